"""Attention of single rows over the paged KV pool: flash-decoding (Dao et al., 2023) through block tables.

A row is one position of one sequence; several rows may be of the same sequence (guesses), each sees what is
before it. The query heads that share a KV head are the rows of one matrix, so KV is read once. A row's
context is cut into splits that are computed side by side and merged by a second kernel, or a small batch
would leave most of the device idle. How many splits there are is fixed by the batch's size, so that a
captured graph stays valid; how much of the context each gets follows from the length, which is read on the
device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...base import BLOCK_TOKENS

_LOG2E = tl.constexpr(1.4426950408889634)

_LEAST = 128
"""Positions that are worth a split of their own."""
_MOST_SPLITS = 64
# Keys, and as many bytes of values, that are held at once: little enough for the shared memory of any device.
_TILE_BYTES = 16 << 10


@triton.jit
def _span(seen, SPLITS: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr):
    """How many of the `seen` positions each split gets."""
    return tl.maximum(tl.cdiv(tl.cdiv(seen, SPLITS), TILE) * TILE, LEAST)


@triton.jit(do_not_specialize=["table_row"])  # differs from step to step: a kernel each would be compiled
def _attend(
    query,
    kv,
    tables,
    lengths,
    sinks,
    out,
    parts,
    peaks,
    sums,
    scale,
    softcap,
    query_row,
    query_head,
    kv_head,
    table_row,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    SUNK: tl.constexpr,
):
    row, shared, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    span = _span(length - begin, SPLITS, LEAST, TILE)
    first = begin + split * span
    last = tl.minimum(first + span, length)
    if first < last:
        member = tl.arange(0, GROUP_PAD)
        column = tl.arange(0, DIM_PAD)
        heads = shared * GROUP + member
        real = (member < GROUP)[:, None] & (column < DIM)[None, :]
        asked = tl.load(
            query + row.to(tl.int64) * query_row + heads[:, None] * query_head + column[None, :],
            mask=real,
            other=0.0,
        )
        keys = kv + shared.to(tl.int64) * kv_head
        values = kv + (KV_HEADS + shared).to(tl.int64) * kv_head
        peak = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_PAD,), tl.float32)
        mixed = tl.zeros((GROUP_PAD, DIM_PAD), tl.float32)
        for start in range(first, last, TILE):
            place = start + tl.arange(0, TILE)
            inside = place < last
            page = tl.load(tables + row.to(tl.int64) * table_row + place // PAGE, mask=inside, other=0)
            offset = (page.to(tl.int64) * PAGE + place % PAGE) * DIM
            key = tl.load(
                keys + offset[None, :] + column[:, None],
                mask=inside[None, :] & (column < DIM)[:, None],
                other=0.0,
            )
            scores = tl.dot(asked, key, input_precision="ieee") * scale
            if CAPPED:  # c * tanh(s / c)
                scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
            # What is in the pool behind the context may be anything, NaN too: it is never multiplied.
            scores = tl.where(inside[None, :], scores * _LOG2E, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - higher)
            weights = tl.exp2(scores - higher[:, None])
            value = tl.load(
                values + offset[:, None] + column[None, :],
                mask=inside[:, None] & (column < DIM)[None, :],
                other=0.0,
            )
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            peak = higher
        HEADS: tl.constexpr = KV_HEADS * GROUP
        at = row.to(tl.int64) * HEADS + heads
        if SPLITS == 1:
            if SUNK:
                sink = tl.load(sinks + heads, mask=member < GROUP, other=0.0).to(tl.float32) * _LOG2E
                higher = tl.maximum(peak, sink)
                shrink = tl.exp2(peak - higher)
                total = total * shrink + tl.exp2(sink - higher)
                mixed = mixed * shrink[:, None]
            found = mixed / total[:, None]
            tl.store(out + at[:, None] * DIM + column[None, :], found.to(out.dtype.element_ty), mask=real)
        else:
            at = at * SPLITS + split
            tl.store(parts + at[:, None] * DIM + column[None, :], mixed, mask=real)
            tl.store(peaks + at, peak, mask=member < GROUP)
            tl.store(sums + at, total, mask=member < GROUP)


@triton.jit
def _merge(
    lengths,
    sinks,
    out,
    parts,
    peaks,
    sums,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    SPLITS: tl.constexpr,
    SUNK: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    seen = tl.load(lengths + row).to(tl.int32)
    if WINDOW > 0:
        seen = tl.minimum(seen, WINDOW)
    split = tl.arange(0, SPLITS)
    made = split * _span(seen, SPLITS, LEAST, TILE) < seen
    column = tl.arange(0, DIM_PAD)
    at = (row.to(tl.int64) * HEADS + head) * SPLITS + split
    peak = tl.load(peaks + at, mask=made, other=float("-inf"))
    highest = tl.max(peak, 0)
    if SUNK:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        highest = tl.maximum(highest, sink)
    share = tl.exp2(peak - highest)
    total = tl.sum(share * tl.load(sums + at, mask=made, other=0.0), 0)
    if SUNK:
        total += tl.exp2(sink - highest)
    part = tl.load(
        parts + at[:, None] * DIM + column[None, :], mask=made[:, None] & (column < DIM)[None, :], other=0.0
    )
    found = tl.sum(part * share[:, None], 0) / total
    place = out + (row.to(tl.int64) * HEADS + head) * DIM + column
    tl.store(place, found.to(out.dtype.element_ty), mask=column < DIM)


def splits_of(rows: int, kv_heads: int, longest: int, processors: int) -> int:
    """How many splits a batch of `rows` gets, whose contexts have at most `longest` positions: enough for
    four programs a multiprocessor, and some even for large batches, where one context may be far longer than
    the others. A power of two."""
    wanted = max(8, -(-4 * processors // (rows * kv_heads)))
    most = min(_MOST_SPLITS, -(-longest // _LEAST))
    splits: int = triton.next_power_of_2(min(wanted, most))
    return splits


def attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    splits: int,
) -> torch.Tensor:
    """query [R, heads, head_dim] over kv [2 * kv_heads, blocks, 16, head_dim], one layer of the pool: row r
    sees the `lengths[r]` positions of the blocks in `tables[r]` [R, width]. Returns [R, heads, head_dim].
    Safe to capture: shapes and splits do not depend on values."""
    rows, heads, dim = query.shape
    kv_heads = kv.shape[0] // 2
    out = torch.empty((rows, heads, dim), dtype=query.dtype, device=query.device)
    parts, peaks, sums = (
        torch.empty(size, dtype=torch.float32, device=query.device)
        for size in ((rows, heads, splits, dim), (rows, heads, splits), (rows, heads, splits))
    )
    sunk = sinks is not None
    sinks = lengths if sinks is None else sinks  # a pointer that is not read
    dim_pad = max(16, triton.next_power_of_2(dim))
    tile = min(64, max(16, _TILE_BYTES // (dim_pad * kv.element_size())))
    fixed = {"DIM": dim, "DIM_PAD": dim_pad, "TILE": tile, "LEAST": _LEAST}
    fixed |= {"WINDOW": window, "SPLITS": splits, "SUNK": sunk}
    _attend[(rows, kv_heads, splits)](
        query,
        kv,
        tables,
        lengths,
        sinks,
        out,
        parts,
        peaks,
        sums,
        scale,
        softcap,
        query.stride(0),
        query.stride(1),
        kv.stride(0),
        tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PAD=max(16, triton.next_power_of_2(heads // kv_heads)),
        PAGE=BLOCK_TOKENS,
        CAPPED=softcap > 0,
        **fixed,
        num_warps=4,
        num_stages=3,  # a page's number is read ahead of its keys
    )
    if splits > 1:
        _merge[(rows, heads)](lengths, sinks, out, parts, peaks, sums, HEADS=heads, **fixed, num_warps=4)
    return out
