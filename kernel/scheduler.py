"""Who runs next, and for how many tokens. Pure functions over processes; the clock is passed in.

There is no prefill and no decode phase: a step has a token budget, every runnable process that lacks one
token gets it, and what is left goes in order to those that lack more. Order: whoever starved goes first,
then the class, then the least weighted service (virtual runtime; a nice step is a factor 1.25, as in
Linux's CFS). Two rules keep people from waiting: beside somebody who generates, prompts of his class and
weaker ones come in chunks; and a prompt never shares its steps with work of a weaker class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmasos.syscalls.types import BLOCK_TOKENS

from .process import CLASS_RANK, Process

NICE_STEP = 1.25

PASS_ROWS = 16
"""One pass over the weights serves about so many rows in the time of one: up to here rows are cheap."""


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
        rank = 0 if starved else CLASS_RANK[booked.sched_class]
        return (not starved, rank, booked.vruntime, p.pid)

    return sorted((p for p in processes if p.runnable), key=key)


def plan(
    queue: list[Process],
    most: int,
    step_tokens: int,
    chunk_tokens: int,
    reserve: Callable[[Process, int], bool],
) -> list[Share]:
    """Divides a step of at most `step_tokens` tokens among the first `most` of `queue` that it can serve.

    `reserve` makes room for so many more tokens of a process, or says that it cannot run now; then the
    process gets nothing and its tokens go to others. Those that lack one token (they are generating) are all
    served; the rest of the budget is handed out in order. Of it, prompts get at most `chunk_tokens` while
    somebody of their class or a stronger one generates. `step_tokens` is no less than `most`.
    """
    generating = [_class_rank(p) for p in queue[:most] if p.lacking == 1]
    heard = min(generating, default=len(CLASS_RANK))
    kept = len(generating)  # tokens of the step that are kept for them
    budget = step_tokens - kept
    prompts, strongest = 0, len(CLASS_RANK)  # tokens of prompts in the step, and the best class of them
    shares: list[Share] = []
    for process in queue:
        if len(shares) == most:
            break
        lacking, rank = process.lacking, _class_rank(process)
        if rank > strongest:
            continue
        if lacking == 1:
            if kept + budget > 0 and reserve(process, 1):
                shares.append(Share(process, 1))
                kept, budget = (kept - 1, budget) if kept else (kept, budget - 1)
            continue
        count = min(budget, chunk_tokens - prompts) if heard <= rank else budget
        count = _chunk(process, lacking, count)
        if count > 0 and reserve(process, count):
            shares.append(Share(process, count))
            budget -= count
            prompts += count
            if lacking > PASS_ROWS:
                strongest = min(strongest, rank)
    return shares


def _class_rank(process: Process) -> int:
    return CLASS_RANK[(process.beam_of or process).sched_class]


def _chunk(process: Process, lacking: int, most: int) -> int:
    """How much of a prompt to compute: all, or up to the end of a block, so that others may share it."""
    if lacking <= most:
        return lacking
    start = process.computed + process.ahead
    whole = (start + most) // BLOCK_TOKENS * BLOCK_TOKENS - start
    return whole if whole > 0 else most


def charge(process: Process, tokens: int, now: float) -> None:
    """Books `tokens` of service."""
    process.vruntime += tokens * NICE_STEP**process.nice
    process.last_run = now


def enter(process: Process, others: Iterable[Process], now: float) -> None:
    """Puts a process that becomes runnable on a par with the least served of its class, so that having
    waited is no credit and being new is no handicap."""
    peers = [
        o.vruntime
        for o in others
        if o.sched_class is process.sched_class and o is not process and (o.flights or o.runnable)
    ]
    if peers:
        process.vruntime = max(process.vruntime, min(peers))
    process.last_run = now


def victim(
    holders: Iterable[Process], claimant: Process, planned: set[int], flying: bool = False
) -> Process | None:
    """Whose blocks `claimant` may take: of those that hold blocks, are not in the step being planned and
    rank below it or wait for somebody, first the waiting ones, then the lowest rank. None: nobody.
    `flying`: of those that are in flight instead, whose blocks may not be taken before they have landed."""

    def waits(p: Process) -> bool:
        return p.infer is None or (p.beam_of or p).stopped or p.infer.blocked

    def weakness(p: Process) -> tuple[bool, tuple[int, int, int, int]]:
        return (waits(p), p.rank())

    candidates = [
        p
        for p in holders
        if p.table.blocks
        and p.pid not in planned
        and bool(p.flights) == flying
        and p is not claimant
        and (waits(p) or p.rank() > claimant.rank() or _waits_for(p, claimant))
    ]
    return max(candidates, key=weakness, default=None)


def _waits_for(beam: Process, claimant: Process) -> bool:
    """Whether `beam` has done its part of a round that `claimant`, of the same search, still works on."""
    same = beam.beam_of is not None and beam.beam_of is claimant.beam_of
    return same and beam.infer is not None and beam.pid in beam.infer.tops
