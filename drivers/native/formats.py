"""The packed weight formats of engine/engine.h in numpy: stored -> rows -> interleaved blocks, and back.

In between lie rows, one output channel each: float32 and bfloat16 values as they are, int4 as GGUF's Q4_1 (20
bytes for 32 columns) and int8 as its Q8_0 (34 bytes). So Q4_1 and Q8_0 are only permuted, Q4_0 gets its
minimum spelled out, and Q4_K's sub-blocks become groups of their own; the rest is quantised anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import PLAIN, Bytes, Floats, values_of
from .architecture import GROUP, ROWS

DTYPES = ("float32", "bfloat16", "int8", "int4")

# Stored types that int4 takes without quantising anew.
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")
_LARGEST_HALF = 65504.0

_Q4_0 = np.dtype([("d", "<f2"), ("q", "<u4", (4,))])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "<u4", (4,))])
_Q8_0 = np.dtype([("d", "<f2"), ("q", "<u4", (8,))])
_Q4_K = np.dtype([("d", "<f2"), ("m", "<f2"), ("scales", "u1", (3, 4)), ("q", "u1", (4, GROUP))])
_BLOCK_4 = np.dtype([("q", "<u4", (4, ROWS)), ("d", "<f2", (ROWS,)), ("m", "<f2", (ROWS,))])
_BLOCK_8 = np.dtype([("q", "<u4", (8, ROWS)), ("d", "<f2", (ROWS,))])
_ROW_BYTES = {"float32": 4 * GROUP, "bfloat16": 2 * GROUP, "int8": _Q8_0.itemsize, "int4": _Q4_1.itemsize}

_SIGN = np.uint32(0x80808080)
# Ends of a group's range that are tried for int4, as shares of the range itself.
_SHRUNK = (1.0, 0.94, 0.88, 0.8)
_TILE = 1 << 17  # values quantised at a time: what stays in the cache


def format_of(type_: str, dtype: str, vocabulary: bool, whole_groups: bool = True) -> str:
    """The format in which a tensor stored as `type_` is kept for `dtype`. `vocabulary`: it is the embedding
    or the head, which 4 bits would hurt most. `whole_groups`: its groups of 32 columns stay together."""
    if dtype != "int4":
        return dtype
    if type_ in PLAIN:
        return "int8" if vocabulary else "int4"
    return "int4" if type_ in FOUR_BITS and whole_groups else "int8"


def row_bytes(format_: str, cols: int) -> int:
    """Bytes of one row, and of a matrix's share of it. `cols` is a multiple of 32."""
    return cols // GROUP * _ROW_BYTES[format_]


def to_rows(format_: str, type_: str, stored: NDArray[Any]) -> Bytes:
    """Rows [n, row_bytes] of what is stored as `type_`: uint8 [n, bytes] where quantised, else values
    [n, cols] as float32, float16 or uint16 (BF16). `cols` is a multiple of 32."""
    if (format_, type_) in (("int4", "Q4_1"), ("int8", "Q8_0"), ("float32", "F32"), ("bfloat16", "BF16")):
        return np.ascontiguousarray(stored).view(np.uint8)
    with np.errstate(all="ignore"):  # what is not finite is found when it is computed with
        if format_ == "int4" and type_ == "Q4_0":
            return _from_q4_0(stored)
        if format_ == "int4" and type_ == "Q4_K":
            return _from_q4_k(stored)
        return _converted(format_, type_, stored)


def _converted(format_: str, type_: str, stored: NDArray[Any]) -> Bytes:
    values = values_of(type_, np.ascontiguousarray(stored).view(np.uint8))
    if format_ == "float32":
        return values.view(np.uint8)
    if format_ == "bfloat16":
        return _bfloat16(values).view(np.uint8)
    quantise = _quantise_4 if format_ == "int4" else _quantise_8
    groups = values.reshape(-1, GROUP)
    made = [quantise(groups[i : i + _TILE // GROUP]) for i in range(0, len(groups), _TILE // GROUP)]
    return np.concatenate(made).view(np.uint8).reshape(len(stored), -1)


def interleave(format_: str, rows: Bytes) -> Bytes:
    """Packed blocks, flat, of rows [n, row_bytes] with n a multiple of 16."""
    blocks = len(rows) // ROWS
    if format_ in ("float32", "bfloat16"):
        words = rows.view(np.uint32).reshape(blocks, ROWS, -1)
        return np.ascontiguousarray(words.swapaxes(1, 2)).view(np.uint8).reshape(-1)
    four = format_ == "int4"
    groups = rows.view(_Q4_1 if four else _Q8_0).reshape(blocks, ROWS, -1)
    packed = np.empty((blocks, groups.shape[2]), _BLOCK_4 if four else _BLOCK_8)
    packed["q"] = groups["q"].transpose(0, 2, 3, 1)
    packed["d"] = groups["d"].swapaxes(1, 2)
    if four:
        packed["m"] = groups["m"].swapaxes(1, 2)
    else:
        packed["q"] ^= _SIGN
    return packed.reshape(-1).view(np.uint8)


def unpack(format_: str, packed: Bytes, rows: int, cols: int) -> Floats:
    """float32 [rows, cols] of a packed matrix."""
    blocks = rows // ROWS
    if format_ == "float32":
        return packed.view(np.float32).reshape(blocks, cols, ROWS).swapaxes(1, 2).reshape(rows, cols)
    if format_ == "bfloat16":
        pairs = packed.view(np.uint16).reshape(blocks, cols // 2, ROWS, 2).swapaxes(1, 2)
        return (pairs.reshape(rows, cols).astype(np.uint32) << 16).view(np.float32)
    four = format_ == "int4"
    groups = packed.view(_BLOCK_4 if four else _BLOCK_8).reshape(blocks, cols // GROUP)
    # [blocks, groups, vector, row, byte] -> [blocks, row, groups, vector and byte]
    data = np.ascontiguousarray(groups["q"]).view(np.uint8)
    data = data.reshape(*groups.shape, -1, ROWS, 4).transpose(0, 3, 1, 2, 4)
    data = data.reshape(blocks, ROWS, groups.shape[1], -1)
    scales = groups["d"].swapaxes(1, 2)[..., None].astype(np.float32)
    if four:
        levels = np.concatenate([data & 15, data >> 4], -1).astype(np.float32)
        values = scales * levels + groups["m"].swapaxes(1, 2)[..., None].astype(np.float32)
    else:
        values = scales * (data.astype(np.float32) - 128)
    return values.reshape(rows, cols)


def _from_q4_0(stored: Bytes) -> Bytes:
    groups = np.ascontiguousarray(stored).view(_Q4_0)
    rows = np.empty(groups.shape, _Q4_1)
    rows["d"], rows["q"] = groups["d"], groups["q"]
    rows["m"] = -8 * groups["d"].astype(np.float32)  # exact: a power of two
    return rows.view(np.uint8)


def _from_q4_k(stored: Bytes) -> Bytes:
    """A block of 256 is 8 sub-blocks of 32 with 6-bit scales and minima of a common fp16; two sub-blocks
    share 32 bytes, one in the low and one in the high nibbles."""
    groups = np.ascontiguousarray(stored).view(_Q4_K)
    low, high, mixed = (groups["scales"][..., i, :] for i in range(3))
    scales = np.concatenate([low & 63, (mixed & 15) | ((low >> 2) & 48)], -1)
    minima = np.concatenate([high & 63, (mixed >> 4) | ((high >> 2) & 48)], -1)
    rows = np.empty((*groups.shape, 8), _Q4_1)
    rows["d"] = groups["d"].astype(np.float32)[..., None] * scales
    rows["m"] = -groups["m"].astype(np.float32)[..., None] * minima
    data = groups["q"]
    levels = np.stack([data & 15, data >> 4], -2).reshape(*groups.shape, 8, GROUP)
    rows["q"] = _nibbles(levels)
    return rows.reshape(len(stored), -1).view(np.uint8)


def _nibbles(levels: Bytes) -> NDArray[np.uint32]:
    """[…, 32] levels of 4 bits -> […, 4] words: columns 0…15 in low nibbles, 16…31 in high ones."""
    packed: NDArray[Any] = levels[..., : GROUP // 2] | levels[..., GROUP // 2 :] << 4
    return packed.view(np.uint32)


def _bfloat16(values: Floats) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def _half(values: Floats) -> NDArray[np.float16]:
    return values.clip(-_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)


def _inverse(scales: NDArray[np.float16]) -> Floats:
    """1/x, and 0 for 0."""
    wide = scales.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


def _quantise_8(groups: Floats) -> NDArray[Any]:
    """Q8_0 blocks [n] of groups [n, 32]: symmetric, the largest value at 127."""
    blocks = np.empty(len(groups), _Q8_0)
    columns = np.ascontiguousarray(groups.T)
    blocks["d"] = _half(np.maximum(columns.max(0), -columns.min(0)) * np.float32(1 / 127))
    levels = np.rint(columns * _inverse(blocks["d"])).clip(-127, 127).astype(np.int8)
    blocks["q"] = np.ascontiguousarray(levels.T).view(np.uint32)
    return blocks


def _quantise_4(groups: Floats) -> NDArray[Any]:
    """Q4_1 blocks [n] of groups [n, 32]. A few ranges are tried; for the levels that one gives, the best
    scale and minimum are a regression of the values on the levels, which also says how good they are."""
    blocks = np.empty(len(groups), _Q4_1)
    columns = np.ascontiguousarray(groups.T)
    low, high = columns.min(0), columns.max(0)
    centre, width = (low + high) / 2, high - low
    mean = columns.mean(0)
    best = np.full(len(groups), -1, np.float32)
    scale, minimum = np.zeros_like(width), mean.copy()
    for share in _SHRUNK:
        step = width * np.float32(share / 15)
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
        levels = columns - (centre - step * np.float32(7.5))
        levels *= inverse
        np.rint(levels, out=levels)
        levels.clip(0, 15, out=levels)
        middle = levels.mean(0)
        spread = np.einsum("ij,ij->j", levels, levels) - GROUP * middle * middle
        common = np.einsum("ij,ij->j", levels, columns) - GROUP * middle * mean
        slope = np.divide(common, spread, out=np.zeros_like(spread), where=spread > 0)
        explained = common * slope
        better = explained > best
        best[better] = explained[better]
        scale[better] = slope[better]
        minimum[better] = (mean - slope * middle)[better]
    blocks["d"], blocks["m"] = _half(scale), _half(minimum)
    levels = (columns - blocks["m"].astype(np.float32)) * _inverse(blocks["d"])
    small = np.rint(levels).clip(0, 15).astype(np.uint8)
    blocks["q"] = _nibbles(np.ascontiguousarray(small.T))
    return blocks
