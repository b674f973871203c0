"""Lets who waits for a first token go before the step that runs, where the device can interrupt it: within a
layer instead of a step.

It is for those of a stronger class than everybody in flight, or of the same class and a tenant who has nobody
there and has not had more than his share and a little. Whose first token is there waits for the next step as
others do. A step that has been kept from running for as long as it takes is left alone: it ends, however many
arrive.

What keeps it safe: only the step that runs is overtaken, never one that waits behind it, for that may close
or copy what the other needs; nor orders about KV files that wait. The step that overtakes writes to blocks
that the other neither reads nor writes: everybody in that must still stand there, for blocks are given away
when somebody ends, and nobody is pushed out.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from . import planning
from .devices import Device, Pool
from .pace import PASS_ROWS
from .process import CLASS_RANK, Process
from .shares import tenant_of

if TYPE_CHECKING:
    from .loop import Kernel


BURST_S = 0.2
"""A tenant may have had so much more of the device than those of his class whom he overtakes: a prompt or a
few. What he has had counts, so in the long run nobody gets more than his share."""


def advance(kernel: Kernel, device: Device) -> None:
    """Sends a step that overtakes, if somebody may."""
    if not _interruptible(device):
        return
    pool = planning.next_pool(kernel, device)
    if pool is None or pool.loaded is None or pool.loaded.encodes or not _worth(kernel, device, pool):
        return
    ahead = {_rank_and_tenant(part.process) for part in device.flights[0].parts}
    taken = pool.queue.take(kernel.config.aging_s, lambda process: planning.estimate(pool, process))
    try:
        first = [p for p in itertools.islice(taken, PASS_ROWS) if _goes_first(pool, p, ahead)]
        if first:
            planning.divide(kernel, device, pool, iter(first), overtakes=True)
    finally:
        pool.queue.settle()


def _interruptible(device: Device) -> bool:
    """Whether the step that runs may be interrupted."""
    if len(device.flights) != 1 or device.orders:
        return False
    (running,) = device.flights
    expected, loaded = running.expected(), running.pool.loaded
    if expected is None or running.lost >= expected or running.overtakes:
        return False
    return loaded is not None and loaded.interruptible and running.stands()


def _worth(kernel: Kernel, device: Device, pool: Pool) -> bool:
    """Whether a newcomer gains more than it costs, which is one more reading of the weights: what is left of
    the step that runs, and the rows that would be in the next one beside it."""
    (running,) = device.flights
    left = (running.left or 0.0) - (kernel.now() - device.begun)
    return left + pool.pace.row * running.rows >= pool.pace.fixed


def _goes_first(pool: Pool, process: Process, ahead: set[tuple[int, str]]) -> bool:
    """Whether a process waits for its first token and goes before everybody who is `ahead`."""
    infer = process.infer
    if infer is None or infer.first_token is not None or infer.beams or process.flights or process.swap:
        return False
    rank, tenant = _rank_and_tenant(process)
    counter = pool.queue.shares.counter
    had = counter(rank, tenant)

    def before(other_rank: int, other: str) -> bool:
        if rank != other_rank:
            return rank < other_rank
        return tenant != other and had <= counter(rank, other) + BURST_S

    return all(itertools.starmap(before, ahead))


def _rank_and_tenant(process: Process) -> tuple[int, str]:
    head = process.beam_of or process
    return CLASS_RANK[head.sched_class], tenant_of(head.owner)
