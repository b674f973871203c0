"""Weights of 8 or 4 bits for the CUDA path, made from the checkpoint's values at load.

    float8   e4m3, one scale a row (out)                        1 byte a value
    int8     symmetric, one scale a row                         1 byte a value
    int4     from 0 to 15, scale and minimum a group of 32      5 bits a value

They are stored so that a decode step reads no more than these bytes. Few rows are multiplied by a kernel that
turns weights into numbers as it reads them; for many rows the whole weight is turned into numbers once, which
costs little beside their product. float8 is multiplied as it is where the device can.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .ops import Ops

FORMATS = ("float8", "int8", "int4")
GROUP = 32
_LARGEST_FLOAT8 = 448.0
_FLOAT8_ROWS = 16  # what torch._scaled_mm wants rows, and both sides of the weight, to be a multiple of

BYTES = {"float8": 1.0, "int8": 1.0, "int4": 0.625}
"""Of a value, scales of groups included."""


class QuantisedLinear:
    """y = x @ weightᵀ + bias for x [T, in], with `weight` [out, in] quantised on the device it is on."""

    __slots__ = ("_bias", "_float8", "_lows", "_ops", "_scales", "_stored", "nbytes", "packed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, format_: str, ops: Ops) -> None:
        self._ops, self._bias, self.packed = ops, bias, True
        self._lows: torch.Tensor | None = None
        if format_ == "int4":
            self._stored, self._scales, self._lows = _to_int4(weight)
        else:
            self._stored, self._scales = (_to_float8 if format_ == "float8" else _to_int8)(weight)
        whole = all(size % _FLOAT8_ROWS == 0 for size in weight.shape)
        self._float8 = format_ == "float8" and whole and ops.multiplies_float8
        parts = (self._stored, self._scales, self._lows, bias)
        self.nbytes = sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = self._ops.few_rows(x, self._stored, self._scales, self._lows, self._bias)
        if found is not None:
            return found
        if self._float8:
            return self._scaled(x)
        return functional.linear(x, self.weight(x.dtype), self._bias)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers [out, in] that are computed with."""
        if self._lows is None:
            return (self._stored.to(dtype) * self._scales[:, None]).to(dtype)
        halves = torch.stack((self._stored & 15, self._stored >> 4), dim=1)  # [out, 2, groups * 16]
        values = halves.view(len(halves), 2, -1, GROUP // 2).transpose(1, 2).flatten(2).float()
        values = torch.addcmul(self._lows.float()[..., None], values, self._scales.float()[..., None])
        return values.flatten(1).to(dtype)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """The product in float8, with a scale for each row of x too."""
        rows = -len(x) % _FLOAT8_ROWS
        padded = functional.pad(x, (0, 0, 0, rows)) if rows else x
        scales = padded.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / _LARGEST_FLOAT8
        small = (padded / scales).to(torch.float8_e4m3fn)
        found = torch._scaled_mm(
            small, self._stored.t(), scale_a=scales, scale_b=self._scales[None], out_dtype=torch.bfloat16
        )[: len(x)]
        return found if self._bias is None else found + self._bias


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(dim=1).float().clamp_min(1e-12) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def _to_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(dim=1).float().clamp_min(1e-12) / _LARGEST_FLOAT8
    return (weight / scales[:, None]).to(torch.float8_e4m3fn), scales


def _to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes [out, in / 2], float16 scales and minima [out, in / 32]; byte i of a group's 16 has value i in
    its low half, value i + 16 in its high half. Value = scale * stored + minimum."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scales, lows = ((high - low) / 15).half(), low.half()
    stored = ((groups - lows.float()[..., None]) / scales.float().clamp_min(1e-8)[..., None]).round_()
    stored = stored.clamp_(0, 15).to(torch.uint8)
    packed = stored[..., : GROUP // 2] | stored[..., GROUP // 2 :] << 4
    return packed.flatten(1), scales, lows


def quantise(weight: torch.Tensor, bias: torch.Tensor | None, format_: str, ops: Ops) -> QuantisedLinear:
    """Rows that are no whole groups are kept in 8 bits."""
    if format_ == "int4" and weight.shape[1] % GROUP:
        format_ = "int8"
    return QuantisedLinear(weight, bias, format_, ops)
