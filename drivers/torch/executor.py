"""The torch driver: one executor for `cpu` and `cuda`, the device a parameter.

Keeps resident models by handle, sizes their KV pools from what is really free, and starts steps in the order
in which they are submitted. Two steps of a model may be under way: the second takes the tokens that the first
chooses from the device's memory, and if it cannot, the first is waited for.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from llmasos.syscalls import errors

from .. import adapter as peft
from ..base import Batch, Description, Encode, Encoded, File, Interrupt, Loaded, LoadSpec, SeqOut, StepResult
from ..families import describe
from ..families import encoder as encoders
from ..grammar import Vocabulary
from ..mirror import Mirror
from ..room import holders, kv_blocks, size_text
from . import host, linear, quantised
from .attention import Coming, KvPool
from .config import Config, Shape
from .encoder import TorchEncoder
from .flight import Flight
from .graphs import StaticDecode
from .lora import AdapterBank
from .models import Model, build, family_of, is_ours
from .ops import has_triton, triton_trouble
from .ranks import Ranks
from .resident import Resident
from .shards import Shard
from .weights import Checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Steps of a model that may be under way at once.
_DEPTH = 2

# No pool holds more than this many contexts or tokens: nobody has so many users on one device.
_MOST_CONTEXTS = 64
_MOST_TOKENS = 1 << 20

_T = TypeVar("_T")


@dataclass(slots=True)
class _Ticket:
    """A submitted step, until it is collected: under way as `flight`, ended with `outputs`, or failed."""

    resident: Resident | None
    batch: Batch
    begun: float
    flight: Flight | None = None
    outputs: list[SeqOut] | None = None
    problem: BaseException | None = None
    seconds: float = 0.0


class TorchDriver:
    """Computes on `cpu`, `cuda` or `cuda:<n>`. Raises NoSuchDevice if torch has no such device. `static`:
    decode steps have fixed shapes, on CUDA as captured graphs; on a CPU only tests want that. `ranks`: it
    computes a rank's part of each model; every rank is asked for the same (group.py)."""

    def __init__(self, device: str, static: bool | None = None, ranks: Ranks | None = None) -> None:
        self._name = device
        self._device = host.device_of(device)
        self._ranks = ranks
        if self._device.type == "cuda":
            importlib.import_module("torch.nn.attention.bias")  # so no chunk waits for it (attention.py)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, host.physical_cores() // self._here))
        self._static = has_triton(self._device) if static is None else static
        self._residents: dict[int, Resident] = {}
        self._encoders: dict[int, TorchEncoder] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._settled = 0.0  # when the last step ended

    @property
    def _parts(self) -> int:
        """How many ranks share a model."""
        return self._ranks.size if self._ranks else 1

    @property
    def _here(self) -> int:
        """How many of them share this device's memory and cores."""
        return self._ranks.here if self._ranks else 1

    def describe(self) -> Description:
        cuda = self._device.type == "cuda"
        total, free = host.memory(self._device)
        return Description(
            driver=self._device.type,
            text=self._text(),
            memory_total=total,
            memory_free=free,
            dtypes=[*_DTYPES, *self._formats()],
            step_tokens=4096 if cuda else 256,
            max_sequences=256 if cuda else 32,
        )

    def _text(self) -> str:
        if self._device.type == "cuda":
            return f"torch {torch.__version__}, {torch.cuda.get_device_name(self._device)}"
        return f"{self._engine(torch.float32)}, {torch.get_num_threads()} threads, {host.cpu_name()}"

    def _engine(self, dtype: torch.dtype) -> str:
        """What computes on a CPU."""
        packed = "oneDNN packed weights" if linear.can_pack(self._device, dtype) else "plain matrices"
        return f"torch {torch.__version__}, {packed}"

    def _engine_of(self, model: Model, name: str, static: bool) -> str:
        """What computes a model whose weights are in `name`."""
        own: str = getattr(model, "engine", "")
        if own:
            return own
        if self._device.type != "cuda":
            return self._engine(_DTYPES[name])
        if trouble := triton_trouble(self._device):
            return f"torch {torch.__version__}, eager: {trouble}"
        decode = "CUDA graphs" if static else "eager"
        return f"torch {torch.__version__}, {decode}, Triton paged attention, {name} weights"

    def _formats(self) -> tuple[str, ...]:
        """The quantised weights that this device computes with: without our kernels they would only be
        slow."""
        if not has_triton(self._device) or not host.multiplies_bfloat16(self._device):
            return ()
        float8 = torch.cuda.get_device_capability(self._device) >= (8, 9)
        return quantised.FORMATS if float8 else tuple(f for f in quantised.FORMATS if f != "float8")

    def _dtype(self, spec: LoadSpec, checkpoint: Checkpoint) -> str:
        """What to compute in. Half the bytes are half the time only where they are multiplied as they are."""
        if spec.dtype:
            return spec.dtype
        halved = self._device.type == "cuda" or checkpoint.stored in ("BF16", "F16")
        return "bfloat16" if halved and host.multiplies_bfloat16(self._device) else "float32"

    def load(self, spec: LoadSpec) -> Loaded:
        known = (*_DTYPES, *self._formats())
        if spec.dtype and spec.dtype not in known:
            raise errors.UnsupportedModel(
                f"{self._name} does not compute in {spec.dtype!r}",
                hint=f"one of {', '.join(known)}, or none: what suits the model",
            )
        self.unload(spec.handle)
        checkpoint = Checkpoint(spec.files)
        config = Config(checkpoint.config)
        with self._computing():
            if encoders.is_encoder(config):
                return self._twice(lambda: self._load_encoder(spec, config, checkpoint), "loading a model")
            resident = self._twice(lambda: self._load(spec, config, checkpoint), "loading a model")
        self._residents[spec.handle] = resident
        return resident.loaded

    def _load_encoder(self, spec: LoadSpec, config: Config, checkpoint: Checkpoint) -> Loaded:
        """In the type that the weights are stored in: it costs little, and others compare the vectors."""
        if self._ranks is not None:
            raise errors.UnsupportedModel("a group computes no encoders", hint="choose a single device")
        halved = checkpoint.stored in ("BF16", "F16") and host.multiplies_bfloat16(self._device)
        name = spec.dtype or ("bfloat16" if halved else "float32")
        if name not in _DTYPES:
            raise errors.UnsupportedModel(
                f"encoders are not computed in {name}", hint=f"one of {', '.join(_DTYPES)}, or none"
            )
        described = encoders.describe(config, spec.files, checkpoint)
        self._check_weights(checkpoint, 4)
        encoder = TorchEncoder(described, checkpoint, self._device, _DTYPES[name])
        self._encoders[spec.handle] = encoder
        cuda = self._device.type == "cuda"
        return Loaded(
            handle=spec.handle,
            dtype=name,
            kv_dtype="",
            engine=f"torch {torch.__version__}, no padding" if cuda else self._engine(_DTYPES[name]),
            context_length=described.context_length,
            vocab_size=described.vocab_size,
            blocks=0,
            block_bytes=0,
            weights_bytes=encoder.weights_bytes,
            encodes=described.encodes,
            width=described.width,
        )

    def _load(self, spec: LoadSpec, config: Config, checkpoint: Checkpoint) -> Resident:
        name = self._dtype(spec, checkpoint)
        format_ = name if name in quantised.FORMATS else ""
        kv_name = "bfloat16" if format_ else name
        dtype = _DTYPES[kv_name]
        if spec.kv_dtype not in ("", kv_name):
            raise errors.UnsupportedModel(
                f"{self._name} keeps KV in {kv_name} beside weights in {name}, not in {spec.kv_dtype[:32]!r}",
                hint="leave kv_dtype empty",
            )
        shape = family_of(config).shape_of(config)
        self._check_weights(checkpoint, quantised.BYTES.get(format_, dtype.itemsize))
        model = build(config, checkpoint, self._device, dtype, format_, self._ranks)
        shape = model.shape
        static = self._static and is_ours(config)
        block_bytes = KvPool.block_bytes(shape, dtype)
        blocks = self._blocks(shape, block_bytes, spec.kv_fraction)
        loaded = Loaded(
            handle=spec.handle,
            dtype=name,
            kv_dtype=kv_name,
            engine=self._engine_of(model, name, static),
            context_length=shape.context_length,
            vocab_size=shape.vocab_size,
            blocks=blocks,
            block_bytes=block_bytes,
            weights_bytes=model.weights_bytes,
            kv_layout="torch heads",
        )
        pool = KvPool(shape, blocks, dtype, self._device)
        vocabulary = Vocabulary(spec.files, shape.vocab_size)
        mirror = Mirror(blocks, shape.vocab_size, shape.context_length, vocabulary)
        captured = self._device.type == "cuda"
        decode = StaticDecode(model, pool, shape.context_length, captured) if static else None
        bank = self._bank(config, dtype) if is_ours(config) else None
        return Resident(loaded, model, pool, mirror, bank, decode)

    def _bank(self, config: Config, dtype: torch.dtype) -> AdapterBank:
        decoder = describe(config)
        return AdapterBank(decoder, dtype, self._device, Shard(decoder, self._ranks) if self._ranks else None)

    def _check_weights(self, checkpoint: Checkpoint, value_bytes: float) -> None:
        needed = int(checkpoint.numel * value_bytes) // self._parts * self._here
        _, free = host.memory(self._device)
        if needed > free:
            raise errors.NeverFits(
                f"the weights need {size_text(needed)}, {self._name} has {size_text(free)} free; "
                f"{self._holders()}",
                hint="unload other models, use bfloat16 or a smaller model",
                needed=needed,
                free=free,
            )

    def _blocks(self, shape: Shape, block_bytes: int, fraction: float) -> int:
        """KV blocks that fit into `fraction` of the free memory. Raises NeverFits below one context."""
        _, free = host.memory(self._device)
        fraction /= self._here
        length = shape.context_length
        most = min(_MOST_CONTEXTS * length, _MOST_TOKENS)
        return kv_blocks(self._name, length, block_bytes, free, fraction, most, self._holders())

    def unload(self, handle: int) -> None:
        if self._encoders.pop(handle, None) is not None:
            self._drop_caches()
        if (resident := self._residents.pop(handle, None)) is not None:
            self._tickets = {n: t for n, t in self._tickets.items() if t.resident is not resident}
            self._drop_caches()

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        resident = self._resident(handle)
        if (bank := resident.bank) is None:
            raise errors.UnsupportedModel(
                "adapters are served with our own model families only, not with transformers' code",
                hint="merge the adapter into its model",
            )
        loras = peft.read(files, bank.decoder)
        with self._computing():
            size = self._twice(lambda: bank.put(adapter, loras), "loading an adapter")
        resident.mirror.adapters.add(adapter)
        return size

    def unload_adapter(self, handle: int, adapter: int) -> None:
        resident = self._resident(handle)
        resident.mirror.adapters.discard(adapter)
        if resident.bank is not None:
            resident.bank.drop(adapter)

    def submit(self, batch: Batch) -> int:
        """Starts a step. What goes wrong is raised when it is collected."""
        resident = self._residents.get(batch.handle)
        ticket = self._tickets[batch.ticket] = _Ticket(resident, batch, time.perf_counter())
        if resident is None:
            ticket.problem = errors.DeviceFault(f"no model is loaded under handle {batch.handle}")
            return batch.ticket
        try:
            with self._computing():
                ticket.flight = self._launch(resident, batch)
                resident.flights.append(ticket.flight)
        except BaseException as problem:
            resident.mirror.forget(batch)
            ticket.problem = problem
        return batch.ticket

    def _launch(self, resident: Resident, batch: Batch) -> Flight:
        while len(resident.flights) >= _DEPTH:
            self._settle(resident)
        coming: Coming | None = None
        if resident.flights:
            before = resident.flights[-1]
            if resident.static is not None and before.may_precede(batch):
                coming = before.defer()
            else:
                self._settle(resident)
        step = resident.mirror.apply(batch)
        rows = sum(piece.end - piece.start for piece in step.pieces)
        return self._twice(lambda: resident.launch(step, coming), f"a step of {rows} tokens")

    def _settle(self, resident: Resident) -> None:
        """Waits for the resident's oldest step."""
        flight = resident.flights.pop(0)
        ticket = next(ticket for ticket in self._tickets.values() if ticket.flight is flight)
        later = resident.flights[0] if resident.flights else None
        try:
            ticket.outputs = flight.settle(resident.pool, later)
        except BaseException as problem:
            resident.mirror.forget(ticket.batch)
            ticket.problem = problem
        now = time.perf_counter()
        ticket.seconds = now - max(ticket.begun, self._settled)
        self._settled = now

    def collect(self, ticket: int, interrupt: Interrupt | None = None) -> StepResult:
        if (found := self._tickets.get(ticket)) is None:
            raise errors.DeviceFault(f"no step with ticket {ticket} was submitted")
        with self._computing():
            while found.resident is not None and found.outputs is None and found.problem is None:
                self._settle(found.resident)
            del self._tickets[ticket]
            if found.problem is not None:
                raise found.problem
        assert found.outputs is not None
        return StepResult(ticket, found.outputs, found.seconds)

    def encode(self, encode: Encode) -> Encoded:
        if (encoder := self._encoders.get(encode.handle)) is None:
            raise errors.DeviceFault(f"no encoder is loaded under handle {encode.handle}")
        begun = time.perf_counter()
        tokens = np.frombuffer(encode.tokens, "<u4")
        with self._computing():
            rows = self._twice(
                lambda: encoder.encode(tokens, encode.lengths, encode.pairs),
                f"encoding {len(tokens)} tokens",
            )
        data = rows.astype("<f4", copy=False).tobytes()
        return Encoded(encode.ticket, data, time.perf_counter() - begun)

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        with self._computing():
            return self._resident(handle).pool.read_blocks(blocks)

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None:
        with self._computing():
            self._resident(handle).pool.write_blocks(blocks, data)

    def close(self) -> None:
        self._tickets.clear()
        self._residents.clear()
        self._encoders.clear()
        self._drop_caches()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        try:
            with torch.inference_mode():
                yield
        except RuntimeError as problem:
            host.end_if_lost(self._device, problem)
            raise

    def _resident(self, handle: int) -> Resident:
        if (resident := self._residents.get(handle)) is None:
            raise errors.DeviceFault(f"no model is loaded under handle {handle}")
        return resident

    def _drop_caches(self) -> None:
        for resident in self._residents.values():
            resident.pool.drop_workspace()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _twice(self, verb: Callable[[], _T], what: str) -> _T:
        """Runs `verb`; when memory runs out, drops caches and runs it once more."""
        # What one rank does twice no other one does with it.
        attempts = (1, 2) if self._ranks is None else (2,)
        for attempt in attempts:
            try:
                return verb()
            except (MemoryError, RuntimeError) as problem:
                if not _is_out_of_memory(problem):
                    raise
                if attempt == 2:
                    raise errors.DeviceFault(
                        f"{self._name} ran out of memory in {what}; {self._holders()}",
                        hint="unload a model or lower the share of KV blocks",
                    ) from None
            self._drop_caches()
        raise AssertionError("unreachable")

    def _holders(self) -> str:
        return holders((resident.loaded, len(resident.mirror)) for resident in self._residents.values())


def _is_out_of_memory(problem: BaseException) -> bool:
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator, CUDA itself (graphs, pinned memory) and its libraries have no class of their own.
    texts = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(text in str(problem) for text in texts)
