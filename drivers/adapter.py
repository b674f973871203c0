"""Reads a LoRA adapter as peft writes it, for the modules of a decoder. No torch.

Everything is checked before memory is taken: digests, sizes, and that every field of adapter_config.json is
one that we compute with or one that changes nothing (peft's LoraConfig says what each means). What would
change the result and is not computed is refused by its name.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors
from llmasos.syscalls import errors

from .base import File
from .checkpoint import PLAIN, Floats, mapped, read_json, values_of
from .families.decoder import Decoder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MOST_RANK = 256
"""Of one module."""

_LARGEST = 1e18
"""Of an adapter's halves, and of their product: no training comes near, and what is far above leaves the
range of float32 once inputs are multiplied with it."""

_MOST_CONFIG = 1 << 20  # bytes
_MOST_HEADER = 1 << 22
_PREFIX = "base_model.model."
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_(A|B)\.weight")

# What says how it was trained, where it came from, or which modules it has: the tensors tell that.
_HARMLESS = {
    *("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "ensure_weight_tying"),
}
_COMPUTED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Values at which other fields change nothing, besides null, false and what is empty. An adapter that was
# initialised in other ways (PiSSA, OLoRA, LoftQ, CorDA) belongs to weights that were changed for it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
# Patterns are regular expressions of a stranger: without repetitions they take no time.
_PATTERN = re.compile(r"[\w.^\\-]{1,256}")


class Lora(NamedTuple):
    """What is added to a module's output for input x: b @ (a @ x). `a` is [rank, in], `b` [out, rank], times
    the adapter's scaling; both float32."""

    a: Floats
    b: Floats


def read(files: dict[str, File], decoder: Decoder) -> dict[str, Lora]:
    """The modules that an adapter changes, named as the decoder's layers name them. Raises Corrupt or
    UnsupportedModel."""
    for needed in (CONFIG, WEIGHTS):
        if needed not in files:
            raise errors.Corrupt(f"the adapter has no {needed}", hint="pull the adapter again")
    if files[CONFIG].size > _MOST_CONFIG:
        raise errors.Corrupt(f"{CONFIG} has {files[CONFIG].size} bytes", hint="pull the adapter again")
    scaling = _Scaling(read_json(files[CONFIG], CONFIG, dict[str, Any]))
    sizes = _sizes(decoder)
    halves = _tensors(files[WEIGHTS], sizes, decoder.prefix)
    found = {}
    for name, parts in halves.items():
        a, b = parts.get("A"), parts.get("B")
        rows, columns = sizes[name]
        rank = scaling.rank(decoder.prefix + name)
        if a is None or b is None or a.shape != (rank, columns) or b.shape != (rows, rank):
            shapes = ", ".join(f"{part} {values.shape}" for part, values in sorted(parts.items()))
            raise errors.Corrupt(
                f"the adapter's tensors of {name} are {shapes}; rank {rank} of a module [{rows}, {columns}] "
                f"needs A {(rank, columns)} and B {(rows, rank)}",
                hint="it was made for another model, or is damaged",
                module=name,
            )
        with np.errstate(over="ignore"):  # what comes of it is refused
            found[name] = Lora(a, b * np.float32(scaling.of(decoder.prefix + name, rank)))
        _check_size(name, found[name])
    return found


def _check_size(name: str, lora: Lora) -> None:
    """Raises Corrupt when what is added may be no finite number. No value of a product is larger than its
    factors' norms multiplied."""
    with np.errstate(over="ignore"):
        a, b = float(np.linalg.norm(lora.a)), float(np.linalg.norm(lora.b))
    if not max(a, b, a * b) < _LARGEST:
        raise errors.Corrupt(
            f"the adapter's A and B of {name[:128]!r} are too large to compute: norms of {a:.0e} and {b:.0e}",
            hint="its training diverged, or the file is damaged",
            module=name[:128],
        )


def _sizes(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every module that may have an adapter."""
    sizes = {}
    for layer in decoder.layers:
        for name in (*layer.qkv, layer.out, *layer.up, layer.down):
            first, second = decoder.expected[f"{name}.weight"]
            sizes[name] = (second, first) if decoder.turned else (first, second)
    return sizes


class _Scaling:
    """What adapter_config.json says of ranks and scalings. Raises UnsupportedModel."""

    def __init__(self, config: dict[str, Any]) -> None:
        for name, value in config.items():
            if name in _HARMLESS or name in _COMPUTED or not value or value in _NEUTRAL.get(name, ()):
                continue
            raise _refused(name, value)
        if "peft_type" not in config:
            raise errors.Corrupt(f"{CONFIG} names no peft_type", hint="pull the adapter again")
        self._rank, self._alpha = config.get("r", 8), config.get("lora_alpha", 8)
        self._ranks, self._alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
        self._root = config.get("use_rslora")
        if not isinstance(self._root, bool | None):
            raise _refused("use_rslora", self._root)

    def rank(self, module: str) -> int:
        rank = _matching(self._ranks, module, self._rank)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MOST_RANK:
            raise _refused("r", rank)
        return rank

    def of(self, module: str, rank: int) -> float:
        alpha = _matching(self._alphas, module, self._alpha)
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e6:
            raise _refused("lora_alpha", alpha)
        return float(alpha) / (math.sqrt(rank) if self._root else rank)


def _patterns(config: dict[str, Any], name: str) -> list[tuple[re.Pattern[str], Any]]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or not all(_PATTERN.fullmatch(key) for key in patterns):
        raise _refused(name, patterns)
    try:
        return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
    except re.error:
        raise _refused(name, patterns) from None


def _matching(patterns: list[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that the end of the module's name matches."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _refused(name: str, value: Any) -> errors.UnsupportedModel:
    return errors.UnsupportedModel(
        f"adapter option {name!r} is {str(value)[:64]!r}, which no driver computes",
        hint="plain LoRA of the layers' matrices is served: merge the adapter with peft",
        option=name[:64],
    )


def _tensors(file: File, sizes: dict[str, tuple[int, int]], prefix: str) -> dict[str, dict[str, Floats]]:
    """float32 tensors by module and half ("A", "B")."""
    most = _MOST_HEADER + 4 * MOST_RANK * sum(map(sum, sizes.values()))
    if file.size > most:
        raise errors.Corrupt(
            f"{WEIGHTS} has {file.size} bytes, an adapter of this model has at most {most}",
            hint="it was made for another model",
        )
    try:
        # The library checks that the tensors fill the file and each has the bytes that its shape needs.
        stored = safetensors.deserialize(bytes(mapped(file, WEIGHTS)))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as problem:
        raise errors.Corrupt(f"{WEIGHTS}: {str(problem)[:200]}", hint="pull the adapter again") from None
    found: dict[str, dict[str, Floats]] = {}
    for name, tensor in stored:
        match = _NAME.fullmatch(name)
        module = match[1].removeprefix(prefix) if match else ""
        plain = tensor["dtype"] in PLAIN and len(tensor["shape"]) == 2 and min(tensor["shape"]) > 0
        if match is None or module not in sizes or not plain:
            raise errors.UnsupportedModel(
                f"the adapter's tensor {name[:128]!r} ({tensor['dtype']}, {tensor['shape']}) is not computed",
                hint="plain LoRA of the layers' matrices is served: merge the adapter with peft",
                tensor=name[:128],
            )
        rows = np.frombuffer(tensor["data"], np.uint8).reshape(tensor["shape"][0], -1)
        values = values_of(tensor["dtype"], rows).reshape(tensor["shape"])
        if not np.isfinite(values).all():
            raise errors.Corrupt(f"the adapter's tensor {name[:128]!r} has values that are no numbers")
        found.setdefault(module, {})[match[2]] = values
    if not found:
        raise errors.Corrupt("the adapter changes nothing: it has no tensors", hint="pull the adapter again")
    return found
