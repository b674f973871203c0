"""Reads a model's tensors through its tensors.json: maps the weight files, never parses them.

Everything is checked before memory is taken: the digest of each file, that each tensor lies inside its file,
that its size is what type and shape say, and (`expect`) that the tensors are exactly those that the family
computes with.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import gguf
import msgspec
import numpy as np
import torch
from llmasos.syscalls import errors
from msgspec import Struct

from ..base import File

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_T = TypeVar("_T")
_LARGEST = 2**48  # bytes; nothing real comes near, and products of it stay exact


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


def nbytes_of(type_: str, shape: list[int]) -> int:
    """Bytes of a tensor. Raises UnsupportedModel for types that we do not read, Corrupt for bad shapes."""
    if not 1 <= len(shape) <= 4 or any(not 0 < size < _LARGEST for size in shape):
        raise errors.Corrupt(f"a tensor has the shape {shape}")
    if type_ in _PLAIN:
        return math.prod(shape) * _PLAIN[type_].itemsize
    if type_ not in QUANTISED:
        known = ", ".join((*_PLAIN, *QUANTISED))
        raise errors.UnsupportedModel(f"tensor type {type_[:32]!r} is not read", hint=f"known: {known}")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    if shape[-1] % block:
        raise errors.Corrupt(f"{type_} rows of {shape[-1]} values are not whole blocks of {block}")
    return math.prod(shape) // int(block) * int(size)


class Checkpoint:
    """The mapped files of a model. Raises Corrupt or UnsupportedModel; tensors are read one by one."""

    def __init__(self, files: dict[str, File]) -> None:
        for needed in ("config.json", "tensors.json"):
            if needed not in files:
                raise errors.Corrupt(f"the model has no {needed}", hint="pull the model again")
        self.config = self._decode(files["config.json"], "config.json", dict[str, Any])
        self._entries = self._decode(files["tensors.json"], "tensors.json", _Index).tensors
        self._maps: dict[str, mmap.mmap] = {}
        for entry in self._entries.values():
            if entry.file not in self._maps:
                if entry.file not in files:
                    raise errors.Corrupt(
                        f"tensors.json names {entry.file[:96]!r}, which the model does not have"
                    )
                self._maps[entry.file] = _map(files[entry.file], entry.file)
        for name, entry in self._entries.items():
            self._check(name, entry)

    @staticmethod
    def _decode(file: File, name: str, kind: type[_T]) -> _T:
        data = bytes(_map(file, name))
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as problem:
            raise errors.Corrupt(f"{name}: {problem}", hint="pull the model again") from None

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
        if entry.transpose and len(entry.shape) != 2:
            raise errors.Corrupt(f"tensor {name!r} is to be transposed and has no two dimensions")

    def drop_prefix(self, prefix: str) -> None:
        """Drops `prefix` from the names that have it: some checkpoints carry it, some do not."""
        self._entries = {name.removeprefix(prefix): entry for name, entry in self._entries.items()}

    @property
    def numel(self) -> int:
        """Values in all tensors."""
        return sum(math.prod(entry.shape) for entry in self._entries.values())

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

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in `dtype` on the host, in Hugging Face's row order; owns its memory."""
        entry = self._entries[name]
        raw = np.frombuffer(self._maps[entry.file], np.uint8, entry.nbytes, entry.offset)
        if plain := _PLAIN.get(entry.type):
            tensor = torch.from_numpy(raw.copy()).view(plain).view(entry.shape).to(dtype)
        else:
            rows = raw.reshape(math.prod(entry.shape[:-1]), -1)
            values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[entry.type])
            tensor = torch.from_numpy(np.ascontiguousarray(values)).view(entry.shape).to(dtype)
        if entry.heads:
            half = entry.shape[0] // entry.heads // 2
            split = tensor.view(entry.heads, half, 2, *entry.shape[1:])
            tensor = split.transpose(1, 2).reshape(entry.shape)
        return tensor.t().contiguous() if entry.transpose else tensor


def _map(file: File, name: str) -> mmap.mmap:
    """The file's bytes, verified. Raises Corrupt."""
    try:
        with Path(file.path).open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as problem:
        raise errors.Corrupt(
            f"{name} cannot be read: {type(problem).__name__}", hint="pull the model again"
        ) from None
    if len(mapped) != file.size or f"sha256:{hashlib.sha256(mapped).hexdigest()}" != file.digest:
        raise errors.Corrupt(f"{name} is not what its digest says", hint="run fsck and pull the model again")
    return mapped
