"""Who answers `migrate`: a process leaves one device and goes on at another, while its client keeps reading.

It is taken out of planning, waits until no step has it, and has its KV written by the old device's worker.
Then it belongs to the new device's pool, as a swapped process whose file is not complete yet. If the KV
cannot be taken along it is computed anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmasos.syscalls import errors, table

from . import adapters, residency, snapshots, swapping
from .devices import Pool
from .process import Process
from .sessions import Request

if TYPE_CHECKING:
    from .loop import Kernel


def migrate(kernel: Kernel, process: Process, request: Request, device_name: str) -> None:
    """Answers when the process belongs to the device and its KV is there or given up."""
    snapshots.must_be_single(process)
    if process.moving:
        raise errors.ProcessBusy(f"process {process.pid} is moving already", hint="wait for that")
    old = process.pool
    if residency.device_for(kernel, device_name).name == old.device_name:
        kernel.sessions.reply(request, table.MigrateReply(process.pid, device_name, process.computed))
        return
    manifest = kernel.store.resolve(process.model)
    if manifest.digest != process.digest:
        raise errors.NoSuchModel(f"{process.model} is not the model any more that process {process.pid} runs")
    new, adapter = residency.place(kernel, manifest, device_name, old.dtype)

    def ready(error: errors.LLMasOSError | None) -> None:
        try:
            if error is not None:
                raise error
            if process not in old.processes or process.exit is not None:
                raise errors.ProcessEnded(f"process {process.pid} has ended")
            snapshots.must_be_single(process)
            kernel.admit(
                new, process.owner, len(process.tokens), process.infer.limit if process.infer else 0, 0
            )
        except errors.LLMasOSError as refusal:
            kernel.sessions.fail(request, refusal)
            return
        process.moving = True
        kernel.departures.append((process, lambda: _depart(kernel, process, new, adapter, request)))

    def cancel() -> None:
        adapters.forgo(new, adapter, ready)
        kernel.sessions.fail(request, errors.Unavailable("cancelled"))

    kernel.sessions.on_cancel(request, cancel)
    adapters.when_ready(kernel, new, adapter, ready)


def depart(kernel: Kernel) -> None:
    """Lets go who was waiting for a step to land."""
    waiting, kernel.departures = kernel.departures, []
    for process, go in waiting:
        if process.flights and process.exit is None:
            kernel.departures.append((process, go))
        else:
            go()


def _depart(
    kernel: Kernel, process: Process, new: Pool, adapter: adapters.Adapter | None, request: Request
) -> None:
    old = process.pool
    process.moving = False
    if process not in old.processes or process.exit is not None:
        kernel.sessions.fail(request, errors.ProcessEnded(f"process {process.pid} has ended"))
        return

    def arrived(error: errors.LLMasOSError | None) -> None:
        why = f"its KV was lost on the way: {error.message}" if error else ""
        reply = table.MigrateReply(process.pid, new.device_name, process.computed, why)
        kernel.sessions.reply(request, reply)

    why = snapshots.differs(snapshots.layout_of(old), snapshots.layout_of(new))
    file = process.swap
    saving = file is None and not why and process.computed > 0
    if saving and (file := swapping.save(kernel, process, arrived)) is not None:
        file.foreign = True
    elif saving:
        why = "there is no room for its KV in swap"
    old.memory.release(process.table)
    old.close(process)
    old.processes.discard(process)
    old.holders.discard(process)
    old.forsake(process)
    process.pool, process.adapter, process.table = new, adapter, process.table.empty()
    new.processes.add(process)
    kernel.ledger.process(process)
    process.swap = file
    if why:
        process.lose()
    new.queue.touch(process)
    if not (saving and process.swap):
        reply = table.MigrateReply(process.pid, new.device_name, process.computed, why)
        kernel.sessions.reply(request, reply)
