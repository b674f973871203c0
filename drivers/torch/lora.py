"""LoRA adapters of a model of ours, on its device: the rows of a step that have one are grouped by it, and
two grouped products make what is added to a matrix's output for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ..adapter import Lora
from ..families.decoder import Decoder, Layer
from ..mirror import Piece
from .rope import interleaved
from .shards import Shard
from .transfer import send

_ALIGNED = 8  # what grouped products want ranks to be a multiple of

Place = tuple[int, str]
"""A matrix: its layer, and its name there (qkv, out, up, down)."""


class _Half(NamedTuple):
    """A [in, rank] and B [rank, out] of a matrix, transposed for rows on the left."""

    a: torch.Tensor
    b: torch.Tensor


class _Stack:
    """The halves of one matrix in all slots: a [slots, in, rank], b [slots, rank, out], zero where there is
    nothing."""

    def __init__(self, half: _Half) -> None:
        self.a = half.a.new_zeros(0, len(half.a), 0)
        self.b = half.b.new_zeros(0, 0, half.b.shape[1])

    def put(self, slot: int, slots: int, half: _Half | None) -> None:
        """Sets `slot` of `slots`; makes room for it."""
        rank = -(-(0 if half is None else len(half.b)) // _ALIGNED) * _ALIGNED
        more, wider = max(0, slots - len(self.a)), max(0, rank - self.a.shape[2])
        if more or wider:
            self.a = functional.pad(self.a, (0, wider, 0, 0, 0, more))
            self.b = functional.pad(self.b, (0, 0, 0, wider, 0, more))
        self.a[slot], self.b[slot] = 0, 0
        if half is not None:
            self.a[slot, :, : half.a.shape[1]] = half.a
            self.b[slot, : len(half.b)] = half.b


@dataclass(frozen=True, slots=True)
class Adapted:
    """The rows [n] of a step that have an adapter, those of a slot side by side; `ends` [slots] int32 says
    where each slot's end."""

    bank: AdapterBank
    rows: torch.Tensor
    ends: torch.Tensor

    def add(self, place: Place, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to y [T, out] what the adapters make of x [T, in]."""
        if (stack := self.bank.stacks.get(place)) is None:
            return
        reduced = functional.grouped_mm(x.index_select(0, self.rows), stack.a, offs=self.ends)
        y.index_add_(0, self.rows, functional.grouped_mm(reduced, stack.b, offs=self.ends))


class AdapterBank:
    """The adapters of one model, by number; with `shard` a rank's parts of them."""

    def __init__(
        self, decoder: Decoder, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
    ) -> None:
        self.decoder, self._dtype, self._device = decoder, dtype, device
        self._shard, self._own = shard, shard.decoder if shard else decoder
        self._slots: list[int] = []  # the number in each; 0: free
        self.stacks: dict[Place, _Stack] = {}

    def put(self, number: int, loras: dict[str, Lora]) -> int:
        """Returns the bytes that it takes."""
        self.drop(number)
        loras = self._shard.cut(loras) if self._shard else loras
        if 0 not in self._slots:
            self._slots.append(0)
        slot, size = self._slots.index(0), 0
        halves = dict(self._halves(loras))
        for place, half in halves.items():
            self.stacks.setdefault(place, _Stack(half))
            size += half.a.nbytes + half.b.nbytes
        for place, stack in self.stacks.items():
            stack.put(slot, len(self._slots), halves.get(place))
        self._slots[slot] = number
        return size

    def drop(self, number: int) -> None:
        if number in self._slots:
            self._slots[self._slots.index(number)] = 0
        if not any(self._slots):
            self._slots, self.stacks = [], {}

    def adapted(self, pieces: list[Piece]) -> Adapted | None:
        """For the rows of `pieces` one after another."""
        if not any(piece.sequence.adapter for piece in pieces):
            return None
        slots = {number: slot for slot, number in enumerate(self._slots) if number}
        rows: list[list[int]] = [[] for _ in self._slots]
        row = 0
        for piece in pieces:
            count = piece.end - piece.start
            if piece.sequence.adapter:
                rows[slots[piece.sequence.adapter]] += range(row, row + count)
            row += count
        ends = np.cumsum([len(own) for own in rows]).astype(np.int32)
        order = np.array([row for own in rows for row in own], np.int64)
        return Adapted(self, send(order, self._device), send(ends, self._device))

    def _halves(self, loras: dict[str, Lora]) -> Iterator[tuple[Place, _Half]]:
        for index, layer in enumerate(self.decoder.layers):
            for name, tensors in _matrices(layer).items():
                if any(tensor in loras for tensor in tensors):
                    yield (index, name), self._half(layer, tensors, loras)

    def _half(self, layer: Layer, tensors: tuple[str, ...], loras: dict[str, Lora]) -> _Half:
        """Tensors of one input side by side, as their matrix has them; each keeps its own ranks."""
        edits = interleaved(layer, self._own.shape)
        a, b = [], []
        for tensor in tensors:
            if (lora := loras.get(tensor)) is None:
                b.append(torch.zeros(self._rows(tensor), 0))
                continue
            a.append(torch.from_numpy(lora.a))
            values = torch.from_numpy(lora.b)
            b.append(edits[tensor](values) if tensor in edits else values)
        parts = torch.cat(a).t(), torch.block_diag(*b).t()  # type: ignore[no-untyped-call]
        return _Half(*(part.to(self._device, self._dtype).contiguous() for part in parts))

    def _rows(self, tensor: str) -> int:
        return self._own.expected[f"{tensor}.weight"][int(self._own.turned)]


def _matrices(layer: Layer) -> dict[str, tuple[str, ...]]:
    return {"qkv": layer.qkv, "out": (layer.out,), "up": layer.up, "down": (layer.down,)}
