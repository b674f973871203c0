"""Attention of packed rows, example by example: what is computed grows with the lengths of the examples, not
with the row's, and no mask is made. Gives what transformers' block-diagonal mask gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from ..torch.models.transformers_survey import Code, Survey, answered_by


class Blocks:
    """Answers transformers' attention calls (transformers_survey.Attention) for rows whose positions, [rows,
    length], begin anew with each example."""

    def __init__(self, positions: torch.Tensor) -> None:
        self._edges = [
            [*torch.nonzero(row == 0).flatten().tolist(), len(row)] for row in positions.cpu().unbind()
        ]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        wishes: dict[str, Any],
    ) -> torch.Tensor:
        rows = []
        for i, edges in enumerate(self._edges):
            found = [
                functional.scaled_dot_product_attention(
                    query[i : i + 1, :, begin:end],
                    key[i : i + 1, :, begin:end],
                    value[i : i + 1, :, begin:end],
                    dropout_p=wishes.get("dropout") or 0.0,
                    is_causal=True,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
                for begin, end in pairwise(edges)
            ]
            rows.append(torch.cat(found, dim=2))
        return torch.cat(rows).transpose(1, 2).contiguous()


class Attention:
    """How a model attends while it is trained: `implementation` for transformers, `over` around what is
    computed of a batch, forward and backward."""

    def __init__(self, code: Code, survey: Survey, longest: int) -> None:
        calls = survey.calls
        odd = any(call.softcap or call.sinks for call in calls)
        short = any(call.window and call.window < longest for call in calls)
        self._blocks, self._intercepted = not (odd or short), code.intercepted
        # transformers' eager attention alone knows caps and sinks.
        self.implementation = code.implementation if self._blocks else "eager" if odd else "sdpa"

    @contextmanager
    def over(self, positions: torch.Tensor) -> Iterator[None]:
        if not self._blocks:
            yield
            return
        with answered_by(Blocks(positions), self._intercepted):
            yield
