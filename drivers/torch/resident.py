"""A model on a device: its weights, its KV pool, the mirror of its sequences, and one step of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from llmasos.syscalls import types as t

from ..base import Loaded
from ..mirror import Mirror, Piece, Sequence, Step
from . import sampler
from .attention import Coming, KvPool, Plan
from .flight import Flight
from .graphs import StaticDecode
from .lora import AdapterBank
from .models import Model
from .transfer import fetch, send

# Rows whose whole logits are held at once when the prompt is scored.
_SCORED_ROWS = 128


@dataclass(slots=True)
class Resident:
    """`bank` has the adapters of a model of ours. `static` decodes with fixed shapes, if the model can.
    `flights` are the steps that were started and not settled, oldest first."""

    loaded: Loaded
    model: Model
    pool: KvPool
    mirror: Mirror
    bank: AdapterBank | None = None
    static: StaticDecode | None = None
    flights: list[Flight] = field(default_factory=list)

    def launch(self, step: Step, coming: Coming | None) -> Flight:
        """Starts an applied batch, whose PENDING tokens are in `coming`. May be repeated when it fails: it
        leaves the mirror as it is."""
        for source, target in step.copies:
            self.pool.copy(source, target)
        flight = Flight(step)
        if not step.pieces:
            return flight
        flight.choosing = [piece for piece in step.pieces if piece.choose]
        if self.static is not None and self.static.takes(step.pieces):
            self._decode(self.static, flight, coming)
        else:
            self._mixed(flight, coming)
        if self.pool.device.type == "cuda":
            flight.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            flight.event.record()
        return flight

    def _decode(self, static: StaticDecode, flight: Flight, coming: Coming | None) -> None:
        row = 0
        for piece in flight.step.pieces:
            flight.rows[piece.index] = row
            row += piece.end - piece.start
        logits, finite = static.run(flight.step.pieces, coming)
        flight.finite = fetch(finite)
        if flight.choosing:
            places, rows = _last_rows(flight.choosing, flight.rows)
            flight.drawn = self.pool.ops.choose(logits, places, rows)

    def _mixed(self, flight: Flight, coming: Coming | None) -> None:
        pieces = flight.step.pieces
        plan = Plan(self.pool, pieces, self.model.windows, coming, self.bank)
        hidden = self.model.forward(plan)
        flight.rows = plan.rows
        flight.finite = fetch(hidden.isfinite().all(dim=1))
        for piece in pieces:
            if piece.scores_prompt:
                flight.prompts[piece.index] = self._score_prompt(piece, hidden[plan.rows[piece.index] :])
            if piece.beams:
                last = plan.rows[piece.index] + piece.end - piece.start - 1
                logits = self.model.logits(hidden[last : last + 1])[0]
                flight.beams[piece.index] = sampler.best_continuations(logits, piece.sequence, piece.beams)
        if flight.choosing:
            places, rows = _last_rows(flight.choosing, plan.rows)
            last_hidden = hidden.index_select(0, send(np.array(places), hidden.device))
            logits = self.model.logits(last_hidden)
            flight.drawn = self.pool.ops.choose(logits, list(range(len(rows))), rows)

    def _score_prompt(self, piece: Piece, hidden: torch.Tensor) -> list[t.Chosen]:
        """Scores of the tokens at `piece.scored`; `hidden` begins at the piece's first row."""
        sampling = piece.sequence.sampling
        known = piece.sequence.tokens[piece.scored.start : piece.scored.stop].tolist()
        scores: list[t.Chosen] = []
        for first in range(0, len(known), _SCORED_ROWS):
            wanted = known[first : first + _SCORED_ROWS]
            logits = self.model.logits(hidden[first : first + len(wanted)])
            scores += sampler.score(logits, wanted, [sampling.logprobs or 0] * len(wanted))
        return scores


def _last_rows(choosing: list[Piece], first: dict[int, int]) -> tuple[list[int], list[tuple[Sequence, int]]]:
    """The rows that choose, and for each its sequence and the position of the token that is chosen."""
    places, rows = [], []
    for piece in choosing:
        for position in range(piece.known, piece.end + 1):
            places.append(first[piece.index] + position - 1 - piece.start)
            rows.append((piece.sequence, position))
    return places, rows
