"""AdamW as the recipe has it: which weights decay, the learning rate of each step, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from llmasos.syscalls import errors
from llmasos.syscalls.training import Recipe, Schedule
from torch import nn
from transformers.optimization import get_scheduler

from .crew import Crew, like, local

_SCHEDULES = {
    Schedule.LINEAR: "linear",
    Schedule.COSINE: "cosine",
    Schedule.CONSTANT: "constant_with_warmup",
}


class Optimizer:
    """Steps parameters, by name. Its state is AdamW's two moments of each. Where a parameter is divided among
    the ranks of `crew`, each rank steps its own part: AdamW looks at one number at a time. `tied` are
    parameters that the first and the last stage both have."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], recipe: Recipe, steps: int, crew: Crew, tied: list[str]
    ) -> None:
        self.parameters, self._crew, self._tied = parameters, crew, tied
        self._parts = {name: local(parameter.detach()) for name, parameter in parameters.items()}
        # As transformers' Trainer: vectors (norms, biases) do not decay.
        matrices = [p for p in self._parts.values() if p.dim() > 1]
        vectors = [p for p in self._parts.values() if p.dim() <= 1]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            fused=True,
        )
        self._recipe = recipe
        warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * steps)
        self._share = _share_of_rate(_SCHEDULES[recipe.lr_scheduler_type], warmup, steps)

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, which counts from 0."""
        return self._recipe.rate * self._share(step)

    def begin(self) -> None:
        """Forgets gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, step: int) -> float:
        """Changes the weights by their gradients; returns the norm of these before clipping. Raises
        DeviceFault, and changes nothing, if it is not finite."""
        self._crew.sum_gradients(self.parameters, self._tied)
        found = self._crew.norm(self.parameters, self._tied)
        norm = float(found)
        if not math.isfinite(norm):
            raise errors.DeviceFault(
                f"gradients are not finite at step {step + 1}",
                hint="use a lower learning_rate, more warmup_steps, or bf16 off",
                step=step + 1,
            )
        for name, parameter in self.parameters.items():
            self._parts[name].grad = None if parameter.grad is None else local(parameter.grad)
        if self._recipe.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self._parts.values(), self._recipe.max_grad_norm, found)
        for group in self._adamw.param_groups:
            group["lr"] = self.rate(step)
        self._adamw.step()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments, by name: what `restore` takes."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            state[f"weight.{name}"] = parameter.detach()
            moments = self._adamw.state[self._parts[name]]
            for moment in _MOMENTS:
                if moment in moments:
                    state[f"{moment}.{name}"] = like(moments[moment], parameter)
        return state

    def blank(self) -> dict[str, torch.Tensor]:
        """A state to read one into."""
        return {
            f"{kind}.{name}": like(torch.zeros_like(self._parts[name]), parameter)
            for name, parameter in self.parameters.items()
            for kind in ("weight", *_MOMENTS)
        }

    def restore(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """As after `steps` steps. Raises Corrupt."""
        if state.keys() != {f"{kind}.{name}" for kind in ("weight", *_MOMENTS) for name in self.parameters}:
            raise errors.Corrupt("the checkpoint has other tensors than the model")
        for name, parameter in self.parameters.items():
            for kind in ("weight", *_MOMENTS):
                if state[f"{kind}.{name}"].shape != parameter.shape:
                    raise errors.Corrupt(f"{name} of the checkpoint has another shape than the model's")
            part = self._parts[name]
            with torch.no_grad():
                part.copy_(local(state[f"weight.{name}"]))
            self._adamw.state[part] = {
                "step": torch.tensor(float(steps), device=part.device),
                **{m: local(state[f"{m}.{name}"]).to(part.device, part.dtype) for m in _MOMENTS},
            }

    def nbytes(self) -> int:
        """Of weights, gradients and moments."""
        return 4 * sum(p.nbytes for p in self._parts.values())


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _share_of_rate(kind: str, warmup: int, steps: int) -> Callable[[int], float]:
    """transformers' schedule as a function of the step."""
    nobody = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(kind, nobody, num_warmup_steps=warmup, num_training_steps=steps)
    share: Callable[[int], float] = scheduler.lr_lambdas[0]
    return share
