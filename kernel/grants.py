"""When a training run computes: it has its device's grant as long as nobody else is to go first.

A trainer that is called in stops within a layer, at the lowest priority of the operating system, so steps are
sent at once and need not wait for it. What it computed is charged as steps are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmasos.drivers import base

from . import scheduler
from .devices import Device
from .effects import ToWorker
from .process import CLASS_RANK, Process
from .run import Run

if TYPE_CHECKING:
    from .loop import Kernel

LOOK_S = 0.1
"""So often what a run computes is charged, and somebody of its own class may go first."""

FROZEN_S = 120.0
"""A trainer that was called in has stopped by then, however little of the processors is left to it."""


def grant(kernel: Kernel, device: Device) -> None:
    """Lets the run whose turn it is compute."""
    aging_s = kernel.config.aging_s
    head = device.runs.head(aging_s)
    process = next(device.runs.take(aging_s, lambda _: 0.0), None)
    run = process.run if process else None
    if process is not None and run is not None and run.connection is not None:
        run.grant, run.called_in = next(kernel.numbers), False
        run.aged = head is not None and not head[0]
        run.granted_at = run.charged_at = kernel.now()
        process.flights, device.granted = 1, process
        kernel.effects.append(ToWorker(run.connection, base.Grant(run.grant)))
        _look_again(kernel, run, kernel.now() + LOOK_S)
    device.runs.settle()


def yields(kernel: Kernel, device: Device) -> bool:
    """Whether steps may be sent: nobody computes by a grant, or who does is called in now, because it is
    somebody else's turn."""
    process = device.granted
    if process is None or process.run is None:
        return True
    run, now = process.run, kernel.now()
    if run.called_in:
        if now >= run.called_at + FROZEN_S and run.program is not None:
            kernel.log.warn(f"process {process.pid}: its trainer does not stop computing and is killed")
            kernel.programs.stop(run.program)
        return True
    if process.exit is not None or process.stopped or run.leaving or _is_wanted(kernel, device, process, run):
        run.called_in, run.called_at = True, now
        kernel.at(now + FROZEN_S, lambda: None)
        if run.connection is not None:
            kernel.effects.append(ToWorker(run.connection, base.CallIn(run.grant)))
        return True
    if now - run.charged_at >= LOOK_S:
        _charge(kernel, process, run)
    _look_again(kernel, run, run.charged_at + LOOK_S)
    return False


def _is_wanted(kernel: Kernel, device: Device, process: Process, run: Run) -> bool:
    """Whether the device is to do something else first: at once for a stronger class, after a step's time for
    who else is to go first."""
    if any(not pool.ready and (pool.awaited or pool.processes) for pool in device.pools):
        return True
    queues = [device.runs, *(pool.queue for pool in device.pools if pool.ready)]
    heads = [head for queue in queues if len(queue) and (head := queue.head(kernel.config.aging_s))]
    if not heads:
        return False
    first, rank = min(heads), CLASS_RANK[process.sched_class]
    held = kernel.now() - run.granted_at >= kernel.config.step_ms / 1000
    if first[1] < rank:
        return held or not run.aged
    if not held:
        _look_again(kernel, run, run.granted_at + kernel.config.step_ms / 1000)
        return False
    _charge(kernel, process, run)
    counter = device.shares.counter(rank, process.tenant)
    return first < (True, rank, counter, process.pid)


def _look_again(kernel: Kernel, run: Run, when: float) -> None:
    if run.look_at <= kernel.now() or when < run.look_at:
        run.look_at = when
        kernel.at(when, lambda: None)


def _charge(kernel: Kernel, process: Process, run: Run) -> None:
    now = kernel.now()
    scheduler.charge(process, now - run.charged_at, now)
    process.pool.queue.shares.chosen(CLASS_RANK[process.sched_class], process.tenant)
    run.charged_at = now


def landed(kernel: Kernel, process: Process, run: Run) -> None:
    _charge(kernel, process, run)
    run.grant, process.flights = 0, 0
    device = kernel.devices[process.pool.device_name]
    device.granted = None
    process.pool.queue.touch(process)
