"""Typed reading of a model's config.json: what a family asks for is checked and named when it is wrong.
Whoever wants more of a value than to compare it takes it from the getter of its type.

Both styles of transformers are read: 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmasos.syscalls import errors

_LARGEST = 1e300  # of a number

# Hugging Face's names of activations -> ours.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a driver must know of a model to make its KV pool and check its input."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    vocab_size: int


class Config:
    """A config.json. Every getter raises UnsupportedModel naming the option."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    @property
    def values(self) -> dict[str, Any]:
        """Everything that config.json says."""
        return dict(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`. Sizes are bounded by the model's files before (check_sizes)."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise _refused(name, value, f"a whole number from {least} on")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _LARGEST:
            raise _refused(name, value, "a number")
        return float(value)

    def epsilon(self, name: str, default: float) -> float:
        """What a norm adds to a variance."""
        value = self.number(name, default)
        self.check(0 <= value < 1, name, "a number from 0 to 1")
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise _refused(name, value, "a name")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise _refused(name, value, "a list of names")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _refused(name, value, "true or false")
        return value

    def activation(self, name: str, default: str) -> str:
        """silu, gelu (exact), gelu_tanh or relu."""
        value = self.text(name, default)
        if value not in _ACTIVATIONS:
            raise _refused(name, value, f"one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def per_layer(self, name: str, layers: int) -> list[Any] | None:
        """A list with an item for each layer, if the config has it."""
        value = self.get(name)
        if value is not None and (not isinstance(value, list) or len(value) < layers):
            raise _refused(name, value, f"a list of {layers} items")
        return value

    def check(self, holds: bool, name: str, wanted: str) -> None:
        """Raises for option `name` unless the condition holds."""
        if not holds:
            raise _refused(name, self.get(name), wanted)

    def refuse_unless(self, **neutral: Any) -> None:
        """Raises for options whose value is not the one at which they do nothing."""
        for name, harmless in neutral.items():
            if self.get(name, harmless) != harmless:
                raise _refused(name, self.get(name), repr(harmless))

    def rope(self, default_theta: float) -> Config:
        """The rotary parameters in transformers 5 style, `rope_type` and `rope_theta` always set."""
        given = self.get("rope_scaling") or self.get("rope_parameters") or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise _refused("rope_parameters", "one map a layer type", "one map for all layers")
        merged = {"rope_theta": self.number("rope_theta", default_theta), **given}
        merged.setdefault("rope_type", given.get("type") or "default")
        for name in ("original_max_position_embeddings", "partial_rotary_factor"):
            if self.get(name) is not None:
                merged[name] = self.get(name)
        merged.setdefault("original_max_position_embeddings", self.get("max_position_embeddings"))
        return Config(merged)


def _refused(name: str, value: Any, wanted: str) -> errors.UnsupportedModel:
    return errors.UnsupportedModel(
        f"config option {name!r} is {str(value)[:64]!r}; the driver computes only {wanted}",
        hint="no driver computes this variant of the architecture",
        option=name,
    )
