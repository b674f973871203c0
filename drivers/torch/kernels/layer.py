"""What lies between the matrices of a decoder layer, one launch each: residual and RMS norm; head norms,
rotary embedding and the write into the KV pool; SiLU and the gate's product.

Values are rounded to the tensors' dtype where torch's separate operators would round them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(x, delta, weight, out, width, epsilon, ADDS: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PAD)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(delta + row * width + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row * width + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    size = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    scaled = value * size * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, scaled.to(out.dtype.element_ty), mask=inside)


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Adds `delta` to x [T, width] in place, if there is one; returns the RMS norm of x times `weight`."""
    out = torch.empty_like(x)
    pad = triton.next_power_of_2(x.shape[1])
    _add_norm[(len(x),)](
        x,
        x if delta is None else delta,
        weight,
        out,
        x.shape[1],
        epsilon,
        ADDS=delta is not None,
        PAD=pad,
        num_warps=min(16, max(4, pad // 512)),
    )
    return out


@triton.jit
def _place(
    rows,
    pool,
    slots,
    turns,
    norm,
    epsilon,
    rows_row,
    pool_head,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    TURNED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One head of one row: queries, then keys, then values."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) + FIRST
    pair = tl.arange(0, HALF_PAD)
    even, odd = 2 * pair, 2 * pair + 1
    source = rows + row * rows_row + head * DIM
    kind = rows.dtype.element_ty
    a = tl.load(source + even, mask=even < DIM, other=0.0).to(tl.float32)
    b = tl.load(source + odd, mask=odd < DIM, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORMED:
            size = tl.rsqrt(tl.sum(a * a + b * b, 0) / DIM + epsilon)
            first = tl.load(norm + head * DIM + even, mask=even < DIM, other=0.0).to(tl.float32)
            second = tl.load(norm + head * DIM + odd, mask=odd < DIM, other=0.0).to(tl.float32)
            a = ((a * size).to(kind).to(tl.float32) * first).to(kind).to(tl.float32)
            b = ((b * size).to(kind).to(tl.float32) * second).to(kind).to(tl.float32)
        if TURNED:
            cosine = tl.load(turns + row * DIM + even, mask=even < DIM, other=0.0)
            sine = tl.load(turns + row * DIM + odd, mask=odd < DIM, other=0.0)
            a, b = a * cosine - b * sine, a * sine + b * cosine
    if head < HEADS:
        tl.store(source + even, a.to(kind), mask=even < DIM)
        tl.store(source + odd, b.to(kind), mask=odd < DIM)
    else:
        target = pool + (head - HEADS).to(tl.int64) * pool_head + tl.load(slots + row) * DIM
        tl.store(target + even, a.to(kind), mask=even < DIM)
        tl.store(target + odd, b.to(kind), mask=odd < DIM)


def place(
    rows: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    turns: torch.Tensor | None,
    norm: torch.Tensor | None,
    epsilon: float,
) -> None:
    """rows [T, heads + 2 * kv_heads, head_dim], contiguous: norms the heads of queries and keys by norm
    [heads + kv_heads, head_dim], turns them by the complex factors `turns` [T, 1, head_dim / 2], each if
    given, queries in place; puts keys and values into `slots` [T] of pool [2 * kv_heads, blocks, 16,
    head_dim]."""
    count, wide, dim = rows.shape
    heads = wide - pool.shape[0]
    first = heads if turns is None and norm is None else 0
    _place[(count, wide - first)](
        rows,
        pool,
        slots,
        slots if turns is None else torch.view_as_real(turns),  # else a pointer that is not read
        rows if norm is None else norm,
        epsilon,
        rows.stride(0),
        pool.stride(0),
        FIRST=first,
        HEADS=heads,
        KV_HEADS=pool.shape[0] // 2,
        DIM=dim,
        HALF_PAD=triton.next_power_of_2(-(-dim // 2)),
        TURNED=turns is not None,
        NORMED=norm is not None,
        num_warps=1,
    )


@triton.jit
def _gate(x, out, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (opened * up).to(out.dtype.element_ty), mask=inside)


def silu_gate(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x [T, 2 * width], the gate first. Returns [T, width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    _gate[(rows, triton.cdiv(width, 1024))](x, out, width, TILE=1024, num_warps=4)
    return out
