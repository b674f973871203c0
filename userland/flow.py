"""Sequences of syscalls written once and run by the sync and the async client alike.

A flow is a generator: it yields steps, is sent their answers, and returns a result. An error of a step is
thrown into it, so a flow cleans up with try/except and further steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .aio import AsyncClient
from .client import Client

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Do:
    """Make one syscall; the answer is its reply."""

    call: table.Call


class Reader(Protocol):
    """Who takes what a stream brings: an Answer, for one. The stream is cancelled once it has `stopped`."""

    @property
    def stopped(self) -> bool: ...

    def feed(self, event: t.InferEvent, /) -> object: ...

    def flush(self, finish: t.Finish, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Run:
    """Run several `infer`s at once, each feeding its reader; the answer is their replies."""

    calls: Sequence[table.Infer]
    answers: Sequence[Reader]


Flow = Generator[Do | Run, Any, Result]


def reap(pids: Sequence[int]) -> Flow[None]:
    """Kills and reaps processes, whatever state they are in. Only what was killed is waited for: nothing else
    is sure to end."""
    for pid in pids:
        try:
            yield Do(table.Kill(pid, t.Signal.KILL))
        except errors.ProcessEnded:
            pass  # a zombie, still to be reaped
        except errors.Unavailable:
            return  # no kernel is there; the rest goes with the session
        except errors.LLMasOSError:
            continue  # it has ended, or the session did and took it along
        try:
            yield Do(table.Wait(pid))
        except errors.LLMasOSError:
            pass


def drive(client: Client, flow: Flow[Result]) -> Result:
    """Runs a flow to its end. Ctrl-C cancels the running step in the kernel and lets the flow clean up."""
    try:
        step = next(flow)
        while True:
            try:
                answer = client.call(cast(Any, step.call)) if isinstance(step, Do) else _run(client, step)
            except BaseException as problem:
                step = flow.throw(problem)
            else:
                step = flow.send(answer)
    except StopIteration as end:
        return cast(Result, end.value)


async def adrive(client: AsyncClient, flow: Flow[Result]) -> Result:
    """`drive` for asyncio; a cancelled task cancels in the kernel too. That waits for the answer of a brief
    call: what it has made the flow must hear of, or nobody cleans it up."""
    cancelled: asyncio.CancelledError | None = None
    try:
        step = next(flow)
        while True:
            try:
                if isinstance(step, Do) and not isinstance(step.call, table.Encode):
                    task = asyncio.ensure_future(client.call(cast(Any, step.call)))
                    while not task.done():
                        try:
                            await asyncio.wait((task,))
                        except asyncio.CancelledError as cut:
                            cancelled = cut
                    answer = task.result()
                elif cancelled is not None:
                    late, cancelled = cancelled, None
                    raise late
                elif isinstance(step, Do):
                    answer = await client.call(cast(Any, step.call))
                else:
                    answer = await _arun(client, step)
            except BaseException as problem:
                step = flow.throw(problem)
            else:
                step = flow.send(answer)
    except StopIteration as end:
        if cancelled is not None:
            raise cancelled from None
        return cast(Result, end.value)


def _run(client: Client, step: Run) -> list[table.InferReply]:
    streams = client.gather(step.calls)
    for index, event in streams:
        answer = step.answers[index]
        answer.feed(event)
        if answer.stopped:
            streams.cancel(index)
    replies = cast(list[table.InferReply], streams.replies)
    for answer, reply in zip(step.answers, replies, strict=True):
        answer.flush(reply.finish)
    return replies


async def _arun(client: AsyncClient, step: Run) -> list[table.InferReply]:
    tasks = [
        asyncio.create_task(_feed(client, call, answer))
        for call, answer in zip(step.calls, step.answers, strict=True)
    ]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _feed(client: AsyncClient, call: table.Infer, answer: Reader) -> table.InferReply:
    async with client.stream(call) as stream:
        async for event in stream:
            answer.feed(event)
            if answer.stopped:
                stream.cancel()
    answer.flush(stream.reply.finish)
    return stream.reply
