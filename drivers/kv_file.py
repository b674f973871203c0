"""The KV of one process as a file: written and read by the worker, so that its bytes never cross the kernel.

    8 bytes   magic
    4 bytes   length of the header, u32 little-endian
    header    msgpack of Header
    32 bytes  seal: BLAKE2b of all before it
    per block its bytes, then 32 bytes: BLAKE2b of them, keyed with the seal and salted with its number

A reader can begin at any block, and a changed bit, a missing end, a block of another file or in another place
are each found before a byte gets to the device. Sizes are checked before memory is taken; one block is in
memory at a time. A file has its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
from llmasos.syscalls import errors
from msgspec import Struct

from .base import BLOCK_TOKENS, Batch, Driver, Export, Import, KvStamp, Loaded, Moved, Relay

MAGIC = b"LLMASKV1"
MOST_HEADER = 4096
HASH = 32
_START = len(MAGIC) + 4


class Header(Struct, frozen=True):
    """What a file holds. Its blocks mean something only to a model and a device that agree with all of it."""

    stamp: KvStamp
    dtype: str
    kv_dtype: str
    kv_layout: str
    block_bytes: int
    blocks: int


_header = msgspec.msgpack.Decoder(Header)


def carry_out(driver: Driver, loaded: dict[int, Loaded], message: Export | Import | Relay) -> Moved:
    """Does what the kernel asks. Raises Corrupt (the file is not what it should be), StorageFailed (it cannot
    be written or read) and what the driver raises; after a failed Export or Relay there is no file."""
    begun = time.perf_counter()
    try:
        match message:
            case Export():
                header = _expected(loaded, message.handle, message.stamp, len(message.blocks))
                blocks: Iterator[bytes] = (
                    driver.export_blocks(message.handle, [block]) for block in message.blocks
                )
                size = write(Path(message.path), header, blocks, message.durable)
            case Import():
                size = _import(driver, loaded, message)
            case Relay():
                with open(message.source, "rb") as file:
                    header, seal = _open(file)
                    blocks = _blocks(file, header, seal, 0, header.blocks)
                    size = write(Path(message.path), header, blocks, message.durable)
    except OSError as problem:
        raise errors.StorageFailed(
            f"{type(message).__name__.lower()} of KV: {problem.strerror or type(problem).__name__}",
            hint="see `llsh df`",
        ) from None
    return Moved(message.ticket, size, time.perf_counter() - begun)


def write(path: Path, header: Header, blocks: Iterable[bytes], durable: bool) -> int:
    """Makes the file and returns its size in bytes. Raises OSError, and then leaves nothing behind."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            size = _write(fd, header, blocks)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(unfinished, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        for left in (unfinished, path):
            with suppress(OSError):
                os.unlink(left)
        raise
    return size


def read(path: Path, expected: Header, skip: int, count: int) -> Iterator[bytes]:
    """Blocks `skip` … `skip`+`count`-1 of the file, each verified. Raises Corrupt, OSError."""
    with path.open("rb") as file:
        header, seal = _open(file)
        if header != expected:
            raise errors.Corrupt(
                f"the KV file is of another process, model or device: {_differs(header, expected)}"
            )
        yield from _blocks(file, header, seal, skip, count)


def _expected(loaded: dict[int, Loaded], handle: int, stamp: KvStamp, blocks: int) -> Header:
    if (model := loaded.get(handle)) is None:
        raise errors.DeviceFault(f"no model is loaded under handle {handle}")
    return Header(stamp, model.dtype, model.kv_dtype, model.kv_layout, model.block_bytes, blocks)


def _import(driver: Driver, loaded: dict[int, Loaded], message: Import) -> int:
    if message.copies:
        driver.collect(driver.submit(Batch(message.ticket, message.handle, [], [], message.copies, [])))
    total = -(-message.stamp.positions // BLOCK_TOKENS)
    expected = _expected(loaded, message.handle, message.stamp, total)
    size = 0
    found = read(Path(message.path), expected, message.skip, len(message.blocks))
    for block, data in zip(message.blocks, found, strict=True):
        driver.import_blocks(message.handle, [block], data)
        size += len(data)
    return size


def _write(fd: int, header: Header, blocks: Iterable[bytes]) -> int:
    packed = msgspec.msgpack.encode(header)
    start = MAGIC + len(packed).to_bytes(4, "little") + packed
    seal = hashlib.blake2b(start, digest_size=HASH).digest()
    size = _put(fd, start + seal)
    count = 0
    for index, block in enumerate(blocks):
        if len(block) != header.block_bytes:
            raise errors.DeviceFault(f"a block has {len(block)} bytes instead of {header.block_bytes}")
        size += _put(fd, block) + _put(fd, _mark(block, seal, index))
        count += 1
    if count != header.blocks:
        raise errors.DeviceFault(f"{count} blocks instead of {header.blocks}")
    return size


def _put(fd: int, data: bytes) -> int:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    return len(data)


def _open(file: BinaryIO) -> tuple[Header, bytes]:
    """The header of a file and its seal, verified; the file's size is what the header says."""
    start = file.read(_START)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if len(start) != _START or start[: len(MAGIC)] != MAGIC or length > MOST_HEADER:
        raise errors.Corrupt("this is no KV file of this version")
    packed, seal = file.read(length), file.read(HASH)
    if hashlib.blake2b(start + packed, digest_size=HASH).digest() != seal:
        raise errors.Corrupt("the header of the KV file is damaged")
    try:
        header = _header.decode(packed)
    except msgspec.DecodeError:
        raise errors.Corrupt("the header of the KV file means nothing") from None
    size = os.fstat(file.fileno()).st_size
    wanted = _START + length + HASH + header.blocks * (header.block_bytes + HASH)
    if size != wanted:
        raise errors.Corrupt(f"the KV file has {size} bytes instead of {wanted}")
    return header, seal


def _blocks(file: BinaryIO, header: Header, seal: bytes, skip: int, count: int) -> Iterator[bytes]:
    if not 0 <= skip <= skip + count <= header.blocks:
        raise errors.Corrupt(f"blocks {skip} to {skip + count} of {header.blocks} were asked for")
    file.seek(skip * (header.block_bytes + HASH), os.SEEK_CUR)
    for index in range(skip, skip + count):
        block, mark = file.read(header.block_bytes), file.read(HASH)
        if _mark(block, seal, index) != mark:
            raise errors.Corrupt(f"block {index} of the KV file is damaged")
        yield block


def _mark(block: bytes, seal: bytes, index: int) -> bytes:
    return hashlib.blake2b(block, digest_size=HASH, key=seal, salt=index.to_bytes(16, "little")).digest()


def _differs(found: Header, expected: Header) -> str:
    names = [n for n in Header.__struct_fields__ if getattr(found, n) != getattr(expected, n)]
    return f"{', '.join(names)} differ"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
