"""Compiles the engine: which variants there are, for which processors, with which flags.

Standard library only: setup.py uses it to put prebuilt variants into a wheel, `library.py` to compile the one
that fits this machine where no prebuilt one is.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "engine"

_SEAL = b"llmasos\n"
_MOST_SECONDS = 300

# Contraction is off because a product that is fused in one place and not in another would let the result of a
# row depend on the batch. The standard library is linked in so that the file runs on any Linux of its kind.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-pthread",
    "-static-libgcc",
    "-static-libstdc++",
]


@dataclass(frozen=True, slots=True)
class Variant:
    """The engine for processors that have `needs` (words of /proc/cpuinfo)."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...] = ()


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
_AVX512_WORDS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c"})
_AVX512_BF16 = (*(f"-m{word}" for word in _AVX512), "-mavx512bf16", "-mfma", "-mf16c")

# Best first; the last runs everywhere.
VARIANTS = {
    "x86_64": [
        Variant(
            "avx512-amx",
            _AVX512_WORDS | {"avx512_bf16", "amx_tile", "amx_int8"},
            (*_AVX512_BF16, "-mamx-tile", "-mamx-int8"),
        ),
        Variant("avx512-bf16", _AVX512_WORDS | {"avx512_bf16"}, _AVX512_BF16),
        Variant("avx512", _AVX512_WORDS, (*(f"-m{word}" for word in _AVX512), "-mfma", "-mf16c")),
        Variant(
            "avx2-vnni",
            frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
            ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
        ),
        Variant("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")),
        Variant("portable", frozenset()),
    ],
    "aarch64": [
        Variant("neon-i8mm", frozenset({"asimddp", "atomics", "i8mm"}), ("-march=armv8.2-a+dotprod+i8mm",)),
        Variant("neon", frozenset({"asimddp", "atomics"}), ("-march=armv8.2-a+dotprod",)),
        Variant("portable", frozenset()),
    ],
}


def variants(machine: str = "") -> list[Variant]:
    """The variants for `machine` (platform.machine() of this one if empty), best first."""
    machine = machine or platform.machine()
    return VARIANTS.get({"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine), [])


def processor_words() -> set[str]:
    """The features that the kernel lists for this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(words.split())
    return set()


def find_compiler() -> list[str]:
    """The command of a C++ compiler, [] if there is none. $CXX, which may have arguments, goes first."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        wanted = []
    for command in (wanted, ["g++"], ["clang++"], ["c++"]):
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    return []


def fingerprint(machine: str = "") -> str:
    """Changes with the sources, the flags and the machine."""
    digest = hashlib.sha256(repr((FLAGS, [(v.name, v.flags) for v in variants(machine)])).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def file_name(variant: Variant, machine: str = "") -> str:
    """What `variant`, compiled from these sources for `machine`, is called."""
    return f"engine-{variant.name}-{fingerprint(machine)}.so"


class CompileError(Exception):
    """The compiler did not do it; the text says why, for people."""


class TookTooLong(CompileError):
    """The compiler will hardly do any other variant either."""


def compile_engine(variant: Variant, compiler: list[str], target: Path) -> None:
    """Writes the sealed shared library of `variant` to `target`, all or nothing.

    Raises CompileError, or OSError when the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS, *variant.flags, "-o", str(made), str(SOURCES / "engine.cpp")]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_MOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise TookTooLong(f"{compiler[0]} takes more than {_MOST_SECONDS} s") from None
        except OSError as problem:
            raise CompileError(f"{compiler[0]} cannot be run: {problem.strerror}") from None
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            told = next((line for line in lines if "error" in line), lines[0] if lines else "")
            text = "".join(c if c.isprintable() else "?" for c in told[:200])
            raise CompileError(
                f"{compiler[0]} cannot compile the engine: {text or f'it ends with {done.returncode}'}"
            )
        _seal(made)
        made.replace(target)


# To map a file that was cut short kills the process (SIGBUS), so a compiled engine ends with a digest of what
# comes before. The loader does not read behind the sections that the file's header names.


def _seal(path: Path) -> None:
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(_SEAL + digest)
        file.flush()
        os.fsync(file.fileno())


def is_sealed(path: Path) -> bool:
    """Whether `path` is there and every byte is as it was compiled."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    size = len(data) - len(_SEAL) - hashlib.sha256().digest_size
    return size > 0 and data[size:] == _SEAL + hashlib.sha256(data[:size]).digest()
