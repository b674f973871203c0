"""Who answers `snapshot` and `restore`: a process becomes a file of the model filesystem, and a process
again.

The KV of positions that are computed never changes, so a process may run while it is saved: what counts is
what was booked when the call came. Its KV is written by the device's worker, then the record is committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmasos.drivers import base
from llmasos.syscalls import errors, table
from llmasos.syscalls.types import Sampling, pack_tokens, unpack_tokens
from msgspec.structs import replace

from . import adapters, residency, swapping, training
from .devices import Pool, Saving
from .files import room_on_disk
from .memory import blocks_for
from .modelfs import session_files
from .modelfs.session_files import Kv, Layout, Snapshot
from .process import Process
from .sessions import Request, Session
from .tenants import Subject
from .tiers import KvFile, file_size

if TYPE_CHECKING:
    from .loop import Kernel


def snapshot(kernel: Kernel, subject: Subject, request: Request, call: table.Snapshot) -> None:
    """Answers when the snapshot is on the disk."""
    process = kernel.processes.find(call.pid, subject)
    if process.run is not None:
        kernel.sessions.reply(request, training.save(kernel, subject, process, call.target))
        return
    must_be_single(process)
    if process.swap and not process.swap.available:
        raise errors.ProcessBusy(f"process {process.pid} is moving to another device", hint="try again")
    _room_on_disk(kernel, subject.path, process)
    device, files = kernel.devices[process.pool.device_name], kernel.store.sessions
    owner, name, record = subject.path, call.target, _record(process, call.target)
    file = f"{kernel.random.getrandbits(64):016x}.kv"
    source = process.swap
    stamp = source.stamp if source else swapping.stamp(process)
    positions, layout = process.computed, layout_of(process.pool)
    message = _order(kernel, process, str(files.kv_path(file)), stamp)
    if message is None or layout is None or device.worker is None:
        kernel.sessions.reply(request, files.commit(owner, name, record))
        return
    if source:
        source.share()
        saving = Saving(source.ticket, source.blocks)
    else:
        assert isinstance(message, base.Export)
        saving = Saving(message.ticket, frozenset(message.blocks))
    savings = process.pool.savings
    savings.append(saving)

    def answered(answer: base.Moved | errors.LLMasOSError) -> None:
        savings.remove(saving)
        if source:
            source.release()
        try:
            if isinstance(answer, errors.LLMasOSError):
                raise answer
            if saving.spoiled:  # what was written is not this context's KV; its tokens are
                files.forget_kv(file)
                info = files.commit(owner, name, record)
            else:
                kv = Kv(file, answer.bytes, positions, stamp, layout)
                info = files.commit(owner, name, replace(record, kv=kv))
        except errors.LLMasOSError as error:
            files.forget_kv(file)
            kernel.sessions.fail(request, error)
            return
        kernel.sessions.reply(request, info)

    swapping.order(kernel, device, message, answered)


def _room_on_disk(kernel: Kernel, owner: str, process: Process) -> None:
    """Raises QuotaExceeded when a snapshot of the process is too much for its owner."""
    loaded = process.pool.loaded
    size = 4 * len(process.tokens)
    if loaded is not None:
        size += file_size(blocks_for(process.computed), loaded.block_bytes)
    room_on_disk(kernel, owner, size)


def restore(kernel: Kernel, session: Session, request: Request, call: table.Restore) -> None:
    """Answers when the model is resident and the process is there."""
    subject, files = session.subject, kernel.store.sessions
    found = files.load(subject.path, call.source)
    subject.require_priority(found.sched_class, found.nice)
    manifest = kernel.store.resolve(found.model, subject.may_command)
    if manifest.digest != found.digest:
        raise errors.NoSuchModel(
            f"{found.model} is not the model any more that snapshot {call.source} was made with",
            hint="give that model its name back; `llsh ls /models` shows digests",
            model=found.model,
        )
    if found.run is not None:
        kernel.sessions.reply(request, training.bring_back(kernel, session, call, found, found.run))
        return
    kernel.processes.room_for(subject.path, 1)
    pool, adapter = residency.place(kernel, manifest, call.device, found.dtype)
    ticket = next(kernel.numbers)
    path = files.borrow(found.kv, str(ticket)) if found.kv else None
    file = (
        KvFile(path, None, 0, found.kv.stamp, frozenset(), ticket, ready=True) if path and found.kv else None
    )
    owner = None if call.detached else session.key
    process = kernel.processes.spawn(
        subject.path, owner, pool, found.sched_class, found.nice, found.label, kernel.now(), adapter
    )
    process.tokens = unpack_tokens(found.tokens)
    process.generated, process.lineage = found.generated, found.lineage
    process.unfinished = unfinished = found.unfinished
    process.swap, process.computed = file, found.kv.positions if file and found.kv else 0

    def ready(error: errors.LLMasOSError | None) -> None:
        if process not in pool.processes or error is not None:
            kernel.processes.discard(process)
            kernel.sessions.fail(request, error or errors.Unavailable("cancelled"))
            return
        why = _why_not(found, pool, file)
        if why:
            process.lose()
        kernel.processes.name(process)
        kernel.sessions.reply(
            request,
            table.RestoreReply(
                pid=process.pid,
                model=process.model,
                device=pool.device_name,
                context=len(process.tokens),
                kept=process.computed,
                recomputed=why,
                sampling=unfinished.sampling if unfinished else Sampling(),
                max_tokens=unfinished.max_tokens if unfinished else None,
            ),
        )

    def cancel() -> None:
        adapters.forgo(pool, adapter, ready)
        kernel.processes.discard(process)
        kernel.sessions.fail(request, errors.Unavailable("cancelled"))

    kernel.sessions.on_cancel(request, cancel)
    adapters.when_ready(kernel, pool, adapter, ready)


def must_be_single(process: Process) -> None:
    """Raises ProcessEnded, ProcessBusy: beams are several contexts, which are one only when the search is
    over."""
    if process.exit is not None:
        raise errors.ProcessEnded(f"process {process.pid} has ended", hint="only `wait` applies to it")
    if process.run is not None:
        raise errors.ProcessBusy(f"process {process.pid} trains", hint="it stays on its device")
    if process.encoding is not None:
        raise errors.ProcessBusy(f"process {process.pid} encodes, and ends with that")
    if process.infer is not None and process.infer.beams is not None:
        raise errors.ProcessBusy(
            f"process {process.pid} runs a beam search", hint="wait for its end or cancel it"
        )


def layout_of(pool: Pool) -> Layout | None:
    """What the KV of a resident model means."""
    loaded = pool.loaded
    if loaded is None:
        return None
    return Layout(loaded.dtype, loaded.kv_dtype, loaded.kv_layout, loaded.block_bytes)


def differs(a: Layout | None, b: Layout | None) -> str:
    """Why KV of one layout is worth nothing in another, "" if it is."""
    if a is None or b is None or a == b:
        return ""
    return "its KV is of " + " instead of ".join(
        f"{x.dtype} weights in {x.kv_dtype}, {x.kv_layout}" for x in (a, b)
    )


def _why_not(found: Snapshot, pool: Pool, file: KvFile | None) -> str:
    """Why the KV of a snapshot cannot be used, "" if it can."""
    if found.kv is None:
        return "the snapshot has no KV" if found.tokens else ""
    if file is None:
        return "the snapshot's KV is missing"
    return differs(found.kv.layout, layout_of(pool))


def _record(process: Process, name: str) -> Snapshot:
    infer, unfinished = process.infer, process.unfinished
    if infer is not None and infer.samples and infer.finish is None:
        # What goes on begins where the context ends, whatever of it the reader has.
        unfinished = infer.unfinished(len(process.tokens))
    return Snapshot(
        created=session_files.now(),
        model=process.model,
        digest=process.digest,
        dtype=process.pool.dtype,
        sched_class=process.sched_class,
        nice=process.nice,
        label=process.label,
        generated=process.generated,
        tokens=pack_tokens(process.tokens),
        lineage=[*process.lineage, name][-session_files.MOST_LINEAGE :],
        kv=None,
        unfinished=unfinished,
    )


def _order(
    kernel: Kernel, process: Process, path: str, stamp: base.KvStamp
) -> base.Export | base.Relay | None:
    """What has the KV of a process written to `path`; None if it has none."""
    ticket = next(kernel.numbers)
    if process.swap:
        return base.Relay(ticket, str(process.swap.path), path, durable=True)
    if blocks := swapping.savable(process):
        return base.Export(ticket, process.pool.handle, path, stamp, blocks, durable=True)
    return None
