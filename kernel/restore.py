"""Brings back what the journal holds, when the kernel boots: processes under their pids, answers, limits, and
which pids are free.

A process comes back READY or WAITING with its history and nothing computed; its model is loaded, or adopted
from a worker that holds it. One whose model or device is gone is a zombie that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls.types import unpack_tokens

from . import residency, training
from .adapters import Adapter
from .devices import Pool
from .ledger import ANSWER, NEXT_PID, PROCESS, QUOTA, AnswerRow, ProcessRow, QuotaRow
from .memory import Table
from .process import Exit, Process
from .runqueue import RunQueue
from .shares import Shares

if TYPE_CHECKING:
    from .loop import Kernel

Place = tuple[Pool, Adapter | None]


def restore(kernel: Kernel, rows: Mapping[str, bytes], epoch: float) -> set[bytes]:
    """Returns the sessions that may come back for what is theirs. `epoch`: see ledger.Ledger."""
    answers = [msgspec.msgpack.decode(data, type=AnswerRow) for data in _of(rows, ANSWER)]
    kernel.ledger.known(answers)
    for data in _of(rows, QUOTA):
        limit = msgspec.msgpack.decode(data, type=QuotaRow)
        kernel.quotas.set(limit.path, limit.limit)
    found = [msgspec.msgpack.decode(data, type=ProcessRow) for data in _of(rows, PROCESS)]
    places: dict[tuple[str, str, str], Place] = {}  # ten thousand processes have few models
    for row in sorted(found, key=lambda row: row.pid):
        process = _process(kernel, row, epoch, places)
        kernel.processes.restore(process)
        if row.run is not None:
            training.restore(kernel, process, row.run)
    if taken := rows.get(NEXT_PID):
        kernel.processes.reserve_pids(msgspec.msgpack.decode(taken, type=int))
    if found:
        kernel.log.info(f"{len(found)} processes are back")
    return {row.session for row in found if row.session} | {row.session for row in answers}


def place_of(kernel: Kernel, model: str, digest: str, device: str, dtype: str) -> Place:
    """Where what was called `model` is to run, by its content. Raises NoSuchModel, NoSuchDevice."""
    manifest = kernel.store.find(lambda manifest: manifest.digest == digest)
    if manifest is None:
        raise errors.NoSuchModel(f"{model} is not in the model filesystem any more")
    return residency.place(kernel, manifest, device, dtype)


def _of(rows: Mapping[str, bytes], kind: str) -> list[bytes]:
    return [data for name, data in rows.items() if name.startswith(f"{kind} ")]


def _process(
    kernel: Kernel, row: ProcessRow, epoch: float, places: dict[tuple[str, str, str], Place]
) -> Process:
    end = Exit(*row.exit) if row.exit else None
    pool, adapter = None, None
    if end is None:
        try:
            kind = (row.digest, row.device, row.dtype)
            if row.run is not None:
                pool = training.pool_of(kernel, row.pid, row.device)
            elif kind in places:
                pool, adapter = places[kind]
            else:
                pool, adapter = places[kind] = place_of(kernel, row.model, *kind)
        except errors.LLMasOSError as problem:
            end = Exit(1, f"after a restart: {problem.message}")
            kernel.log.warn(f"process {row.pid} cannot go on: {problem}")
    if pool is None:  # a zombie needs no real one
        queue = RunQueue(Shares(kernel.quotas.weight), kernel.now)
        pool = Pool(0, row.model, row.digest, row.dtype, row.device, row.owner, {}, 0.0, queue)
    return Process(
        pid=row.pid,
        parent=row.parent,
        owner=row.owner,
        session=row.session or None,
        pool=pool,
        sched_class=row.sched_class,
        nice=row.nice,
        label=row.label,
        table=Table(),
        born=row.born - epoch,
        tokens=unpack_tokens(row.tokens),
        generated=row.generated,
        stopped=row.stopped,
        exit=end,
        unfinished=row.unfinished,
        lineage=row.lineage,
        named=True,
        adapter=adapter,
    )
