"""Decode steps with fixed shapes, captured once as CUDA graphs and replayed: a step of a small model is
hundreds of launches, which the host cannot issue as fast as the device runs them.

A batch is padded to the next of a few sizes. Padding computes token 0 into a scratch block and is ignored.
What changes between steps (token ids, positions, slots, block tables, lengths) lies in buffers that the graph
reads; so it is valid for any context length. Graphs are captured when their size is first needed and share
one pool of memory. Without capture the same steps run operator by operator, on any device (tests).

When this was written no device was at hand: the steps had been run, their capture and replay had not
(docs/decisions.md, "CUDA: written, not yet run").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..base import BLOCK_TOKENS
from ..mirror import Piece
from .attention import FEW_ROWS, Coming, FlatRows, KvPool, blocks_of, fill_tables
from .lora import Place
from .models import Model
from .ops import PagedRows, Turn
from .transfer import send

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST_ROWS = SIZES[-1]


class StaticRows:
    """A batch of `size` rows at fixed addresses: see attention.StepRows."""

    def __init__(self, pool: KvPool, size: int, tables: torch.Tensor, longest: int) -> None:
        self._pool, self._size = pool, size
        self._inputs = torch.zeros((4, size), dtype=torch.int64, device=pool.device)
        self.tokens, self.positions, self._slots, lengths = self._inputs.unbind()
        self._tables = tables[:size]
        self._paged = PagedRows(self._tables, lengths, longest)
        self.set([], None)

    def set(self, pieces: list[Piece], coming: Coming | None) -> None:
        """Takes the rows of `pieces` in; the rest is padding."""
        inputs = np.zeros((4, self._size), np.int64)
        inputs[2], inputs[3] = self._pool.scratch * BLOCK_TOKENS, 1
        width = max(map(blocks_of, pieces), default=1)
        tables = np.full((self._size, width), self._pool.scratch, np.int32)
        if pieces:
            flat = FlatRows(pieces)
            inputs[:, : len(flat)] = flat.tokens, flat.positions, flat.slots, flat.positions + 1
            fill_tables(pieces, tables)
        self._inputs.copy_(send(inputs, self._pool.device))
        self._tables[:, :width].copy_(send(tables, self._pool.device))
        if coming is not None:
            coming.fill(self.tokens, pieces)

    def attend_heads(
        self, layer: int, rows: torch.Tensor, scale: float, window: int = 0, turn: Turn | None = None
    ) -> torch.Tensor:
        """See StepRows."""
        ops, pool = self._pool.ops, self._pool.layer(layer)
        ops.place(rows, pool, self._slots, turn)
        query = rows[:, : self._pool.shape.heads]
        return ops.attend(query, pool, self._paged, scale, window, 0.0, None).flatten(1)

    def adapt(self, place: Place, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See StepRows: `StaticDecode.takes` no rows with adapters."""
        return y


class DecodeGraph:
    """Steps of one size. `logits` [size, vocab_size] and `finite` [size] are buffers of all sizes, written by
    each."""

    def __init__(self, model: Model, rows: StaticRows, logits: torch.Tensor, finite: torch.Tensor) -> None:
        self._model, self.rows, self._logits, self._finite = model, rows, logits, finite
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, pool: Any) -> None:
        """On padding alone. The first run, outside of the graph, lets libraries set themselves up and Triton
        compile its kernels. It needs no stream of its own: cuBLAS would keep a workspace for each."""
        self._compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._compute()
        self._graph = graph

    def run(self) -> None:
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def _compute(self) -> None:
        hidden = self._model.forward(self.rows)
        self._finite.copy_(hidden.isfinite().all(dim=1))
        self._logits.copy_(self._model.logits(hidden))


class StaticDecode:
    """The graphs of one resident model. `captured`: replay them; else run the same steps one by one."""

    def __init__(self, model: Model, pool: KvPool, context_length: int, captured: bool) -> None:
        self._model, self._pool, self._captured = model, pool, captured
        self._longest = context_length
        size, device = (MOST_ROWS, -(-context_length // BLOCK_TOKENS)), pool.device
        self._tables = torch.full(size, pool.scratch, dtype=torch.int32, device=device)
        self._logits = torch.empty((MOST_ROWS, model.shape.vocab_size), device=device)
        self._finite = torch.empty(MOST_ROWS, dtype=torch.bool, device=device)
        self._graphs: dict[int, DecodeGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if captured else None

    @staticmethod
    def takes(pieces: list[Piece]) -> bool:
        """Whether a step is one of few rows a sequence that all choose, if anything, a token each, and none
        has an adapter."""
        rows = [piece.end - piece.start for piece in pieces]
        plain = not any(piece.beams or piece.scores_prompt or piece.sequence.adapter for piece in pieces)
        return plain and max(rows) <= FEW_ROWS and sum(rows) <= MOST_ROWS

    def run(self, pieces: list[Piece], coming: Coming | None) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logits [R, vocab_size] and whether all is finite [R], for the rows of `pieces` one after
        another. Both are valid until the next run."""
        count = sum(piece.end - piece.start for piece in pieces)
        graph = self._graph(next(size for size in SIZES if size >= count))
        graph.rows.set(pieces, coming)
        graph.run()
        return self._logits[:count], self._finite[:count]

    def _graph(self, size: int) -> DecodeGraph:
        if size not in self._graphs:
            rows = StaticRows(self._pool, size, self._tables, self._longest)
            graph = DecodeGraph(self._model, rows, self._logits[:size], self._finite[:size])
            if self._captured:
                graph.capture(self._memory)
            self._graphs[size] = graph
        return self._graphs[size]
