"""Flows over asyncio: whenever the task is cancelled, the flow hears of what was made, and cleans it up."""

from __future__ import annotations

import asyncio

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.flow import Do, Flow, Run, adrive, reap


class Kernel:
    """Answers a call after some turns of the loop; `left` are the processes that nobody has reaped."""

    def __init__(self) -> None:
        self.left: set[int] = set()
        self.made = 0
        self.begun = 0

    async def call(self, call: table.Call) -> object:
        self.begun += 1
        if isinstance(call, table.SpawnModel):
            self.made += 1
            self.left.add(self.made)
            await asyncio.sleep(0)
            return table.SpawnReply(self.made, "m", "", "null", 8)
        await asyncio.sleep(0)
        if isinstance(call, table.Wait):
            self.left.remove(call.pid)
            return table.WaitReply(call.pid, 0, "", 0)
        if isinstance(call, table.Kill) and call.pid == 2:
            raise errors.ProcessEnded("it had ended")
        return table.Done()

    def stream(self, call: table.Infer):
        raise AssertionError("nothing is streamed here")


def work() -> Flow[str]:
    pids: list[int] = []
    try:
        for _ in range(3):
            pids.append((yield Do(table.SpawnModel("m"))).pid)
        yield Run([], [])
        yield Do(table.Kill(1, t.Signal.STOP))
    finally:
        yield from reap(pids)
    return "done"


async def cancelled_after(turns: int, again: int | None = None) -> Kernel:
    kernel = Kernel()
    task = asyncio.ensure_future(adrive(kernel, work()))  # type: ignore[arg-type]
    for _ in range(turns):
        await asyncio.sleep(0)
    if task.done():
        assert task.result() == "done"
        return kernel
    task.cancel()
    for _ in range(again or 0):
        await asyncio.sleep(0)
    if again is not None:
        task.cancel()
    if turns:  # else it never began
        with pytest.raises(asyncio.CancelledError):
            await task
    return kernel


@pytest.mark.parametrize("again", [None, 1, 4])
def test_whenever_it_is_cancelled_nothing_is_left(again: int | None) -> None:
    for turns in range(80):  # before its first step, at every one of them, and after its last
        assert not asyncio.run(cancelled_after(turns, again)).left, turns


@pytest.mark.parametrize("problem", [errors.DaemonUnreachable("gone"), errors.PermissionDenied("no")])
def test_what_could_not_be_killed_is_not_waited_for(problem: errors.LLMasOSError) -> None:
    flow = reap([1, 2])
    assert next(flow) == Do(table.Kill(1, t.Signal.KILL))
    if isinstance(problem, errors.Unavailable):
        with pytest.raises(StopIteration):
            flow.throw(problem)
    else:
        assert flow.throw(problem) == Do(table.Kill(2, t.Signal.KILL))


def test_an_encode_is_cut_off_at_once() -> None:
    async def never(call: table.Call) -> None:
        await asyncio.Event().wait()

    async def cut() -> None:
        kernel = Kernel()
        kernel.call = never  # type: ignore[method-assign, assignment]

        def flow() -> Flow[None]:
            yield Do(table.Encode("m"))

        task = asyncio.ensure_future(adrive(kernel, flow()))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(cut(), 5))
