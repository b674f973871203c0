"""Merges a LoRA adapter into its model: W + scaling * B A, in files that transformers and we load.

    python -m llmasos.drivers.merge     with a base.MergeSpec as JSON on its standard input

It prints JSON lines: {"done": bytes, "total": bytes}, and last {"ok": {}} or {"error": {...}}; exits 0 or 1.

Weights keep their type, those of a quantised model become QUANTISED_AS. Rows are computed some at a time, so
that memory is bounded whatever the model's size.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from llmasos.syscalls import errors

from . import adapter
from .adapter import Lora
from .base import MergeSpec
from .checkpoint import PLAIN, Bytes, Checkpoint, Floats, values_of
from .families import describe
from .families.decoder import Decoder
from .model_config import Config

QUANTISED_AS = "F32"

_MOST = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "BF16": 3.3895314e38}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AT_ONCE = 1 << 23  # values

Told = Callable[[int, int], None]


class _Tensor(NamedTuple):
    """One to write: its name in the checkpoint, and its type and shape in the file."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * PLAIN[self.type]


def merge(spec: MergeSpec, told: Told) -> None:
    """Writes config.json and model.safetensors; `told` hears bytes done and bytes in all. Raises Corrupt,
    UnsupportedModel, StorageFailed."""
    checkpoint = Checkpoint(spec.base)
    decoder = describe(Config(checkpoint.config))
    decoder.expect(checkpoint)
    added = adapter.read(spec.adapter, decoder)
    tensors = [_tensor(checkpoint, name, shape) for name, shape in decoder.expected.items()]
    # Wide types first: each then begins at a multiple of its width.
    tensors.sort(key=lambda tensor: (-PLAIN[tensor.type], tensor.name))
    config = checkpoint.config
    if checkpoint.stored not in PLAIN:
        config = config | {"dtype": _NAMES[QUANTISED_AS]}
    try:
        folder = Path(spec.folder)
        (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        _write(folder / "model.safetensors", spec.room, tensors, checkpoint, decoder, added, told)
    except OSError as problem:
        raise errors.StorageFailed(
            f"the merged model cannot be written: {problem.strerror}", hint="see `llsh df`"
        ) from None


def _tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> _Tensor:
    stored = checkpoint.entry(name).type
    return _Tensor(name, stored if stored in PLAIN else QUANTISED_AS, shape)


def _write(
    path: Path,
    room: int,
    tensors: list[_Tensor],
    checkpoint: Checkpoint,
    decoder: Decoder,
    added: dict[str, Lora],
    told: Told,
) -> None:
    """A safetensors file: the length of the header, the header, the tensors one after the other. The library
    writes only what is in memory as a whole. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    done = 0
    for tensor in tensors:
        offsets = [done, done + tensor.nbytes]
        place = {"dtype": tensor.type, "shape": list(tensor.shape), "data_offsets": offsets}
        header[decoder.prefix + tensor.name] = place
        done = offsets[1]
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    total = 8 + len(text) + done
    if total > room:
        raise errors.StorageFailed(
            f"the merged model has {total} bytes, there is room for {max(0, room)}", hint="see `llsh df`"
        )
    with path.open("xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, total)
        done = _put(file.fileno(), len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            lora = added.get(tensor.name.removesuffix(".weight"))
            for rows in _rows(checkpoint, tensor, lora, decoder.turned):
                done += _put(file.fileno(), rows.data)
                told(done, total)


def _put(fd: int, data: bytes | memoryview) -> int:
    rest = memoryview(data).cast("B")
    size = len(rest)
    while rest:
        rest = rest[os.write(fd, rest) :]
    return size


def _rows(checkpoint: Checkpoint, tensor: _Tensor, lora: Lora | None, turned: bool) -> Iterator[Bytes]:
    """A tensor's bytes, some rows at a time. `turned`: it is stored [in, out]."""
    raw = checkpoint.raw(tensor.name)
    columns = tensor.shape[-1]
    height = math.prod(tensor.shape) // columns
    step = max(1, _AT_ONCE // columns)
    whole = checkpoint.read(tensor.name).reshape(height, columns) if raw.transposed else None
    for begin in range(0, height, step):
        some = slice(begin, begin + step)
        if lora is None and whole is None and raw.type == tensor.type:
            yield np.ascontiguousarray(raw.rows[some])
            continue
        values = values_of(raw.type, raw.rows[some]) if whole is None else whole[some]
        if lora is not None:
            left, right = (lora.a.T, lora.b.T) if turned else (lora.b, lora.a)
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused
                values = values + left[some] @ right
        yield _stored(tensor, values)


def _stored(tensor: _Tensor, values: Floats) -> Bytes:
    """float32 values as a type of PLAIN, rounded to the nearest, ties to even. Raises UnsupportedModel."""
    if not (np.abs(values) <= _MOST[tensor.type]).all():
        raise errors.UnsupportedModel(
            f"{tensor.name} would have values that {tensor.type} does not hold",
            hint="the adapter cannot be merged",
        )
    if tensor.type == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(values.astype(np.float16 if tensor.type == "F16" else np.float32)).view(
        np.uint8
    )


def _say(line: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def main() -> int:
    """Returns the exit code."""
    try:
        spec = msgspec.json.decode(sys.stdin.buffer.read(), type=MergeSpec)
        merge(spec, lambda done, total: _say({"done": done, "total": total}))
    except BrokenPipeError:
        return 1  # nobody listens any more
    except errors.LLMasOSError as problem:
        _say({"error": errors.to_wire(problem)})
        return 1
    except Exception as problem:
        traceback.print_exception(problem, file=sys.stderr)
        failure = errors.PullFailed(
            f"the merging failed: {type(problem).__name__}", hint="see the daemon's log; this is a bug"
        )
        _say({"error": errors.to_wire(failure)})
        return 1
    _say({"ok": {}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
