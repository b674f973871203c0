"""Compiles the engine: which variants there are, for which processors, with which flags.

Standard library only: setup.py uses it to put prebuilt variants into a wheel, `library.py` to compile the one
that fits this machine where no prebuilt one is.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "engine"

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

# Best first; the last runs everywhere.
VARIANTS = {
    "x86_64": [
        Variant(
            "avx512-bf16",
            _AVX512_WORDS | {"avx512_bf16"},
            (*(f"-m{word}" for word in _AVX512), "-mavx512bf16", "-mfma", "-mf16c"),
        ),
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
        Variant("neon-i8mm", frozenset({"asimddp", "i8mm"}), ("-march=armv8.2-a+dotprod+fp16+i8mm",)),
        Variant("neon", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod+fp16",)),
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


def find_compiler() -> str:
    """A C++ compiler, "" if there is none. $CXX is honoured."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return ""


def fingerprint() -> str:
    """Changes with the sources and the flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_engine(variant: Variant, compiler: str, target: Path) -> None:
    """Writes the shared library of `variant` to `target`, all or nothing.

    Raises OSError or subprocess.SubprocessError.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, *variant.flags, "-o", str(made), str(SOURCES / "engine.cpp")]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        made.replace(target)
