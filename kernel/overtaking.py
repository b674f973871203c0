"""Lets newcomers (newcomers.py) go before the step that runs, where the device can interrupt it: within a
layer instead of a step. A step that is of newcomers alone, or has been kept from running for as long as it
takes, is left alone: it ends, however many arrive.

What keeps it safe: only the step that runs is overtaken, never one that waits behind it, for that may close
or copy what the other needs; nor orders about KV files that wait. The step that overtakes writes to blocks
that the other neither reads nor writes: everybody in that must still stand there, for blocks are given away
when somebody ends, and nobody is pushed out.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from . import newcomers, planning
from .devices import Device
from .pace import PASS_ROWS

if TYPE_CHECKING:
    from .loop import Kernel


def advance(kernel: Kernel, device: Device) -> None:
    """Sends a step that overtakes, if somebody may."""
    if not _interruptible(device):
        return
    (running,) = device.flights
    pool = planning.next_pool(kernel, device)
    if pool is None or pool.loaded is None or pool.loaded.encodes:
        return
    if not newcomers.gain(pool, running, (running.left or 0.0) - (kernel.now() - device.begun)):
        return
    taken = pool.queue.take(kernel.config.aging_s, lambda process: planning.estimate(pool, process))
    try:
        first = list(filter(newcomers.before(pool, running), itertools.islice(taken, PASS_ROWS)))
        if first:
            planning.divide(kernel, device, pool, iter(first), apart=True, overtakes=True)
    finally:
        pool.queue.settle()


def _interruptible(device: Device) -> bool:
    """Whether the step that runs may be interrupted."""
    if len(device.flights) != 1 or device.orders:
        return False
    (running,) = device.flights
    expected, loaded = running.expected(), running.pool.loaded
    if expected is None or running.lost >= expected or running.apart:
        return False
    return loaded is not None and loaded.interruptible and running.stands()
