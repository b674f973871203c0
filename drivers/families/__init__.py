"""What a config.json means, family by family, as data that every driver computes from. No torch."""

from __future__ import annotations

from types import ModuleType

from llmasos.syscalls import errors

from ..model_config import Config
from . import gpt2, llama
from .decoder import Decoder

_FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "smollm3": llama,
}


def describe(config: Config) -> Decoder:
    """Raises UnsupportedModel for architectures and options that are not described here."""
    kind = config.text("model_type")
    if kind not in _FAMILIES:
        raise errors.UnsupportedModel(
            f"architecture {kind[:64]!r} is not computed",
            hint=f"supported: {', '.join(_FAMILIES)}",
            architecture=kind[:64],
        )
    for name in config.texts("architectures"):
        if not name.endswith(("ForCausalLM", "LMHeadModel")):
            raise errors.UnsupportedModel(
                f"{name[:64]!r} does not generate text", hint="pull its ForCausalLM variant"
            )
    described: Decoder = _FAMILIES[kind].describe(config)
    return described
