"""A step that was started on a device, until the host has its result.

The step behind it may be started before that. Then what it chose is booked in the mirror as PENDING tokens
(`defer`), which the next step takes from the device's memory, and corrected when the result is there
(`settle`). The mirror is right again at every point where anybody looks at the tokens themselves.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch
from llmasos.syscalls import types as t

from ..base import BLOCK_TOKENS, Batch, SeqOut
from ..mirror import Choice, Piece, Step
from . import sampler
from .attention import PENDING, Coming, KvPool
from .ops import Drawn


@dataclass(slots=True)
class Flight:
    """`rows` maps a piece's index to its first row of `finite` [T], which is on the host once `event` has
    come; `drawn` are the choices of the last rows of `choosing`, one after another. `prompts` and `beams` by
    a piece's index."""

    step: Step
    rows: dict[int, int] = field(default_factory=dict)
    finite: torch.Tensor | None = None
    choosing: list[Piece] = field(default_factory=list)
    drawn: Drawn | None = None
    prompts: dict[int, list[t.Chosen]] = field(default_factory=dict)
    beams: dict[int, list[t.TokenLogprob]] = field(default_factory=dict)
    event: torch.cuda.Event | None = None
    deferred: bool = False
    _void: set[int] = field(default_factory=set)  # pieces of sequences that had ended before

    def may_precede(self, batch: Batch) -> bool:
        """Whether `batch` can be applied to the mirror while the tokens chosen here are unknown to it."""
        if any(piece.drafted or piece.beams for piece in self.step.pieces):
            return False
        waiting = {piece.sequence.id: piece.sequence for piece in self.choosing}
        if any(PENDING in sequence.sampling.stop_token_ids for sequence in waiting.values()):
            return False
        anew = {*batch.closes, *(opened.seq for opened in batch.opens)}
        for work in batch.work:
            sequence = waiting.get(work.seq)
            if sequence is None or work.seq in anew:
                continue
            if work.count != 1 or work.tokens or work.draft or work.beams or sequence.changed:
                return False
        return True

    def defer(self) -> Coming | None:
        """Books the step without its result; says where the tokens come from."""
        self.deferred = True
        for piece in self.step.pieces:
            if piece.index not in self._void:
                piece.done([Choice(PENDING)] if piece.choose else [], [], [])
        if self.drawn is None:
            return None
        places = {piece.sequence.id: place for place, piece in enumerate(self.choosing)}
        return Coming(self.drawn.tokens, places)

    def settle(self, pool: KvPool, later: Flight | None) -> list[SeqOut]:
        """Waits for the result and books it. `later` is the step behind this one, if it was started."""
        if self.event is not None:
            self.event.synchronize()
        outputs = list(self.step.outputs)
        finite = [] if self.finite is None else self.finite.tolist()
        found = iter([] if self.drawn is None else self.drawn.choices())
        # Asked in the order in which they were drawn.
        choices = {piece.index: [next(found) for _ in range(piece.drafted + 1)] for piece in self.choosing}
        for piece in self.step.pieces:
            index, sequence = piece.index, piece.sequence
            row = self.rows[index]
            sound = all(finite[row : row + piece.end - piece.start])
            made = choices.get(index, [])
            if index in self._void:
                outputs[index] = SeqOut(
                    sequence.id, sequence.computed, error=sequence.fault, code=sequence.code
                )
            elif self.deferred:
                outputs[index] = self._correct(piece, sound, made, later)
            elif sound:
                outputs[index] = piece.done(made, self.prompts.get(index, []), self.beams.get(index, []))
            else:
                # A NaN left in a block would pass through the mask of the sequence that gets the block next.
                first, last = piece.start // BLOCK_TOKENS, -(-piece.end // BLOCK_TOKENS)
                pool.clear(sequence.blocks[first:last].tolist())
                outputs[index] = piece.failed(sampler.NOT_FINITE)
        return outputs

    def _correct(self, piece: Piece, sound: bool, made: list[Choice], later: Flight | None) -> SeqOut:
        """Puts what was chosen in the place of PENDING. The block of a broken row is not cleared: it may be
        somebody else's by now, whom what is behind his context does not touch (Ops.pages)."""
        sequence = piece.sequence
        error = sampler.NOT_FINITE if not sound else "".join(choice.error for choice in made)
        if error:
            out = piece.failed(error)
        else:
            tokens = [choice.token for choice in made]
            sequence.tokens[piece.end : piece.end + len(tokens)] = array("I", tokens)
            stop = any(token in sequence.sampling.stop_token_ids for token in tokens)
            sequence.over = sequence.over or stop
            chosen = [choice.chosen for choice in made if choice.chosen is not None]
            prompt = self.prompts.get(piece.index, [])
            out = SeqOut(sequence.id, piece.end, tokens, stop, chosen, prompt)
        if later is not None and (out.error or out.stop):
            # What the step behind this one computes of a sequence that has ended counts for nothing.
            later._void |= {other.index for other in later.step.pieces if other.sequence is sequence}
        return out
