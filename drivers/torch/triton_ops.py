"""The operators of a step as Triton kernels: see `ops.Ops`. Nothing here waits for the device."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..mirror import Choice, Sequence
from . import sampler
from .config import ACTIVATIONS, Activation
from .kernels import attention, layer, linear, sampling
from .ops import Drawn, PagedRows, Turn
from .transfer import fetch, send


class TritonOps:
    """See Ops. On a `device` that is a CPU the kernels run in Triton's interpreter (tests)."""

    pages = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._processors, self.multiplies_float8 = 4, False
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
            self.multiplies_float8 = torch.cuda.get_device_capability(device) >= (8, 9)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        return layer.add_norm(x, delta, weight, epsilon)

    def gate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        if activation is ACTIVATIONS["silu"]:
            return layer.silu_gate(x)
        gate, up = x.chunk(2, dim=-1)
        return activation(gate).mul_(up)

    def place(self, rows: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, turn: Turn | None) -> None:
        turns, norm, epsilon = turn or Turn(None, None, 0.0)
        layer.place(rows, pool, slots, turns, norm, epsilon)

    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: PagedRows,
        scale: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        longest = min(rows.longest, window) if window else rows.longest
        splits = attention.splits_of(len(query), pool.shape[0] // 2, longest, self._processors)
        return attention.attend(query, pool, rows.tables, rows.lengths, scale, window, softcap, sinks, splits)

    def few_rows(
        self,
        x: torch.Tensor,
        stored: torch.Tensor,
        scales: torch.Tensor,
        lows: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if len(x) > linear.MOST_ROWS:
            return None
        return linear.matmul(x, stored, scales, lows, bias, self._processors)

    def choose(self, logits: torch.Tensor, places: list[int], rows: list[tuple[Sequence, int]]) -> Drawn:
        samplings = [sequence.sampling for sequence, _ in rows]
        processed = [index for index, (sequence, _) in enumerate(rows) if sequence.changed]
        scores, sources = logits, places
        if processed:
            scores = logits.index_select(0, send(np.array(places), self._device))
            sources = list(range(len(rows)))
            sampler.process_rows(scores, [(index, *rows[index]) for index in processed])
        seeds = np.array([s.seed or 0 for s in samplings], np.uint64).view(np.int64)
        numbers = [sources, seeds, [position for _, position in rows], [s.top_k for s in samplings]]
        reals = [
            [s.temperature for s in samplings],
            [s.top_p for s in samplings],
            [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings],
        ]
        tokens = sampling.sample(
            scores,
            send(np.array(numbers, np.int64), self._device),
            send(np.array(reals, np.float32), self._device),
        )
        asked = [index for index, s in enumerate(samplings) if s.logprobs is not None]
        scored = self._scored(logits, tokens, places, asked, [samplings[i].logprobs or 0 for i in asked])
        found, why = fetch(tokens), dict.fromkeys(processed, sampler.NOTHING_LEFT)

        def choices() -> list[Choice]:
            made = [Choice(token) for token in found.tolist()]
            for index, choice in enumerate(made):
                if choice.token < 0:
                    left = choice.token == sampling.NOTHING_LEFT
                    choice.error = why.get(index, sampler.NOT_FINITE) if left else sampler.NOT_FINITE
            if scored is not None:
                for index, chosen in zip(asked, scored.chosen(), strict=True):
                    made[index].chosen = None if made[index].error else chosen
            return made

        return Drawn(tokens, choices)

    def _scored(
        self, logits: torch.Tensor, tokens: torch.Tensor, places: list[int], asked: list[int], tops: list[int]
    ) -> sampler.Scored | None:
        if not asked:
            return None
        part = logits.index_select(0, send(np.array([places[index] for index in asked]), self._device))
        own = tokens.index_select(0, send(np.array(asked), self._device)).clamp_(min=0)
        return sampler.Scored(part, own, tops)
