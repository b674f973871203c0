"""LLMasOS through its public Python client, with a daemon of its own in a home that holds the model.

Settings: `home`, `model`, `dtype`, `set` (the kernel's own). Run by the interpreter of the checkout that is
measured.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from base import Engine, Events, Request, main


class LLMasOS(Engine):
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        os.environ["LLMASOS_HOME"] = settings["home"]
        os.environ.pop("LLMASOS_SOCKET", None)
        if os.path.exists(lock := os.path.join(settings["home"], "run", "lock")):
            with open(lock) as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises when a daemon serves this home
        # The daemon first: its start is part of a cold start, and this side imports while it boots.
        log = open(os.path.join(settings["home"], "bench.log"), "ab")  # noqa: SIM115
        overrides = [word for one in ['devices=["cpu"]', *settings["set"]] for word in ("--set", one)]
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "llmasos.kernel.main", *overrides],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        from llmasos.syscalls import table, types
        from llmasos.syscalls.address import socket_address
        from llmasos.userland.aio import AsyncClient
        from llmasos.userland.daemon import is_listening

        self.table, self.types = table, types
        self.model, self.dtype = settings["model"], settings.get("dtype", "")
        self.loop = asyncio.new_event_loop()
        self.events: asyncio.Queue[tuple[str, list[int], bool]] = asyncio.Queue()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        while not is_listening(socket_address()):
            if self.daemon.poll() is not None:
                raise RuntimeError(
                    f"llmasosd exited with {self.daemon.returncode}, see bench.log in its home"
                )
            time.sleep(0.01)

        async def connect() -> AsyncClient:
            return await AsyncClient().open()

        self.client = self.loop.run_until_complete(connect())
        return {"version": metadata.version("llmasos")} | self._resident()

    def _resident(self) -> dict[str, Any]:
        """Makes the kernel load the model, and says as what."""

        async def ask() -> dict[str, Any]:
            spawned = await self.client.call(self.table.SpawnModel(self.model, dtype=self.dtype))
            devices = (await self.client.call(self.table.Lsdev())).devices
            await self.client.call(self.table.Kill(spawned.pid, self.types.Signal.KILL))
            await self.client.call(self.table.Wait(spawned.pid))
            pool = next(pool for device in devices for pool in device.pools)
            return {"format": pool.dtype, "weights_bytes": pool.weights_bytes}

        return self.loop.run_until_complete(ask())

    def submit(self, requests: list[Request]) -> None:
        if shared := [request for request in requests if request.prefix]:
            task = self.loop.create_task(self._fork(shared))
            self.tasks |= dict.fromkeys([request.key for request in shared], task)
        for request in requests:
            if not request.prefix:
                self.tasks[request.key] = self.loop.create_task(self._stream(request))

    def _call(self, request: Request, pid: int | None = None) -> Any:
        sampling = self.types.Sampling(stop_token_ids=[])
        if pid is not None:
            own = self.types.pack_tokens(request.tokens[request.prefix :])
            return self.table.Infer(pid, tokens=own, max_tokens=request.new, sampling=sampling, exit=True)
        kind = self.types.SchedClass.BATCH if request.background else self.types.SchedClass.INTERACTIVE
        return self.table.Infer(
            model=self.model,
            tokens=self.types.pack_tokens(request.tokens),
            max_tokens=request.new,
            sampling=sampling,
            sched_class=kind,
            dtype=self.dtype,
        )

    async def _stream(self, request: Request, pid: int | None = None) -> None:
        try:
            async with self.client.stream(self._call(request, pid)) as stream:
                async for event in stream:
                    self.events.put_nowait((request.key, event.tokens, False))
            self.events.put_nowait((request.key, [], True))
        except Exception as problem:
            self.events.put_nowait((request.key, [], problem))  # type: ignore[arg-type]

    async def _fork(self, requests: list[Request]) -> None:
        """One process takes the shared prefix in, a fork of it serves each request."""
        head = requests[0].tokens[: requests[0].prefix]
        parent = (await self.client.call(self.table.SpawnModel(self.model, dtype=self.dtype))).pid
        await self.client.call(
            self.table.Infer(parent, tokens=self.types.pack_tokens(head), max_tokens=0), timeout_s=600
        )
        pids = [parent, *(await self.client.call(self.table.Fork(parent, len(requests) - 1))).pids]
        pairs = zip(requests, pids, strict=True)
        await asyncio.gather(*(self._stream(request, pid) for request, pid in pairs))
        for pid in pids:
            await self.client.call(self.table.Wait(pid, 60.0))

    def poll(self, timeout_s: float) -> Events:
        async def wait() -> Events:
            try:
                async with asyncio.timeout(timeout_s):
                    found = [await self.events.get()]
            except TimeoutError:
                return []
            while not self.events.empty():
                found.append(self.events.get_nowait())
            return found

        found = self.loop.run_until_complete(wait())
        for _, _, done in found:
            if isinstance(done, Exception):
                raise done
        return found

    def cancel(self, keys: list[str]) -> None:
        tasks = {self.tasks[key] for key in keys}
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        while not self.events.empty():
            self.events.get_nowait()

    def close(self) -> None:
        self.loop.run_until_complete(self.client.call(self.table.Shutdown(0.0)))
        self.daemon.wait(30)


if __name__ == "__main__":
    main(LLMasOS())
