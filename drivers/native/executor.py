"""The native CPU driver: resident models by handle, steps computed by the compiled engine.

Needs neither torch nor gguf once a model is packed. What it computes equals the torch driver's result in
float32; a row's result never depends on the batch, bit for bit, in every dtype.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmasos.syscalls import errors

from .. import adapter as peft
from .. import host
from ..base import Batch, Description, Encode, Encoded, File, Interrupt, Loaded, LoadSpec, StepResult
from ..checkpoint import read_json
from ..families import describe
from ..grammar import Vocabulary
from ..mirror import Mirror, Piece, Step
from ..model_config import Config
from ..room import holders, kv_blocks
from . import formats, library, lora, pack
from .model import MAX_PICKS, MAX_ROWS, Floats, NativeModel, wanted

KV_DTYPES = ("float32", "bfloat16", "int8")

# 8 bits with a scale a token and head: half the memory, and less error than 8-bit activations cause.
_KV_FOR = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}

MOST_TOKENS = 1 << 17
"""Tokens that a pool holds at most: what was once written stays in memory as a prefix cache, and a machine
that people work on has other uses for it."""

Note = Callable[[str, str], None]


@dataclass(slots=True)
class _Resident:
    config: File
    loaded: Loaded
    model: NativeModel
    mirror: Mirror

    def compute(self, step: Step, interrupt: Interrupt | None) -> None:
        for source, target in step.copies:
            self.model.copy_block(source, target)
        for pieces in _portions(step.pieces):
            for piece, result in zip(pieces, self.model.compute(pieces, interrupt), strict=True):
                step.take(
                    piece,
                    piece.failed(result.error)
                    if result.error
                    else piece.done(result.choices, result.prompt, result.beams),
                )


def _portions(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Cuts a step into what one call of the engine takes. Pieces that begin earlier in their sequence go
    first: a later one may build on blocks that an earlier one fills."""
    portion: list[Piece] = []
    rows = picks = 0
    total = sum(piece.end - piece.start for piece in pieces)
    ordered = sorted(pieces, key=lambda piece: piece.start) if total > MAX_ROWS else pieces
    for piece in ordered:
        count, choices = piece.end - piece.start, wanted(piece)
        if portion and (rows + count > MAX_ROWS or picks + choices > MAX_PICKS):
            yield portion
            portion, rows, picks = [], 0, 0
        portion.append(piece)
        rows, picks = rows + count, picks + choices
    if portion:
        yield portion


class NativeDriver:
    """Computes on the processors that this process may use. Raises library.NoEngine when no compiled engine
    runs here. `note` gets (level, text) for dmesg; `variant` names one of build.VARIANTS (tests)."""

    def __init__(self, note: Note, variant: str = "") -> None:
        self._note = note
        self._engine = library.load(variant)
        cpus = host.cores()
        self._threads = len(cpus)
        self._pool = self._engine.functions.llk_pool_new(len(cpus), (ctypes.c_int32 * len(cpus))(*cpus))
        if not self._pool:
            raise library.NoEngine(f"{self._threads} threads cannot be started")
        self._residents: dict[int, _Resident] = {}
        self._pending: dict[int, Batch] = {}

    def describe(self) -> Description:
        total, free = host.memory()
        return Description(
            driver="cpu",
            text=f"{self.engine_text()}, {self._threads} threads, {host.cpu_name()}",
            memory_total=total,
            memory_free=free,
            dtypes=list(formats.DTYPES),
            step_tokens=MAX_ROWS,
            max_sequences=MAX_PICKS,
        )

    def engine_text(self) -> str:
        return f"native engine {self._engine.variant} ({self._engine.origin})"

    def load(self, spec: LoadSpec) -> Loaded:
        if spec.kv_dtype not in ("", *KV_DTYPES):
            raise errors.UnsupportedModel(
                f"the native engine keeps no KV in {spec.kv_dtype[:32]!r}",
                hint=f"one of {', '.join(KV_DTYPES)}, or none: what suits the weights",
            )
        self.unload(spec.handle)
        packed = pack.load(spec, lambda text: self._note("info", text))
        kv_dtype = spec.kv_dtype or _KV_FOR[packed.dtype]
        model = NativeModel(self._engine, self._pool, packed, kv_dtype)
        a = packed.architecture
        _, free = host.memory()
        try:
            blocks = kv_blocks(
                "cpu",
                a.context_length,
                model.block_bytes,
                free,
                spec.kv_fraction,
                MOST_TOKENS,
                self._holders(),
            )
            model.make_pool(blocks)
        except (errors.LLMasOSError, OSError):
            model.close()
            raise
        loaded = Loaded(
            handle=spec.handle,
            dtype=packed.dtype,
            kv_dtype=kv_dtype,
            engine=self.engine_text(),
            context_length=a.context_length,
            vocab_size=a.vocab_size,
            blocks=blocks,
            block_bytes=model.block_bytes,
            weights_bytes=packed.nbytes,
            repeats=True,
            interruptible=True,
            kv_layout="native tiles",
        )
        vocabulary = Vocabulary(spec.files, a.vocab_size)
        mirror = Mirror(blocks, a.vocab_size, a.context_length, vocabulary)
        self._residents[spec.handle] = _Resident(spec.files["config.json"], loaded, model, mirror)
        return loaded

    def all_logits(self, handle: int, tokens: list[int], chunk: int = MAX_ROWS) -> Floats:
        """Logits [len(tokens), vocab_size] at every position of `tokens`, computed `chunk` positions at a
        time. Overwrites the first KV blocks (benchmarks of quality, tests)."""
        return self._resident(handle).model.all_logits(tokens, chunk)

    def unload(self, handle: int) -> None:
        if (resident := self._residents.pop(handle, None)) is not None:
            resident.model.close()

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        resident = self._resident(handle)
        decoder = describe(Config(read_json(resident.config, "config.json", dict[str, Any])))
        loras = peft.read(files, decoder)
        format_ = lora.FORMATS[resident.loaded.dtype]
        bound = lora.BoundAdapter(loras, decoder, resident.model.architecture, format_)
        resident.model.adapters[adapter] = bound
        resident.mirror.adapters.add(adapter)
        return bound.nbytes

    def unload_adapter(self, handle: int, adapter: int) -> None:
        resident = self._resident(handle)
        resident.mirror.adapters.discard(adapter)
        resident.model.adapters.pop(adapter, None)

    def submit(self, batch: Batch) -> int:
        self._pending[batch.ticket] = batch
        return batch.ticket

    def collect(self, ticket: int, interrupt: Interrupt | None = None) -> StepResult:
        if (batch := self._pending.pop(ticket, None)) is None:
            raise errors.DeviceFault(f"no step with ticket {ticket} was submitted")
        resident = self._resident(batch.handle)
        begun = time.perf_counter()
        step = resident.mirror.apply(batch)
        try:
            resident.compute(step, interrupt)
            while not (interrupt and interrupt.is_cut) and resident.mirror.again(step):
                resident.compute(step, interrupt)
        except BaseException:
            resident.mirror.forget(batch)
            raise
        seconds = time.perf_counter() - begun - (interrupt.seconds if interrupt else 0.0)
        return StepResult(ticket, step.outputs, seconds, step.rounds)

    def encode(self, encode: Encode) -> Encoded:
        raise errors.DeviceFault("the native engine computes no encoders")

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        return self._resident(handle).model.read_blocks(blocks)

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None:
        self._resident(handle).model.write_blocks(blocks, data)

    def close(self) -> None:
        self._pending.clear()
        for handle in list(self._residents):
            self.unload(handle)
        if self._pool:
            self._engine.functions.llk_pool_free(self._pool)
            self._pool = None

    def _resident(self, handle: int) -> _Resident:
        if (resident := self._residents.get(handle)) is None:
            raise errors.DeviceFault(f"no model is loaded under handle {handle}")
        return resident

    def _holders(self) -> str:
        return holders((resident.loaded, len(resident.mirror)) for resident in self._residents.values())
