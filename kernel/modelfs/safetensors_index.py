"""Reads the header of a safetensors file: which tensor lies where. No tensor is read.

Format: u64 little-endian length of the header, a JSON object {name: {dtype, shape, data_offsets}}, then the
data without gaps. Files come from strangers: every number is checked against the file before it is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
from llmasos.syscalls.errors import Corrupt
from msgspec import Meta, Struct

MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME = 512

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}

_Number = Annotated[int, Meta(ge=0, le=2**53)]


class _Entry(Struct, frozen=True):
    dtype: str
    shape: Annotated[list[_Number], Meta(max_length=8)]
    data_offsets: tuple[_Number, _Number]


class Tensor(Struct, frozen=True):
    """A tensor: its dtype as safetensors calls it, its shape, its absolute place in the file, its bytes."""

    dtype: str
    shape: list[int]
    offset: int
    nbytes: int


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises Corrupt."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER or 8 + length > size:
            raise Corrupt(f"{path.name}: no safetensors file: header of {length} bytes in a file of {size}")
        header = file.read(length)
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(path.name, name, raw, 8 + length) for name, raw in entries.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise Corrupt(f"{path.name}: damaged safetensors header: {problem}") from None
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise Corrupt(f"{path.name}: {len(tensors)} tensors")
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise Corrupt(f"{path.name}: tensors overlap or leave gaps at byte {tensor.offset}")
        end += tensor.nbytes
    if end != size:
        raise Corrupt(f"{path.name}: tensors end at byte {end}, the file at {size}")
    return tensors


def _tensor(file: str, name: str, raw: msgspec.Raw, start: int) -> Tensor:
    entry = msgspec.json.decode(raw, type=_Entry)
    begin, end = entry.data_offsets
    bits = _BITS.get(entry.dtype)
    if bits is None or len(name) > MAX_NAME:
        raise Corrupt(f"{file}: {name[:80]!r} has the unknown dtype {entry.dtype[:20]!r}")
    if math.prod(entry.shape) * bits != (end - begin) * 8:
        raise Corrupt(f"{file}: {name[:80]!r} of shape {entry.shape} takes bytes {begin} to {end}")
    return Tensor(entry.dtype, entry.shape, start + begin, end - begin)
