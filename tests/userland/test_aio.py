"""The async client: the same behaviour, cancelled by cancelling the task."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.aio import AsyncClient
from llmasos.userland.client import Client


def infer(n: int) -> table.Infer:
    return table.Infer(model="tiny:latest", tokens=t.pack_tokens(range(n)))


def test_calls_and_streams(kernel: Any) -> None:
    async def main() -> None:
        async with AsyncClient(kernel.address) as client:
            assert (await client.call(table.Whoami())).subject == "me"
            assert client.boot_id == "boot1"
            async with client.stream(infer(300), window=8) as stream:
                tokens = [token async for event in stream for token in event.tokens]
            assert tokens == list(range(300))[::-1]
            assert stream.reply.finish is t.Finish.LENGTH
            with pytest.raises(errors.NoSuchProcess):
                await client.call(table.Kill(99))

    asyncio.run(main())


def test_many_streams_at_once(kernel: Any) -> None:
    async def read(client: AsyncClient, n: int) -> int:
        return sum([len(event.tokens) async for event in client.stream(infer(n), window=8)])

    async def main() -> None:
        async with AsyncClient(kernel.address) as client:
            assert await asyncio.gather(*(read(client, n) for n in range(1, 40))) == list(range(1, 40))

    asyncio.run(main())


def test_cancelling_the_task_cancels_in_the_kernel(kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}

    async def main() -> None:
        async with AsyncClient(kernel.address) as client:
            task = asyncio.create_task(client.call(infer(2)))
            while not kernel.streams:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert kernel.streams == {}
            with pytest.raises(errors.TimedOut):
                await client.call(infer(2), timeout_s=0.1)
            assert kernel.streams == {}

    asyncio.run(main())


def test_it_shares_a_sync_clients_connection(kernel: Any) -> None:
    with Client(kernel.address) as sync:

        async def main() -> None:
            async with AsyncClient(connection=sync.connection) as client:
                await client.call(table.Whoami())

        asyncio.run(main())
        assert sync.call(table.Whoami()).subject == "me"
    assert kernel.names().count("hello") == 1


def test_nobody_there(folder: Any) -> None:
    async def main() -> None:
        with pytest.raises(errors.DaemonUnreachable, match="llmasosd"):
            await AsyncClient(f"ipc://{folder}/none.sock").open()

    asyncio.run(main())
