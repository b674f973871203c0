"""Reads a model's tensors through its tensors.json: maps the weight files, never parses them. Needs no torch,
and gguf only where a quantised tensor is turned into numbers.

Everything is checked before memory is taken: the digest of each file, that each tensor lies inside its file,
that its size is what type and shape say, and (`expect`) that the tensors are exactly those that the family
computes with.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from llmasos.syscalls import errors
from msgspec import Struct
from numpy.typing import NDArray

from .base import File, check_sizes

# Bytes of a value.
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
# Values in a block and its bytes, as ggml defines them.
QUANTISED = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
_LARGEST = 2**48  # bytes; nothing real comes near, and products of it stay exact
_T = TypeVar("_T")
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor lies. `shape` is in torch order, before `transpose`. `heads`: the rows are in ggml's
    rotary order, for so many heads."""

    file: str
    type: str
    shape: list[int]
    offset: int
    nbytes: int
    heads: int = 0
    transpose: bool = False


class _Index(Struct, frozen=True):
    tensors: dict[str, Entry]


class Raw(NamedTuple):
    """A tensor as it is stored: `rows` [rows, bytes of a row], in Hugging Face's row order; read-only where
    nothing had to be moved. `shape` is that of the stored values; `transposed`: the tensor is their
    transpose."""

    type: str
    shape: tuple[int, ...]
    rows: Bytes
    transposed: bool


def nbytes_of(type_: str, shape: list[int]) -> int:
    """Bytes of a tensor. Raises UnsupportedModel for types that we do not read, Corrupt for bad shapes."""
    if not 1 <= len(shape) <= 4 or any(not 0 < size < _LARGEST for size in shape):
        raise errors.Corrupt(f"a tensor has the shape {shape}")
    if type_ in PLAIN:
        return math.prod(shape) * PLAIN[type_]
    if type_ not in QUANTISED:
        known = ", ".join((*PLAIN, *QUANTISED))
        raise errors.UnsupportedModel(f"tensor type {type_[:32]!r} is not read", hint=f"known: {known}")
    block, size = QUANTISED[type_]
    if shape[-1] % block:
        raise errors.Corrupt(f"{type_} rows of {shape[-1]} values are not whole blocks of {block}")
    return math.prod(shape) // block * size


def values_of(type_: str, rows: Bytes) -> Floats:
    """float32 values [rows, columns] of stored rows [rows, bytes]; owns its memory."""
    if type_ == "F32":
        return rows.copy().view(np.float32)
    if type_ == "F16":
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    if type_ == "BF16":
        return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    import gguf  # a third of a second, which most models need not wait for

    values: Floats = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_])
    return np.ascontiguousarray(values)


class Checkpoint:
    """The mapped files of a model. Raises Corrupt or UnsupportedModel; tensors are read one by one."""

    def __init__(self, files: dict[str, File]) -> None:
        for needed in ("config.json", "tensors.json"):
            if needed not in files:
                raise errors.Corrupt(f"the model has no {needed}", hint="pull the model again")
        self.config = read_json(files["config.json"], "config.json", dict[str, Any])
        self._entries = read_json(files["tensors.json"], "tensors.json", _Index).tensors
        check_sizes(self.config, len(self._entries), self.numel)
        self._maps: dict[str, mmap.mmap] = {}
        for entry in self._entries.values():
            if entry.file not in self._maps:
                if entry.file not in files:
                    raise errors.Corrupt(
                        f"tensors.json names {entry.file[:96]!r}, which the model does not have"
                    )
                self._maps[entry.file] = mapped(files[entry.file], entry.file)
        for name, entry in self._entries.items():
            self._check(name, entry)

    def _check(self, name: str, entry: Entry) -> None:
        if entry.nbytes != nbytes_of(entry.type, entry.shape):
            raise errors.Corrupt(
                f"tensor {name!r} has {entry.nbytes} bytes, {entry.type} {entry.shape} needs others"
            )
        size = len(self._maps[entry.file])
        if entry.offset < 0 or entry.offset + entry.nbytes > size:
            raise errors.Corrupt(f"tensor {name!r} reaches outside {entry.file!r} of {size} bytes")
        if entry.heads and (entry.heads < 0 or entry.shape[0] % (2 * entry.heads)):
            raise errors.Corrupt(f"tensor {name!r} has no {entry.heads} heads of even size")
        if entry.heads and len(entry.shape) == 1 and entry.type in QUANTISED:
            raise errors.Corrupt(f"tensor {name!r} has heads inside the blocks of {entry.type}")
        if entry.transpose and len(entry.shape) != 2:
            raise errors.Corrupt(f"tensor {name!r} is to be transposed and has no two dimensions")

    def drop_prefix(self, prefix: str) -> None:
        """Drops `prefix` from the names that have it: some checkpoints carry it, some do not."""
        self._entries = {name.removeprefix(prefix): entry for name, entry in self._entries.items()}

    def rename(self, change: Callable[[str], str]) -> None:
        """Calls the tensors what `change` makes of their names. Raises Corrupt when two get the same."""
        renamed = {change(name): entry for name, entry in self._entries.items()}
        if len(renamed) < len(self._entries):
            raise errors.Corrupt("two tensors of the model are the same by other names")
        self._entries = renamed

    @property
    def numel(self) -> int:
        """Values in all tensors."""
        return sum(math.prod(entry.shape) for entry in self._entries.values())

    def types(self) -> dict[str, int]:
        """How many values are stored as each type."""
        counts: dict[str, int] = {}
        for entry in self._entries.values():
            counts[entry.type] = counts.get(entry.type, 0) + math.prod(entry.shape)
        return counts

    @property
    def stored(self) -> str:
        """The type that most values have ("BF16", "Q4_K", …)."""
        sizes = self.types()
        return max(sizes, key=sizes.__getitem__, default="F32")

    def entry(self, name: str) -> Entry:
        return self._entries[name]

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def expect(self, shapes: dict[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Raises unless the tensors are those of `shapes`, or match a pattern of `ignored`."""
        for name, shape in shapes.items():
            if name not in self._entries:
                raise errors.Corrupt(
                    f"the model has no tensor {name!r}", hint="its config names it", tensor=name
                )
            entry = self._entries[name]
            found = tuple(reversed(entry.shape)) if entry.transpose else tuple(entry.shape)
            if found != shape:
                raise errors.Corrupt(f"tensor {name!r} is {found}, its config says {shape}", tensor=name)
        patterns = [re.compile(pattern) for pattern in ignored]
        for name in self._entries:
            if name not in shapes and not any(pattern.fullmatch(name) for pattern in patterns):
                raise errors.UnsupportedModel(
                    f"tensor {name[:96]!r} has no place in this family",
                    hint="no driver computes it",
                    tensor=name,
                )

    def raw(self, name: str) -> Raw:
        """A tensor as it is stored, but for ggml's rotary row order."""
        entry = self._entries[name]
        stored = np.frombuffer(self._maps[entry.file], np.uint8, entry.nbytes, entry.offset)
        if entry.heads:
            half = entry.shape[0] // entry.heads // 2
            # Row (head, i, part) of ggml is row (head, part, i) of Hugging Face.
            split = stored.reshape(entry.heads, half, 2, -1).swapaxes(1, 2)
            stored = np.ascontiguousarray(split)
        rows = stored.reshape(math.prod(entry.shape[:-1]), -1)
        return Raw(entry.type, tuple(entry.shape), rows, entry.transpose)

    def read(self, name: str) -> Floats:
        """A tensor in float32, in Hugging Face's row order; owns its memory."""
        raw = self.raw(name)
        values = values_of(raw.type, raw.rows).reshape(raw.shape)
        return np.ascontiguousarray(values.T) if raw.transposed else values


def read_json(file: File, name: str, kind: type[_T]) -> _T:
    """A file as what it has to be, verified. Raises Corrupt."""
    try:
        return msgspec.json.decode(bytes(mapped(file, name)), type=kind)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise errors.Corrupt(f"{name}: {problem}", hint="pull the model again") from None


def mapped(file: File, name: str) -> mmap.mmap:
    """The file's bytes, verified. Raises Corrupt."""
    try:
        with Path(file.path).open("rb") as opened:
            found = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as problem:
        raise errors.Corrupt(
            f"{name} cannot be read: {type(problem).__name__}", hint="pull the model again"
        ) from None
    if len(found) != file.size or f"sha256:{hashlib.sha256(found).hexdigest()}" != file.digest:
        raise errors.Corrupt(f"{name} is not what its digest says", hint="run fsck and pull the model again")
    return found
