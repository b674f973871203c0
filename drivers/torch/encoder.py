"""Encoders of the BERT family in torch. No padding anywhere: the tokens of all texts are rows of one matrix,
those of the longest texts last, and attention takes the texts of one length together.

Sums, norms and what is made of the vectors are float32, whatever the matrices are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from llmasos.syscalls.types import Encodes
from numpy.typing import NDArray
from torch.nn import functional

from ..families.encoder import Encoder
from .config import ACTIVATIONS, Activation
from .linear import Linear
from .weights import Checkpoint

_HEAD_ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu}

# [n, length, hidden] -> [n, hidden]
_POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda x: x[:, 0],
    "lasttoken": lambda x: x[:, -1],
    "max": lambda x: x.amax(1),
    "mean": lambda x: x.mean(1),
    "mean_sqrt_len": lambda x: x.sum(1) / x.shape[1] ** 0.5,
}


class _Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)


class _Layer(NamedTuple):
    """x = norm1(x + out(attention(qkv(x)))); x = norm2(x + down(act(up(x))))."""

    qkv: Linear
    out: Linear
    norm1: _Norm
    up: Linear
    down: Linear
    norm2: _Norm


class _Group(NamedTuple):
    """`texts` of `length` tokens, whose rows begin at `start`."""

    start: int
    texts: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.texts * self.length)


class TorchEncoder:
    """A resident encoder. `weights_bytes` counts what it holds."""

    def __init__(
        self, described: Encoder, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.described = described
        self._device, self._dtype = device, dtype
        self._checkpoint = checkpoint
        self.weights_bytes = 0
        self._words = self._tensor("embeddings.word_embeddings.weight")
        self._positions = self._tensor("embeddings.position_embeddings.weight")
        segmented = described.segments > 0
        self._segments = self._tensor("embeddings.token_type_embeddings.weight") if segmented else None
        self._norm = self._norm_of("embeddings.LayerNorm")
        self._layers = [self._layer(f"encoder.layer.{i}") for i in range(described.layers)]
        self._pooler = self._linear("pooler.dense") if described.encodes is Encodes.CLASSIFY else None
        self._classifier = self._linear("classifier") if described.encodes is not Encodes.EMBED else None
        del self._checkpoint

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self._checkpoint.tensor(name, torch.float32).to(self._device)
        self.weights_bytes += tensor.nbytes
        return tensor

    def _norm_of(self, name: str) -> _Norm:
        return _Norm(self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"), self.described.epsilon)

    def _linear(self, *names: str) -> Linear:
        """Matrices of one input as one."""
        weight = torch.cat([self._checkpoint.tensor(f"{name}.weight", self._dtype) for name in names])
        bias = torch.cat([self._checkpoint.tensor(f"{name}.bias", self._dtype) for name in names])
        layer = Linear(weight, bias, self._device)
        self.weights_bytes += layer.nbytes
        return layer

    def _layer(self, name: str) -> _Layer:
        attention = f"{name}.attention"
        return _Layer(
            qkv=self._linear(*(f"{attention}.self.{part}" for part in ("query", "key", "value"))),
            out=self._linear(f"{attention}.output.dense"),
            norm1=self._norm_of(f"{attention}.output.LayerNorm"),
            up=self._linear(f"{name}.intermediate.dense"),
            down=self._linear(f"{name}.output.dense"),
            norm2=self._norm_of(f"{name}.output.LayerNorm"),
        )

    def encode(self, tokens: NDArray[np.uint32], lengths: list[int], pairs: list[int]) -> NDArray[np.float32]:
        """Rows [texts, width], or [tokens, width], in the order of the texts. `tokens` [sum(lengths)]."""
        sizes = np.asarray(lengths, np.int64)
        order = np.argsort(sizes, kind="stable")
        sizes = sizes[order]
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)  # place in its text, of each row
        before = np.cumsum(np.asarray(lengths)) - np.asarray(lengths)
        rows = np.repeat(before[order], sizes) + within  # where each row's token lies in `tokens`
        lengths_there, counts = np.unique(sizes, return_counts=True)
        starts = np.cumsum(lengths_there * counts) - lengths_there * counts
        groups = [_Group(*map(int, one)) for one in zip(starts, counts, lengths_there, strict=True)]
        second = np.repeat(np.asarray(pairs, np.int64)[order], sizes) if any(pairs) else None
        x = self._embedded(tokens[rows].astype(np.int64), within, second)
        for layer in self._layers:
            x = layer.norm1(x + layer.out(self._attention(layer.qkv(self._cast(x)), groups)))
            x = layer.norm2(x + layer.down(self._act(layer.up(self._cast(x)))))
        made = self._made(x, groups)
        back = np.empty(len(made), np.int64)
        back[rows if self.described.encodes is Encodes.TOKENS else order] = np.arange(len(made))
        found: NDArray[np.float32] = made.float().cpu().numpy()
        return found[back]

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype)

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.described.activation](x)

    def _ids(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(ids).to(self._device)

    def _embedded(
        self, tokens: NDArray[np.int64], within: NDArray[np.int64], second: NDArray[np.int64] | None
    ) -> torch.Tensor:
        x = functional.embedding(self._ids(tokens), self._words)
        x = x + functional.embedding(self._ids(within + self.described.offset), self._positions)
        if self._segments is not None:
            if second is None or self.described.segments < 2:
                x = x + self._segments[0]
            else:
                of_second = ((second > 0) & (within >= second)).astype(np.int64)
                x = x + functional.embedding(self._ids(of_second), self._segments)
        return self._norm(x)

    def _attention(self, qkv: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
        """[rows, hidden] of [rows, 3 · hidden]."""
        heads, hidden = self.described.heads, self.described.hidden
        out = torch.empty(len(qkv), hidden, dtype=qkv.dtype, device=qkv.device)
        for group in groups:
            split = qkv[group.rows].view(group.texts, group.length, 3, heads, hidden // heads)
            q, k, v = split.permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(q, k, v)
            out[group.rows] = seen.transpose(1, 2).reshape(-1, hidden)
        return out

    def _made(self, x: torch.Tensor, groups: list[_Group]) -> torch.Tensor:
        """What the model makes of the last vectors, in their order."""
        if self._classifier is not None and self._pooler is None:
            return self._classifier(self._cast(x))
        poolings = self.described.poolings or ("cls",)
        pooled = torch.cat([self._pooled(x, group, poolings) for group in groups])
        if self._pooler is not None and self._classifier is not None:
            activation = _HEAD_ACTIVATIONS[self.described.head_activation]
            return self._classifier(activation(self._pooler(self._cast(pooled))))
        return functional.normalize(pooled, dim=-1) if self.described.normalised else pooled

    def _pooled(self, x: torch.Tensor, group: _Group, poolings: tuple[str, ...]) -> torch.Tensor:
        each = x[group.rows].view(group.texts, group.length, -1)
        return torch.cat([_POOLINGS[name](each) for name in poolings], dim=-1)
