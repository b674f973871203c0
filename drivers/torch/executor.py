"""The torch driver: one executor for `cpu` and `cuda`, the device a parameter.

Keeps resident models by handle, sizes their KV pools from what is really free, and computes steps in the
order in which they were submitted, each when it is collected.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from llmasos.syscalls import errors

from ..base import BLOCK_TOKENS, Batch, Description, Loaded, LoadSpec, StepResult
from ..mirror import Mirror
from . import host, linear
from .attention import KvPool
from .config import Config, Shape
from .models import family_of
from .resident import Resident
from .weights import Checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# No pool holds more than this many contexts or tokens: nobody has so many users on one device.
_MOST_CONTEXTS = 64
_MOST_TOKENS = 1 << 20

_T = TypeVar("_T")


class TorchDriver:
    """Computes on `cpu`, `cuda` or `cuda:<n>`. Raises NoSuchDevice if torch has no such device."""

    def __init__(self, device: str) -> None:
        self._name = device
        self._device = torch.device(device)
        if self._device.type == "cuda":
            if not torch.cuda.is_available() or (self._device.index or 0) >= torch.cuda.device_count():
                raise errors.NoSuchDevice(
                    f"torch {torch.__version__} sees no {device}",
                    hint="use --device cpu, or a CUDA build of torch",
                )
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(host.physical_cores())
        self._residents: dict[int, Resident] = {}
        self._pending: dict[int, Batch] = {}

    def describe(self) -> Description:
        cuda = self._device.type == "cuda"
        total, free = host.memory(self._device)
        return Description(
            driver=self._device.type,
            text=self._text(),
            memory_total=total,
            memory_free=free,
            dtypes=list(_DTYPES),
            step_tokens=4096 if cuda else 256,
            max_sequences=256 if cuda else 32,
        )

    def _text(self) -> str:
        if self._device.type == "cuda":
            return f"torch {torch.__version__}, {torch.cuda.get_device_name(self._device)}"
        return f"{self._engine(torch.float32)}, {torch.get_num_threads()} threads, {host.cpu_name()}"

    def _engine(self, dtype: torch.dtype) -> str:
        if self._device.type == "cuda":
            return f"torch {torch.__version__}, eager"
        packed = "oneDNN packed weights" if linear.can_pack(self._device, dtype) else "plain matrices"
        return f"torch {torch.__version__}, {packed}"

    def _dtype(self, spec: LoadSpec, checkpoint: Checkpoint) -> str:
        """What to compute in. Half the bytes are half the time only where they are multiplied as they are."""
        if spec.dtype:
            return spec.dtype
        if self._device.type == "cuda":
            return "bfloat16"
        halved = checkpoint.stored in ("BF16", "F16")
        return "bfloat16" if halved and host.computes_bfloat16() else "float32"

    def load(self, spec: LoadSpec) -> Loaded:
        if spec.dtype and spec.dtype not in _DTYPES:
            raise errors.UnsupportedModel(
                f"{self._name} does not compute in {spec.dtype!r}",
                hint=f"one of {', '.join(_DTYPES)}, or none: what suits the model",
            )
        self.unload(spec.handle)
        with torch.inference_mode():
            resident = self._twice(lambda: self._load(spec), "loading a model")
        self._residents[spec.handle] = resident
        return resident.loaded

    def _load(self, spec: LoadSpec) -> Resident:
        checkpoint = Checkpoint(spec.files)
        name = self._dtype(spec, checkpoint)
        dtype = _DTYPES[name]
        if spec.kv_dtype not in ("", name):
            raise errors.UnsupportedModel(
                f"{self._name} keeps KV in the dtype of the weights, {name}, not in {spec.kv_dtype[:32]!r}",
                hint="leave kv_dtype empty",
            )
        config = Config(checkpoint.config)
        family = family_of(config)
        shape = family.shape_of(config)
        self._check_weights(checkpoint, dtype)
        model = family.build(config, checkpoint, self._device, dtype)
        block_bytes = KvPool.block_bytes(shape, dtype)
        blocks = self._blocks(shape, block_bytes, spec.kv_fraction)
        loaded = Loaded(
            handle=spec.handle,
            dtype=name,
            kv_dtype=name,
            engine=getattr(model, "engine", "") or self._engine(dtype),
            context_length=shape.context_length,
            vocab_size=shape.vocab_size,
            blocks=blocks,
            block_bytes=block_bytes,
            weights_bytes=model.weights_bytes,
        )
        pool = KvPool(shape, blocks, dtype, self._device)
        return Resident(loaded, model, pool, Mirror(blocks, shape.vocab_size, shape.context_length))

    def _check_weights(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        needed = checkpoint.numel * dtype.itemsize
        _, free = host.memory(self._device)
        if needed > free:
            raise errors.NeverFits(
                f"the weights need {_size(needed)}, {self._name} has {_size(free)} free; {self._holders()}",
                hint="unload other models, use bfloat16 or a smaller model",
                needed=needed,
                free=free,
            )

    def _blocks(self, shape: Shape, block_bytes: int, fraction: float) -> int:
        """KV blocks that fit into `fraction` of the free memory. Raises NeverFits below one context."""
        _, free = host.memory(self._device)
        context = -(-shape.context_length // BLOCK_TOKENS)
        most = max(context, min(_MOST_CONTEXTS * context, _MOST_TOKENS // BLOCK_TOKENS))
        blocks = min(int(free * fraction) // block_bytes, most)
        if blocks < context:
            raise errors.NeverFits(
                f"one context of {shape.context_length} tokens needs {_size(context * block_bytes)} of KV, "
                f"{_size(int(free * fraction))} may be used ({fraction:.0%} of {_size(free)} free on "
                f"{self._name}); {self._holders()}",
                hint="unload other models, use bfloat16, or give KV a larger share of the memory",
                needed=context * block_bytes,
                free=int(free * fraction),
            )
        return blocks

    def unload(self, handle: int) -> None:
        if self._residents.pop(handle, None) is not None:
            self._drop_caches()

    def submit(self, batch: Batch) -> int:
        self._pending[batch.ticket] = batch
        return batch.ticket

    def collect(self, ticket: int) -> StepResult:
        if ticket not in self._pending:
            raise errors.DeviceFault(f"no step with ticket {ticket} was submitted")
        batch = self._pending.pop(ticket)
        resident = self._resident(batch.handle)
        begun = time.perf_counter()
        step = resident.mirror.apply(batch)
        rows = sum(piece.end - piece.start for piece in step.pieces)
        try:
            with torch.inference_mode():
                outputs = self._twice(lambda: resident.compute(step), f"a step of {rows} tokens")
        except BaseException:
            resident.mirror.forget(batch)
            raise
        return StepResult(ticket, outputs, time.perf_counter() - begun)

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        with torch.inference_mode():
            return self._resident(handle).pool.read_blocks(blocks)

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None:
        with torch.inference_mode():
            self._resident(handle).pool.write_blocks(blocks, data)

    def close(self) -> None:
        self._pending.clear()
        self._residents.clear()
        self._drop_caches()

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
        for attempt in (1, 2):
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
        """Who holds the device's memory."""
        held = [
            f"model {handle}: weights {_size(r.loaded.weights_bytes)}, KV {_size(r.kv_bytes)}, "
            f"{len(r.mirror)} sequences"
            for handle, r in self._residents.items()
        ]
        return "; ".join(held) if held else "no other model is loaded"


def _is_out_of_memory(problem: BaseException) -> bool:
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(problem)  # torch's CPU allocator has no class of its own


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
