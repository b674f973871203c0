"""Model families. A family is a module with `shape_of` and `build`."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
from llmasos.syscalls import errors

from ..attention import StepRows
from ..config import Config, Shape
from ..ranks import Ranks
from ..weights import Checkpoint

# `model_type` of config.json -> module of this folder. Imported only when a model asks for it.
FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "smollm3": "llama",
}


class Model(Protocol):
    """A decoder. `weights_bytes` counts what it holds; `windows` its sliding windows (0: none)."""

    shape: Shape
    windows: set[int]
    weights_bytes: int

    def forward(self, plan: StepRows) -> torch.Tensor:
        """The last hidden states [T, hidden] of a step's rows, after the final norm; writes their KV. A
        family of ours waits for nothing, so that its steps can be captured."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, vocab_size] of some rows [R, hidden]."""
        ...


class Family(Protocol):
    def shape_of(self, config: Config) -> Shape:
        """Raises UnsupportedModel for options that are not computed."""
        ...

    def build(
        self, config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> Model:
        """Raises Corrupt or UnsupportedModel before it reads the first tensor."""
        ...


class OwnFamily(Protocol):
    """A family of ours."""

    def build(
        self,
        config: Config,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        format_: str,
        ranks: Ranks | None,
    ) -> Model:
        """The part of one of `ranks`, if there are any; matrices in one of quantised.FORMATS, if any."""
        ...


def is_ours(config: Config) -> bool:
    """Whether a family here computes the architecture, not transformers' code."""
    return config.text("model_type") in FAMILIES


def family_of(config: Config) -> Family:
    """The module that computes the config's architecture: a family of ours, or else transformers' own code.
    Raises UnsupportedModel."""
    for name in config.texts("architectures"):
        if not name.endswith(("ForCausalLM", "LMHeadModel")):
            raise errors.UnsupportedModel(
                f"{name[:64]!r} does not generate text", hint="pull its ForCausalLM variant"
            )
    module = FAMILIES.get(config.text("model_type"), "transformers_code")
    return cast(Family, importlib.import_module(f".{module}", __name__))


def build(
    config: Config,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    format_: str,
    ranks: Ranks | None = None,
) -> Model:
    """A model that computes in `dtype`, its matrices in one of quantised.FORMATS, if any; this rank's part of
    it, if there are `ranks`. Raises Corrupt or UnsupportedModel."""
    family = family_of(config)
    if is_ours(config):
        return cast(OwnFamily, family).build(config, checkpoint, device, dtype, format_, ranks)
    if format_:
        raise errors.UnsupportedModel(
            f"transformers' code does not compute with weights in {format_}", hint="leave dtype empty"
        )
    if ranks is not None:
        raise errors.UnsupportedModel(
            f"a group of devices computes the families {', '.join(FAMILIES)} only",
            hint="choose a single device",
        )
    return family.build(config, checkpoint, device, dtype)
