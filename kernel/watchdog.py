"""Finds workers that hang, by work done: a step that has not ended long after it should have, or a load.

A process that exists proves nothing. Looks at every device at least each LEAST_S while it has a step; one
whose step is overdue gets SIGABRT, which leaves its stack in the daemon's log, and SIGKILL if that is not
enough. The supervisor starts another, and the poison rule (config.crash_limit) counts it as a death. What a
load should take nobody knows, but its files cannot take longer than a slow disk needs; a model whose loads
hang is not loaded on that device again, whoever asks. Moving KV files has no expected time, so nobody watches
it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from .effects import KillWorker

if TYPE_CHECKING:
    from .devices import Device, Pool
    from .loop import Kernel

LEAST_S = 10.0
FACTOR = 20
UNKNOWN_S = 600.0
"""A first step may compile, and compute a whole prompt on a slow device: nobody knows what it should take."""

LOAD_S = 600.0
LOAD_BYTES_S = 10e6
"""A load may take so long, and as long as reading the files at so many bytes a second: a disk across a slow
network, packing the weights, compiling kernels."""

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
    _end(kernel, device, f"a step has taken {now - device.begun:.0f} s")


def loading(kernel: Kernel, device: Device, pool: Pool) -> None:
    """The device begins to load the pool's model now. It has no steps meanwhile."""
    begun = device.begun = kernel.now()
    allowed = LOAD_S + sum(file.size for file in pool.files.values()) / LOAD_BYTES_S

    def look() -> None:
        if device.loading is pool and device.begun == begun:
            device.hangs[pool.digest] += 1
            _end(kernel, device, f"loading {pool.model} has taken {allowed:.0f} s")

    kernel.at(begun + allowed, look)


def _end(kernel: Kernel, device: Device, why: str) -> None:
    pid = device.worker_pid
    kernel.log.warn(f"{device.name}: worker {pid} hangs, {why}; ending it")
    kernel.effects.append(KillWorker(pid, signal.SIGABRT))

    def insist() -> None:
        if device.worker_pid == pid:
            kernel.effects.append(KillWorker(pid))

    kernel.at(kernel.now() + GRACE_S, insist)
