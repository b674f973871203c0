"""How a step is divided among those who run next (runqueue.py). Pure functions; the clock is passed in.

There is no prefill and no decode phase: a step has a token budget, every runnable process that lacks one
token gets it, and what is left goes in order to those that lack more. Two rules keep people from waiting:
beside somebody who generates, prompts of his class and weaker ones come in chunks; and a prompt never shares
its steps with work of a weaker class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from llmasos.syscalls.types import BLOCK_TOKENS
from msgspec import Struct

from .pace import PASS_ROWS
from .process import CLASS_RANK, Process

NICE_STEP = 1.25
"""A nice step is a factor of so much, as in Linux's CFS."""

MOST_REFUSALS = 64
"""A plan looks no further when so many of those that came next could not be served."""


class Share(Struct, frozen=True):  # a dataclass takes five times as long to make
    """`count` tokens of the next step that `process` wants, or gets."""

    process: Process
    count: int


def plan(
    first: list[Share],
    more: Iterable[Share],
    most: int,
    step_tokens: int,
    chunk_tokens: int,
    reserve: Callable[[Process, int], bool],
) -> list[Share]:
    """Divides a step of at most `step_tokens` tokens among the first `most` that it can serve, of `first`,
    those whose turn it is, and `more`, who follow: all with what they lack.

    `reserve` makes room for so many more tokens of a process, or says that it cannot run now; then the
    process gets nothing and its tokens go to others. Those that lack one token (they are generating) are all
    served; the rest of the budget is handed out in order. Of it, prompts get at most `chunk_tokens` while
    somebody of their class or a stronger one generates. `step_tokens` is no less than `most`.
    """
    generating = [_class_rank(want.process) for want in first if want.count == 1]
    heard = min(generating, default=len(CLASS_RANK))
    kept = len(generating)  # tokens of the step that are kept for them
    budget = step_tokens - kept
    prompts, strongest = 0, len(CLASS_RANK)  # tokens of prompts in the step, and the best class of them
    shares: list[Share] = []
    waiting = itertools.chain(first, more)
    refusals = 0
    while len(shares) < most and refusals < MOST_REFUSALS + len(first) and kept + budget > 0:
        want = next(waiting, None)
        if want is None:
            break
        process, lacking, rank = want.process, want.count, _class_rank(want.process)
        if lacking == 1:
            count = 1
        else:
            count = _chunk(process, lacking, min(budget, chunk_tokens - prompts) if heard <= rank else budget)
        if rank > strongest or count <= 0 or not reserve(process, count):
            refusals += 1
            continue
        shares.append(want if count == lacking else Share(process, count))
        if lacking == 1:
            kept, budget = (kept - 1, budget) if kept else (kept, budget - 1)
            continue
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


def charge(process: Process, seconds: float, now: float) -> None:
    """Books `seconds` of the device for a process, or the search that it is a beam of, and for its tenant."""
    head = process.beam_of or process
    head.vruntime += seconds * NICE_STEP**head.nice
    process.pool.queue.shares.charge(_class_rank(head), head.tenant, seconds, now)
