"""Which part of a decoder a rank of a group computes (tensor parallel; Megatron-LM, Shoeybi et al., 2019).

A layer's heads and the inner width of its MLP are divided, so that a rank needs the others for two sums only:
after the attention and after the MLP. The vocabulary is divided too, in the embedding and in the head. Norms
and learned positions are everywhere. Nothing has to divide evenly.

Plain tensors and collectives: the dispatch of DTensor costs a decode step 3 to 6 times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from llmasos.syscalls import errors
from torch.nn import functional

from ..adapter import Lora
from ..families.decoder import Decoder
from .config import Shape
from .ranks import Ranks
from .weights import Checkpoint

Matrix = Callable[[torch.Tensor], torch.Tensor]
"""y [T, out] of x [T, in]."""

Lookup = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Embeddings [T, hidden] of token ids [T] by a matrix."""


def share(count: int, rank: int, size: int) -> range:
    """The rank's share of `count` things in a row; shares differ by one at most."""
    return range(rank * count // size, (rank + 1) * count // size)


def heads_of(shape: Shape, rank: int, size: int) -> tuple[range, list[int]]:
    """The rank's query heads and the KV heads that it keeps. Query heads of one KV head stay together while
    there are enough KV heads; then ranks keep the same one, or one for each query head."""
    group = shape.heads // shape.kv_heads
    if size <= shape.kv_heads:
        kept = share(shape.kv_heads, rank, size)
        return range(kept.start * group, kept.stop * group), list(kept)
    queries = share(shape.heads, rank, size)
    each = [head // group for head in queries]
    return queries, each if len(set(each)) > 1 else each[:1]


class Shard:
    """What a rank computes of the decoder `whole`: `decoder` is that as a decoder, but for `vocabulary`, the
    token ids whose rows it has. Raises UnsupportedModel when a rank would have nothing to do."""

    def __init__(self, whole: Decoder, ranks: Ranks) -> None:
        shape, rank, size = whole.shape, ranks.rank, ranks.size
        if size > min(shape.heads, whole.inner, shape.vocab_size):
            raise errors.UnsupportedModel(
                f"a model with {shape.heads} heads cannot be divided among {size} ranks",
                hint="use a smaller group",
            )
        self.ranks = ranks
        queries, kept = heads_of(shape, rank, size)
        inner = share(whole.inner, rank, size)
        self.vocabulary = share(shape.vocab_size, rank, size)
        q, kv = _rows(list(queries), shape.head_dim), _rows(kept, shape.head_dim)
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        fused = torch.cat((q, wide + kv, wide + narrow + kv))
        mlp = torch.tensor(inner)
        # By a tensor's name, without .weight: the outputs or the inputs that are kept.
        self.outputs: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        for layer in whole.layers:
            parts = (fused,) if len(layer.qkv) == 1 else (q, kv, kv)
            self.outputs |= dict(zip(layer.qkv, parts, strict=True))
            self.outputs |= dict.fromkeys(layer.up, mlp)
            self.inputs |= {layer.out: q, layer.down: mlp}
        self.decoder = replace(
            whole,
            shape=replace(shape, heads=len(queries), kv_heads=len(kept)),
            inner=len(inner),
            expected=whole.expected | dict(self._shapes(whole)),
        )

    def _shapes(self, whole: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of the matrices that are cut."""
        for dim, cut in ((int(whole.turned), self.outputs), (1 - int(whole.turned), self.inputs)):
            for name, kept in cut.items():
                shape = list(whole.expected[f"{name}.weight"])
                shape[dim] = len(kept)
                yield f"{name}.weight", tuple(shape)

    def cut(self, loras: dict[str, Lora]) -> dict[str, Lora]:
        """This rank's part of an adapter. Of what will be summed each rank adds its share."""
        return {name: self._cut(name, lora) for name, lora in loras.items()}

    def _cut(self, name: str, lora: Lora) -> Lora:
        if (kept := self.outputs.get(name)) is not None:
            return Lora(lora.a, lora.b[kept.numpy()])
        return Lora(lora.a[:, self.inputs[name].numpy()], lora.b)


class Part:
    """A rank's part of a checkpoint: the tensors by their names, cut."""

    def __init__(self, shard: Shard, checkpoint: Checkpoint) -> None:
        self._shard, self._checkpoint = shard, checkpoint
        self.ranks, self.decoder = shard.ranks, shard.decoder

    def __contains__(self, name: str) -> bool:
        """The bias of what will be summed is rank 0's to add."""
        summed = name.removesuffix(".bias") in self._shard.inputs
        return name in self._checkpoint and not (summed and self.ranks.rank > 0)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See Checkpoint."""
        tensor, shard = self._checkpoint.tensor(name, dtype), self._shard
        layer, _, kind = name.rpartition(".")
        bias, turned = kind == "bias", int(self.decoder.turned)
        if (kept := shard.outputs.get(layer)) is not None:
            return tensor.index_select(0 if bias else turned, kept)
        if (kept := shard.inputs.get(layer)) is not None and not bias:
            return tensor.index_select(1 - turned, kept)
        if layer in (self.decoder.embedding, self.decoder.head):
            return tensor[shard.vocabulary.start : shard.vocabulary.stop].clone()
        return tensor

    def lookup(self) -> Lookup:
        return partial(_embed, self.ranks, self._shard.vocabulary.start)

    def head(self, matrix: Matrix) -> Matrix:
        """All logits, of each rank's."""
        ranks, count = self.ranks, self.decoder.shape.vocab_size
        widths = [len(share(count, rank, ranks.size)) for rank in range(ranks.size)]
        return lambda x: ranks.side_by_side(matrix(x), widths)


def _embed(ranks: Ranks, first: int, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Lookup by this rank's rows of the matrix, which begin at token id `first`."""
    places = tokens - first
    elsewhere = (places < 0) | (places >= len(weight))
    rows = functional.embedding(places.masked_fill(elsewhere, 0), weight)
    return ranks.sum(rows.masked_fill_(elsewhere[:, None], 0.0))


def _rows(heads: list[int], dim: int) -> torch.Tensor:
    """The rows of `heads` in a matrix whose outputs are heads of `dim`."""
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()
