"""A frozen base on the weights that the native engine serves with: both map the same file, so its pages are
in memory once. A matrix is turned into numbers piece by piece as it is multiplied, forward and backward, and
these numbers are not kept.

Only the CPU's packed files can be mapped so. On CUDA the weights are in the worker's memory, which another
process could open too (cudaIpcOpenMemHandle); this is not built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from ..families.decoder import Decoder
from ..native import pack
from ..native.architecture import GROUP, ROWS, Architecture
from ..native.recipe import Layout, layouts

_PIECE = 1 << 19
"""Values that are numbers at a time."""

_LOOKED_UP = 64  # rows of an embedding, whose blocks are unpacked together

Order = NDArray[np.int64]


class Matrix:
    """Some rows of a packed matrix, by its row numbers in `order`, without its padding: a weight [out, in].
    `columns` picks the real ones where padding lies between them."""

    def __init__(
        self, packed: pack.Packed, name: str, order: Order, width: int, columns: Order | None = None
    ) -> None:
        self._packed = packed  # which keeps the file mapped
        self._blocks, self._unpack = _view(packed.tensors[name])
        self._order, self._width = order, width
        self._columns = None if columns is None else torch.from_numpy(columns)
        # Whole blocks in even steps, as those of most models: then nothing is unpacked in vain.
        first, last = order[0] // ROWS, order[-1] // ROWS
        count = -(-len(order) // ROWS)
        stride = max(1, int(last - first) // max(1, count - 1))
        numbers = first + stride * np.arange(count)
        whole = (numbers[:, None] * ROWS + np.arange(ROWS)).reshape(-1)[: len(order)]
        self._even = self._blocks[first : last + 1 : stride] if np.array_equal(whole, order) else None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._order), self._width

    @property
    def piece(self) -> int:
        """Rows that are numbers at a time."""
        number = -(-len(self._order) * self._width // _PIECE)
        return -(-len(self._order) // number // ROWS) * ROWS

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """The numbers, some rows [rows, in] at a time, about as many each time."""
        for begin in range(0, len(self._order), self.piece):
            place = slice(begin, min(begin + self.piece, len(self._order)))
            yield place, self._columns_of(self._rows(place)).to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] by their numbers [n]."""
        found = []
        for some in torch.split(torch.from_numpy(self._order)[ids], _LOOKED_UP):
            rows = self._unpack(self._blocks[some // ROWS]).view(len(some), ROWS, -1)
            found.append(self._columns_of(rows[torch.arange(len(some)), some % ROWS]))
        return torch.cat(found)

    def _rows(self, place: slice) -> torch.Tensor:
        if self._even is not None:
            blocks = self._even[place.start // ROWS : -(-place.stop // ROWS)]
            return self._unpack(blocks)[: place.stop - place.start]
        wanted = self._order[place]
        first = int(wanted.min()) // ROWS
        covering = self._unpack(self._blocks[first : int(wanted.max()) // ROWS + 1])
        return covering[torch.from_numpy(wanted - first * ROWS)]

    def _columns_of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, : self._width] if self._columns is None else rows[:, self._columns]


def _view(tensor: pack.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The blocks of a packed matrix where they lie, and what makes rows of numbers of some of them. The
    formats are those of native/formats.py."""
    data = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.address))
    raw, blocks = torch.from_numpy(data), tensor.rows // ROWS
    match tensor.format:
        case "float32":
            return raw.view(torch.float32).view(blocks, tensor.cols, ROWS), _from_float32
        case "bfloat16":
            return raw.view(torch.bfloat16).view(blocks, tensor.cols // 2, ROWS, 2), _from_bfloat16
        case "int8":
            return raw.view(blocks, tensor.cols // GROUP, -1), _from_int8
        case _:
            return raw.view(blocks, tensor.cols // GROUP, -1), _from_int4


def _from_float32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])


def _from_bfloat16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.transpose(1, 2).reshape(-1, 2 * blocks.shape[1])


def _words(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` words of each row and group: uint8 [blocks, 16, groups, 4 * count]."""
    words = blocks[..., : 4 * count * ROWS].view(torch.int32).view(*blocks.shape[:2], count, ROWS)
    return words.permute(0, 3, 1, 2).contiguous().view(torch.uint8)


def _halves(blocks: torch.Tensor, begin: int) -> torch.Tensor:
    """A float16 of each row and group as float32: [blocks, 16, groups, 1]."""
    found = blocks[..., begin : begin + 2 * ROWS].contiguous().view(torch.float16)
    return found.transpose(1, 2).float().unsqueeze(3)


def _from_int8(blocks: torch.Tensor) -> torch.Tensor:
    levels = _words(blocks, 8).bitwise_xor_(128).view(torch.int8).float()
    return levels.mul_(_halves(blocks, 32 * ROWS)).view(len(blocks) * ROWS, -1)


def _from_int4(blocks: torch.Tensor) -> torch.Tensor:
    words = _words(blocks, 4)
    half = words.shape[3]
    levels = torch.empty(*words.shape[:3], 2 * half)
    levels[..., :half] = words & 15
    levels[..., half:] = words.bitwise_right_shift_(4)
    levels.mul_(_halves(blocks, 16 * ROWS)).add_(_halves(blocks, 18 * ROWS))
    return levels.view(len(blocks) * ROWS, -1)


class _Product(torch.autograd.Function):
    """x @ weightᵀ for x [n, in]; what has a gradient is x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        ctx.matrix = matrix
        if matrix.shape[0] * matrix.shape[1] <= _PIECE:
            return functional.linear(x, next(matrix.pieces(x.dtype))[1])
        made = x.new_empty(len(x), matrix.shape[0])
        for place, weight in matrix.pieces(x.dtype):
            torch.mm(x, weight.t(), out=made[:, place])
            del weight  # before there is a next one
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        found = None
        for place, weight in ctx.matrix.pieces(gradient.dtype):
            part = gradient[:, place]
            found = part @ weight if found is None else found.addmm_(part, weight)
            del weight
        assert found is not None
        return found, None


class MappedLinear(nn.Linear):
    """Looks like a Linear, for peft; there is no weight but the mapped one."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.register_parameter("bias", None if bias is None else _frozen(bias))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The numbers, anew each time."""
        return torch.cat([piece for _, piece in self.matrix.pieces(torch.float32)])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        made: torch.Tensor = _Product.apply(input.to(dtype).flatten(0, -2), self.matrix)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            made = made + self.bias.to(dtype)
        return made.view(*input.shape[:-1], self.out_features)


class MappedEmbedding(nn.Embedding):
    def __init__(self, matrix: Matrix) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The numbers, anew each time."""
        return torch.cat([piece for _, piece in self.matrix.pieces(torch.float32)])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.matrix.lookup(input.reshape(-1)).float().view(*input.shape, -1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def place(model: nn.Module, decoder: Decoder, packed: pack.Packed) -> None:
    """Puts the packed weights into a model of transformers that has none (on the meta device)."""
    _Placing(model, decoder, packed).all()


class _Placing:
    def __init__(self, model: nn.Module, decoder: Decoder, packed: pack.Packed) -> None:
        self._model, self._decoder, self._packed = model, decoder, packed
        self._architecture: Architecture = packed.architecture

    def all(self) -> None:
        decoder, a = self._decoder, self._architecture
        vocabulary = np.arange(a.vocab_size)
        head = Matrix(self._packed, "head", vocabulary, a.hidden)
        embedding = head if a.tied else Matrix(self._packed, "embedding", vocabulary, a.hidden)
        self._put(decoder.embedding, MappedEmbedding(embedding))
        output: Any = self._model
        self._replace(output.get_output_embeddings(), MappedLinear(head, None))
        if decoder.positions:
            self._module(decoder.positions).weight = _frozen(self._array("positions", a.hidden))
        self._norm(decoder.final_norm, "final_norm", a.hidden)
        for i, layer in enumerate(decoder.layers):
            name = f"layer.{i}."
            self._norm(layer.norm1, f"{name}norm1", a.hidden)
            self._norm(layer.norm2, f"{name}norm2", a.hidden)
            if layer.head_norms:
                for target, source in zip(layer.head_norms, ("q_norm", "k_norm"), strict=True):
                    self._norm(target, f"{name}{source}", a.head_size)
            for source, layout in layouts(a, layer).items():
                self._linears(f"{name}{source}", layout)

    def _linears(self, source: str, layout: Layout) -> None:
        """Modules whose rows lie one below the other before the layout's order put them elsewhere."""
        order, places = layout.order, np.flatnonzero(layout.order >= 0)
        rows = np.empty(len(places), np.int64)
        rows[order[places]] = places
        bias = self._packed.tensors.get(f"{source}.bias")
        biases = None if bias is None else torch.from_numpy(pack.unpack(bias).reshape(-1))
        begin = 0
        for target in layout.tensors:
            module = self._module(target)
            # Conv1D has its own names.
            height = module.out_features if isinstance(module, nn.Linear) else module.nf
            width = module.in_features if isinstance(module, nn.Linear) else module.nx
            mine = rows[begin : begin + height]
            begin += height
            piece = width // layout.pieces
            columns = None
            if layout.width > piece:
                columns = (np.arange(layout.pieces)[:, None] * layout.width + np.arange(piece)).reshape(-1)
            matrix = Matrix(self._packed, source, mine, width, columns)
            self._put(
                target, MappedLinear(matrix, None if biases is None else biases[torch.from_numpy(mine)])
            )

    def _norm(self, target: str, source: str, width: int) -> None:
        module = self._module(target)
        module.weight = _frozen(self._array(source, width)[0])
        if f"{source}.bias" in self._packed.tensors:
            module.bias = _frozen(self._array(f"{source}.bias", width)[0])

    def _array(self, name: str, width: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(pack.unpack(self._packed.tensors[name])[:, :width]))

    def _module(self, name: str) -> Any:
        return self._model.get_submodule(f"{self._decoder.prefix}{name}")

    def _put(self, name: str, module: nn.Module) -> None:
        self._replace(self._module(name), module)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        name = next(name for name, module in self._model.named_modules() if module is old)
        parent, _, last = name.rpartition(".")
        setattr(self._model.get_submodule(parent), last, new)
