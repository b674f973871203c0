"""Rotary position embedding: the frequencies of each scaling rule, in numpy and without torch.

Formulas: RoFormer (arXiv 2104.09864); linear scaling; Llama 3.1's three bands; YaRN (arXiv 2309.00071), with
the parameters and defaults of Hugging Face's config. Rules that depend on the length of each sequence
(dynamic, longrope) are refused.

Everything is float32 in the order of transformers' formulas, so that the angles at far positions, which are
large multiples of a frequency, are theirs too. The power alone is rounded once from float64: the vector
routines of numpy and torch differ in their last bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llmasos.syscalls import errors
from numpy.typing import NDArray

from .model_config import Config

Floats = NDArray[np.float32]


_Slowed = tuple[NDArray[Any], float]  # frequencies, scale


class Rotation(NamedTuple):
    """Pair i of a head at position p is turned by p * frequencies[i] and multiplied by `scale`. In Hugging
    Face's order of a head of n columns, pair i is columns i and i + n/2."""

    frequencies: Floats
    scale: float


def rotation(config: Config, head_size: int) -> Rotation:
    """`config` is `Config.rope()`'s. Raises UnsupportedModel."""
    config.refuse_unless(partial_rotary_factor=1.0)
    kind = config.text("rope_type")
    if kind not in _RULES or head_size % 2:
        raise errors.UnsupportedModel(
            f"config option 'rope_type' is {kind[:32]!r} with heads of {head_size}",
            hint=f"even heads and one of {', '.join(_RULES)}",
            option="rope_type",
        )
    exponents = np.arange(0, head_size, 2).astype(np.float32) / np.float32(head_size)
    try:
        with np.errstate(all="raise", under="ignore"):
            powers = config.number("rope_theta") ** exponents.astype(np.float64)
            inverse = np.float32(1.0) / powers.astype(np.float32)
            frequencies, scale = _RULES[kind](config, inverse, head_size)
    except (ArithmeticError, ValueError):
        raise errors.UnsupportedModel(
            f"the config's {kind!r} rotary parameters have no frequencies", option="rope_parameters"
        ) from None
    return Rotation(frequencies.astype(np.float32), scale)


def _plain(config: Config, inverse: Floats, head_size: int) -> _Slowed:
    return inverse, 1.0


def _linear(config: Config, inverse: Floats, head_size: int) -> _Slowed:
    return inverse / config.number("factor"), 1.0


def _llama3(config: Config, inverse: Floats, head_size: int) -> _Slowed:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    factor = config.number("factor")
    low, high = config.number("low_freq_factor"), config.number("high_freq_factor")
    turns = config.integer("original_max_position_embeddings") / (2 * math.pi / inverse)
    blend = ((turns - low) / (high - low)).clip(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse, 1.0


def _yarn(config: Config, inverse: Floats, head_size: int) -> _Slowed:
    original = config.integer("original_max_position_embeddings")
    factor, theta = config.number("factor"), config.number("rope_theta")

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times over the original context."""
        return head_size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(config.number("beta_fast", 32.0))
    high = dimension(config.number("beta_slow", 1.0))
    if config.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    ramp = (np.arange(head_size // 2).astype(np.float32) - low) / ((high - low) or 0.001)
    slowed = ramp.clip(0, 1)
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
