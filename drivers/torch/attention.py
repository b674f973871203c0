"""The paged KV pool and attention over it, for any mixture of decoding sequences and prefill chunks.

A step is a flat batch of rows (`Plan`). Pieces of few rows, most of them decoding, are attended together:
through their block tables where a kernel can, else padded to the longest of their group. Each prefill chunk
is computed alone. What has to be gathered is gathered block by block into a workspace that all layers of a
step share, because fresh memory for every gather costs more in page faults than the gather itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from llmasos.syscalls import errors
from torch.nn import functional

from ..base import BLOCK_TOKENS
from ..draft import LONGEST
from ..mirror import Piece
from .config import Shape
from .lora import AdapterBank, Place
from .ops import PagedRows, Turn, ops_for
from .transfer import send

FEW_ROWS = LONGEST + 1
"""A piece of at most so many rows, a token and its guesses, attends row by row where a kernel pages: keys
that are read again come from the cache. A larger chunk is worth a product of matrices."""

PENDING = 0xFFFF_FFFF
"""Stands in a mirror for a token that was chosen on the device and is not known to the host yet."""

# Bytes that one group of decoding sequences may gather in a layer: on a CPU it should stay in the cache.
_GATHER_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
# Scores that are held at once where they have to be written out.
_SCORES = 1 << 26


class KvPool:
    """Keys and values of all layers: [layers, 2 * kv_heads, blocks, 16, head_dim], keys first.

    Head before block, so that a gathered head is one contiguous matrix. Memory is committed only when a
    block is first written (CPU). It starts as zeros: padding is read, though masked, and a NaN in it would
    pass through the mask. One block more than the kernel knows of, `scratch`, takes what padding writes.
    """

    def __init__(self, shape: Shape, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.blocks, self.dtype, self.device = shape, blocks, dtype, device
        self.ops = ops_for(device)
        self.scratch = blocks
        size = (shape.layers, 2 * shape.kv_heads, blocks + 1, BLOCK_TOKENS, shape.head_dim)
        if device.type == "cpu":
            # numpy's zeros come from calloc, untouched; torch.zeros would write every page.
            raw = np.zeros(int(np.prod(size)) * dtype.itemsize, np.uint8)
            self._data = torch.from_numpy(raw).view(dtype).view(size)
        else:
            self._data = torch.zeros(size, dtype=dtype, device=device)
        self._workspace = torch.empty(0, dtype=dtype, device=device)

    @staticmethod
    def block_bytes(shape: Shape, dtype: torch.dtype) -> int:
        return shape.layers * 2 * shape.kv_heads * BLOCK_TOKENS * shape.head_dim * dtype.itemsize

    def layer(self, index: int) -> torch.Tensor:
        """[2 * kv_heads, blocks + 1, 16, head_dim]"""
        return self._data[index]

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Puts kv [T, 2 * kv_heads, head_dim] into slots [T]."""
        self._data[layer].flatten(1, 2).index_copy_(1, slots, kv.transpose(0, 1))

    def gather(self, layer: int, table: torch.Tensor) -> torch.Tensor:
        """The blocks of table [N] as [2 * kv_heads, N, 16 * head_dim]; valid until the next gather."""
        heads, width = 2 * self.shape.kv_heads, BLOCK_TOKENS * self.shape.head_dim
        count = heads * len(table) * width
        if len(self._workspace) < count:
            self._workspace = torch.empty(count, dtype=self.dtype, device=self.device)
        out = self._workspace[:count].view(heads, len(table), width)
        return torch.index_select(self._data[layer].flatten(2, 3), 1, table, out=out)

    def drop_workspace(self) -> None:
        self._workspace = self._workspace.new_empty(0)

    def copy(self, source: int, target: int) -> None:
        self._data[:, :, target] = self._data[:, :, source]

    def clear(self, blocks: list[int]) -> None:
        self._data[:, :, self._checked(blocks)] = 0

    def read_blocks(self, blocks: list[int]) -> bytes:
        """The raw bytes of `blocks`: [layers, 2 * kv_heads, len(blocks), 16, head_dim] in this dtype."""
        return self._data[:, :, self._checked(blocks)].cpu().contiguous().view(torch.uint8).numpy().tobytes()

    def write_blocks(self, blocks: list[int], data: bytes) -> None:
        index = self._checked(blocks)
        size = len(blocks) * self.block_bytes(self.shape, self.dtype)
        if len(data) != size:
            raise errors.Corrupt(f"{len(data)} bytes for {len(blocks)} blocks, {size} expected")
        if blocks:
            layers, heads, _, tokens, width = self._data.shape
            values = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(self.dtype)
            self._data[:, :, index] = values.view(layers, heads, len(blocks), tokens, width).to(self.device)

    def _checked(self, blocks: list[int]) -> torch.Tensor:
        if blocks and not (min(blocks) >= 0 and max(blocks) < self.blocks):
            raise errors.DeviceFault(f"a block is outside the pool of {self.blocks}")
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)


@dataclass(frozen=True, slots=True)
class Coming:
    """Tokens [R] that a step under way chooses, and which of them a sequence will get, by its id."""

    tokens: torch.Tensor
    places: dict[int, int]

    def fill(self, known: torch.Tensor, pieces: list[Piece]) -> None:
        """Puts the tokens that are PENDING at the ends of single-row pieces into `known` [T], in the order of
        the pieces."""
        rows, places, row = [], [], 0
        for piece in pieces:
            row += piece.end - piece.start
            if piece.sequence.tokens[piece.end - 1] == PENDING:
                rows.append(row - 1)
                places.append(self.places[piece.sequence.id])
        if rows:
            at, source = (send(np.array(part), known.device) for part in (rows, places))
            # Where nothing could be chosen the sequence is at its end; any token will do.
            known.index_copy_(0, at, self.tokens.index_select(0, source).clamp_(min=0))


class FlatRows:
    """The rows of some pieces one after another, on the host: int64 arrays of tokens (0 where PENDING),
    positions and slots."""

    def __init__(self, pieces: list[Piece]) -> None:
        # Lists, not arrays: most pieces are one row, and a batch of 64 is to be laid out in 0.1 ms.
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for piece in pieces:
            blocks, places = piece.sequence.blocks, range(piece.start, piece.end)
            tokens.extend(piece.sequence.tokens[piece.start : piece.end])
            positions.extend(places)
            slots.extend([blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in places])
        self.tokens, self.positions, self.slots = (
            np.array(part, np.int64) for part in (tokens, positions, slots)
        )
        self.tokens[self.tokens == PENDING] = 0

    def __len__(self) -> int:
        return len(self.tokens)


def fill_tables(pieces: list[Piece], tables: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Writes the block table of each row of `pieces` into the first rows of tables [R, width]."""
    row = 0
    for piece in pieces:
        rows = piece.end - piece.start
        own = piece.sequence.blocks[: blocks_of(piece)]
        tables[row : row + rows, : len(own)] = own
        row += rows


def _of_the_last(queries: int, length: int, device: torch.device) -> torch.Tensor:
    """What the last `queries` of `length` positions see, [queries, length]."""
    if device.type == "cpu":
        return torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler: seconds

    return causal_lower_right(queries, length)  # never written out by flash attention


def blocks_of(piece: Piece) -> int:
    return -(-piece.end // BLOCK_TOKENS)


class StepRows(Protocol):
    """What a model of ours is told of a step: token ids and positions [T], and who attends."""

    tokens: torch.Tensor
    positions: torch.Tensor

    def attend_heads(
        self, layer: int, rows: torch.Tensor, scale: float, window: int = 0, turn: Turn | None = None
    ) -> torch.Tensor:
        """rows [T, heads + 2 * kv_heads, head_dim]: queries, keys and values of a layer, overwritten. Keys
        and values are turned and kept, then queries attend. Returns [T, heads * head_dim]."""
        ...

    def adapt(self, place: Place, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y [T, out], to which the rows' adapters have added what they make of x [T, in]."""
        ...


@dataclass(slots=True)
class _Group:
    """Pieces computed together: rows `first` … of the flat batch, `queries` rows each. `length` is the
    longest context; `masks` is what to add to the scores for each window size, None where nothing is hidden
    but by causality, the last row seeing everything."""

    first: int
    sequences: int
    queries: int
    length: int
    table: torch.Tensor
    masks: dict[int, torch.Tensor | None]


class Plan:
    """A step as flat rows, pieces of few rows first. `rows` maps a piece's index to its first row; `windows`
    are the sliding windows of the model's layers (0: everything). See StepRows."""

    def __init__(
        self,
        pool: KvPool,
        pieces: list[Piece],
        windows: set[int],
        coming: Coming | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        self._pool = pool
        self._windows = windows
        self._groups: list[_Group] = []
        self.rows: dict[int, int] = {}
        most = FEW_ROWS if pool.ops.pages else 1
        few = sorted((p for p in pieces if p.end - p.start <= most), key=lambda piece: piece.end)
        chunks = [piece for piece in pieces if piece.end - piece.start > most]
        ordered = few + chunks
        row = 0
        for piece in ordered:
            self.rows[piece.index] = row
            row += piece.end - piece.start
        flat = FlatRows(ordered)
        self.tokens, self.positions, self._slots = (
            send(part, pool.device) for part in (flat.tokens, flat.positions, flat.slots)
        )
        if coming is not None:
            coming.fill(self.tokens, ordered)
        self._adapted = None if bank is None else bank.adapted(ordered)
        self._paged: PagedRows | None = None
        if pool.ops.pages and few:
            self._paged = self._by_tables(few, flat.positions)
            few = []
        for group in [*self._batches(few), *([chunk] for chunk in chunks)]:
            self._groups.append(self._group(group))

    def _by_tables(self, few: list[Piece], positions: np.ndarray[Any, Any]) -> PagedRows:
        rows = sum(piece.end - piece.start for piece in few)
        tables = np.zeros((rows, max(map(blocks_of, few))), np.int32)
        fill_tables(few, tables)
        lengths = (positions[:rows] + 1).astype(np.int32)
        device = self._pool.device
        # Not what is the longest in this step: each number of splits is a kernel to compile.
        return PagedRows(send(tables, device), send(lengths, device), self._pool.shape.context_length)

    def _batches(self, single: list[Piece]) -> list[list[Piece]]:
        """Cuts decoding sequences, shortest first, into groups with little padding that fit the workspace."""
        shape = self._pool.shape
        position_bytes = 2 * shape.kv_heads * shape.head_dim * self._pool.dtype.itemsize
        most = _GATHER_BYTES[self._pool.device.type] // position_bytes
        batches: list[list[Piece]] = []
        for piece in single:
            if batches:
                last = batches[-1]
                close = piece.end <= 2 * last[0].end + 4 * BLOCK_TOKENS
                if close and (len(last) + 1) * piece.end <= most:
                    last.append(piece)
                    continue
            batches.append([piece])
        return batches

    def _group(self, pieces: list[Piece]) -> _Group:
        length = max(piece.end for piece in pieces)
        queries = pieces[0].end - pieces[0].start
        blocks = -(-length // BLOCK_TOKENS)
        # Rows that are shorter read their own first block as padding, never another sequence's.
        table = np.empty((len(pieces), blocks), np.int64)
        for row, piece in enumerate(pieces):
            own = piece.sequence.blocks[: blocks_of(piece)]
            table[row] = piece.sequence.blocks[0]
            table[row, : len(own)] = own
        return _Group(
            first=self.rows[pieces[0].index],
            sequences=len(pieces),
            queries=queries,
            length=length,
            table=send(table.reshape(-1), self._pool.device),
            masks={window: self._mask(pieces, length, window) for window in self._windows},
        )

    def _mask(self, pieces: list[Piece], length: int, window: int) -> torch.Tensor | None:
        """[sequences, 1, queries, length] to add to the scores, or None if nothing but causality hides a key.
        A window of w lets a token see itself and the w-1 before it."""
        narrow = bool(window) and length > window
        chunk = pieces[0].end - pieces[0].start > 1
        # Beyond position 0 a CPU has no kernel for causality alone and would make a mask in every layer.
        free = pieces[0].start == 0 or self._pool.device.type == "cuda"
        if not narrow and (free if chunk else pieces[0].end == length):
            return None  # pieces are sorted: if the first is as long as the longest, all are
        device, dtype = self._pool.device, self._pool.dtype
        places = np.array([range(piece.start, piece.end) for piece in pieces], np.int64)
        query = send(places, device)[:, None, :, None]
        key = torch.arange(length, device=device)
        hidden = key > query
        if window:
            hidden = hidden | (key <= query - window)
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        kv: torch.Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes kv [T, 2 * kv_heads, head_dim] of all rows, then attends with query [T, heads, head_dim].
        Returns [T, heads * head_dim]. `softcap` c > 0 bends scores to c * tanh(score / c) (Gemma 2); `sinks`
        [heads] are scores of keys without a value (StreamingLLM, gpt-oss)."""
        self._pool.write(layer, self._slots, kv)
        return self._attend(layer, query, scale, window, softcap, sinks)

    def attend_heads(
        self, layer: int, rows: torch.Tensor, scale: float, window: int = 0, turn: Turn | None = None
    ) -> torch.Tensor:
        """See StepRows."""
        shape = self._pool.shape
        self._pool.ops.place(rows, self._pool.layer(layer), self._slots, turn)
        return self._attend(layer, rows[:, : shape.heads], scale, window, 0.0, None)

    def adapt(self, place: Place, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See StepRows."""
        if self._adapted is not None:
            self._adapted.add(place, x, y)
        return y

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self._paged is not None:
            rows = len(self._paged.lengths)
            out[:rows] = self._pool.ops.attend(
                query[:rows], self._pool.layer(layer), self._paged, scale, window, softcap, sinks
            )
        for group in self._groups:
            end = group.first + group.sequences * group.queries
            part = query[group.first : end]
            mask = group.masks[window]
            if softcap or sinks is not None:
                out[group.first : end] = self._scored(layer, group, part, scale, mask, softcap, sinks)
                continue
            attend = self._decode if group.queries == 1 else self._prefill
            out[group.first : end] = attend(layer, group, part, scale, mask)
        return out.flatten(1)

    def _context(self, layer: int, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [kv_heads, sequences, length, head_dim]."""
        shape = self._pool.shape
        gathered = self._pool.gather(layer, group.table)
        kv = gathered.view(2 * shape.kv_heads, group.sequences, -1, shape.head_dim)[:, :, : group.length]
        return kv[: shape.kv_heads], kv[shape.kv_heads :]

    def _decode(
        self, layer: int, group: _Group, query: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The query heads that share a KV head attend as if they were its rows: no KV is repeated."""
        shape = self._pool.shape
        keys, values = self._context(layer, group)
        shared = query.view(group.sequences, shape.kv_heads, -1, shape.head_dim).transpose(0, 1)
        if mask is not None:
            mask = mask.transpose(0, 1)
        found = functional.scaled_dot_product_attention(shared, keys, values, attn_mask=mask, scale=scale)
        return found.transpose(0, 1).reshape(query.shape)

    def _prefill(
        self, layer: int, group: _Group, query: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        keys, values = self._context(layer, group)
        if mask is not None:
            # The heads that share KV as a batch: not every torch has a CUDA kernel for enable_gqa and a mask,
            # and without one the scores of all heads are written out.
            grouped = query.view(len(query), len(keys), -1, query.shape[2]).permute(1, 2, 0, 3)
            keys, values = (part.expand(-1, grouped.shape[1], -1, -1) for part in (keys, values))
            found = functional.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=mask, scale=scale
            )
            return found.permute(2, 0, 1, 3).flatten(1, 2)
        if group.length > group.queries:
            mask = _of_the_last(group.queries, group.length, query.device)
        found = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[0],
        )
        return found[0].transpose(0, 1)

    def _scored(
        self,
        layer: int,
        group: _Group,
        query: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Decoding or prefill with the scores written out, for what torch's attention cannot do to them."""
        kv_heads, length = self._pool.shape.kv_heads, group.length
        keys, values = self._context(layer, group)
        keys, values = keys[:, :, None].transpose(-1, -2), values[:, :, None]
        rows = query.view(group.sequences, group.queries, kv_heads, -1, query.shape[-1])
        rows = rows.permute(2, 0, 3, 1, 4)  # [kv_heads, sequences, heads of each, queries, head_dim]
        found = torch.empty_like(rows)
        step = max(1, _SCORES // (group.sequences * query.shape[1] * length))
        for first in range(0, group.queries, step):
            part = slice(first, first + step)
            scores = (rows[:, :, :, part] @ keys).float() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                scores = scores + mask[:, 0, None, part]
            elif group.queries > 1:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
                later.triu_(length - group.queries + first + 1)
                scores = scores.masked_fill(later, float("-inf"))
            if sinks is not None:
                column = sinks.float().view(kv_heads, 1, -1, 1, 1).expand(*scores.shape[:-1], 1)
                scores = torch.cat((scores, column), dim=-1)
            found[:, :, :, part] = scores.softmax(dim=-1)[..., :length].to(values.dtype) @ values
        return found.permute(1, 3, 0, 2, 4).reshape(query.shape)
