"""Who follows training runs: each event goes to those who have credits, and the end after the last one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from llmasos.syscalls import errors, table, wire
from llmasos.syscalls.training import TrainEvent

from .process import Process
from .run import Follower, Run
from .sessions import Request

if TYPE_CHECKING:
    from .loop import Kernel


def follow(kernel: Kernel, process: Process, request: Request, after: int, credits_: int) -> None:
    """Streams the events of a run. Raises InvalidArgument."""
    run = process.run
    if run is None:
        raise errors.InvalidArgument(f"process {process.pid} does not train", field="pid")
    follower = Follower(request, after, credits_)
    run.followers.append(follower)

    def cancel() -> None:
        if follower in run.followers:
            run.followers.remove(follower)
            kernel.sessions.reply(request, table.Done())

    def credit(n: int) -> None:
        follower.credits = min(follower.credits + n, wire.MAX_CREDITS)
        serve(kernel, process, run, follower)

    kernel.sessions.on_cancel(request, cancel)
    kernel.sessions.on_credit(request, credit)
    serve(kernel, process, run, follower)


def serve(kernel: Kernel, process: Process, run: Run, follower: Follower) -> None:
    """Sends what a follower has room for; the final answer follows the last event."""
    if follower not in run.followers:
        return
    known = run.dropped + len(run.events)
    follower.next = min(max(follower.next, run.dropped), known)
    first = follower.next - run.dropped
    for event in itertools.islice(run.events, first, first + follower.credits):
        kernel.sessions.item(follower.request, follower.seq, event)
        follower.seq += 1
        follower.credits -= 1
        follower.next += 1
    over = process.exit is not None or process not in process.pool.processes
    if over and follower.next == known:
        run.followers.remove(follower)
        if run.problem is not None:
            kernel.sessions.fail(follower.request, run.problem)
        else:
            kernel.sessions.reply(follower.request, table.Done())


def tell(kernel: Kernel, process: Process, run: Run, event: TrainEvent) -> None:
    run.remember(event)
    for follower in list(run.followers):
        serve(kernel, process, run, follower)
