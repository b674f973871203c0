"""A model on a device: its weights, its KV pool, the mirror of its sequences, and one step of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmasos.syscalls import types as t
from msgspec.structs import replace

from ..base import BLOCK_TOKENS, Loaded, SeqOut
from ..mirror import Mirror, Piece, Step
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
        outputs = list(step.outputs)
        sound = self._drop_broken(step.pieces, plan, hidden, outputs)
        for piece in sound:
            if piece.scores_prompt:
                prompt = self._score_prompt(piece, hidden[plan.rows[piece.index] :])
                outputs[piece.index] = replace(outputs[piece.index], prompt=prompt)
        last = [piece for piece in sound if piece.choose or piece.beams]
        if last:
            rows = [plan.rows[piece.index] + piece.end - piece.start - 1 for piece in last]
            self._continue(last, self.model.logits(hidden[rows]), outputs)
        return outputs

    def _drop_broken(
        self, pieces: list[Piece], plan: Plan, hidden: torch.Tensor, outputs: list[SeqOut]
    ) -> list[Piece]:
        """The pieces whose hidden states are finite. The others fail alone, and what they wrote is cleared:
        a NaN left in a block would pass through the mask of the sequence that gets the block next."""
        finite = hidden.isfinite().all(dim=1).tolist()
        if all(finite):
            return pieces
        sound = []
        for piece in pieces:
            row = plan.rows[piece.index]
            if all(finite[row : row + piece.end - piece.start]):
                sound.append(piece)
                continue
            first, last = piece.start // BLOCK_TOKENS, -(-piece.end // BLOCK_TOKENS)
            self.pool.clear(piece.sequence.blocks[first:last].tolist())
            piece.sequence.fault = sampler.NOT_FINITE
            outputs[piece.index] = SeqOut(piece.sequence.id, error=sampler.NOT_FINITE)
        return sound

    def _score_prompt(self, piece: Piece, hidden: torch.Tensor) -> list[t.Chosen]:
        """Scores of the known tokens at positions start+1 … end; `hidden` begins at the piece's first row."""
        sampling = piece.sequence.sampling
        known = piece.sequence.tokens[piece.start + 1 : piece.end + 1].tolist()
        scores: list[t.Chosen] = []
        for first in range(0, len(known), _SCORED_ROWS):
            wanted = known[first : first + _SCORED_ROWS]
            logits = self.model.logits(hidden[first : first + len(wanted)])
            scores += sampler.score(logits, wanted, [sampling.logprobs or 0] * len(wanted))
        return scores

    def _continue(self, pieces: list[Piece], logits: torch.Tensor, outputs: list[SeqOut]) -> None:
        """Chooses the next token, or lists the best continuations, from one row of logits a piece."""
        for row, piece in enumerate(pieces):
            if piece.beams:
                beams = sampler.best_continuations(logits[row], piece.sequence, piece.beams)
                outputs[piece.index] = replace(outputs[piece.index], beams=beams)
        drawn = [row for row, piece in enumerate(pieces) if not piece.beams]
        choices = sampler.choose(logits[drawn], [pieces[row].sequence for row in drawn]) if drawn else []
        for row, choice in zip(drawn, choices, strict=True):
            piece = pieces[row]
            if choice.error:
                outputs[piece.index] = SeqOut(piece.sequence.id, error=choice.error)
                continue
            piece.sequence.tokens.append(choice.token)
            outputs[piece.index] = replace(
                outputs[piece.index],
                token=choice.token,
                stop=choice.token in piece.sequence.sampling.stop_token_ids,
                chosen=choice.chosen,
            )
