"""The compiled engine in this process: finding or compiling the variant that fits, and its C types.

Prebuilt variants lie beside this file in a wheel; elsewhere the best one is compiled once, in seconds, into
the user's cache folder. The types mirror engine/engine.h, which documents them.
"""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint8, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import build

ABI = 6
MOST_RANKS = 768
"""Of the adapters of matrices that are packed as one."""
PREBUILT = Path(__file__).parent / "lib"

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
KV_FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}
NORMS = {"rms": 0, "layer": 1}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int32),
        ("cols", c_int32),
        ("format", c_int32),
        ("fine", c_int32),
        ("unit", c_void_p),
    ]


class Lora(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("a", "b", "place", "first", "scale")),
        ("ranks", c_int32),
        ("format", c_int32),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "out", "up", "down")),
        ("scale", c_float),
        ("window", c_int32),
        ("rotated", c_int32),
        ("reserved", c_int32),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                "layers",
                "hidden",
                "hidden_padded",
                "heads",
                "kv_heads",
                "head_dim",
                "head_size",
                "inner",
                "vocab",
                "norm",
                "activation",
                "gated",
                "kv_format",
                "rotary",
            )
        ),
        ("epsilon", c_float),
        ("rope_scale", c_float),
        ("frequencies", c_void_p),
        ("positions", c_void_p),
        ("final_norm", c_void_p),
        ("final_norm_bias", c_void_p),
        ("head", Matrix),
        ("embedding", Matrix),
        ("layer", POINTER(Layer)),
        ("kv", c_void_p),
    ]


class Run(ctypes.Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("blocks", c_void_p),
        ("adapter", c_void_p),
        ("start", c_int32),
        ("count", c_int32),
        ("wanted", c_int32),
        ("kept", c_int32),
    ]


class Pick(ctypes.Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("stops", c_void_p),
        ("seed", c_int64),
        ("noise", c_double),
        *(
            (name, c_int32)
            for name in (
                "known",
                "prompt_length",
                "position",
                "stop_count",
                "forbid_stops",
                "top_k",
                "ngram",
                "top",
                "beams",
            )
        ),
        *(
            (name, c_float)
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition",
                "presence",
                "frequency",
                "logprob",
            )
        ),
        ("token", c_int32),
        ("ids", POINTER(c_int32)),
        ("values", POINTER(c_float)),
        ("listed", c_int32),
        ("reserved", c_int32),
        ("mask", c_void_p),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("runs", POINTER(Run)),
        ("run_count", c_int32),
        ("rows", c_int32),
        ("picks", POINTER(Pick)),
        ("pick_count", c_int32),
        ("max_picks", c_int32),
        ("workspace", c_void_p),
        ("max_rows", c_int32),
        ("layer", c_int32),
        ("finite", POINTER(c_uint8)),
        ("watch", c_int32),
        ("reserved", c_int32),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llk_abi": (c_int32, []),
    "llk_usable": (c_int32, []),
    "llk_units": (c_int32, [POINTER(Matrix), c_void_p]),
    "llk_isa": (c_char_p, []),
    "llk_tile_bytes": (c_int64, [POINTER(Model)]),
    "llk_workspace_bytes": (c_int64, [c_void_p, POINTER(Model), c_int32, c_int32]),
    "llk_pool_new": (c_void_p, [c_int32, POINTER(c_int32)]),
    "llk_pool_free": (None, [c_void_p]),
    "llk_run_step": (c_int32, [c_void_p, POINTER(Model), POINTER(Step)]),
    "llk_logits": (c_int32, [c_void_p, POINTER(Model), POINTER(Step), POINTER(c_int32), c_int32, c_void_p]),
    "llk_score": (c_int32, [c_void_p, POINTER(Model), c_void_p, POINTER(Pick), c_int32]),
    "llk_choose": (c_int32, [c_void_p, POINTER(Model), c_void_p, POINTER(Pick), c_int32]),
    "llk_matmul": (c_int32, [c_void_p, POINTER(Matrix), c_void_p, c_int32, c_void_p]),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded library. `functions` has the calls of engine.h by name; they release the GIL."""

    variant: str
    functions: Any
    origin: str


class NoEngine(Exception):
    """The native engine cannot run here; the text says why, for people."""


def load(variant: str = "") -> Engine:
    """The best variant that this processor runs and that can be had, or the one named. Raises NoEngine."""
    words = build.processor_words()
    fitting = [v for v in build.variants() if v.needs <= words and variant in ("", v.name)]
    if not fitting:
        raise NoEngine(f"no variant {variant} for this {os.uname().machine} processor".replace("  ", " "))
    compiler = build.find_compiler()
    problems: list[str] = []
    for candidate in fitting:
        prebuilt = PREBUILT / build.file_name(candidate)
        engine = None
        try:
            if build.is_sealed(prebuilt):
                engine = _open(candidate.name, prebuilt, "prebuilt")
        except NoEngine as problem:
            problems.append(str(problem))
        try:
            engine = engine or _compiled(candidate, compiler)
        except build.TookTooLong as problem:
            compiler = []
            problems.append(str(problem))
        except (build.CompileError, NoEngine) as problem:
            problems.append(str(problem))
        if engine and engine.functions.llk_usable():
            return engine
        if engine:
            problems.append(f"the operating system keeps what {candidate.name} needs from this process")
    raise NoEngine(problems[0])


def _compiled(variant: build.Variant, compiler: list[str]) -> Engine:
    """The variant from the cache, compiled if it is not there; where the cache is of no use, compiled for
    this process alone. Raises NoEngine or CompileError."""
    try:
        return _compiled_in(_private(cache_folder()), variant, compiler, "compiled here")
    except (OSError, RuntimeError, NoEngine) as problem:  # RuntimeError: the user has no home
        why = str(problem)
    try:
        # What is mapped outlives its file.
        with tempfile.TemporaryDirectory(prefix="llmasos-") as folder:
            return _compiled_in(Path(folder), variant, compiler, f"compiled here, not kept: {why}")
    except OSError as problem:
        raise NoEngine(f"there is no place to compile the engine: {problem}") from None


def _compiled_in(folder: Path, variant: build.Variant, compiler: list[str], origin: str) -> Engine:
    """Raises OSError, NoEngine or CompileError."""
    target = folder / build.file_name(variant)
    if not build.is_sealed(target):
        if not compiler:
            raise build.CompileError("no prebuilt engine and no C++ compiler (g++ or clang++)")
        build.compile_engine(variant, compiler, target)
    try:
        return _open(variant.name, target, origin)
    except NoEngine:
        target.unlink(missing_ok=True)  # the next start shall not find it
        raise


def _private(folder: Path) -> Path:
    """`folder`, made if need be. Raises PermissionError if others could put code there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{folder} can be written by others")
    return folder


def cache_folder() -> Path:
    """Where compiled engines are kept. Raises RuntimeError if there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmasos"


def _open(name: str, path: Path, origin: str) -> Engine:
    try:
        functions = ctypes.CDLL(str(path))
        for symbol, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, symbol)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as problem:
        raise NoEngine(f"{path} cannot be loaded: {problem}") from None
    if functions.llk_abi() != ABI:
        raise NoEngine(f"{path} has interface {functions.llk_abi()}, {ABI} is needed")
    return Engine(name, functions, origin)
