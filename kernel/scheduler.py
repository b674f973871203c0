"""Who runs next, and for how many tokens. Pure functions over processes; the clock is passed in.

There is no prefill and no decode phase: a step has a token budget, every runnable process that lacks one
token gets it, and what is left goes in order to those that lack more. Order: whoever starved goes first,
then the class, then the least weighted service (virtual runtime; a nice step is a factor 1.25, as in
Linux's CFS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .process import CLASSES, Process

NICE_STEP = 1.25


@dataclass(frozen=True, slots=True)
class Share:
    """`count` tokens of the next step for `process`."""

    process: Process
    count: int


def order(processes: Iterable[Process], now: float, aging_s: float) -> list[Process]:
    """The runnable ones of `processes`, first to run first."""

    def key(p: Process) -> tuple[bool, int, float, int]:
        booked = p.beam_of or p  # beams are served on their leader's account
        starved = now - booked.last_run >= aging_s
        rank = 0 if starved else CLASSES.index(booked.sched_class)
        return (not starved, rank, booked.vruntime, p.pid)

    return sorted((p for p in processes if p.runnable), key=key)


def plan(queue: list[Process], step_tokens: int, reserve: Callable[[Process, int], bool]) -> list[Share]:
    """Divides a step of at most `step_tokens` tokens among `queue`, which is no longer than that.

    `reserve` makes room for so many more tokens of a process, or says that there is none; then the process
    gets nothing and its tokens go to others. Those that lack one token (they are generating) are all
    served; the rest of the budget is handed out in order.
    """
    generating = {p.pid for p in queue if p.goal - p.computed == 1}
    budget = step_tokens - len(generating)
    shares = []
    for process in queue:
        if process.pid in generating:
            budget += 1
        count = min(process.goal - process.computed, budget if process.pid not in generating else 1)
        if count > 0 and reserve(process, count):
            budget -= count
            shares.append(Share(process, count))
    return shares


def charge(process: Process, tokens: int, now: float) -> None:
    """Books `tokens` of service."""
    process.vruntime += tokens * NICE_STEP**process.nice
    process.last_run = now


def enter(process: Process, others: Iterable[Process], now: float) -> None:
    """Puts a process that becomes runnable on a par with the least served of its class, so that having
    waited is no credit and being new is no handicap."""
    peers = [
        o.vruntime for o in others if o.runnable and o.sched_class is process.sched_class and o is not process
    ]
    if peers:
        process.vruntime = max(process.vruntime, min(peers))
    process.last_run = now


def victim(holders: Iterable[Process], claimant: Process, planned: set[int]) -> Process | None:
    """Whose blocks `claimant` may take: of those that hold blocks, are not in the step being planned and
    rank below it or wait for somebody, first the waiting ones, then the lowest rank. None: nobody."""

    def waits(p: Process) -> bool:
        return p.infer is None or (p.beam_of or p).stopped or p.infer.blocked

    def weakness(p: Process) -> tuple[bool, tuple[int, int, int, int]]:
        return (waits(p), p.rank())

    candidates = [
        p
        for p in holders
        if p.table.blocks
        and p.pid not in planned
        and not p.running
        and p is not claimant
        and (waits(p) or p.rank() > claimant.rank() or _waits_for(p, claimant))
    ]
    return max(candidates, key=weakness, default=None)


def _waits_for(beam: Process, claimant: Process) -> bool:
    """Whether `beam` has done its part of a round that `claimant`, of the same search, still works on."""
    same = beam.beam_of is not None and beam.beam_of is claimant.beam_of
    return same and beam.infer is not None and beam.pid in beam.infer.tops
