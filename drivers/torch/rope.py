"""Rotary position embedding: frequencies of each scaling rule, and the rotation itself.

Formulas: RoFormer (arXiv 2104.09864); linear scaling; Llama 3.1's three bands; YaRN (arXiv 2309.00071), with
the parameters and defaults of Hugging Face's config. Rules that depend on the length of each sequence
(dynamic, longrope) are refused.

The rotation works on adjacent pairs, so a pair is one complex number and a whole layer's queries and keys are
turned by one multiplication. Hugging Face pairs dimension i with i + d/2; `interleave` reorders the rows of a
query or key weight once at load. Scores do not change, as queries and keys are reordered alike.
"""

from __future__ import annotations

import math

import torch
from llmasos.syscalls import errors

from .config import Config


class Rotary:
    """Turns queries and keys by their positions. `config` is `Config.rope()`'s."""

    def __init__(self, config: Config, head_dim: int, device: torch.device) -> None:
        config.refuse_unless(partial_rotary_factor=1.0)
        kind = config.get("rope_type")
        if kind not in _RULES or head_dim % 2:
            raise errors.UnsupportedModel(
                f"config option 'rope_type' is {str(kind)[:32]!r} with heads of {head_dim}",
                hint=f"even heads and one of {', '.join(_RULES)}",
                option="rope_type",
            )
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inverse = 1.0 / (config.number("rope_theta") ** exponents)
        frequencies, self._scale = _RULES[kind](config, inverse, head_dim)
        self._frequencies = frequencies.to(device)

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


def _plain(config: Config, inverse: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    return inverse, 1.0


def _linear(config: Config, inverse: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    return inverse / config.number("factor"), 1.0


def _llama3(config: Config, inverse: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    factor = config.number("factor")
    low, high = config.number("low_freq_factor"), config.number("high_freq_factor")
    turns = config.integer("original_max_position_embeddings") * inverse / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse, 1.0


def _yarn(config: Config, inverse: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    original = config.integer("original_max_position_embeddings")
    factor, theta = config.number("factor"), config.number("rope_theta")

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(config.number("beta_fast", 32.0))
    high = dimension(config.number("beta_slow", 1.0))
    if config.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / ((high - low) or 0.001)
    slowed = ramp.clamp(0, 1)
    return inverse / factor * slowed + inverse * (1 - slowed), _yarn_scale(config, factor)


def _yarn_scale(config: Config, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if config.get("attention_factor") is not None:
        return config.number("attention_factor", 1.0)
    if config.get("mscale") and config.get("mscale_all_dim"):
        return magnitude(config.number("mscale", 1.0)) / magnitude(config.number("mscale_all_dim", 1.0))
    return magnitude(1.0)


_RULES = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
