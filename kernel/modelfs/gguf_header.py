"""Reads the header of a GGUF file: its metadata, and which tensor lies where. No tensor is read.

Format: "GGUF", u32 version, u64 tensors, u64 pairs; pairs of key, type and value; for each tensor its name,
dimensions (innermost first), type and offset from the data's start, which is aligned. Files come from
strangers, and parsers of this format have a history of memory errors: every count and offset is checked
against the file before it is used, with Python's unbounded integers. (The `gguf` package's own reader takes
ten times as long on a big vocabulary; its tables of types and block sizes are used.)
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from llmasos.syscalls.errors import Corrupt, UnsupportedModel
from msgspec import Struct

MAX_HEADER = 256 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_PAIRS = 10_000
MAX_ITEMS = 8_000_000  # of all arrays together
MAX_STRING = 16 * 1024 * 1024

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


class Tensor(Struct, frozen=True):
    """A tensor: its type as ggml calls it, its shape in torch's order, its absolute place, its bytes."""

    type: str
    shape: list[int]
    offset: int
    nbytes: int


class Header(Struct, frozen=True):
    """What a GGUF file says about itself, and its tensors by name."""

    pairs: dict[str, Value]
    tensors: dict[str, Tensor]


def read(path: Path) -> Header:
    """The header of a file. Raises Corrupt, UnsupportedModel (a type of tensor that ggml has dropped)."""
    size = path.stat().st_size
    if size < 24:
        raise Corrupt(f"{path.name}: no GGUF file: {size} bytes")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) as data,
    ):
        try:
            return _Reader(path.name, data, size).header()
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as problem:
            raise Corrupt(f"{path.name}: damaged GGUF header: {type(problem).__name__}") from None


class _Reader:
    """A cursor over the header."""

    def __init__(self, name: str, data: mmap.mmap, size: int) -> None:
        self.name = name
        self.data = data
        self.size = size
        self.at = 0
        self.items = 0

    def header(self) -> Header:
        if self.bytes(4) != b"GGUF":
            raise self.wrong("no GGUF file")
        if (version := self.number("I")) not in _VERSIONS:
            raise self.wrong(f"GGUF version {version}, known are {_VERSIONS}")
        tensor_count, pair_count = self.number("Q"), self.number("Q")
        if tensor_count > MAX_TENSORS or pair_count > MAX_PAIRS:
            raise self.wrong(f"{tensor_count} tensors and {pair_count} pairs")
        pairs: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in pairs:
                raise self.wrong(f"two values for {key[:80]!r}")
            pairs[key] = self.value(self.number("I"))
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = pairs.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise self.wrong(f"alignment {alignment!r}"[:80])
        start = -(-self.at // alignment) * alignment
        return Header(pairs, self.placed(infos, start, alignment))

    def tensor_info(self) -> tuple[str, list[int], int, int]:
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.wrong(f"{name[:80]!r} has {dimensions} dimensions")
        shape = [self.number("Q") for _ in range(dimensions)]
        return name, shape, self.number("I"), self.number("Q")

    def placed(
        self, infos: list[tuple[str, list[int], int, int]], start: int, alignment: int
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, shape, number, offset in infos:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise UnsupportedModel(f"{self.name}: {name[:80]!r} has the unknown type {number}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if min(shape) == 0 or shape[0] % block or offset % alignment:
                raise self.wrong(f"{name[:80]!r}: shape {shape} of {kind.name} at {offset}")
            nbytes = math.prod(shape) // block * block_bytes
            if start + offset + nbytes > self.size:
                raise self.wrong(f"{name[:80]!r} ends after the file, at byte {start + offset + nbytes}")
            if name in tensors:
                raise self.wrong(f"two tensors {name[:80]!r}")
            tensors[name] = Tensor(kind.name, shape[::-1], start + offset, nbytes)
        end = 0
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise self.wrong(f"tensors overlap at byte {tensor.offset}")
            end = tensor.offset + tensor.nbytes
        return tensors

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            found: Value = self.numbers(_SCALARS[kind], 1)[0]
            return found
        if kind != _ARRAY:
            raise self.wrong(f"a value of type {kind}")
        item, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.wrong(f"arrays of {self.items} items")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise self.wrong(f"an array of type {item}")
        return list(self.numbers(_SCALARS[item], count))

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.wrong(f"a string of {length} bytes")
        return self.bytes(length).decode("utf-8")

    def number(self, code: str) -> int:
        return int(self.numbers(code, 1)[0])

    def numbers(self, code: str, count: int) -> tuple[int, ...]:
        form = f"<{count}{code}"
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def bytes(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise self.wrong("the header does not end")
        found = self.data[self.at : self.at + length]
        self.at += length
        return found

    def wrong(self, what: str) -> Corrupt:
        return Corrupt(f"{self.name}: damaged GGUF header: {what}")
