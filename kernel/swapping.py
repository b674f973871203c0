"""How a process's KV leaves a device's memory and comes back: by a file, or by computing it again.

A device does what it is sent in order, so blocks are given away as soon as the order to write them out is
sent, and a step may follow an order to read them at once. If one of them fails, the process is computed anew
and what steps in flight say of it is void: slower, never wrong.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from llmasos.drivers import base
from llmasos.syscalls import errors
from llmasos.syscalls.types import pack_tokens

from .devices import Device, Move, Pool
from .effects import ToWorker
from .memory import blocks_for
from .process import Process
from .tiers import KvFile

if TYPE_CHECKING:
    from .loop import Kernel


def push_out(kernel: Kernel, process: Process) -> None:
    """Takes a process's blocks away. Its KV goes to a file if to write and read that takes less time than to
    compute it again."""
    if process.infer is not None:
        process.preemptions += 1
    file = _save(kernel, process)
    process.pool.memory.release(process.table)
    process.mirror.stale = True
    if file is None:
        process.computed = 0
    process.swap = file


def bring_in(kernel: Kernel, process: Process) -> None:
    """Fills the blocks that were reserved for a swapped process, but for those that it shares with others."""
    file, pool = process.swap, process.pool
    assert file is not None
    skip = process.table.shown
    blocks = process.table.blocks[skip : blocks_for(process.computed)]
    if blocks:
        copies, pool.copies = pool.copies, []
        ticket = next(kernel.numbers)
        spoiled = frozenset([*blocks, *(target for _, target in copies)])
        _ask(
            kernel,
            Move(file.share(), pool, blocks, spoiled),
            base.Import(ticket, pool.handle, str(file.path), file.stamp, skip, blocks, copies),
        )
    process.forget_swap()


def stamp(process: Process) -> base.KvStamp:
    """What the KV of a process is the KV of."""
    history = pack_tokens(process.tokens[: process.computed])
    digest = hashlib.blake2b(history, digest_size=32).digest()
    return base.KvStamp(process.pool.digest, digest, process.computed)


def done(kernel: Kernel, device: Device, message: base.Moved) -> None:
    """An order was carried out."""
    move = device.moves.pop(message.ticket)
    if move.blocks:
        device.transfer.learn_read(message.bytes, message.seconds)
    else:
        device.transfer.learn_write(message.bytes, message.seconds)
        move.file.written(message.bytes)
    move.file.release()


def failed(kernel: Kernel, device: Device, ticket: int, error: errors.LLMasOSError) -> None:
    """An order was not carried out: who relied on it is computed anew."""
    move = device.moves.pop(ticket)
    what = "read" if move.blocks else "written"
    kernel.log.warn(f"{device.name}: KV was not {what}, it will be recomputed: {error.message}")
    if move.blocks:
        spoil(kernel, move.pool, move.spoiled, ticket)
    else:
        _lose_file(move.pool, move.file)
    move.file.release()


def worker_gone(device: Device) -> None:
    """No order will be answered any more. Files that are not finished are lost."""
    moves, device.moves = device.moves, {}
    for move in moves.values():
        if not move.blocks:
            _lose_file(move.pool, move.file)
        move.file.release()


def spoil(kernel: Kernel, pool: Pool, blocks: frozenset[int], ticket: int) -> None:
    """Since the order `ticket` these blocks hold nothing that counts: whoever has them, or a file that was
    written from them, starts anew."""
    for process in pool.processes:
        if not blocks.isdisjoint(process.table.blocks):
            pool.memory.release(process.table)
            process.lose()
        elif process.swap and process.swap.ticket > ticket and not blocks.isdisjoint(process.swap.blocks):
            process.lose()


def _lose_file(pool: Pool, file: KvFile) -> None:
    for process in pool.processes:
        if process.swap is file:
            process.lose()


def _save(kernel: Kernel, process: Process) -> KvFile | None:
    """Has the KV of a process written to a file if that is worth it. Beams are always computed anew."""
    pool, loaded, blocks = (
        process.pool,
        process.pool.loaded,
        process.table.blocks[: blocks_for(process.computed)],
    )
    device = kernel.devices[pool.device_name]
    infer = process.infer
    if not blocks or loaded is None or process.beam_of or (infer and infer.beams):
        return None
    if not {target for _, target in pool.copies}.isdisjoint(blocks):
        return None  # a copy that is still to be made
    cost = device.transfer.there_and_back(len(blocks) * loaded.block_bytes)
    tier = kernel.tiers.room(len(blocks), loaded.block_bytes)
    if tier is None or cost > pool.pace.token * process.computed:
        return None
    ticket = next(kernel.numbers)
    file = kernel.tiers.create(tier, loaded.block_bytes, stamp(process), blocks, ticket)
    _ask(
        kernel,
        Move(file.share(), pool, [], frozenset()),
        base.Export(ticket, pool.handle, str(file.path), file.stamp, blocks),
    )
    return file


def _ask(kernel: Kernel, move: Move, order: base.Export | base.Import) -> None:
    device = kernel.devices[move.pool.device_name]
    assert device.worker is not None
    device.moves[order.ticket] = move
    kernel.effects.append(ToWorker(device.worker, order))
