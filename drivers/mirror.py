"""What a driver remembers of each running sequence: tokens, block table, sampling, how far it is computed.

The mirror makes a decode step's message a few bytes a sequence, and lets a step be sent before the result of
the one before it is back. It applies a batch in the order that base.py gives (closes, opens, copies, work)
and checks every number in it, so that a driver may index with what it gets back. A sequence that breaks a
rule carries its fault until it is closed or opened anew; the others of the batch never notice. The mirror
holds no KV and knows no device.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .base import BLOCK_TOKENS, Batch, SeqOpen, SeqOut, Work
from .draft import Drafter

if TYPE_CHECKING:
    from .grammar import Constraint, Vocabulary


@dataclass(slots=True)
class Choice:
    """A token chosen for a row, with its score if asked for. `error` not empty: nothing was chosen."""

    token: int
    chosen: t.Chosen | None = None
    error: str = ""


@dataclass(slots=True)
class Sequence:
    """`tokens` are all tokens known, of which the first `prompt_length` were given; while a piece of it is
    being computed, the piece's guesses stand behind them. Position p has its KV in slot
    `blocks[p // 16] * 16 + p % 16`, valid for the first `computed` positions. `over`: a stop token came or
    the limit is reached. `adapter` is 0 for the model as it is. `fault` not empty: nothing of it may be
    computed; `code` is the error's."""

    id: int
    tokens: array[int]
    prompt_length: int
    computed: int
    limit: int
    blocks: array[int]
    sampling: t.Sampling
    adapter: int = 0
    drafter: Drafter = field(default_factory=Drafter)
    constraint: Constraint | None = None
    over: bool = False
    fault: str = ""
    code: int = errors.DeviceFault.code

    def spoil(self, error: str) -> SeqOut:
        """Nothing more of it may be computed. Returns what the kernel is told."""
        self.fault = error
        if self.constraint is not None and self.constraint.broken:
            self.code = errors.InvalidArgument.code
        return SeqOut(self.id, error=error, code=self.code)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def mask(self, position: int, out: array[int]) -> str:
        """Sets the bits of `out` for the tokens that its grammar lets stand at `position`. Returns what went
        wrong, or ""."""
        assert self.constraint is not None
        return self.constraint.mask(self.tokens, self.prompt_length, position, out)

    @property
    def processed(self) -> bool:
        """Whether its scores are changed by what came before (penalties, bans)."""
        return self.sampling.follows_text or self.generated < self.sampling.min_new_tokens

    @property
    def changed(self) -> bool:
        """Whether anything changes its scores."""
        return self.constraint is not None or self.processed


@dataclass(slots=True)
class Piece:
    """One Work that may be computed: positions `start` … `end`-1 of `sequence`, the last `drafted` of which
    are guesses. `choose`: each of its last `drafted` + 1 rows picks a next token; `beams` > 0: its last row
    lists the best continuations instead. Behind `known` the kernel has made room for `spare` positions, its
    guesses included; of the tokens that it guesses in one round there are at most `draft`."""

    index: int
    sequence: Sequence
    start: int
    end: int
    choose: bool
    beams: int
    drafted: int = 0
    draft: int = 0
    spare: int = 0

    @property
    def known(self) -> int:
        """Where its guesses begin; its end if it has none."""
        return self.end - self.drafted

    @property
    def scores_prompt(self) -> bool:
        return len(self.scored) > 0

    @property
    def scored(self) -> range:
        """The positions whose tokens, known before, are scored by the rows before them."""
        if not self.sequence.sampling.prompt_logprobs:
            return range(0)
        return range(self.start + 1, min(self.known + 1, len(self.sequence.tokens) - self.drafted))

    def done(self, choices: list[Choice], prompt: list[t.Chosen], beams: list[t.TokenLogprob]) -> SeqOut:
        """Books the piece as computed. `choices` are those of the last `drafted` + 1 rows if `choose`, else
        empty; of them the ones that follow right guesses count. Returns what the kernel is told."""
        sequence, known = self.sequence, self.known
        guesses = sequence.tokens[known : self.end].tolist()
        del sequence.tokens[known : self.end]
        out: list[Choice] = []
        stop = False
        for row, choice in enumerate(choices):
            if choice.error:
                if not out:
                    return sequence.spoil(choice.error)
                break
            out.append(choice)
            stop = choice.token in sequence.sampling.stop_token_ids
            sequence.over = stop or known + len(out) >= sequence.limit
            if sequence.over or row >= len(guesses) or choice.token != guesses[row]:
                break
        tokens = [choice.token for choice in out]
        sequence.tokens.extend(tokens)
        if guesses:
            sequence.drafter.learn(len(sequence.tokens), len(guesses), len(out) - 1)
        sequence.computed = known + max(0, len(out) - 1)
        chosen = [choice.chosen for choice in out if choice.chosen is not None]
        return SeqOut(
            sequence.id, sequence.computed, tokens, stop, chosen, prompt, beams, drafted=self.drafted
        )

    def failed(self, error: str) -> SeqOut:
        """Books that the piece could not be computed: the sequence is unusable until opened anew."""
        return self.sequence.spoil(error)


@dataclass(slots=True)
class Step:
    """An applied batch, one round of it after another. `outputs` is parallel to the batch's work, filled for
    what is not a piece."""

    batch: Batch
    copies: list[tuple[int, int]]
    pieces: list[Piece]
    outputs: list[SeqOut]
    rounds: int = 1

    def take(self, piece: Piece, out: SeqOut) -> None:
        """Adds what a piece has produced in this round."""
        before = self.outputs[piece.index]
        if self.rounds > 1 and not out.error:
            out = SeqOut(
                out.seq,
                out.computed,
                before.tokens + out.tokens,
                out.stop,
                before.chosen + out.chosen,
                before.prompt,
                drafted=before.drafted + out.drafted,
                rounds=before.rounds + 1,
            )
        self.outputs[piece.index] = out


class Mirror:
    """The sequences of one resident model with `blocks` KV blocks, and the numbers of its `adapters`."""

    def __init__(
        self, blocks: int, vocab_size: int, context_length: int, vocabulary: Vocabulary | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._blocks = blocks
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._sequences: dict[int, Sequence] = {}
        self.adapters: set[int] = set()

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
                step.outputs.append(SeqOut(work.seq, error="the sequence is not open"))
                continue
            if work.seq in seen:
                fault = "the sequence has two pieces of work in one batch"
            else:
                fault = self._append(sequence, work, spoiled)
            seen.add(work.seq)
            step.outputs.append(SeqOut(work.seq, sequence.computed, error=fault, code=sequence.code))
            if not fault and not sequence.over:
                spare = max(0, work.draft) + max(0, batch.rounds - 1)
                step.pieces.append(
                    self._piece(index, sequence, work.count, work.sample, work.beams, work.draft, spare)
                )
        return step

    def again(self, step: Step) -> bool:
        """Makes the next round of a step whose pieces are all computed; False when there is none."""
        if step.rounds >= step.batch.rounds:
            return False
        pieces = []
        for piece in step.pieces:
            sequence = piece.sequence
            spare = piece.spare - (sequence.computed - piece.known)  # guesses that came true took some
            # The work's own checks again: nobody but the kernel's arithmetic says that there is a block.
            room = min(len(sequence.blocks) * BLOCK_TOKENS, self._context_length) - sequence.computed
            if not piece.choose or sequence.over or sequence.fault or min(spare, room) < 1:
                continue
            pieces.append(self._piece(piece.index, sequence, 1, True, 0, piece.draft, spare - 1))
        step.rounds += 1
        step.copies, step.pieces = [], pieces
        return bool(pieces)

    def forget(self, batch: Batch) -> None:
        """Closes every sequence of a batch whose step failed half-way: the kernel opens them anew."""
        for work in batch.work:
            self._sequences.pop(work.seq, None)

    def _in_pool(self, blocks: tuple[int, ...] | list[int]) -> bool:
        return not blocks or (min(blocks) >= 0 and max(blocks) < self._blocks)

    def _piece(
        self, index: int, sequence: Sequence, count: int, sample: bool, beams: int, draft: int, spare: int
    ) -> Piece:
        start, known = sequence.computed, len(sequence.tokens)
        end = start + count
        last = end == known
        beams = beams if last else 0
        choose = last and sample and not beams
        guesses: list[int] = []
        if choose and draft > 0 and not sequence.processed:
            room = min(len(sequence.blocks) * BLOCK_TOKENS, self._context_length, sequence.limit - 1) - end
            most = min(draft, spare, max(0, room))
            guesses = sequence.drafter.propose(sequence.tokens, most)
            if (constraint := sequence.constraint) is not None:
                guesses = constraint.guesses(sequence.tokens, sequence.prompt_length, guesses, most)
            sequence.tokens.extend(guesses)
        return Piece(index, sequence, start, end + len(guesses), choose, beams, len(guesses), draft, spare)

    def _open(self, opened: SeqOpen) -> Sequence:
        sequence = Sequence(
            opened.seq,
            array("I"),
            opened.prompt_length,
            opened.computed,
            opened.limit,
            array("i"),
            opened.sampling,
            opened.adapter,
        )
        if len(opened.tokens) % 4:
            sequence.fault = "the packed tokens are cut short"
        else:
            sequence.fault = self._extend(sequence, t.unpack_tokens(opened.tokens), opened.blocks)
        if opened.sampling.grammar is not None and not sequence.fault:
            try:
                sequence.constraint = self._constrained(opened.sampling, opened.sampling.grammar)
            except errors.LLMasOSError as problem:
                sequence.fault, sequence.code = problem.message, problem.code
        covered = min(len(sequence.tokens), len(sequence.blocks) * BLOCK_TOKENS)
        if not sequence.fault and not 0 <= opened.computed <= covered:
            sequence.fault = f"{opened.computed} positions computed, tokens and blocks cover {covered}"
        return sequence

    def _constrained(self, sampling: t.Sampling, grammar: t.Grammar) -> Constraint:
        if self._vocabulary is None:
            raise errors.UnsupportedModel("this driver has no grammars")
        return self._vocabulary.constraint(grammar, sampling.stop_token_ids)

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
        if not sequence.fault and sequence.adapter and sequence.adapter not in self.adapters:
            sequence.fault = f"adapter {sequence.adapter} is not loaded"
        if sequence.fault or sequence.over:
            return sequence.fault
        end = sequence.computed + work.count
        if work.count < 1 or work.beams < 0 or work.draft < 0 or end > len(sequence.tokens):
            return f"positions up to {end - 1} asked for, {len(sequence.tokens)} tokens known"
        if end > len(sequence.blocks) * BLOCK_TOKENS:
            return f"position {end - 1} has no block"
        if end > self._context_length:
            return f"position {end - 1} is outside the context of {self._context_length}"
        return ""
