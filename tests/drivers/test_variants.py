"""Every variant of the engine that this machine runs, ARM's under qemu; how one is found and compiled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmasos.drivers.native import build, library

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ARM_ROOT = Path(os.environ.get("LLMASOS_ARM_ROOT") or Path.home() / ".cache" / "llmasos-arm")

# How far logits may be from the portable engine's, relative to the largest. Where activations are rounded,
# one that lies between two values goes either way.
APART = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2, "int4": 3e-2}
# For int4 AMX rounds activations to 12 bits. To 8, as all others do, is up to a sixth away from the exact
# result on these models. engine_check.py holds AMX against the exact products.
APART_IN_UNITS = 0.15

# Of test_conformance.py and test_native.py, what needs no torch but for its answers.
NATIVE = "test_native and (bit or shared_prefix or guesses_change or call_of or broken_row)"

VARIANTS = [v.name for v in build.variants("x86_64")] + [f"arm-{v.name}" for v in build.variants("aarch64")]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models, and transformers' answers."""
    folder = tmp_path_factory.mktemp("recorded")
    printed = run_pytest(
        [sys.executable],
        {"LLMASOS_RECORD": str(folder), "PYTHONPATH": str(HERE)},
        f"(test_conformance and native) or ({NATIVE})",
    )
    (folder / "passed").write_text(passed(printed))
    return folder


def passed(printed: str) -> str:
    found = re.search(r"\d+ passed", printed)
    return found.group() if found else "nothing passed"


def run_pytest(python: list[str], variables: dict[str, str], selected: str, *options: str) -> str:
    files = [str(HERE / "test_conformance.py"), str(HERE / "test_native.py")]
    options = ("-q", "-p", "emulated", "-p", "no:cacheprovider", "-k", selected, *options)
    return run([*python, "-m", "pytest", *options, *files], variables)


def run(command: list[str], variables: dict[str, str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=ROOT, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


class Place:
    """Where a variant runs: the engine's file, and the command of a Python that loads it. That one keeps
    what it compiles in `compiled`: under an emulator it takes seconds of each start."""

    def __init__(self, engine: Path, python: list[str], paths: list[Path], compiled: Path) -> None:
        self.engine, self.python = engine, python
        self.variables = {
            "PYTHONPATH": os.pathsep.join(map(str, [*paths, HERE])),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(compiled),
        }

    def check(self, recorded: Path) -> dict[str, Any]:
        command = [*self.python, str(HERE / "engine_check.py"), str(self.engine), str(recorded)]
        found: dict[str, Any] = json.loads(run(command, self.variables))
        return found

    def conform(self, recorded: Path) -> str:
        variables = {"LLMASOS_REPLAY": str(recorded), "LLMASOS_ENGINE": str(self.engine), **self.variables}
        return run_pytest(self.python, variables, f"test_conformance or ({NATIVE})", "--noconftest")


def here(name: str, compiled: Path) -> Place:
    [variant] = [v for v in build.variants() if v.name == name] or [None]
    if not variant or not variant.needs <= build.processor_words():
        pytest.skip(f"this processor does not run {name}")
    assert library.load(name).variant == name  # compiles it
    return Place(library.cache_folder() / build.file_name(variant), [sys.executable], [], compiled)


def emulated(name: str, links: Path, compiled: Path) -> Place:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    python = ARM_ROOT / "usr" / "bin" / "python3.11"
    if not compiler or not emulator or not python.exists():
        pytest.skip("needs g++-aarch64-linux-gnu, qemu-user and the folder that tests/drivers/arm.sh makes")
    [variant] = [v for v in build.variants("aarch64") if v.name == name]
    folder = ARM_ROOT / "engines"
    folder.mkdir(exist_ok=True)
    engine = folder / build.file_name(variant, "aarch64")
    if not build.is_sealed(engine):
        build.compile_engine(variant, [compiler], engine)
    if not (links / "llmasos").exists():
        (links / "llmasos").symlink_to(ROOT)
    command = [emulator, "-cpu", "max", "-L", str(ARM_ROOT), str(python)]
    return Place(engine, command, [ARM_ROOT / "site", links], compiled)


@pytest.fixture(scope="module")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    links, compiled = tmp_path_factory.mktemp("links"), tmp_path_factory.mktemp("compiled")

    def place(name: str) -> Place:
        if name.startswith("arm-"):
            return emulated(name.removeprefix("arm-"), links, compiled)
        return here(name, compiled)

    return place


@pytest.fixture(scope="module")
def reference(recorded: Path, place_of: Callable[[str], Place]) -> dict[str, Any]:
    return place_of("portable").check(recorded)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_what_the_portable_one_does(
    name: str, place_of: Callable[[str], Place], recorded: Path, reference: dict[str, Any]
) -> None:
    found = place_of(name).check(recorded)
    assert found["cases"] == reference["cases"]
    assert found["isa"] == name.removeprefix("arm-")
    assert found["in_units"] == (84 if name == "avx512-amx" else 0)
    for case, numbers in reference["numbers"].items():
        words = case.split()
        allowed = APART[words[1]] if words[0] in ("llama", "gpt2", "qwen3", "mistral") else 1e-6
        if allowed == APART["int4"] and found["in_units"]:
            allowed = APART_IN_UNITS
        apart = np.abs(np.subtract(found["numbers"][case], numbers)).max() / np.abs(numbers).max()
        assert apart <= allowed, (case, apart)
    for case, digest in reference["digests"].items():
        # Which scale of int4 has the least error is decided by sums, whose order is numpy's.
        if not (case.startswith("weights") and "int4" in case and name.startswith("arm-")):
            assert found["digests"][case] == digest, case


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_passes_the_drivers_tests(
    name: str, place_of: Callable[[str], Place], recorded: Path
) -> None:
    assert passed(place_of(name).conform(recorded)) == (recorded / "passed").read_text()


# Finding and compiling


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "prebuilt")
    return tmp_path / "cache" / "llmasos"


@pytest.fixture(scope="module")
def portable(place_of: Callable[[str], Place]) -> Path:
    return place_of("portable").engine


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: Path) -> Callable[[str], Path]:
    """Makes $CXX a shell script, in which $out is the file to write and $engine a compiled one. Each call
    leaves a line in the file that is returned."""
    calls = tmp_path / "calls"
    calls.touch()

    def make(body: str) -> Path:
        script = tmp_path / "compiler"
        head = f'#!/bin/sh\necho "$*" >>{calls}\nengine={portable}\n'
        find = 'while [ "$1" != -o ]; do shift; done\nout=$2\n'
        script.write_text(head + find + body + "\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return calls

    return make


def test_an_engine_is_compiled_once(cache: Path, compiler: Callable[[str], Path]) -> None:
    calls = compiler('cp "$engine" "$out"')
    for _ in range(2):
        assert library.load("portable").origin == "compiled here"
    assert len(calls.read_text().splitlines()) == 1
    assert [path.name for path in cache.iterdir()] == [build.file_name(build.variants()[-1])]


@pytest.mark.parametrize("damage", ["empty", "half", "a byte short", "a byte changed", "a folder"])
def test_a_damaged_engine_is_never_mapped(
    damage: str, cache: Path, compiler: Callable[[str], Path], portable: Path
) -> None:
    compiler('cp "$engine" "$out"')
    data = portable.read_bytes()
    damaged = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "a byte short": data[:-1],
        "a byte changed": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    }
    path = cache / build.file_name(build.variants()[-1])
    cache.mkdir(parents=True)
    if damage == "a folder":
        path.mkdir()
        assert "not kept" in library.load("portable").origin
        return
    path.write_bytes(damaged[damage])
    assert library.load("portable").origin == "compiled here"
    assert build.is_sealed(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo note: no >&2; printf 'x.cpp:1: error: \\033[31mbad\\377\\n' >&2; exit 1",
            "error: ?[31mbad\ufffd",
        ),
        ("exit 3", "ends with 3"),
        ("exit 0", "ends with 0"),
        ("kill -9 $$", "ends with -9"),
        ("mkdir $out", "ends with 0"),
        ("echo not a library >$out", "cannot be loaded"),
        ("cp /bin/true $out", "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_gives_a_reason_and_leaves_nothing(
    body: str, message: str, cache: Path, compiler: Callable[[str], Path]
) -> None:
    compiler(body)
    with pytest.raises(library.NoEngine) as caught:
        library.load()
    assert message in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_compiler_that_does_not_end_is_asked_once(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_MOST_SECONDS", 0.3)
    calls = compiler("exec sleep 30")
    with pytest.raises(library.NoEngine, match=r"more than 0\.3 s"):
        library.load()
    assert len(calls.read_text().splitlines()) == 1


def test_the_next_best_variant_is_taken_where_the_compiler_is_old(
    cache: Path, compiler: Callable[[str], Path]
) -> None:
    compiler(
        'case "$out" in *portable*) cp "$engine" "$out";; *) echo "error: unknown -m" >&2; exit 1;; esac'
    )
    assert library.load().variant == "portable"


def test_the_next_best_variant_is_taken_where_the_system_keeps_registers(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler('cp "$engine" "$out"')
    opened = library._open

    def refusing(name: str, path: Path, origin: str) -> library.Engine:
        engine = opened(name, path, origin)
        if name != "portable":
            engine.functions.llk_usable = lambda: 0
        return engine

    monkeypatch.setattr(library, "_open", refusing)
    for _ in range(2):
        assert library.load().variant == "portable"
    # What cannot be used is not compiled again.
    assert len(calls.read_text().splitlines()) == len(
        [v for v in build.variants() if v.needs <= build.processor_words()]
    )


@pytest.mark.parametrize("wanted", ["nowhere/c++", "c++ 'unbalanced", "nowhere; touch pwned", "/", "  "])
def test_what_is_no_compiler_is_passed_over(
    wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", wanted)
    found = build.find_compiler()
    assert not found or Path(found[0]).name in ("g++", "clang++", "c++")
    assert not (tmp_path / "pwned").exists()


def test_a_compiler_may_have_arguments(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("exit 1")
    script = os.environ["CXX"]
    monkeypatch.setenv("CXX", f"{script} --sysroot '/a b'")
    assert build.find_compiler() == [script, "--sysroot", "/a b"]


def test_where_nothing_can_be_kept_the_engine_runs_all_the_same(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler('cp "$engine" "$out"')
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert "written by others" in library.load("portable").origin
    assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "not kept" in library.load("portable").origin

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert "no home" in library.load("portable").origin


def test_a_prebuilt_engine_of_these_sources_goes_first(
    cache: Path, compiler: Callable[[str], Path], portable: Path
) -> None:
    calls = compiler('cp "$engine" "$out"')
    library.PREBUILT.mkdir()
    name = build.file_name(build.variants()[-1])
    shutil.copy(portable, library.PREBUILT / name)
    assert library.load("portable").origin == "prebuilt"
    assert not calls.read_text()
    (library.PREBUILT / name).rename(library.PREBUILT / "engine-portable-0123456789abcdef.so")
    assert library.load("portable").origin == "compiled here"


def test_without_a_compiler_a_lesser_prebuilt_engine_does(
    cache: Path, monkeypatch: pytest.MonkeyPatch, portable: Path
) -> None:
    monkeypatch.setattr(build, "find_compiler", list)
    with pytest.raises(library.NoEngine, match="no C\\+\\+ compiler"):
        library.load()
    library.PREBUILT.mkdir()
    shutil.copy(portable, library.PREBUILT / build.file_name(build.variants()[-1]))
    engine = library.load()
    assert (engine.variant, engine.origin) == ("portable", "prebuilt")
