"""Beam search on processes: each running beam is a process that shares its leader's blocks; a round ends when
all have their continuations, then the search chooses and the beams are forked anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmasos.syscalls.types import Finish

from .beams import Step
from .process import Process

if TYPE_CHECKING:
    from .loop import Kernel


def advance(kernel: Kernel, leader: Process) -> None:
    """When every running beam has its continuations, lets the search choose and re-forks the beams."""
    infer = leader.infer
    if infer is None or infer.beams is None:
        return
    running = infer.members or [leader]
    if any(p.pid not in infer.tops for p in running):
        return
    steps = infer.beams.advance([infer.tops[p.pid] for p in running])
    infer.tops = {}
    infer.made += 1
    kernel.quotas.generated(leader.owner, 1, kernel.now())
    infer.first_token = infer.first_token or kernel.now()
    if infer.beams.done:
        kernel.processes.end_infer(leader, Finish.LENGTH)
    else:
        infer.members = _refork(kernel, leader, running, steps)


def _refork(kernel: Kernel, leader: Process, running: list[Process], steps: list[Step]) -> list[Process]:
    """The beams of the next round. A beam's first heir goes on in its place; further heirs are forks."""
    memory = leader.pool.memory
    chosen: list[Process | None] = [None] * len(steps)
    heirs: set[int] = set()
    for index, step in enumerate(steps):
        parent = running[step.parent]
        if parent is not leader and parent.pid not in heirs:
            heirs.add(parent.pid)
            chosen[index] = parent
    spare = [p for p in running if p is not leader and p.pid not in heirs]
    lengths = {p.pid: len(p.tokens) for p in running}
    for index, step in enumerate(steps):
        parent = running[step.parent]
        member = chosen[index]
        if member is None:
            member = spare.pop() if spare else kernel.processes.add_beam(leader, kernel.now())
            memory.release(member.table)
            member.table = memory.fork(parent.table)
            member.tokens = parent.tokens[: lengths[parent.pid]]
            member.computed = parent.computed
            member.mirror.stale = True
            chosen[index] = member
        member.tokens.append(step.token)
    for member in spare:
        kernel.processes.remove_beam(member)
    beams = [member for member in chosen if member is not None]
    for member in beams:
        member.pool.holders.add(member)
        member.pool.queue.touch(member)
    return beams
