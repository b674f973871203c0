"""Finds workers that hang, by work done: a step that has not ended long after it should have.

A process that exists proves nothing. Looks at every device at least each LEAST_S while it has a step; one
whose step is overdue gets SIGABRT, which leaves its stack in the daemon's log, and SIGKILL if that is not
enough. The supervisor starts another, and the poison rule (config.crash_limit) counts it as a death. Loading
a model and moving KV files have no expected time, so nobody watches them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from .effects import KillWorker

if TYPE_CHECKING:
    from .devices import Device
    from .loop import Kernel

LEAST_S = 10.0
FACTOR = 20
UNKNOWN_S = 600.0
"""A first step may compile, and compute a whole prompt on a slow device: nobody knows what it should take."""

GRACE_S = 2.0


def begun(kernel: Kernel, device: Device) -> None:
    """The first of the device's steps begins now."""
    device.begun = kernel.now()
    if not device.watched:
        device.watched = True
        kernel.at(kernel.now() + LEAST_S, lambda: _look(kernel, device))


def _look(kernel: Kernel, device: Device) -> None:
    device.watched = False
    if not device.flights:
        return
    flight, now = device.flights[0], kernel.now()
    expected = flight.expected()
    allowed = UNKNOWN_S if expected is None else max(LEAST_S, FACTOR * expected)
    overdue = now - device.begun - allowed
    if overdue < 0:
        device.watched = True
        kernel.at(now + min(LEAST_S, -overdue), lambda: _look(kernel, device))
        return
    pid = device.worker_pid
    kernel.log.warn(
        f"{device.name}: worker {pid} hangs, a step has taken {now - device.begun:.0f} s; ending it"
    )
    kernel.effects.append(KillWorker(pid, signal.SIGABRT))

    def insist() -> None:
        if device.worker_pid == pid:
            kernel.effects.append(KillWorker(pid))

    kernel.at(now + GRACE_S, insist)
