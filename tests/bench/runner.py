"""The parent's end of a runner: starts it, asks it, watches its memory."""

from __future__ import annotations

import dataclasses
import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from peers import CACHE, HERE, System, environment, interpreter
from systems.base import Request

LOAD_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 600.0
SAMPLE_S = 0.1


class RunnerFailed(RuntimeError):
    """A system could not do what it was asked."""


class Runner:
    """A process of one system. Its printing goes to a log under CACHE/logs."""

    def __init__(self, name: str, system: System, python: str, home: Path, fresh: bool = False) -> None:
        self.name = name
        logs = CACHE / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{name}.log"
        executable = str(interpreter(system.peer)) if system.peer else python
        settings = (
            system.settings
            | ({} if system.peer else {"home": str(own_home(home, name))})
            | (system.cold if fresh else {})
        )
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [executable, str(HERE / "systems" / system.runner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(system),
                cwd=CACHE,
            )
        try:
            reply = self._ask({"op": "load", "settings": settings}, LOAD_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.info: dict[str, Any] = reply["info"]

    def run(
        self, requests: list[Request], stop_after: float | None, watch_memory: bool = False
    ) -> dict[str, Any]:
        message = {
            "op": "run",
            "requests": [dataclasses.asdict(request) for request in requests],
            "stop_after": stop_after,
        }
        with self._watched(watch_memory) as peaks:
            reply = self._ask(message, RUN_TIMEOUT_S)
        return reply | peaks | {"started": self.started}

    def close(self) -> None:
        tree = self._tree()
        try:
            self._ask({"op": "close"}, 60.0)
        except RunnerFailed:
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(tree, timeout=5)
        for process in alive:
            process.kill()

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RunnerFailed(f"{self.name} has ended, see {self.log}") from None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise RunnerFailed(f"{self.name}: no answer in {timeout_s:g} s, see {self.log}")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10)
            raise RunnerFailed(f"{self.name} ended with status {self.process.returncode}, see {self.log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RunnerFailed(f"{self.name}: {reply['error'].strip()}")
        return reply

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @contextmanager
    def _watched(self, wanted: bool) -> Iterator[dict[str, int]]:
        """Collects the peaks of proportional and resident memory of the whole process tree."""
        peaks: dict[str, int] = {}
        if not wanted:
            yield peaks
            return
        peaks |= {"peak_pss": 0, "peak_rss": 0}
        over = threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLE_S):
                pss = rss = 0
                for process in self._tree():
                    one = memory(process.pid)
                    pss, rss = pss + one[0], rss + one[1]
                peaks["peak_pss"] = max(peaks["peak_pss"], pss)
                peaks["peak_rss"] = max(peaks["peak_rss"], rss)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield peaks
        finally:
            over.set()
            sampler.join()


def own_home(home: Path, name: str) -> Path:
    """A home for one daemon that shares the models of `home`: several may run side by side."""
    own = CACHE / "homes" / name
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    models = own / "modelfs"
    models.unlink(missing_ok=True)
    models.symlink_to(home.absolute() / "modelfs")
    return own


def memory(pid: int) -> tuple[int, int]:
    """Proportional and resident set size in bytes; 0 for a process that has gone."""
    found = {"Pss": 0, "Rss": 0}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return found["Pss"], found["Rss"]


def warn(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
