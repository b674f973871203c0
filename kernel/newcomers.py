"""Who waits for a first token, and so goes before others: before the step that runs (overtaking.py), or
before those who would be in the next one (planning.py).

It is for those of a stronger class than everybody before whom they go, or of the same class and a tenant who
is not among them and has not had more than his share and a little. Whose first token is there waits for the
next step as others do.
"""

from __future__ import annotations

from collections.abc import Callable

from .devices import Flight, Pool
from .process import CLASS_RANK, Process

BURST_S = 0.2
"""A tenant may have had so much more of the device than those of his class before whom he goes: a prompt or
a few. What he has had counts, so in the long run nobody gets more than his share."""


def before(pool: Pool, flight: Flight) -> Callable[[Process], bool]:
    """Tells of a process whether it goes before everybody in a flight."""
    others = {_rank_and_tenant(part.process) for part in flight.parts}
    counter = pool.queue.shares.counter

    def goes_first(process: Process) -> bool:
        infer = process.infer
        if infer is None or infer.first_token is not None or infer.beams or process.flights or process.swap:
            return False
        rank, tenant = _rank_and_tenant(process)
        had = counter(rank, tenant)
        return all(
            rank < other_rank
            or (rank == other_rank and tenant != other and had <= counter(rank, other) + BURST_S)
            for other_rank, other in others
        )

    return goes_first


def gain(pool: Pool, flight: Flight, left_s: float = 0.0) -> bool:
    """Whether who goes first in a step of his own gains more than that costs, which is one more reading of
    the weights: the `left_s` seconds of a step that runs, and the rows of a flight, which would else be in
    his."""
    return left_s + pool.pace.row * flight.rows >= pool.pace.fixed


def _rank_and_tenant(process: Process) -> tuple[int, str]:
    head = process.beam_of or process
    return CLASS_RANK[head.sched_class], head.tenant
