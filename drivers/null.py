"""The driver without a device: deterministic tokens and a KV pool that is only bookkeeping.

Each slot keeps the token written to it and a checksum of everything before it, read through the block table
as attention would. The next token is a hash of all the slots of the history, so a wrong history, a wrong
block table, a forgotten copy or a block given away too early each show as wrong tokens. `next_token` is the
same function on a plain list: what a right kernel must produce. A model may be made forgetful: then its text
depends on its newest tokens alone and repeats itself, as long as the history is right.

Imports nothing heavy: a worker with this driver starts in the time of the interpreter.
"""

from __future__ import annotations

import hashlib
import itertools
import select
import time
import zlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .base import (
    BLOCK_TOKENS,
    Batch,
    Description,
    Encode,
    Encoded,
    File,
    Interrupt,
    Loaded,
    LoadSpec,
    SeqOut,
    StepResult,
)
from .grammar import Vocabulary, blank
from .mirror import Choice, Mirror, Piece, Sequence, Step

_SLOT = 8  # bytes: the token and the checksum of its history, both u32
_BLOCK = _SLOT * BLOCK_TOKENS
_EMPTY = b"\xff" * _BLOCK
_MOOD = 40  # positions after which a forgetful model repeats something else


def _write(token: int, before: int) -> bytes:
    """The slot of `token` after a history with checksum `before`."""
    word = token.to_bytes(4, "little")
    return word + zlib.crc32(word, before).to_bytes(4, "little")


def _checksum(slot: bytes | bytearray) -> int:
    return int.from_bytes(slot[4:8], "little")


def adapter_mark(files: dict[str, File]) -> int:
    """The checksum that a history begins with under an adapter of these files; without one it is 0."""
    return zlib.crc32(repr(sorted((name, file.digest) for name, file in files.items())).encode())


def _slots(tokens: Iterable[int], before: int) -> bytes:
    """The slots that a right history of `tokens` leaves behind."""
    history = bytearray()
    for token in tokens:
        slot = _write(token, before)
        before = _checksum(slot)
        history += slot
    return bytes(history)


def _recent(slots: bytes, memory: int, before: int) -> bytes:
    """What a forgetful model knows of a history: its last `memory` tokens and about how long it is. All of
    it if it is wrong anywhere, so that this shows."""
    tokens = [int.from_bytes(slots[place : place + 4], "little") for place in range(0, len(slots), _SLOT)]
    if _slots(tokens, before) != slots:
        return slots
    return repr((tokens[-memory:], len(tokens) // _MOOD, before)).encode()


class _Scores:
    """The pseudo-distribution after a history: `first` is the best token, the others follow it by number."""

    def __init__(
        self, slots: bytes, sampling: t.Sampling, vocab_size: int, memory: int = 0, before: int = 0
    ) -> None:
        seed = (sampling.seed or 0) if sampling.temperature > 0 else 0
        known = _recent(slots, memory, before) if memory else slots
        mark = hashlib.blake2b(known, digest_size=16, salt=seed.to_bytes(8, "little")).digest()
        self._vocab_size = vocab_size
        self.first = int.from_bytes(mark[:8], "little") % vocab_size
        self._slope = 0.5 + int.from_bytes(mark[8:12], "little") / 2**32

    def rank(self, rank: int) -> t.TokenLogprob:
        return t.TokenLogprob((self.first + rank) % self._vocab_size, -(rank + 1) * self._slope)

    def of(self, token: int, top: int) -> t.Chosen:
        ranks = range(min(top, self._vocab_size))
        return t.Chosen(
            self.rank((token - self.first) % self._vocab_size).logprob, [self.rank(r) for r in ranks]
        )

    def best(
        self, count: int, suppressed: Iterable[int], mask: array[int] | None = None
    ) -> list[t.TokenLogprob]:
        """The best `count` continuations that are not suppressed, and that the mask has, best first."""
        barred = set(suppressed)
        ranks = (self.rank(rank) for rank in range(self._vocab_size))
        left = (score for score in ranks if score.token not in barred)
        if mask is not None:
            left = (score for score in left if mask[score.token // 32] >> (score.token % 32) & 1)
        return list(itertools.islice(left, count))


def next_token(
    tokens: Tokens[int],
    vocab_size: int = 50257,
    sampling: t.Sampling | None = None,
    prompt_length: int = 0,
    memory: int = 0,
    mark: int = 0,
) -> int:
    """The token that this driver generates after `tokens`: a hash of all of them, or of the last `memory`.
    With a temperature the seed counts too, so that forks with other seeds diverge; with an adapter its
    `adapter_mark`."""
    sampling = sampling or t.Sampling()
    young = len(tokens) - prompt_length < sampling.min_new_tokens
    scores = _Scores(_slots(tokens, mark), sampling, vocab_size, memory, mark)
    return scores.best(1, sampling.stop_token_ids if young else ())[0].token


def vector(tokens: Tokens[int], width: int, second: int = 0) -> list[float]:
    """The row that this driver encodes a text to: exact float32, a hash of all of it."""
    mark = zlib.crc32(t.pack_tokens(tokens), second)
    return [(mark * (place + 1) % 65_521) / 65_536 for place in range(width)]


class Resident:
    """A loaded model: its mirror and its slots, one bytearray of 16 slots a block, made when first used.
    `marks` are those of its adapters; 0 is the model as it is."""

    def __init__(self, loaded: Loaded, step_seconds: float, memory: int, vocabulary: Vocabulary) -> None:
        self.loaded = loaded
        self.step_seconds = step_seconds
        self.memory = memory
        self.mirror = Mirror(loaded.blocks, loaded.vocab_size, loaded.context_length, vocabulary)
        self.marks = {0: 0}
        self.mask = blank(loaded.vocab_size)
        self._pool: dict[int, bytearray] = {}

    def block(self, block: int) -> bytes | bytearray:
        return self._pool.get(block, _EMPTY)

    def put(self, block: int, data: bytes | bytearray) -> None:
        self._pool[block] = bytearray(data)

    def history(self, sequence: Sequence, length: int) -> bytes:
        blocks = sequence.blocks[: -(-length // BLOCK_TOKENS)]
        return b"".join([self.block(block) for block in blocks])[: length * _SLOT]

    def compute(self, piece: Piece) -> None:
        """Writes the slots of the piece's positions, each after the slot before it."""
        sequence = piece.sequence
        before = self.marks[sequence.adapter]
        if piece.start:
            before = _checksum(self.history(sequence, piece.start)[-_SLOT:])
        for position in range(piece.start, piece.end):
            block = self._pool.setdefault(sequence.blocks[position // BLOCK_TOKENS], bytearray(_EMPTY))
            slot = _write(sequence.tokens[position], before)
            before = _checksum(slot)
            place = position % BLOCK_TOKENS * _SLOT
            block[place : place + _SLOT] = slot


class NullDriver:
    """Loads any config.json: `max_position_embeddings` (4096), `vocab_size` (50257), and for tests
    `llmasos_null_blocks` (4096), `llmasos_null_step_seconds` (0: no sleep in a step),
    `llmasos_null_memory` (tokens that a forgetful model remembers; 0: all), and `llmasos_null_encodes`: it is
    an encoder, whose rows have `hidden_size` (8) numbers."""

    name = "null"

    def __init__(self) -> None:
        self._residents: dict[int, Resident] = {}
        self._pending: dict[int, Batch] = {}

    def describe(self) -> Description:
        return Description(
            driver=self.name,
            text="no device: deterministic tokens, KV as bookkeeping",
            memory_total=1 << 30,
            memory_free=(1 << 30)
            - sum(r.loaded.blocks * r.loaded.block_bytes for r in self._residents.values()),
            dtypes=["float32", "bfloat16"],
            step_tokens=2048,
            max_sequences=256,
        )

    def load(self, spec: LoadSpec) -> Loaded:
        if spec.dtype not in ("", *self.describe().dtypes):
            raise errors.UnsupportedModel(
                f"{self.name} has no dtype {spec.dtype!r}", hint="leave dtype empty"
            )
        config = _config(spec)
        encodes = t.Encodes(config["llmasos_null_encodes"]) if "llmasos_null_encodes" in config else None
        loaded = Loaded(
            handle=spec.handle,
            dtype=spec.dtype or "float32",
            kv_dtype=spec.kv_dtype or "float32",
            engine="hashes of the history",
            context_length=_number(config, "max_position_embeddings", "n_positions", default=4096),
            vocab_size=_number(config, "vocab_size", default=50257),
            blocks=0 if encodes else _number(config, "llmasos_null_blocks", default=4096),
            block_bytes=_BLOCK,
            weights_bytes=0,
            repeats=True,
            interruptible=not encodes,
            kv_layout="slots",
            encodes=encodes,
            width=_number(config, "hidden_size", default=8) if encodes else 0,
        )
        if not encodes and loaded.blocks * BLOCK_TOKENS < loaded.context_length:
            raise errors.NeverFits(
                f"{loaded.blocks} blocks of {BLOCK_TOKENS} tokens cannot hold one context of "
                f"{loaded.context_length} tokens",
                hint="set llmasos_null_blocks higher in config.json",
                blocks=loaded.blocks,
                context_length=loaded.context_length,
            )
        self._residents[spec.handle] = Resident(
            loaded,
            float(config.get("llmasos_null_step_seconds", 0)),
            int(config.get("llmasos_null_memory", 0)),
            Vocabulary(spec.files, loaded.vocab_size),
        )
        return loaded

    def unload(self, handle: int) -> None:
        self._residents.pop(handle, None)

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        resident = self._resident(handle)
        resident.marks[adapter] = adapter_mark(files)
        resident.mirror.adapters.add(adapter)
        return sum(file.size for file in files.values())

    def unload_adapter(self, handle: int, adapter: int) -> None:
        resident = self._resident(handle)
        resident.mirror.adapters.discard(adapter)
        resident.marks.pop(adapter, None)

    def submit(self, batch: Batch) -> int:
        self._pending[batch.ticket] = batch
        return batch.ticket

    def collect(self, ticket: int, interrupt: Interrupt | None = None) -> StepResult:
        return self.end(self.begin(ticket), interrupt)

    def begin(self, ticket: int) -> Step:
        """Takes a step's batch in."""
        if ticket not in self._pending:
            raise errors.DeviceFault(f"no step with ticket {ticket} was submitted")
        batch = self._pending.pop(ticket)
        resident = self._resident(batch.handle)
        step = resident.mirror.apply(batch)
        for source, target in step.copies:
            resident.put(target, resident.block(source))
        return step

    def end(self, step: Step, interrupt: Interrupt | None = None) -> StepResult:
        """Computes what has begun."""
        seconds = self.round(step, interrupt)
        while not (interrupt and interrupt.is_cut) and self.again(step):
            seconds += self.round(step, interrupt)
        return self.result(step, seconds)

    def round(self, step: Step, interrupt: Interrupt | None = None) -> float:
        """Computes a round and returns the seconds that it took."""
        return self._round(self._resident(step.batch.handle), step, interrupt)

    def again(self, step: Step) -> bool:
        """Makes the next round; False when there is none."""
        return self._resident(step.batch.handle).mirror.again(step)

    def result(self, step: Step, seconds: float) -> StepResult:
        """Of rounds that took so many seconds."""
        ticket = step.batch.ticket
        return StepResult(ticket, step.outputs, self._finish(ticket, seconds), step.rounds)

    def encode(self, encode: Encode) -> Encoded:
        resident = self._resident(encode.handle)
        loaded, seconds = resident.loaded, resident.step_seconds
        if loaded.encodes is None:
            raise errors.DeviceFault(f"model {encode.handle} is no encoder")
        if seconds:
            time.sleep(seconds)
        tokens, rows, at = t.unpack_tokens(encode.tokens), array("f"), 0
        for length, second in zip(encode.lengths, encode.pairs, strict=True):
            text = tokens[at : at + length]
            at += length
            each = ([token] for token in text) if loaded.encodes is t.Encodes.TOKENS else (text,)
            for part in each:
                rows.extend(vector(part, loaded.width, second))
        return Encoded(encode.ticket, rows.tobytes(), seconds)

    def _round(self, resident: Resident, step: Step, interrupt: Interrupt | None) -> float:
        begun, away = time.perf_counter(), interrupt.seconds if interrupt else 0.0
        _pass(resident.step_seconds, interrupt)
        # As on a device, one sequence of a batch may build on blocks that another fills in the same batch.
        for piece in sorted(step.pieces, key=lambda piece: piece.start):
            self._compute(resident, piece)
        for piece in step.pieces:
            step.take(piece, self._score(resident, piece))
        return time.perf_counter() - begun - (interrupt.seconds - away if interrupt else 0.0)

    def _compute(self, resident: Resident, piece: Piece) -> None:
        resident.compute(piece)

    def _finish(self, ticket: int, seconds: float) -> float:
        del ticket
        return seconds

    def _score(self, resident: Resident, piece: Piece) -> SeqOut:
        sequence, sampling = piece.sequence, piece.sequence.sampling
        slots = resident.history(sequence, piece.end)

        def scores_at(end: int) -> _Scores:
            vocab_size, mark = resident.loaded.vocab_size, resident.marks[sequence.adapter]
            return _Scores(slots[: end * _SLOT], sampling, vocab_size, resident.memory, mark)

        prompt = [scores_at(p).of(sequence.tokens[p], sampling.logprobs or 0) for p in piece.scored]
        barred = sampling.stop_token_ids if sequence.generated < sampling.min_new_tokens else []
        mask = resident.mask if sequence.constraint is not None else None
        if piece.beams:
            if mask is not None and (problem := sequence.mask(piece.end, mask)):
                return piece.failed(problem)
            return piece.done([], prompt, scores_at(piece.end).best(piece.beams, barred, mask))
        choices = []
        for end in range(piece.known, piece.end + 1) if piece.choose else ():
            if mask is not None and (problem := sequence.mask(end, mask)):
                return piece.failed(problem)
            scores = scores_at(end)
            if not (found := scores.best(1, barred, mask)):
                choices.append(Choice(-1, error="no token is left to choose"))
                continue
            token = found[0].token
            choices.append(
                Choice(token, None if sampling.logprobs is None else scores.of(token, sampling.logprobs))
            )
        return piece.done(choices, prompt, [])

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        resident = self._resident(handle)
        _check_blocks(blocks, resident.loaded)
        return b"".join(resident.block(block) for block in blocks)

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None:
        resident = self._resident(handle)
        _check_blocks(blocks, resident.loaded)
        if len(data) != len(blocks) * _BLOCK:
            raise errors.Corrupt(f"{len(data)} bytes for {len(blocks)} blocks of {_BLOCK} bytes")
        for index, block in enumerate(blocks):
            resident.put(block, data[index * _BLOCK : (index + 1) * _BLOCK])

    def close(self) -> None:
        self._residents.clear()
        self._pending.clear()

    def _resident(self, handle: int) -> Resident:
        if (resident := self._residents.get(handle)) is None:
            raise errors.DeviceFault(f"no model is loaded under handle {handle}")
        return resident


def _pass(seconds: float, interrupt: Interrupt | None) -> None:
    """Lets so many seconds pass, and what comes meanwhile be taken."""
    if interrupt is not None and interrupt.due:
        interrupt.take()
    while interrupt is not None and interrupt.fd >= 0:
        begun, watch = time.perf_counter(), select.poll()
        watch.register(interrupt.fd, select.POLLIN)
        came = watch.poll(1000 * seconds)
        seconds = max(0.0, seconds - (time.perf_counter() - begun))
        if not came:
            return
        interrupt.take()
    if seconds:
        time.sleep(seconds)


def _check_blocks(blocks: list[int], loaded: Loaded) -> None:
    if blocks and not (min(blocks) >= 0 and max(blocks) < loaded.blocks):
        raise errors.DeviceFault(f"a block is outside the pool of {loaded.blocks}")


def _config(spec: LoadSpec) -> dict[str, Any]:
    if (file := spec.files.get("config.json")) is None:
        return {}
    try:
        data = Path(file.path).read_bytes()
        config = msgspec.json.decode(data)
    except (OSError, msgspec.DecodeError) as problem:
        raise errors.Corrupt(f"config.json cannot be read: {type(problem).__name__}") from None
    if file.digest != f"sha256:{hashlib.sha256(data).hexdigest()}" or not isinstance(config, dict):
        raise errors.Corrupt(
            "config.json is not what its digest says", hint="run fsck and pull the model again"
        )
    return config


def _number(config: dict[str, Any], *names: str, default: int) -> int:
    for name in names:
        if (value := config.get(name)) is not None:
            if not isinstance(value, int) or value < 1:
                raise errors.UnsupportedModel(f"config.json: {name} must be a positive whole number")
            return value
    return default
