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

from .claims import PROGRESS_TOKENS
from .devices import Answered, Device, Pool, Ready
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
        kernel.metrics.preempted(process.infer)
        process.keeps_until = len(process.tokens) + PROGRESS_TOKENS
        process.pool.admitted.discard(process)
    file = save(kernel, process) if process.pool.loaded and worth_saving(kernel, process) else None
    process.pool.memory.release(process.table)
    process.mirror.stale = True
    if file is None:
        process.computed = 0
    process.swap = file
    process.pool.queue.touch(process)


def bring_in(kernel: Kernel, process: Process) -> None:
    """Fills the blocks that were reserved for a swapped process, but for those that it shares with others."""
    pool, skip = process.pool, process.table.shown
    blocks = process.table.blocks[skip : blocks_for(process.computed)]
    if process.swap and blocks:
        _read(kernel, pool, process.swap.share(), skip, blocks)
    process.forget_swap()


def _read(kernel: Kernel, pool: Pool, file: KvFile, skip: int, blocks: list[int]) -> None:
    device = kernel.devices[pool.device_name]
    copies, pool.copies = pool.copies, []
    spoiled = frozenset([*blocks, *(target for _, target in copies)])
    ticket = next(kernel.numbers)

    def answered(answer: base.Moved | errors.LLMasOSError) -> None:
        if isinstance(answer, base.Moved):
            device.transfer.learn_read(answer.bytes, answer.seconds)
        else:
            kernel.log.warn(f"{device.name}: KV was not read, it will be recomputed: {answer.message}")
            spoil(pool, spoiled, ticket)
        file.release()

    message = base.Import(ticket, pool.handle, str(file.path), file.stamp, skip, blocks, copies)
    order(kernel, device, message, answered)


def spoil(pool: Pool, blocks: frozenset[int], ticket: int) -> None:
    """Since the order `ticket` these blocks hold nothing that counts: whoever has them, or a file that was
    written from them, starts anew."""
    for saving in pool.savings:
        if saving.ticket > ticket and not blocks.isdisjoint(saving.blocks):
            saving.spoiled = True
    for process in pool.processes:
        if not blocks.isdisjoint(process.table.blocks):
            pool.memory.release(process.table)
            process.lose()
        elif process.swap and process.swap.ticket > ticket and not blocks.isdisjoint(process.swap.blocks):
            process.lose()


def worth_saving(kernel: Kernel, process: Process) -> bool:
    """Whether to write the KV of a process and to read it again takes less time than to compute it."""
    pool = process.pool
    assert pool.loaded is not None
    size = blocks_for(process.computed) * pool.loaded.block_bytes
    cost = kernel.devices[pool.device_name].transfer.there_and_back(size)
    return cost <= pool.pace.token * process.computed


def savable(process: Process) -> list[int]:
    """The blocks that hold the KV of a process, if they are there and may be written to a file. Beams are
    always computed anew."""
    pool, infer = process.pool, process.infer
    blocks = process.table.blocks[: blocks_for(process.computed)]
    if pool.loaded is None or process.beam_of or (infer and infer.beams):
        return []
    to_be_made = {target for _, target in pool.copies}
    return blocks if to_be_made.isdisjoint(blocks) else []


def save(kernel: Kernel, process: Process, then: Ready = lambda error: None) -> KvFile | None:
    """Has the KV of a process written to a tier's file, as it is after what was sent before; None when it
    cannot be or there is no room. `then` is told when that is done or has failed; whoever relied on it has
    lost its KV by then."""
    pool, blocks = process.pool, savable(process)
    if not blocks or pool.loaded is None:
        return None
    tier = kernel.tiers.room(len(blocks), pool.loaded.block_bytes)
    if tier is None:
        return None
    device, ticket = kernel.devices[pool.device_name], next(kernel.numbers)
    file = kernel.tiers.create(tier, pool.loaded.block_bytes, stamp(process), blocks, ticket)
    file.share()

    def answered(answer: base.Moved | errors.LLMasOSError) -> None:
        if isinstance(answer, base.Moved):
            device.transfer.learn_write(answer.bytes, answer.seconds)
            file.written(answer.bytes)
            if file.foreign:
                for holder in kernel.processes:
                    if holder.swap is file:
                        holder.pool.queue.touch(holder)
        else:
            kernel.log.warn(f"{device.name}: KV was not written, it will be recomputed: {answer.message}")
            for holder in kernel.processes:
                if holder.swap is file:
                    holder.lose()
        file.release()
        then(None if isinstance(answer, base.Moved) else answer)

    order(kernel, device, base.Export(ticket, pool.handle, str(file.path), file.stamp, blocks), answered)
    return file


def order(
    kernel: Kernel,
    device: Device,
    message: base.Export | base.Import | base.Relay | base.LoadAdapter,
    answered: Answered,
) -> None:
    """Sends an order that is no step; `answered` gets what came of it, once."""
    assert device.worker is not None
    device.orders[message.ticket] = answered
    kernel.effects.append(ToWorker(device.worker, message))


def worker_gone(device: Device) -> None:
    """No order will be answered any more. Files that are not finished are lost."""
    orders, device.orders = device.orders, {}
    for answered in orders.values():
        answered(errors.DeviceUnavailable(f"the worker of {device.name} died"))


def stamp(process: Process) -> base.KvStamp:
    """What the KV of a process is the KV of."""
    history = pack_tokens(process.tokens[: process.computed])
    digest = hashlib.blake2b(history, digest_size=32).digest()
    return base.KvStamp(process.digest, digest, process.computed)
