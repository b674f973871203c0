"""Puts the parts together: who learns how, and which parameters this rank steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from llmasos.syscalls.training import Recipe, Shard
from torch import nn

from .batches import Batch
from .crew import Crew
from .gate import Gate
from .model import Built
from .objective import Objective
from .parallel import divide_layers
from .pipeline import PipedObjective
from .sharded import ShardedObjective


class Learns(Protocol):
    """See Objective."""

    def learn(self, batch: Batch, learnt: int) -> float: ...

    def measure(self, batch: Batch) -> tuple[float, int]: ...


@dataclass(frozen=True, slots=True)
class Division:
    """`parameters` are those of this rank that are trained, by the names that they have in the whole model;
    `tied` are names that the first and the last stage both have."""

    objective: Learns
    parameters: dict[str, nn.Parameter]
    tied: list[str]


def divide(
    built: Built, recipe: Recipe, crew: Crew, bf16: bool, device: torch.device, gate: Gate
) -> Division:
    """As the recipe's mesh has it. Every rank has built the same."""
    causal, attention, mesh = built.causal, built.attention, recipe.mesh
    if crew.leads:
        gate.guard(causal)
    if crew.mesh is None:
        return Division(Objective(causal, attention, bf16, gate.wait), _trained(built), [])
    if mesh.stages > 1:
        whole = _trained(built)
        piped = PipedObjective(
            causal, attention, bf16, crew, recipe.per_device_train_batch_size, recipe.longest
        )
        here = {id(parameter) for part in piped.parts for parameter in part.parameters()}
        own = {name: parameter for name, parameter in whole.items() if id(parameter) in here}
        ends = causal.get_output_embeddings().weight
        shared = ends is causal.get_input_embeddings().weight
        if built.adapted is None:  # else the base is mapped, and peft looks at all layers
            piped.forget_others(causal)
        return Division(piped, own, [name for name, p in whole.items() if shared and p is ends])
    if mesh.tensor > 1:
        divide_layers(causal, crew.mesh["tensor"], mesh.sequence)
    if mesh.shard is Shard.DDP:
        return Division(Objective(causal, attention, bf16, lambda: None), _trained(built), [])
    sharded = ShardedObjective(causal, attention, bf16, crew, device)
    return Division(sharded, _trained(built), [])


def _trained(built: Built) -> dict[str, nn.Parameter]:
    return {name: p for name, p in built.trained.named_parameters() if p.requires_grad}


def unit_of(recipe: Recipe) -> int:
    """Of how many tokens the length of a row has to be a multiple."""
    if recipe.mesh.stages > 1:
        return recipe.longest  # a stage knows beforehand what comes
    return recipe.mesh.tensor if recipe.mesh.sequence else 1
