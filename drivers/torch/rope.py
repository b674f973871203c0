"""Rotary position embedding: the rotation itself (see `drivers/rope.py` for the frequencies).

The rotation works on adjacent pairs, so a pair is one complex number and a whole layer's queries and keys are
turned by one multiplication. Hugging Face pairs dimension i with i + d/2; `interleave` reorders the rows of a
query or key weight once at load. Scores do not change, as queries and keys are reordered alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..families.decoder import Layer
from ..model_config import Shape
from ..rope import Rotation

Edit = Callable[[torch.Tensor], torch.Tensor]


class Rotary:
    """Turns queries and keys by their positions."""

    def __init__(self, rotation: Rotation, device: torch.device) -> None:
        self._frequencies = torch.from_numpy(rotation.frequencies).to(device)
        self._scale = rotation.scale

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        """The complex factors [T, 1, head_dim / 2] of positions [T]; the same for every layer of a step."""
        angles = positions[:, None].float() * self._frequencies
        return torch.polar(torch.full_like(angles, self._scale), angles)[:, None]


def rotate(heads: torch.Tensor, turns: torch.Tensor) -> None:
    """Turns `heads` [T, heads, head_dim] in place. float32 in the middle whatever the dtype."""
    pairs = heads.view(*heads.shape[:-1], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(turns)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turns))


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of [heads * head_dim, …] from Hugging Face's order to adjacent pairs."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def interleaved(layer: Layer, shape: Shape) -> dict[str, Edit]:
    """What is done to the rows of a layer's tensors before they rotate, by the tensors' names."""
    if not layer.rotated:
        return {}
    heads = zip(layer.qkv, (shape.heads, shape.kv_heads), strict=False)
    return {name: partial(interleave, heads=count) for name, count in heads}
