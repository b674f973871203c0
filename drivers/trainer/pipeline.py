"""The objective of a model whose layers lie on several ranks, one behind the other, by
torch.distributed.pipelining: a batch goes through in micro-batches, so that all stages are busy.

With `interleaved` and `zero-bubble` a rank has two stages, which are not neighbours. All ranks of a pipeline
are given the same rows. Shapes are said beforehand: asking the neighbour for them would be done by pickle.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from llmasos.syscalls.training import Pipeline
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from .attention import Attention
from .batches import Batch
from .crew import Crew
from .objective import Objective

_SCHEDULES: dict[Pipeline, Any] = {
    Pipeline.ONE_F_ONE_B: Schedule1F1B,
    Pipeline.INTERLEAVED: ScheduleInterleaved1F1B,
    Pipeline.ZERO_BUBBLE: ScheduleInterleavedZeroBubble,
}


def stages_of_a_rank(schedule: Pipeline) -> int:
    return 1 if schedule is Pipeline.ONE_F_ONE_B else 2


class _Stage(nn.Module):
    """Some layers of a model: from token ids if it is the first, to the sum of losses if it is the last, else
    from hidden states [rows, length, hidden] to hidden states."""

    def __init__(self, causal: Any, attention: Attention, index: int, count: int, bf16: bool) -> None:
        super().__init__()
        whole = causal.base_model
        layers = len(whole.layers)
        own = range(index * layers // count, (index + 1) * layers // count)
        self.first, self.last = index == 0, index == count - 1
        decoder = copy.copy(whole)
        decoder._modules = dict(whole._modules)
        decoder.layers = nn.ModuleList([whole.layers[i] for i in own])
        self.layers = list(decoder.layers)
        decoder.config = copy.deepcopy(whole.config)
        decoder.config.num_hidden_layers = len(own)
        if getattr(whole.config, "layer_types", None):
            decoder.config.layer_types = [whole.config.layer_types[i] for i in own]
        if not self.first:
            decoder.embed_tokens = None
        if not self.last:
            decoder.norm = nn.Identity()
        part = copy.copy(causal)
        part._modules = {**causal._modules, causal.base_model_prefix: decoder}
        if not self.last:
            part.lm_head = None
        self.part = part
        self._objective = [Objective(part, attention, bf16, lambda: None)]  # no module of this one

    def forward(self, given: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        [objective] = self._objective
        batch = Batch(given, position_ids, targets, 0)
        with objective.attention.over(position_ids), objective.autocast(batch):
            output = objective.decoded(batch, embedded=not self.first)
            if not self.last:
                hidden: torch.Tensor = output.last_hidden_state.float()
                return hidden
            wanted = batch.learning
            loss = objective.loss(output.last_hidden_state[wanted], targets[wanted], type(output))
            return loss[None]


class PipedObjective:
    """See Objective. `rows` of `length` tokens in every batch."""

    def __init__(
        self, causal: Any, attention: Attention, bf16: bool, crew: Crew, rows: int, length: int
    ) -> None:
        assert crew.mesh is not None
        assert crew.ranks is not None
        self._shape, self._learnt, self._device = crew.shape, 1, crew.ranks.device
        kind = crew.shape.pipeline
        each = stages_of_a_rank(kind)
        count = each * crew.shape.stages
        hidden = int(causal.config.hidden_size)
        small = rows // crew.shape.micro_batches
        ids = torch.empty(small, length, dtype=torch.int64, device="meta")
        between = torch.empty(small, length, hidden, device="meta", requires_grad=True)
        loss = torch.empty(1, device="meta")
        group = crew.mesh["stages"].get_group()
        self.parts: list[_Stage] = []
        stages = []
        for index in range(crew.stage, count, crew.shape.stages):
            part = _Stage(causal, attention, index, count, bf16)
            self.parts.append(part)
            stages.append(
                PipelineStage(
                    part,
                    index,
                    count,
                    self._device,
                    input_args=(ids if part.first else between,),
                    output_args=(loss if part.last else between,),
                    group=group,
                )
            )
        self._first, self._last = crew.stage == 0, crew.stage == crew.shape.stages - 1
        self._schedule = _SCHEDULES[kind](
            stages if each > 1 else stages[0],
            crew.shape.micro_batches,
            loss_fn=lambda output, target: output.sum() / self._learnt,
            scale_grads=False,
        )

    def forget_others(self, causal: Any) -> None:
        """Frees the layers of other ranks in the model that this was made of."""
        here = {id(layer) for part in self.parts for layer in part.layers}
        layers = causal.base_model.layers
        for i, layer in enumerate(layers):
            if id(layer) not in here:
                layers[i] = nn.Identity()

    def learn(self, batch: Batch, learnt: int) -> float:
        return self._run(self._schedule.step, batch, learnt, train=True)

    def measure(self, batch: Batch) -> tuple[float, int]:
        return self._run(self._schedule.eval, batch, 1, train=False), batch.learnt

    def _run(self, go: Any, batch: Batch, learnt: int, train: bool) -> float:
        for part in self.parts:
            part.part.train(train)
        self._learnt = learnt
        losses: list[torch.Tensor] = []
        go(
            *((batch.input_ids,) if self._first else ()),
            target=batch.targets if self._last else None,
            losses=losses if self._last else None,
            position_ids=batch.position_ids,
            targets=batch.targets,
        )
        return float(sum(loss.detach() for loss in losses))
