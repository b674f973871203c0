"""What a driver remembers of each running sequence: tokens, block table, sampling.

The mirror makes a decode step's message a few bytes a sequence. It applies a batch in the order that base.py
gives (closes, opens, copies, work) and checks every number in it, so that a driver may index with what it
gets back. A sequence that breaks a rule carries its fault until it is closed or opened anew; the others of
the batch never notice. The mirror holds no KV and knows no device.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from llmasos.syscalls import types as t

from .base import BLOCK_TOKENS, Batch, SeqOpen, SeqOut, Work


@dataclass(slots=True)
class Sequence:
    """`tokens` are all tokens known, of which the first `prompt_length` were given; position p has its KV in
    slot `blocks[p // 16] * 16 + p % 16`. `fault` not empty: nothing of it may be computed."""

    id: int
    tokens: array[int]
    prompt_length: int
    blocks: array[int]
    sampling: t.Sampling
    fault: str = ""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(slots=True)
class Piece:
    """One Work that may be computed: positions `start` … `end`-1 of `sequence`. `choose` says that its last
    row picks the next token, `beams` > 0 that it lists the best continuations instead."""

    index: int
    sequence: Sequence
    start: int
    end: int
    choose: bool
    beams: int

    @property
    def scores_prompt(self) -> bool:
        return self.sequence.sampling.prompt_logprobs and self.start + 1 < len(self.sequence.tokens)


@dataclass(slots=True)
class Step:
    """An applied batch. `outputs` is parallel to the batch's work, already filled where `error` is set."""

    batch: Batch
    copies: list[tuple[int, int]]
    pieces: list[Piece]
    outputs: list[SeqOut]


class Mirror:
    """The sequences of one resident model with `blocks` KV blocks."""

    def __init__(self, blocks: int, vocab_size: int, context_length: int) -> None:
        self._blocks = blocks
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, batch: Batch) -> Step:
        """Takes a batch in. Never raises: what cannot be done is an `error` in the step's outputs."""
        for seq in batch.closes:
            self._sequences.pop(seq, None)
        for opened in batch.opens:
            self._sequences[opened.seq] = self._open(opened)
        copies = [pair for pair in batch.copies if self._in_pool(pair)]
        spoiled = {target for source, target in batch.copies if not self._in_pool((source, target))}
        step = Step(batch, copies, [], [])
        seen: set[int] = set()
        for index, work in enumerate(batch.work):
            sequence = self._sequences.get(work.seq)
            if sequence is None:
                fault = "the sequence is not open"
            elif work.seq in seen:
                fault = "the sequence has two pieces of work in one batch"
            else:
                fault = self._append(sequence, work, spoiled)
            seen.add(work.seq)
            step.outputs.append(SeqOut(work.seq, error=fault))
            if sequence is not None and not fault:
                end = work.start + work.count
                last = end == len(sequence.tokens)
                beams = work.beams if last else 0
                step.pieces.append(
                    Piece(index, sequence, work.start, end, last and work.sample and not beams, beams)
                )
        return step

    def forget(self, batch: Batch) -> None:
        """Closes every sequence of a batch whose step failed half-way: the kernel opens them anew."""
        for work in batch.work:
            self._sequences.pop(work.seq, None)

    def _in_pool(self, blocks: tuple[int, ...] | list[int]) -> bool:
        return not blocks or (min(blocks) >= 0 and max(blocks) < self._blocks)

    def _open(self, opened: SeqOpen) -> Sequence:
        sequence = Sequence(opened.seq, array("I"), opened.prompt_length, array("i"), opened.sampling)
        if len(opened.tokens) % 4:
            sequence.fault = "the packed tokens are cut short"
        else:
            sequence.fault = self._extend(sequence, t.unpack_tokens(opened.tokens), opened.blocks)
        return sequence

    def _extend(self, sequence: Sequence, tokens: list[int], blocks: list[int]) -> str:
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._vocab_size):
            return f"a token id is outside the vocabulary of {self._vocab_size}"
        if not self._in_pool(blocks):
            return f"a block is outside the pool of {self._blocks}"
        sequence.tokens.extend(tokens)
        sequence.blocks.extend(blocks)
        return ""

    def _append(self, sequence: Sequence, work: Work, spoiled: set[int]) -> str:
        """Extends the mirror by `work` and says what forbids computing it."""
        if not sequence.fault:
            sequence.fault = self._extend(sequence, work.tokens, work.blocks)
        if not sequence.fault and spoiled and not spoiled.isdisjoint(sequence.blocks):
            sequence.fault = f"one of its blocks was to be copied from outside the pool of {self._blocks}"
        if sequence.fault:
            return sequence.fault
        end = work.start + work.count
        if work.start < 0 or work.count < 1 or work.beams < 0 or end > len(sequence.tokens):
            return f"positions {work.start} to {end - 1} asked for, {len(sequence.tokens)} tokens known"
        if end > len(sequence.blocks) * BLOCK_TOKENS:
            return f"position {end - 1} has no block"
        if end > self._context_length:
            return f"position {end - 1} is outside the context of {self._context_length}"
        return ""
