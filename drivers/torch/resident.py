"""A model on a device: its weights, its KV pool, the mirror of its sequences, and one step of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmasos.syscalls import types as t

from ..base import BLOCK_TOKENS, Loaded, SeqOut
from ..mirror import Choice, Mirror, Piece, Step
from . import sampler
from .attention import KvPool, Plan
from .models import Model

# Rows whose whole logits are held at once when the prompt is scored.
_SCORED_ROWS = 128


@dataclass(slots=True)
class Resident:
    loaded: Loaded
    model: Model
    pool: KvPool
    mirror: Mirror

    @property
    def kv_bytes(self) -> int:
        return self.loaded.blocks * self.loaded.block_bytes

    def compute(self, step: Step) -> list[SeqOut]:
        """Runs an applied batch. May be repeated when it fails: the mirror changes only at its end."""
        for source, target in step.copies:
            self.pool.copy(source, target)
        if not step.pieces:
            return step.outputs
        plan = Plan(self.pool, step.pieces, self.model.windows)
        hidden = self.model.forward(plan)
        broken = self._broken(step.pieces, plan, hidden)
        sound = [piece for piece in step.pieces if piece.index not in broken]
        prompts = {
            piece.index: self._score_prompt(piece, hidden[plan.rows[piece.index] :])
            for piece in sound
            if piece.scores_prompt
        }
        choices, beams = self._continue(sound, plan, hidden)
        # From here on nothing can fail, so all is booked or nothing.
        outputs = list(step.outputs)
        for piece in step.pieces:
            index = piece.index
            if index in broken:
                outputs[index] = piece.failed(sampler.NOT_FINITE)
            else:
                outputs[index] = piece.done(
                    choices.get(index, []), prompts.get(index, []), beams.get(index, [])
                )
        return outputs

    def _broken(self, pieces: list[Piece], plan: Plan, hidden: torch.Tensor) -> set[int]:
        """The pieces whose hidden states are not finite. They fail alone, and what they wrote is cleared:
        a NaN left in a block would pass through the mask of the sequence that gets the block next."""
        finite = hidden.isfinite().all(dim=1).tolist()
        if all(finite):
            return set()
        broken = set()
        for piece in pieces:
            row = plan.rows[piece.index]
            if not all(finite[row : row + piece.end - piece.start]):
                broken.add(piece.index)
                first, last = piece.start // BLOCK_TOKENS, -(-piece.end // BLOCK_TOKENS)
                self.pool.clear(piece.sequence.blocks[first:last].tolist())
        return broken

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

    def _continue(
        self, pieces: list[Piece], plan: Plan, hidden: torch.Tensor
    ) -> tuple[dict[int, list[Choice]], dict[int, list[t.TokenLogprob]]]:
        """By a piece's index: the tokens chosen for its last rows, or its best continuations."""
        choices: dict[int, list[Choice]] = {}
        beams: dict[int, list[t.TokenLogprob]] = {}
        last = [
            (piece, position)
            for piece in pieces
            if piece.choose or piece.beams
            for position in range(piece.known, piece.end + 1)
        ]
        if not last:
            return choices, beams
        places = [plan.rows[piece.index] + position - 1 - piece.start for piece, position in last]
        logits = self.model.logits(hidden[places])
        for row, (piece, _) in enumerate(last):
            if piece.beams:
                beams[piece.index] = sampler.best_continuations(logits[row], piece.sequence, piece.beams)
        drawn = [row for row, (piece, _) in enumerate(last) if piece.choose]
        if drawn:
            rows = [(last[row][0].sequence, last[row][1]) for row in drawn]
            for row, choice in zip(drawn, sampler.choose(logits[drawn], rows), strict=True):
                choices.setdefault(last[row][0].index, []).append(choice)
        return choices, beams
