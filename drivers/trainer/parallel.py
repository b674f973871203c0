"""How a model is divided among the ranks of a run, by torch's own means: FSDP2 over the data ranks, DTensor
within the layers. Stages are pipeline.py's.

What cannot be divided as asked is refused before anything is loaded. What can:

    ddp          all methods, alone or with stages, or with tensor
    optimizer,   all methods, alone, with replicas or with tensor
    full
    tensor       the llama family, heads and inner width divided evenly; with sequence: not for lora
    stages       the llama family; with ddp over data ranks
"""

from __future__ import annotations

from typing import Any

import torch
from llmasos.syscalls import errors
from llmasos.syscalls.training import Mesh, Method, Recipe, Shard
from torch import nn
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model_config import Config
from .crew import Crew

_LLAMAS = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Families whose layers have the names that a plan needs."""

_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")


def check(recipe: Recipe, config: Config, device: str) -> None:
    """Raises InvalidArgument (the mesh is none) or UnsupportedModel (not for this model)."""
    mesh = recipe.mesh
    if mesh.ranks == 1:
        return
    if mesh.stages > 1 and (mesh.tensor > 1 or mesh.replicas > 1 or mesh.shard is not Shard.DDP):
        raise _impossible("stages go with data ranks of shard=ddp only", "leave tensor and replicas at 1")
    if mesh.replicas > 1 and (mesh.shard is Shard.DDP or mesh.tensor > 1):
        raise _impossible(
            "replicas are of groups that shard, without tensor", "use data alone, or shard=optimizer or full"
        )
    if mesh.sequence and (mesh.tensor == 1 or recipe.method is Method.LORA):
        raise _impossible("sequence goes with tensor, and not with lora", "leave sequence off")
    if mesh.offload and device != "cpu" and mesh.shard is Shard.DDP:
        raise _impossible("offload is of what is sharded", "use shard=optimizer or full")
    if recipe.per_device_train_batch_size % mesh.micro_batches:
        raise _impossible(
            f"{recipe.per_device_train_batch_size} rows are not {mesh.micro_batches} equal micro-batches",
            "per_device_train_batch_size has to be a multiple of micro_batches",
        )
    if mesh.stages > 1 and mesh.micro_batches < mesh.stages:
        raise _impossible(
            f"{mesh.micro_batches} micro-batches for {mesh.stages} stages", "micro_batches of at least stages"
        )
    if mesh.stages > 1 and recipe.gradient_checkpointing:
        raise _impossible("stages compute no activations twice", "leave gradient_checkpointing off")
    if mesh.tensor > 1 or mesh.stages > 1:
        _check_model(mesh, config)


def _check_model(mesh: Mesh, config: Config) -> None:
    kind = str(config.get("model_type"))
    if kind not in _LLAMAS:
        raise errors.UnsupportedModel(
            f"{kind} is trained with data ranks only, not with tensor or stages", hint="use data and shard"
        )
    heads = config.integer("num_attention_heads")
    for name, count in {
        "num_attention_heads": heads,
        "num_key_value_heads": config.integer("num_key_value_heads", heads),
        "intermediate_size": config.integer("intermediate_size"),
    }.items():
        if count % mesh.tensor:
            raise errors.UnsupportedModel(
                f"{name} is {count}, which {mesh.tensor} ranks cannot divide evenly",
                hint="use another tensor",
            )


def _impossible(what: str, hint: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"mesh: {what}", hint=hint, field="mesh")


def layers_of(causal: nn.Module) -> list[nn.Module]:
    return [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]


def divide_layers(causal: Any, mesh: DeviceMesh, sequence: bool) -> None:
    """Tensor parallel: every rank has its heads and its share of the inner width and of the vocabulary; with
    `sequence` what lies between is divided along the sequence."""
    between = dtensor.Shard(1) if sequence else dtensor.Replicate()
    decoder = causal.base_model
    for layer in layers_of(causal):
        plan: dict[str, ParallelStyle] = {}
        for name in _COLUMNS:
            plan |= _columns(layer, name)
        for name in _ROWS:
            plan |= _rows(layer, name, between)
        if sequence:
            plan |= {
                "input_layernorm": SequenceParallel(),
                "post_attention_layernorm": SequenceParallel(),
                "self_attn": PrepareModuleInput(
                    input_kwarg_layouts={"hidden_states": between},
                    desired_input_kwarg_layouts={"hidden_states": dtensor.Replicate()},
                    use_local_output=True,
                ),
                "mlp": PrepareModuleInput(
                    input_layouts=(between,),
                    desired_input_layouts=(dtensor.Replicate(),),
                    use_local_output=True,
                ),
            }
        parallelize_module(layer, mesh, plan, src_data_rank=None)
    tied = causal.lm_head.weight is decoder.embed_tokens.weight
    trained = causal.lm_head.weight.requires_grad
    if not trained:
        return  # frozen: everywhere
    ends: dict[str, ParallelStyle] = {
        f"{causal.base_model_prefix}.embed_tokens": RowwiseParallel(input_layouts=dtensor.Replicate()),
        "lm_head": ColwiseParallel(output_layouts=dtensor.Replicate()),
    }
    parallelize_module(causal, mesh, ends, src_data_rank=None)
    if tied:
        causal.lm_head.weight = decoder.embed_tokens.weight
    if sequence:
        _divide_sequence(decoder, mesh)


def _divide_sequence(decoder: Any, mesh: DeviceMesh) -> None:
    """From the first layer to the last norm; outside of it everybody has all of it."""
    enter = PrepareModuleInput(
        input_layouts=(dtensor.Replicate(),),
        desired_input_layouts=(dtensor.Shard(1),),
        use_local_output=True,
    )
    parallelize_module(decoder.layers[0], mesh, enter, src_data_rank=None)
    parallelize_module(decoder, mesh, {"norm": SequenceParallel()}, src_data_rank=None)
    decoder.norm.register_forward_hook(lambda module, inputs, output: output.full_tensor())


def _columns(layer: nn.Module, name: str) -> dict[str, ParallelStyle]:
    """Outputs divided; of LoRA's additions those of B."""
    if hasattr(layer.get_submodule(name), "base_layer"):
        return {f"{name}.base_layer": ColwiseParallel(), f"{name}.lora_B.default": ColwiseParallel()}
    return {name: ColwiseParallel()}


def _rows(layer: nn.Module, name: str, between: dtensor.Placement) -> dict[str, ParallelStyle]:
    """Inputs divided; of LoRA's additions those of A."""
    if hasattr(layer.get_submodule(name), "base_layer"):
        return {f"{name}.base_layer": RowwiseParallel(), f"{name}.lora_A.default": RowwiseParallel()}
    return {name: RowwiseParallel(output_layouts=between)}


def shard(root: nn.Module, crew: Crew, device: torch.device) -> None:
    """FSDP2 over the data ranks: of `root` and each layer in it."""
    assert crew.mesh is not None
    shape = crew.shape
    mesh = crew.mesh["replicas", "data"] if shape.replicas > 1 else crew.mesh["data"]
    offload = CPUOffloadPolicy() if shape.offload and device.type != "cpu" else OffloadPolicy()
    for module in [*layers_of(root), root]:
        fully_shard(
            module, mesh=mesh, reshard_after_forward=shape.shard is Shard.FULL, offload_policy=offload
        )
