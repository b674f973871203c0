"""One dense layer. On a CPU its weight is packed once for oneDNN, which reads it two to four times as fast
as a plain matrix in a decode step (docs/decisions.md)."""

from __future__ import annotations

import torch
from torch.nn import functional

# Rows that the packed layout is made for. Measured best from 1 to 256 rows.
_PACKED_ROWS = 16


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes packed weights of `dtype` here. The operators are those that torch's own compiler
    emits; a torch without them computes with plain matrices."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Linear:
    """y = x @ weightᵀ + bias for x [T, in]; `weight` is [out, in]. When not `packed`, it keeps the tensors
    that it was given."""

    __slots__ = ("_bias", "_weight", "nbytes", "packed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> None:
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.packed = can_pack(device, weight.dtype)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)
        self._weight = weight.to(device)
        self._bias = None if bias is None else bias.to(device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return packed
        return functional.linear(x, self._weight, self._bias)
