"""A packed model bound to the engine: its C structures, its KV pool, its workspace, and one step of it.

All memory is taken here, when the model is loaded; a step allocates nothing that outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .. import grammar
from ..base import BLOCK_TOKENS, Interrupt
from ..mirror import Choice, Piece
from . import library
from .library import Layer, Matrix, Model, Pick, Run, Step
from .lora import BoundAdapter
from .pack import Packed

MAX_ROWS = 512
"""Rows that one call of the engine computes at most."""
MAX_PICKS = 64
"""Rows whose logits one call keeps at most."""
MOST_LISTED = 64
"""Tokens that one row lists at most: 20 log-probabilities, or the continuations of 16 beams."""

FINE = ("head",)
"""Matrices whose activations have 15 bits where weights are integers: the head is no part of a prompt's work
and causes a quarter of the error (docs/decisions.md)."""

NOT_FINITE = "the model's logits are not finite: it overflowed or its weights are broken"
NOTHING_LEFT = "no token is left to choose: no_repeat_ngram_size, min_new_tokens or the grammar forbid all"

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(slots=True)
class Result:
    """What a piece gave: choices for its wanted rows, scores of its prompt, its beams; or an error."""

    choices: list[Choice] = field(default_factory=list)
    prompt: list[t.Chosen] = field(default_factory=list)
    beams: list[t.TokenLogprob] = field(default_factory=list)
    error: str = ""


class _Desk:
    """What a step of a model needs while it is computed: a workspace, and what the engine is asked and
    answers with. A step that another one interrupts keeps its own."""

    def __init__(self, size: int, vocab_size: int) -> None:
        self.workspace = _memory(size)
        self.runs, self.picks = (Run * MAX_ROWS)(), (Pick * MAX_PICKS)()
        self.finite = (ctypes.c_uint8 * MAX_ROWS)()
        self.stops: list[array[int]] = []
        self.masks = [grammar.blank(vocab_size) for _ in range(MAX_PICKS)]
        self.step = Step(
            runs=self.runs,
            picks=self.picks,
            max_picks=MAX_PICKS,
            workspace=_address(self.workspace),
            max_rows=MAX_ROWS,
            finite=self.finite,
        )
        self._ids, self._values = (
            (ctypes.c_int32 * (MAX_PICKS * MOST_LISTED))(),
            (ctypes.c_float * (MAX_PICKS * MOST_LISTED))(),
        )
        for row, pick in enumerate(self.picks):
            pick.ids = ctypes.cast(
                ctypes.byref(self._ids, row * MOST_LISTED * 4), ctypes.POINTER(ctypes.c_int32)
            )
            pick.values = ctypes.cast(
                ctypes.byref(self._values, row * MOST_LISTED * 4), ctypes.POINTER(ctypes.c_float)
            )


class NativeModel:
    """`blocks` KV blocks of `block_bytes`, and the `adapters` that sequences may have. The pool's pages are
    committed when a block is first written."""

    def __init__(self, engine: library.Engine, pool: int, packed: Packed, kv_dtype: str) -> None:
        self._functions, self._pool, self._packed = engine.functions, pool, packed
        self.architecture = packed.architecture
        self._layers = (Layer * len(self.architecture.layers))()
        self._units: list[Floats] = []
        self._model = self._bind(packed, kv_dtype)
        tile = self._functions.llk_tile_bytes(self._model)
        self.block_bytes = tile * self.architecture.kv_heads * len(self.architecture.layers)
        self.padded_vocab = -(-self.architecture.vocab_size // 16) * 16
        self._desks = [self._make_desk()]  # those that no step is using
        self.adapters: dict[int, BoundAdapter] = {}
        self.blocks = 0
        self._kv: mmap.mmap | None = None

    def _bind(self, packed: Packed, kv_dtype: str) -> Model:
        a, tensors = packed.architecture, packed.tensors

        def address(name: str) -> int | None:
            return tensors[name].address if name in tensors else None

        def matrix(name: str) -> Matrix:
            tensor = tensors[name]
            made = Matrix(
                data=tensor.address,
                bias=address(f"{name}.bias"),
                rows=tensor.rows,
                cols=tensor.cols,
                format=library.FORMATS[tensor.format],
                fine=name.rpartition(".")[2] in FINE,
            )
            if self._functions.llk_units(made, None):
                units = np.empty((2, tensor.rows), np.float32)
                self._functions.llk_units(made, units.ctypes.data)
                self._units.append(units)
                made.unit = units.ctypes.data
            return made

        for i, (settings, layer) in enumerate(zip(a.layers, self._layers, strict=True)):
            name = f"layer.{i}."
            for norm in ("norm1", "norm2"):
                setattr(layer, norm, address(f"{name}{norm}"))
                setattr(layer, f"{norm}_bias", address(f"{name}{norm}.bias"))
            layer.q_norm, layer.k_norm = address(f"{name}q_norm"), address(f"{name}k_norm")
            layer.qkv, layer.out = matrix(f"{name}qkv"), matrix(f"{name}out")
            layer.up, layer.down = matrix(f"{name}up"), matrix(f"{name}down")
            layer.scale, layer.window, layer.rotated = settings.scale, settings.window, settings.rotated
        head = matrix("head")
        return Model(
            layers=len(a.layers),
            hidden=a.hidden,
            hidden_padded=a.hidden_padded,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            head_size=a.head_size,
            inner=a.inner_padded,
            vocab=a.vocab_size,
            norm=library.NORMS[a.norm],
            activation=library.ACTIVATIONS[a.activation],
            gated=a.gated,
            kv_format=library.KV_FORMATS[kv_dtype],
            rotary=a.rotary,
            epsilon=a.epsilon,
            rope_scale=a.rope_scale,
            frequencies=address("frequencies"),
            positions=address("positions"),
            final_norm=address("final_norm"),
            final_norm_bias=address("final_norm.bias"),
            head=head,
            embedding=head if a.tied else matrix("embedding"),
            layer=self._layers,
        )

    def _make_desk(self) -> _Desk:
        size = self._functions.llk_workspace_bytes(self._pool, self._model, MAX_ROWS, MAX_PICKS)
        return _Desk(size, self.architecture.vocab_size)

    def make_pool(self, blocks: int) -> None:
        """Takes the address space of `blocks` KV blocks, all zero."""
        self._kv = _memory(blocks * self.block_bytes)
        self._model.kv = _address(self._kv)
        self.blocks = blocks

    def close(self) -> None:
        """Gives all memory back."""
        self._packed.close()
        if self._kv is not None:
            self._kv.close()
        for desk in self._desks:
            desk.workspace.close()

    # Blocks

    def copy_block(self, source: int, target: int) -> None:
        size = self.block_bytes
        ctypes.memmove(self._model.kv + target * size, self._model.kv + source * size, size)

    def read_blocks(self, blocks: list[int]) -> bytes:
        """The raw bytes of `blocks`, one after another, in this model's kv_dtype."""
        assert self._kv is not None
        size = self.block_bytes
        return b"".join([self._kv[block * size : (block + 1) * size] for block in self._checked(blocks)])

    def write_blocks(self, blocks: list[int], data: bytes) -> None:
        assert self._kv is not None
        size = self.block_bytes
        if len(data) != len(blocks) * size:
            raise errors.Corrupt(f"{len(data)} bytes for {len(blocks)} blocks, {len(blocks) * size} expected")
        for index, block in enumerate(self._checked(blocks)):
            self._kv[block * size : (block + 1) * size] = data[index * size : (index + 1) * size]

    def _checked(self, blocks: list[int]) -> list[int]:
        if blocks and not (min(blocks) >= 0 and max(blocks) < self.blocks):
            raise errors.DeviceFault(f"a block is outside the pool of {self.blocks}")
        return blocks

    # Steps

    def compute(self, pieces: Items[Piece], interrupt: Interrupt | None = None) -> list[Result]:
        """Computes pieces that together are at most MAX_ROWS rows and MAX_PICKS choices; what each gave.
        An `interrupt` is served between layers, and may compute others meanwhile."""
        desk = self._desks.pop() if self._desks else self._make_desk()
        try:
            return self._compute(desk, pieces, interrupt)
        finally:
            self._desks.append(desk)

    def _compute(self, desk: _Desk, pieces: Items[Piece], interrupt: Interrupt | None) -> list[Result]:
        rows = picks = 0
        desk.stops = []
        refused: dict[int, str] = {}
        for run, piece in zip(desk.runs, pieces, strict=False):
            sequence, count = piece.sequence, piece.end - piece.start
            run.tokens = sequence.tokens.buffer_info()[0] + 4 * piece.start
            run.blocks = sequence.blocks.buffer_info()[0]
            run.start, run.count = piece.start, count
            run.adapter = self.adapters[sequence.adapter].address if sequence.adapter else None
            run.wanted, run.kept = wanted(piece), _kept(piece)
            for row in range(run.wanted):
                asked = desk.picks[picks + row]
                self._ask(desk, asked, piece, row)
                asked.mask = None
                if piece.sequence.constraint is not None:
                    mask = desk.masks[picks + row]
                    if problem := piece.sequence.mask(piece.known + row, mask):
                        refused.setdefault(id(piece), problem)
                    else:
                        asked.mask = mask.buffer_info()[0]
            rows, picks = rows + count, picks + run.wanted
        step = desk.step
        step.run_count, step.rows, step.pick_count, step.layer = len(pieces), rows, picks, 0
        if interrupt and interrupt.due:
            interrupt.take()
        step.watch = interrupt.fd if interrupt else -1
        while self._functions.llk_run_step(self._pool, self._model, step):
            assert interrupt is not None
            interrupt.take()
            step.watch = interrupt.fd
        results, pick = [], 0
        for index, piece in enumerate(pieces):
            result = Result()
            if id(piece) in refused:
                result.error = refused[id(piece)]
            elif desk.finite[index]:
                for place in range(pick, pick + wanted(piece)):
                    self._take(desk.picks[place], piece, result)
            else:
                result.error = NOT_FINITE
                self._clear(piece)
            results.append(result)
            pick += wanted(piece)
        row = 0
        for piece, result in zip(pieces, results, strict=True):
            if piece.scores_prompt and not result.error:
                result.prompt = self._score(desk, piece, row)  # overwrites what the picks had listed
            row += _kept(piece)
        return results

    def all_logits(self, tokens: list[int], chunk: int = MAX_ROWS) -> Floats:
        """Logits [len(tokens), vocab_size] at every position of a context that fits the pool, computed
        `chunk` positions at a time (benchmarks of quality, tests)."""
        sequence = array("I", tokens)
        blocks = array("i", range(-(-len(tokens) // BLOCK_TOKENS)))
        logits = np.empty((len(tokens), self.architecture.vocab_size), np.float32)
        desk = self._desks[0]
        step, run = desk.step, desk.runs[0]
        step.run_count, step.pick_count, step.layer, step.watch = 1, 0, 0, -1
        run.blocks = blocks.buffer_info()[0]
        for start in range(0, len(tokens), chunk):
            count = min(chunk, len(tokens) - start)
            run.tokens = sequence.buffer_info()[0] + 4 * start
            run.start, run.count, run.wanted, run.kept, run.adapter = start, count, 0, count, None
            step.rows = count
            self._functions.llk_run_step(self._pool, self._model, step)
            for row in range(0, count, MAX_PICKS):
                rows = list(range(row, min(row + MAX_PICKS, count)))
                part = self._logits(desk, rows)[:, : self.architecture.vocab_size]
                logits[start + row : start + row + len(rows)] = part
        return logits

    def _ask(self, desk: _Desk, pick: Pick, piece: Piece, row: int) -> None:
        """What to choose from the logits behind `row` of the piece's guesses."""
        sequence, sampling = piece.sequence, piece.sequence.sampling
        pick.temperature, pick.beams = sampling.temperature, piece.beams
        pick.top = -1 if sampling.logprobs is None or piece.beams else sampling.logprobs
        processed = sequence.processed
        pick.repetition, pick.presence, pick.frequency, pick.ngram, pick.forbid_stops = 1, 0, 0, 0, 0
        if not processed and not sampling.temperature:
            return
        pick.seed, pick.position = sampling.seed or 0, piece.known + row
        pick.top_k, pick.top_p, pick.min_p = sampling.top_k, sampling.top_p, sampling.min_p
        if not processed:
            return
        pick.repetition, pick.ngram = sampling.repetition_penalty, sampling.no_repeat_ngram_size
        pick.presence, pick.frequency = sampling.presence_penalty, sampling.frequency_penalty
        pick.tokens, pick.known = sequence.tokens.buffer_info()[0], len(sequence.tokens)
        pick.prompt_length = sequence.prompt_length
        if sequence.generated < sampling.min_new_tokens:
            stops = array("i", [s for s in sampling.stop_token_ids if s < self.architecture.vocab_size])
            desk.stops.append(stops)  # lives as long as the step
            pick.stops, pick.stop_count, pick.forbid_stops = stops.buffer_info()[0], len(stops), 1

    def _take(self, pick: Pick, piece: Piece, result: Result) -> None:
        if pick.token == -2:
            result.error = NOT_FINITE
        elif piece.beams:
            result.beams = _listed(pick)
        elif pick.token < 0:
            result.choices.append(Choice(-1, error=NOTHING_LEFT))
        else:
            chosen = t.Chosen(pick.logprob, _listed(pick)) if pick.top >= 0 else None
            result.choices.append(Choice(pick.token, chosen))

    def _clear(self, piece: Piece) -> None:
        """A NaN left in a block would pass through the mask of the sequence that gets the block next."""
        for block in piece.sequence.blocks[piece.start // BLOCK_TOKENS : -(-piece.end // BLOCK_TOKENS)]:
            ctypes.memset(self._model.kv + block * self.block_bytes, 0, self.block_bytes)

    def _score(self, desk: _Desk, piece: Piece, first: int) -> list[t.Chosen]:
        """Scores of the tokens at `piece.scored`, whose rows begin at row `first` of those that were kept."""
        positions, scores = list(piece.scored), []
        top = piece.sequence.sampling.logprobs or 0
        for begin in range(0, len(positions), MAX_PICKS):
            part = positions[begin : begin + MAX_PICKS]
            logits = self._logits(desk, [first + position - 1 - piece.start for position in part])
            picks = (Pick * len(part))()
            for pick, mine, position in zip(picks, desk.picks, part, strict=False):
                pick.token, pick.top, pick.ids, pick.values = (
                    piece.sequence.tokens[position],
                    top,
                    mine.ids,
                    mine.values,
                )
            self._functions.llk_score(self._pool, self._model, logits.ctypes.data, picks, len(part))
            scores += [t.Chosen(pick.logprob, _listed(pick)) for pick in picks]
        return scores

    def _logits(self, desk: _Desk, rows: list[int]) -> Floats:
        """Logits [len(rows), padded_vocab] of rows of the step just computed."""
        logits = np.empty((len(rows), self.padded_vocab), np.float32)
        indices = (ctypes.c_int32 * len(rows))(*rows)
        self._functions.llk_logits(self._pool, self._model, desk.step, indices, len(rows), logits.ctypes.data)
        return logits


def wanted(piece: Piece) -> int:
    """Rows of a piece whose logits are needed to go on."""
    return piece.drafted + 1 if piece.choose else int(piece.beams > 0)


def _kept(piece: Piece) -> int:
    """Rows of a piece whose logits can be had behind the step."""
    return piece.end - piece.start if piece.scores_prompt else wanted(piece)


def _listed(pick: Pick) -> list[t.TokenLogprob]:
    return [t.TokenLogprob(pick.ids[i], pick.values[i]) for i in range(pick.listed)]


def _memory(size: int) -> mmap.mmap:
    """Memory of this process, all zero, committed when it is first touched, in huge pages if there are any:
    tiles lie far apart, and with small pages every one would miss the TLB."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _address(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))
