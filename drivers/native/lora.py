"""A LoRA adapter as the engine adds it (engine/engine.h): A and B of tensors that are packed as one matrix
lie side by side, their columns and rows where the packed matrix has its own."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from llmasos.syscalls import errors
from numpy.typing import NDArray

from .. import host
from ..adapter import Lora
from ..checkpoint import Floats
from ..families.decoder import Decoder
from ..room import size_text
from . import formats, library
from .architecture import ROWS, Architecture, up_to
from .recipe import Layout, layouts

_RANKS = 4  # that the engine multiplies with at once
_ALIGNED = 64

FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}
"""Of an adapter, by the model's dtype. It is read once a step, often for one row, so its bytes are its price;
and it loses less than the weights beside it (docs/decisions.md)."""


class _Part(NamedTuple):
    """What is added to one packed matrix: `arrays` are a, b, place, first and scale of the engine's
    llk_lora."""

    ranks: int
    arrays: tuple[NDArray[Any], ...]


class BoundAdapter:
    """An adapter in memory, `nbytes` of it. `address`, good as long as this object, is that of the engine's
    llk_lora [layers][4]. Raises NeverFits."""

    def __init__(
        self, loras: dict[str, Lora], decoder: Decoder, architecture: Architecture, format_: str
    ) -> None:
        sizes = architecture.matrices()
        parts = {}
        for i, layer in enumerate(decoder.layers):
            for place, (name, layout) in enumerate(layouts(architecture, layer).items()):
                rows = [
                    decoder.expected[f"{tensor}.weight"][int(decoder.turned)] for tensor in layout.tensors
                ]
                if part := _pack(loras, layout, rows, sizes[f"layer.{i}.{name}"][1], format_):
                    parts[4 * i + place] = part
        self.nbytes = sum(up_to(array.nbytes, _ALIGNED) for part in parts.values() for array in part.arrays)
        _check_room(self.nbytes)
        self._memory = np.empty(self.nbytes + _ALIGNED, np.uint8)
        self._table = (library.Lora * (4 * len(decoder.layers)))()
        self.address = ctypes.addressof(self._table)
        at = -self._memory.ctypes.data % _ALIGNED
        for index, part in parts.items():
            entry = self._table[index]
            entry.ranks, entry.format = part.ranks, library.FORMATS[format_]
            for field, array in zip(("a", "b", "place", "first", "scale"), part.arrays, strict=True):
                self._memory[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
                setattr(entry, field, self._memory.ctypes.data + at)
                at += up_to(array.nbytes, _ALIGNED)


def _check_room(needed: int) -> None:
    _, free = host.memory()
    if needed > free:
        raise errors.NeverFits(
            f"the adapter needs {size_text(needed)}, {size_text(free)} are free",
            hint="unload models or other adapters",
            needed=needed,
            free=free,
        )


def _pack(
    loras: dict[str, Lora], layout: Layout, rows: list[int], columns: int, format_: str
) -> _Part | None:
    """`rows` are those of the layout's tensors. None where the adapter leaves the matrix as it is."""
    found = [_whole(loras[name], format_) if name in loras else None for name in layout.tensors]
    if not any(found):
        return None
    blocks = layout.order.reshape(-1, ROWS)
    ends = np.cumsum(rows)
    owners = np.searchsorted(ends, blocks.max(1), side="right")  # a block has rows of one tensor alone
    ranks = np.array([0 if lora is None else len(lora.scale) for lora in found], np.int32)
    counts = np.where(blocks.max(1) < 0, 0, ranks[owners])
    place = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    b = np.zeros((place[-1], ROWS), np.float32)
    for index, lora in enumerate(found):
        if lora is None:
            continue
        mine = np.flatnonzero((owners == index) & (counts > 0))
        own = blocks[mine] - (ends[index] - rows[index])  # below 0: a row of zeros
        values = np.where(own[..., None] < 0, 0, lora.b[np.maximum(own, 0)])
        b[place[mine][:, None] + np.arange(ranks[index])] = values.swapaxes(1, 2)
    first = (np.cumsum(ranks) - ranks).astype(np.int32)[owners]
    total = up_to(int(ranks.sum()), _RANKS)
    a, scale = np.zeros((total, columns), np.float32), np.zeros(total, np.float32)
    a[: ranks.sum()] = np.concatenate([layout.columns(lora.a, columns) for lora in found if lora])
    scale[: ranks.sum()] = np.concatenate([lora.scale for lora in found if lora])
    fours = a.reshape(-1, _RANKS, columns // ROWS, ROWS).swapaxes(1, 2)
    return _Part(total, (_stored(fours, format_), _stored(b, format_), place, first, scale))


class _Scaled(NamedTuple):
    """A Lora whose ranks are worth `scale` [rank] times their numbers."""

    a: Floats
    b: Floats
    scale: Floats


def _whole(lora: Lora, format_: str) -> _Scaled:
    """For int8 with whole numbers from -127 to 127."""
    a, b = lora
    if format_ != "int8":
        return _Scaled(a, b, np.ones(len(a), np.float32))
    left = np.maximum(abs(a).max(1), 1e-20) / 127
    right = np.maximum(abs(b).max(0), 1e-20) / 127
    return _Scaled(np.rint(a / left[:, None]), np.rint(b / right), left * right)


def _stored(values: Floats, format_: str) -> NDArray[Any]:
    if format_ == "int8":
        return values.astype(np.int8)
    return formats.to_rows(format_, "F32", np.ascontiguousarray(values).reshape(-1, ROWS))
