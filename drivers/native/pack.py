"""A model's weights as the engine reads them, in one file that is mapped. Made once from the checkpoint and
kept among the derived files; later loads read neither the checkpoint nor anything but this file.

    offset 0   magic (8), length of the header (8, little endian), SHA-256 of the header (32), header (JSON)
    then, at a multiple of 4096, the data: arrays and matrices at multiples of 64

A derived file is used only if it says that it was made by this version from the very files that are wanted,
all its sizes and offsets are what the model's architecture needs, and its bytes have the digests it names.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from llmasos.syscalls import errors
from msgspec import Struct

from .. import host
from ..base import LoadSpec
from ..checkpoint import Bytes, Checkpoint, Floats
from ..families import describe
from ..model_config import Config
from . import formats
from .architecture import Architecture, architecture_of, up_to
from .recipe import Recipe, natural_dtype

# To be raised whenever other bytes or another architecture would come of the same files: a change of the
# packed formats, of the rules of quantisation, or of what `families` makes of a config.
VERSION = 1

_MAGIC = b"LLMPACK\n"
_FIXED = len(_MAGIC) + 8 + 32
_PAGE = 4096
_ALIGNED = 64
_PIECE = 1 << 23  # bytes that are hashed at a time
_MOST_HEADER = 1 << 26
_PLAIN = "plain"  # the format of arrays: float32, row by row
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

Note = Callable[[str], None]
Progress = Callable[[int, int], None]


class _Place(Struct, frozen=True, array_like=True):
    """A tensor in the data. `rows` and `cols` are padded."""

    offset: int
    nbytes: int
    format: str
    rows: int
    cols: int


class _Header(Struct, frozen=True, forbid_unknown_fields=True):
    """`natural` is the dtype that suits how the model is stored; `pieces` are digests of the data."""

    version: int
    dtype: str
    natural: str
    architecture: Architecture
    sources: dict[str, str]
    size: int
    tensors: dict[str, _Place]
    pieces: list[str]


class Tensor(NamedTuple):
    """A packed matrix or a plain array in this process's memory. `format` is a dtype, or "plain"."""

    address: int
    nbytes: int
    format: str
    rows: int
    cols: int


class Packed:
    """A mapped model. Tensors are named as `Architecture.matrices` and `arrays` name them. Their addresses
    are good until `close`, or until this object is gone. `nbytes` is what the weights take."""

    def __init__(self, header: _Header, mapped: mmap.mmap, start: int) -> None:
        self.architecture, self.dtype, self.nbytes = header.architecture, header.dtype, header.size
        self._mapped = mapped
        base = np.frombuffer(mapped, np.uint8).ctypes.data + start
        self.tensors = {
            name: Tensor(base + place.offset, place.nbytes, place.format, place.rows, place.cols)
            for name, place in header.tensors.items()
        }

    def close(self) -> None:
        self.tensors = {}
        self._mapped.close()


def load(spec: LoadSpec, note: Note, progress: Progress | None = None) -> Packed:
    """The packed weights of `spec`: found among its derived files, or made. `note` gets lines for people,
    `progress` (bytes made, bytes in all). Raises Corrupt, UnsupportedModel or NeverFits."""
    if spec.dtype and spec.dtype not in formats.DTYPES:
        raise errors.UnsupportedModel(
            f"the native engine does not compute in {spec.dtype[:32]!r}",
            hint=f"one of {', '.join(formats.DTYPES)}, or none: what suits the model",
        )
    derived = _Derived(spec)
    if derived.usable and (found := derived.find(spec.dtype, note)):
        return found
    begun = time.perf_counter()
    checkpoint = Checkpoint(spec.files)
    decoder = describe(Config(checkpoint.config))
    architecture = architecture_of(decoder)
    decoder.expect(checkpoint)
    natural = natural_dtype(checkpoint.types())
    dtype = spec.dtype or natural
    recipe = Recipe(decoder, architecture, checkpoint, dtype)
    plan = _planned(recipe, architecture, dtype, natural, derived.sources)
    with contextlib.ExitStack() as stack:
        where, packed = "", None
        if derived.usable:
            try:
                packed, where = derived.write(stack, plan, recipe, progress), str(derived.folder)
            except OSError as problem:
                note(f"packed weights cannot be kept in {derived.folder}: {problem.strerror}")
        if packed is None:
            packed, where = _unkept(stack, plan, recipe, progress)
    took = time.perf_counter() - begun
    note(f"packed weights as {dtype}: {packed.nbytes / 1e6:.0f} MB in {took:.1f} s, {where}")
    return packed


def unpack(tensor: Tensor) -> Floats:
    """float32 [rows, cols], padding included."""
    data = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.address))
    if tensor.format == _PLAIN:
        values: Floats = data.view(np.float32).reshape(tensor.rows, tensor.cols).copy()
        return values
    return formats.unpack(tensor.format, data, tensor.rows, tensor.cols)


def _bytes_of(format_: str, rows: int, cols: int) -> int:
    return 4 * rows * cols if format_ == _PLAIN else rows * formats.row_bytes(format_, cols)


def _planned(
    recipe: Recipe, architecture: Architecture, dtype: str, natural: str, sources: dict[str, str]
) -> _Header:
    """The header but for its digests, which have their length already."""
    tensors: dict[str, _Place] = {}
    end = 0
    sizes = [(name, _PLAIN, *size) for name, size in architecture.arrays().items()]
    sizes += [(matrix.name, matrix.format, matrix.rows, matrix.cols) for matrix in recipe.matrices()]
    for name, format_, rows, cols in sizes:
        nbytes = _bytes_of(format_, rows, cols)
        tensors[name] = _Place(end, nbytes, format_, rows, cols)
        end = up_to(end + nbytes, _ALIGNED)
    pieces = ["0" * 64] * -(-end // _PIECE)
    return _Header(VERSION, dtype, natural, architecture, sources, end, tensors, pieces)


def _encoded(header: _Header) -> bytes:
    body = msgspec.json.encode(header)
    return _MAGIC + len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body


def _write_data(
    descriptor: int, start: int, plan: _Header, recipe: Recipe, progress: Progress | None
) -> None:
    """Raises OSError."""
    done = 0

    def put(offset: int, data: Bytes) -> None:
        nonlocal done
        view = data.data
        while view:
            written = os.pwrite(descriptor, view, start + offset)
            view, offset = view[written:], offset + written
        done += data.nbytes
        if progress:
            progress(done, plan.size)

    os.ftruncate(descriptor, start + plan.size)
    for name, values in recipe.arrays():
        put(plan.tensors[name].offset, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    ends = {name: place.offset for name, place in plan.tensors.items()}
    for name, made in _in_order(recipe):
        put(ends[name], made)
        ends[name] += made.nbytes


def _in_order(recipe: Recipe) -> Iterator[tuple[str, Bytes]]:
    """The slices of all matrices, made by several threads and only as far ahead as these are busy."""
    count = min(8, host.physical_cores())
    ahead: deque[tuple[str, Future[Bytes]]] = deque()
    with ThreadPoolExecutor(count) as threads:
        for matrix in recipe.matrices():
            for make in matrix.slices(recipe.checkpoint):
                ahead.append((matrix.name, threads.submit(make)))
                if len(ahead) > 2 * count:
                    name, future = ahead.popleft()
                    yield name, future.result()
        for name, future in ahead:
            yield name, future.result()


def _map(descriptor: int) -> mmap.mmap:
    mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
        with contextlib.suppress(OSError, AttributeError):  # not every system or file has them
            mapped.madvise(getattr(mmap, advice))
    return mapped


def _digests(mapped: mmap.mmap, start: int, size: int) -> list[str]:
    """SHA-256 of the pieces of the data. hashlib lets go of the GIL."""
    with memoryview(mapped) as whole, ThreadPoolExecutor(min(4, host.physical_cores())) as threads:

        def digest(begin: int) -> str:
            with whole[start + begin : start + min(begin + _PIECE, size)] as piece:
                return hashlib.sha256(piece).hexdigest()

        return list(threads.map(digest, range(0, size, _PIECE)))


def _unkept(
    stack: contextlib.ExitStack, plan: _Header, recipe: Recipe, progress: Progress | None
) -> tuple[Packed, str]:
    """In memory if there is room, else in a temporary file without a name. Raises NeverFits."""
    _, free = host.memory()
    in_memory = hasattr(os, "memfd_create") and plan.size < free
    try:
        if in_memory:
            descriptor = os.memfd_create("llmasos-weights")
        else:
            descriptor, path = tempfile.mkstemp()
            os.unlink(path)
        stack.callback(os.close, descriptor)
        _write_data(descriptor, 0, plan, recipe, progress)
    except OSError as problem:
        raise errors.NeverFits(
            f"no room for {plan.size / 1e6:.0f} MB of packed weights: {problem.strerror}",
            hint="free memory or disk space, or use a smaller dtype",
            needed=plan.size,
            free=free,
        ) from None
    return Packed(plan, _map(descriptor), 0), "in memory" if in_memory else "in a temporary file"


class _Unusable(Exception):
    """Why a derived file is not used."""


class _Derived:
    """The derived files of one model."""

    def __init__(self, spec: LoadSpec) -> None:
        self.folder = Path(spec.derived)
        self.sources = {name: file.digest for name, file in sorted(spec.files.items()) if _is_source(name)}
        digests = [spec.files[name].digest for name in self.sources if _is_weights(name)]
        # Digests become a file's name.
        self.usable = bool(spec.derived and digests) and all(map(_DIGEST.fullmatch, self.sources.values()))
        if self.usable:
            text = "\n".join(f"{name}\0{digest}" for name, digest in self.sources.items())
            short = hashlib.sha256(text.encode()).hexdigest()[:12]
            self._stem = f"{digests[0].removeprefix('sha256:')[:32]}-{short}"

    def _path(self, dtype: str) -> Path:
        return self.folder / f"{self._stem}-{dtype}-v{VERSION}.pack"

    def find(self, dtype: str, note: Note) -> Packed | None:
        """The file for `dtype`, of which "" is the one that suits the model."""
        for candidate in (dtype,) if dtype else formats.DTYPES:
            try:
                found = self._open(candidate, natural=not dtype)
            except FileNotFoundError:
                continue
            except (OSError, _Unusable) as problem:
                note(f"derived file {self._path(candidate).name} is not used ({problem}); packing anew")
                continue
            if found:
                return found
        return None

    def _open(self, dtype: str, natural: bool) -> Packed | None:
        """Raises OSError or _Unusable; None if only the dtype is not what suits the model."""
        with self._path(dtype).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            fixed = file.read(_FIXED)
            if len(fixed) < _FIXED or not fixed.startswith(_MAGIC):
                raise _Unusable("no packed weights")
            length = int.from_bytes(fixed[8:16], "little")
            body = file.read(length) if length <= min(size, _MOST_HEADER) else b""
            if hashlib.sha256(body).digest() != fixed[16:]:
                raise _Unusable("its header is damaged")
            try:
                header = msgspec.json.decode(body, type=_Header)
            except msgspec.DecodeError as problem:
                raise _Unusable(f"its header: {problem}") from None
            if natural and header.natural != dtype:
                return None
            start = up_to(_FIXED + length, _PAGE)
            self._check(header, dtype, size - start)
            mapped = _map(file.fileno())
        if _digests(mapped, start, header.size) != header.pieces:
            mapped.close()
            raise _Unusable("its data is damaged")
        return Packed(header, mapped, start)

    def _check(self, header: _Header, dtype: str, size: int) -> None:
        """Raises _Unusable unless the header is of these sources and describes `size` bytes of data."""
        if (header.version, header.dtype, header.sources) != (VERSION, dtype, self.sources):
            raise _Unusable("it was made from other files")
        if header.size != size or not header.architecture.consistent():
            raise _Unusable("it has another size than its header says")
        matrices, arrays = header.architecture.matrices(), header.architecture.arrays()
        if header.tensors.keys() != matrices.keys() | arrays.keys():
            raise _Unusable("it has other tensors than its model")
        for name, place in header.tensors.items():
            known = formats.DTYPES if name in matrices else (_PLAIN,)
            expected = matrices.get(name) or arrays[name]
            if (
                place.format not in known
                or (place.rows, place.cols) != expected
                or place.nbytes != _bytes_of(place.format, place.rows, place.cols)
                or place.offset % _ALIGNED
                or not 0 <= place.offset <= size - place.nbytes
            ):
                raise _Unusable(f"{name} does not lie where it should")

    def write(
        self, stack: contextlib.ExitStack, plan: _Header, recipe: Recipe, progress: Progress | None
    ) -> Packed:
        """Makes the file, all or nothing. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        start = up_to(len(_encoded(plan)), _PAGE)
        descriptor, temporary = tempfile.mkstemp(".tmp", f"{self._stem}-", self.folder)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells that it is not abandoned
            _write_data(descriptor, start, plan, recipe, progress)
            with _map(descriptor) as mapped:
                header = msgspec.structs.replace(plan, pieces=_digests(mapped, start, plan.size))
            os.pwrite(descriptor, _encoded(header), 0)
            os.fsync(descriptor)
            # What is read for a mapping with MADV_HUGEPAGE lies in huge pages (ext4 since Linux 6.16, others
            # before), what has been written does not.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(temporary, self._path(plan.dtype))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._forget_older(plan.dtype)
        try:
            packed = self._open(plan.dtype, natural=False)
        except _Unusable as problem:
            self._path(plan.dtype).unlink()
            raise OSError(errno.EIO, f"what was written came back otherwise: {problem}") from None
        assert packed is not None
        return packed

    def _sweep(self) -> None:
        """Deletes files that a killed worker began."""
        for path in self.folder.glob("*.tmp"):
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _forget_older(self, dtype: str) -> None:
        kept = self._path(dtype)
        for path in self.folder.glob(f"{self._stem}-{dtype}-v*.pack"):
            if path != kept:
                with contextlib.suppress(OSError):
                    path.unlink()


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def _is_source(name: str) -> bool:
    return name in ("config.json", "tensors.json") or _is_weights(name)
