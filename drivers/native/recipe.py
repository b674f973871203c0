"""How each packed matrix and array of a model is made from the tensors of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import PLAIN, QUANTISED, Bytes, Checkpoint, Floats, values_of
from ..families.decoder import Decoder, Layer
from . import formats
from .architecture import ROWS, Architecture, up_to

# Values of a matrix that are made at a time.
_SLICE = 1 << 20
_STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def natural_dtype(types: dict[str, int]) -> str:
    """The dtype that suits how a model is stored; `types` counts the values of each type."""
    counts = {
        "float32": types.get("F32", 0),
        "bfloat16": types.get("F16", 0) + types.get("BF16", 0),
        "quantised": sum(types.get(kind, 0) for kind in QUANTISED),
    }
    most = max(counts, key=counts.__getitem__)
    if most != "quantised":
        return most
    four = sum(types.get(kind, 0) for kind in formats.FOUR_BITS)
    return "int4" if 2 * four >= counts["quantised"] else "int8"


class Layout(NamedTuple):
    """How a matrix of a layer is put together. `tensors` are one below the other, without `.weight`; `order`
    [rows] says which of their rows comes where, -1 being a row of zeros. Their columns are `pieces` equal
    parts, each padded to `width`, or as they are when that is 0."""

    tensors: tuple[str, ...]
    order: NDArray[np.int64]
    pieces: int = 1
    width: int = 0

    def columns(self, values: NDArray[Any], cols: int) -> NDArray[Any]:
        """Values [n, columns of the tensors], padded to [n, cols]."""
        count, piece = len(values), values.shape[1] // self.pieces
        if values.shape[1] == cols:
            return values
        padded = np.zeros((count, cols), values.dtype)
        width = self.width or cols
        apart = padded[:, : self.pieces * width].reshape(count, self.pieces, width)
        apart[..., :piece] = values.reshape(count, self.pieces, piece)
        return padded


def layouts(architecture: Architecture, layer: Layer) -> dict[str, Layout]:
    """Those of the matrices qkv, out, up and down of a layer."""
    hidden = _below(architecture.hidden, up_to(architecture.hidden, ROWS))
    return {
        "qkv": Layout(layer.qkv, _head_order(architecture)),
        "out": Layout((layer.out,), hidden, architecture.heads, architecture.head_dim),
        "up": Layout(layer.up, _up_order(architecture)),
        "down": Layout((layer.down,), hidden),
    }


class _Part(NamedTuple):
    """A tensor that is rows of a matrix: uint8 [rows, bytes] if quantised, else values [rows, cols]."""

    type: str
    rows: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix [rows, cols]."""

    name: str
    format: str
    rows: int
    cols: int
    turned: bool
    layout: Layout

    def slices(self, checkpoint: Checkpoint) -> Iterator[Callable[[], Bytes]]:
        """What makes the packed bytes, some blocks of rows each; any thread may call it."""
        parts = [_part(checkpoint, f"{name}.weight", self.turned) for name in self.layout.tensors]
        step = max(ROWS, _SLICE // self.cols // ROWS * ROWS)
        for begin in range(0, self.rows, step):
            order = self.layout.order[begin : begin + step]
            yield partial(self._blocks, parts, order)

    def _blocks(self, parts: list[_Part], order: NDArray[np.int64]) -> Bytes:
        return formats.interleave(self.format, self._gather(parts, order))

    def _gather(self, parts: list[_Part], order: NDArray[np.int64]) -> Bytes:
        if len(parts) == 1 and self._straight(order):
            return self._made(parts[0], parts[0].rows[order[0] : order[-1] + 1])
        rows = np.zeros((len(order), formats.row_bytes(self.format, self.cols)), np.uint8)
        begin = 0
        for part in parts:
            places = np.flatnonzero((order >= begin) & (order < begin + len(part.rows)))
            if len(places):
                rows[places] = self._made(part, part.rows[order[places] - begin])
            begin += len(part.rows)
        return rows

    @staticmethod
    def _straight(order: NDArray[np.int64]) -> bool:
        """Whether it is a range of rows, without padding."""
        return bool(order[0] >= 0 and (np.diff(order) == 1).all())

    def _made(self, part: _Part, rows: NDArray[Any]) -> Bytes:
        if part.type in PLAIN:
            return formats.to_rows(self.format, part.type, self.layout.columns(rows, self.cols))
        block, size = QUANTISED[part.type]
        if rows.shape[1] // size * block == self.cols:
            return formats.to_rows(self.format, part.type, rows)
        values = self.layout.columns(values_of(part.type, rows), self.cols)
        return formats.to_rows(self.format, "F32", values)


def _part(checkpoint: Checkpoint, name: str, turned: bool) -> _Part:
    """The tensor as a matrix of output rows; `turned`: Hugging Face has it [in, out]."""
    raw = checkpoint.raw(name)
    if raw.type in PLAIN:
        values = raw.rows.view(_STORED[raw.type])
        return _Part(raw.type, values.T if raw.transposed != turned else values)
    if raw.transposed == turned:
        return _Part(raw.type, raw.rows)
    values = checkpoint.read(name)
    return _Part("F32", values.T if turned else values)


class Recipe:
    """Everything that is packed of one model in one dtype."""

    def __init__(
        self, decoder: Decoder, architecture: Architecture, checkpoint: Checkpoint, dtype: str
    ) -> None:
        self._decoder, self._architecture = decoder, architecture
        self.checkpoint, self._dtype = checkpoint, dtype
        self._sizes = architecture.matrices()

    def matrices(self) -> Iterator[Matrix]:
        """In the order in which a step reads them."""
        decoder, architecture = self._decoder, self._architecture
        vocabulary = _below(architecture.vocab_size, self._sizes["head"][0])
        if not architecture.tied:
            yield self._vocabulary("embedding", Layout((decoder.embedding,), vocabulary))
        for i, layer in enumerate(decoder.layers):
            for name, layout in layouts(architecture, layer).items():
                yield self._matrix(f"layer.{i}.{name}", layout, decoder.turned)
        yield self._vocabulary("head", Layout((decoder.head or decoder.embedding,), vocabulary))

    def _vocabulary(self, name: str, layout: Layout) -> Matrix:
        return self._matrix(name, layout, turned=False, vocabulary=True)

    def _matrix(self, name: str, layout: Layout, turned: bool, vocabulary: bool = False) -> Matrix:
        rows, cols = self._sizes[name]
        apart = layout.pieces > 1 and layout.width != self._architecture.head_size
        found = set()
        for tensor in layout.tensors:
            entry = self.checkpoint.entry(f"{tensor}.weight")
            type_ = entry.type if entry.transpose == turned or entry.type in PLAIN else "F32"
            found.add(formats.format_of(type_, self._dtype, vocabulary, not apart))
        format_ = found.pop() if len(found) == 1 else "int8"
        return Matrix(name, format_, rows, cols, turned, layout)

    def arrays(self) -> Iterator[tuple[str, Floats]]:
        """Plain float32 arrays, padded with zeros."""
        decoder, architecture = self._decoder, self._architecture
        sizes = architecture.arrays()
        made: dict[str, tuple[str, ...]] = {"final_norm": (decoder.final_norm,)}
        orders = {"qkv": _head_order(architecture), "up": _up_order(architecture)}
        for i, layer in enumerate(decoder.layers):
            name = f"layer.{i}."
            made |= {f"{name}norm1": (layer.norm1,), f"{name}norm2": (layer.norm2,)}
            made |= {f"{name}qkv": layer.qkv, f"{name}out": (layer.out,)}
            made |= {f"{name}up": layer.up, f"{name}down": (layer.down,)}
            if layer.head_norms:
                made |= {f"{name}q_norm": layer.head_norms[:1], f"{name}k_norm": layer.head_norms[1:]}
        for target, tensors in made.items():
            for suffix, kind in (("", "weight"), (".bias", "bias")):
                if size := sizes.get(f"{target}{suffix}"):
                    parts = [self.checkpoint.read(f"{tensor}.{kind}") for tensor in tensors]
                    whole = np.concatenate([part.reshape(-1) for part in parts])
                    order = orders.get(target.rpartition(".")[2], _below(len(whole), size[1]))
                    padded = np.append(whole, np.float32(0))[order]  # -1 is the zero
                    yield f"{target}{suffix}", padded.reshape(size)
        if decoder.rotation:
            yield "frequencies", decoder.rotation.frequencies.reshape(1, -1)
        else:
            positions = self.checkpoint.read(f"{decoder.positions}.weight")
            wide = sizes["positions"][1]
            yield "positions", np.pad(positions, ((0, 0), (0, wide - positions.shape[1])))


def _head_order(architecture: Architecture) -> NDArray[np.int64]:
    heads = architecture.heads + 2 * architecture.kv_heads
    return _spread(heads, architecture.head_size, architecture.head_dim).reshape(-1)


def _up_order(architecture: Architecture) -> NDArray[np.int64]:
    if not architecture.gated:
        return _below(architecture.inner, architecture.up_rows)
    gate, up = _spread(2, architecture.inner, architecture.inner_padded).reshape(2, -1, ROWS)
    return np.stack([gate, up], 1).reshape(-1)


def _below(count: int, padded: int) -> NDArray[np.int64]:
    """0 … count-1, then -1."""
    return _spread(1, count, padded).reshape(-1)


def _spread(pieces: int, count: int, padded: int) -> NDArray[np.int64]:
    """[pieces, padded]: the numbers of the rows of `pieces` times `count` rows, each piece padded with -1."""
    order = np.full((pieces, padded), -1, np.int64)
    order[:, :count] = np.arange(pieces * count).reshape(pieces, count)
    return order
