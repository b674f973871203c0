"""Products of few rows with quantised weights (linear.py), which are read as they are and turned into numbers
on the way to the tensor cores: a decode step reads every weight once, so its time is that of the bytes.

Where a matrix has too few columns of output to fill the device, its depth is cut into splits whose sums a
second kernel adds up, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_ROWS = 256
"""More rows are worth turning the whole weight into numbers once."""


@triton.jit(do_not_specialize=["rows"])  # or one more kernel would be compiled for a single row
def _matmul(
    x,
    stored,
    scales,
    lows,
    bias,
    out,
    rows,
    wide,
    deep,
    x_row,
    FOUR: tl.constexpr,
    BIASED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`deep` counts what is stored in a row: values, or bytes of two 4-bit values each."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * TILE_M + tl.arange(0, TILE_M)
    line = stored + n.to(tl.int64) * deep
    share = tl.cdiv(tl.cdiv(deep, TILE_K), SPLITS) * TILE_K
    first = split * share
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(first, tl.minimum(first + share, deep), TILE_K):
        if FOUR:
            # Byte i of a group's 16 holds its values i (low half) and i + 16.
            group = start // 16 + tl.arange(0, TILE_K // 16)
            place = tl.arange(0, 16)
            byte = group[:, None] * 16 + place[None, :]
            both = (n < wide)[:, None, None] & (byte < deep)[None, :, :]
            pair = tl.load(line[:, None, None] + byte[None, :, :], mask=both, other=0)
            at = n.to(tl.int64)[:, None] * (deep // 16) + group[None, :]
            inside = (n < wide)[:, None] & (group < deep // 16)[None, :]
            scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
            low = tl.load(lows + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
            even = ((pair & 15).to(tl.float32) * scale + low).to(x.dtype.element_ty)
            odd = ((pair >> 4).to(tl.float32) * scale + low).to(x.dtype.element_ty)
            column = tl.reshape(group[:, None] * 32 + place[None, :], (TILE_K,))
            known = (m < rows)[:, None] & (column < 2 * deep)[None, :]
            source = x + m[:, None] * x_row + column[None, :]
            front = tl.load(source, mask=known, other=0.0)
            back = tl.load(source + 16, mask=known, other=0.0)
            even = tl.trans(tl.reshape(even, (TILE_N, TILE_K)))
            odd = tl.trans(tl.reshape(odd, (TILE_N, TILE_K)))
            total = tl.dot(front, even, total, input_precision="ieee")
            total = tl.dot(back, odd, total, input_precision="ieee")
        else:
            column = start + tl.arange(0, TILE_K)
            inside = (n < wide)[:, None] & (column < deep)[None, :]
            weight = tl.load(line[:, None] + column[None, :], mask=inside, other=0.0)
            known = (m < rows)[:, None] & (column < deep)[None, :]
            part = tl.load(x + m[:, None] * x_row + column[None, :], mask=known, other=0.0)
            total = tl.dot(part, tl.trans(weight.to(x.dtype.element_ty)), total, input_precision="ieee")
    written = (m < rows)[:, None] & (n < wide)[None, :]
    at = m[:, None].to(tl.int64) * wide + n[None, :]
    if SPLITS > 1:
        tl.store(out + split.to(tl.int64) * rows * wide + at, total, mask=written)
    else:
        if not FOUR:
            total *= tl.load(scales + n, mask=n < wide, other=0.0)[None, :]
        if BIASED:
            total += tl.load(bias + n, mask=n < wide, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows"])
def _add_up(
    parts, scales, bias, out, rows, wide, FOUR: tl.constexpr, BIASED: tl.constexpr, SPLITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * 256 + tl.arange(0, 256)
    inside = n < wide
    total = tl.zeros((256,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * wide + n, mask=inside, other=0.0)
    if not FOUR:
        total *= tl.load(scales + n, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * wide + n, total.to(out.dtype.element_ty), mask=inside)


def matmul(
    x: torch.Tensor,
    stored: torch.Tensor,
    scales: torch.Tensor,
    lows: torch.Tensor | None,
    bias: torch.Tensor | None,
    processors: int,
) -> torch.Tensor:
    """x [T, in] times the transpose of a weight [out, in], plus bias [out]; returns [T, out] in x's dtype.
    With `lows`: `stored` uint8 [out, in / 2], `scales` and `lows` float16 [out, in / 32]. Without: `stored`
    int8 or float8 [out, in], `scales` float32 [out]."""
    x = x.contiguous()
    (rows, _), (wide, deep) = x.shape, stored.shape
    tile_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tile_n = 2 * tile_m  # the more rows, the more often x is read beside the weight
    tile_k, stages = (64, 3) if tile_m == 64 else (128, 4)  # what shared memory holds
    programs = triton.cdiv(wide, tile_n) * triton.cdiv(rows, tile_m)
    splits = max(1, min(8, 3 * processors // programs, deep // (2 * tile_k)))
    out = torch.empty((rows, wide), dtype=x.dtype, device=x.device)
    parts = torch.empty((splits, rows, wide), dtype=torch.float32, device=x.device) if splits > 1 else out
    fixed = {"FOUR": lows is not None, "BIASED": bias is not None, "SPLITS": splits}
    bias = scales if bias is None else bias  # a pointer that is not read
    _matmul[(triton.cdiv(wide, tile_n), splits, triton.cdiv(rows, tile_m))](
        x,
        stored,
        scales,
        scales if lows is None else lows,
        bias,
        parts,
        rows,
        wide,
        deep,
        x.stride(0),
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_K=tile_k,
        **fixed,
        num_warps=4,
        num_stages=stages,
    )
    if splits > 1:
        _add_up[(rows, triton.cdiv(wide, 256))](parts, scales, bias, out, rows, wide, **fixed)
    return out
