"""What a run trains: transformers' model with the base's weights, LoRA's additions by peft, or new weights.

No code comes from a model: the class is one of the installed transformers, and config.json only sets it. The
frozen base of a LoRA run is the file that serving maps, where the native engine serves the model; else, and
for all that is trained itself, weights are this process's own, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from llmasos.syscalls import errors
from llmasos.syscalls.training import ALL_LINEAR, Method, Recipe
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import host
from ..base import LoadSpec, TrainSpec
from ..checkpoint import read_json
from ..families import describe
from ..families.encoder import is_encoder
from ..model_config import Config
from ..native import pack
from ..native.architecture import refusal
from ..torch import host as torch_host
from ..torch.models.transformers_code import load
from ..torch.models.transformers_survey import Code, Survey, code_of, explained, freeze_rotary, survey_of
from ..torch.weights import Checkpoint
from .attention import Attention
from .mapped import place
from .parallel import check

_STATE_BYTES = {Method.LORA: 4, Method.FULL: 16, Method.PRETRAIN: 16}
"""Of a weight, at least: in float32, with its gradient and two moments where it is trained."""

_FIXED = {"model_type", "architectures", "auto_map", "quantization_config", "vocab_size"}
"""Of a config what pre-training may not replace: the class, and what the tokenizer gives."""


@dataclass(slots=True)
class Built:
    """`causal` is transformers' model, `adapted` peft's around it where there is LoRA. `resident`: bytes of
    weights of this process's own that are not trained. `turned`: its matrices are Conv1D, [in, out]."""

    causal: Any
    adapted: PeftModel | None
    attention: Attention
    context_length: int
    vocab_size: int
    resident: int
    turned: bool

    @property
    def trained(self) -> nn.Module:
        model: nn.Module = self.causal if self.adapted is None else self.adapted
        return model


def build(spec: TrainSpec, device: torch.device, bf16: bool) -> Built:
    """Raises Corrupt, UnsupportedModel, InvalidArgument (the recipe does not fit the model), NeverFits."""
    recipe = spec.recipe
    if "config.json" not in spec.files:
        raise errors.Corrupt("the model has no config.json", hint="pull the model again")
    values = read_json(spec.files["config.json"], "config.json", dict[str, Any])
    config = Config(_changed(values, recipe))
    if is_encoder(config):
        raise errors.UnsupportedModel(
            f"{config.get('model_type')} is an encoder: it cannot be trained here",
            hint="train a model that generates text",
        )
    code = code_of(config)
    survey = survey_of(code)
    length = survey.shape.context_length
    if recipe.longest > length:
        raise errors.InvalidArgument(
            f"max_length is {recipe.longest}, the model's context has {length} tokens",
            hint=f"at most {length}",
        )
    torch.manual_seed(recipe.seed)
    check(recipe, config, device.type)
    divided = recipe.mesh.tensor > 1  # DTensor knows no mapped matrix
    mapped = recipe.method is Method.LORA and device.type == "cpu" and not refusal(config) and not divided
    if not mapped:
        _refuse_without_room(survey, recipe, device)
    attention = Attention(code, survey, recipe.longest)
    name = attention.implementation
    causal = _mapped(spec, code, config, name) if mapped else _own(spec, code, survey, bf16, name)
    turned = any(isinstance(module, Conv1D) for module in causal.modules()) or (
        mapped and describe(config).turned
    )
    causal.to(device).train()
    adapted = _adapted(causal, recipe, code.kind) if recipe.method is Method.LORA else None
    if recipe.gradient_checkpointing:
        with explained(code.kind, "its activations cannot be computed twice"):
            causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = sum(p.nbytes for p in causal.parameters() if not p.requires_grad)
    return Built(causal, adapted, attention, length, survey.shape.vocab_size, own, turned)


def _changed(values: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The config, as pre-training has it."""
    if not recipe.config:
        return values
    if recipe.method is not Method.PRETRAIN:
        raise errors.InvalidArgument(
            "config is for pre-training; other methods keep the model's",
            hint="use method pretrain, or no config",
        )
    try:
        changes = msgspec.json.decode(recipe.config, type=dict[str, Any])
    except msgspec.DecodeError as problem:
        raise errors.InvalidArgument(
            f"config is no JSON object: {problem}", hint='like {"num_hidden_layers": 4}'
        ) from None
    for name in changes:
        if name in _FIXED or name not in values:
            raise errors.InvalidArgument(
                f"config cannot set {name[:64]!r}",
                hint=f"the model's config has {', '.join(sorted(values.keys() - _FIXED))}"[:400],
            )
    return values | changes


def _refuse_without_room(survey: Survey, recipe: Recipe, device: torch.device) -> None:
    needed = survey.parameters * _STATE_BYTES[recipe.method]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host.memory()[1]
    ranks = recipe.mesh.ranks
    if needed > free * ranks:
        raise errors.NeverFits(
            f"training needs {needed / 1e6:.0f} MB for weights and their state, {free / 1e6:.0f} are free",
            hint="use lora, a smaller model, or more ranks that shard",
            needed=needed,
            free=free,
        )


def _own(spec: TrainSpec, code: Code, survey: Survey, bf16: bool, attention: str) -> Any:
    if spec.recipe.method is Method.PRETRAIN:
        with explained(code.kind, "transformers cannot make it"):
            fresh = code.model_class._from_config(
                code.config, attn_implementation=attention, dtype=torch.float32
            )
        freeze_rotary(fresh)
        return fresh
    checkpoint = Checkpoint(spec.files)
    if spec.recipe.method is Method.FULL:
        return load(code, survey, checkpoint, torch.float32, attention)
    wanted = spec.recipe.dtype or ("bfloat16" if checkpoint.stored in ("BF16", "F16") else "float32")
    if wanted not in ("float32", "bfloat16"):
        raise errors.UnsupportedModel(
            f"no base of weights in {wanted} is trained on here", hint="leave dtype empty"
        )
    dtype = torch.bfloat16 if bf16 and wanted == "bfloat16" else torch.float32
    return load(code, survey, checkpoint, dtype, attention)


def _mapped(spec: TrainSpec, code: Code, config: Config, attention: str) -> Any:
    dtype = spec.recipe.dtype
    packed = pack.load(LoadSpec(0, spec.files, dtype, 0.0, derived=spec.derived), lambda _: None)
    with explained(code.kind, "transformers cannot make it"), init_empty_weights(include_buffers=False):
        model = code.model_class._from_config(code.config, attn_implementation=attention, dtype=torch.float32)
    freeze_rotary(model)
    place(model, describe(config), packed)
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise errors.UnsupportedModel(f"{missing[0]} has no place in the packed weights of {code.kind}")
    return model


def _adapted(causal: Any, recipe: Recipe, kind: str) -> PeftModel:
    lora = recipe.lora
    named, head = [], causal.get_output_embeddings()
    for name, module in causal.named_modules():
        if module is not head and isinstance(module, (nn.Linear, Conv1D)):
            named.append(name)
    targets: list[str] | str | None = lora.target_modules or None
    if lora.target_modules == [ALL_LINEAR]:
        targets = ALL_LINEAR
    for target in lora.target_modules if targets != ALL_LINEAR else []:
        if not any(name == target or name.endswith(f".{target}") for name in named):
            known = sorted({name.rpartition(".")[2] for name in named})
            raise errors.InvalidArgument(
                f"no matrix that lora adds to is called {target!r}",
                hint=f"it adds to {', '.join(known)}"[:400],
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in causal.modules()),
    )
    # Whatever transformers drew from it before, the additions begin the same.
    torch.manual_seed(recipe.seed)
    try:
        return get_peft_model(causal, config)
    except ValueError as problem:
        known = sorted({name.rpartition(".")[2] for name in named})
        raise errors.InvalidArgument(
            f"peft cannot add to {kind}: {' '.join(str(problem).split())[:160]}",
            hint=f"name target_modules among {', '.join(known)}"[:400],
        ) from None


def _whole(number: float) -> Any:
    """As peft writes it: an integer where it is one."""
    return int(number) if math.isfinite(number) and number == int(number) else number


def computes_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether the run multiplies in bfloat16."""
    if recipe.bf16 is not None:
        return recipe.bf16
    return torch_host.multiplies_bfloat16(device)


def device_of(name: str) -> torch.device:
    """Where a device of the kernel computes: see torch/host.py. Raises NoSuchDevice."""
    kind = name.partition("*")[0]  # of a group
    return torch_host.device_of(kind if kind.startswith("cuda") else "cpu")
