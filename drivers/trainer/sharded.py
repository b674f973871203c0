"""The objective of a model whose weights are gathered as they are needed (FSDP2): one pass forward and one
back for each batch, because the ranks gather together, and each learns from another number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .batches import Batch
from .crew import Crew
from .objective import Objective
from .parallel import shard


class _Lesson(nn.Module):
    """From a batch to the sum of its losses: what FSDP sees as the model. The logits of a piece are made
    again on the way back, so that one piece is held at a time."""

    def __init__(self, causal: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.causal = causal
        self._objective = [objective]  # no module of this one

    def forward(self, *batch: Any) -> torch.Tensor:
        [objective] = self._objective
        rows, targets, output = objective.hidden(Batch(*batch))
        pieces = objective.pieces(len(targets))
        if len(pieces) == 1:
            return objective.loss(rows, targets, output)
        parts = [
            checkpoint(objective.loss, rows[piece], targets[piece], output, use_reentrant=False)
            for piece in pieces
        ]
        return torch.stack(parts).sum()


class ShardedObjective(Objective):
    """See Objective."""

    def __init__(
        self, causal: Any, attention: Attention, bf16: bool, crew: Crew, device: torch.device
    ) -> None:
        super().__init__(causal, attention, bf16, lambda: None)
        self._lesson = _Lesson(causal, self)
        self._data_ranks = crew.data_ranks
        shard(self._lesson, crew, device)

    def learn(self, batch: Batch, learnt: int) -> float:
        self._causal.train()
        with self.attention.over(batch.position_ids):
            with self.autocast(batch):
                share = self._lesson(*batch) / learnt
            # FSDP makes the mean of the ranks' gradients; wanted is the sum.
            (share * self._data_ranks).backward()
        return float(share.detach())

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[float, int]:
        self._causal.eval()
        with self.attention.over(batch.position_ids), self.autocast(batch):
            return float(self._lesson(*batch)), batch.learnt
