"""The built wheel holds every module of the tree, the native engine and the two commands."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from llmasos.drivers.native import build

ROOT = Path(__file__).parent.parent
FOLDERS = ("syscalls", "drivers", "kernel", "userland")


def build_wheel(folder: Path, compiler: str) -> Path:
    """Builds a wheel from a copy of the tree, with what PATH and $CXX have of compilers."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "__init__.py", "py.typed"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    (folder / "bin").mkdir()
    environment = {**os.environ, "PATH": str(folder / "bin"), "CXX": compiler}
    subprocess.run(command, check=True, timeout=300, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("llmasos/")}
        metadata = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        commands = archive.read(metadata).decode()
    tree = {
        f"llmasos/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".h", ".cpp", ".html", ".css", ".js", ".svg")
        and "__pycache__" not in path.parts
    }
    assert packed == tree | {"llmasos/__init__.py", "llmasos/py.typed"}
    assert "llmasosd = llmasos.kernel.main:main" in commands
    assert "llsh = llmasos.userland.llsh.main:main" in commands


@pytest.mark.skipif(not build.find_compiler() or not build.variants(), reason="no engine is compiled here")
def test_the_wheel_holds_the_engines_that_the_compiler_makes(tmp_path: Path) -> None:
    """The compiler knows only the portable variant, and works in a hurry."""
    [compiler, *arguments] = build.find_compiler()
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\nPATH={os.environ["PATH"]}\ncase "$*" in *engine-portable*) ;; *) exit 1;; esac\n'
        f'exec {compiler} {" ".join(arguments)} "$@" -O0\n'
    )
    script.chmod(0o755)
    wheel = build_wheel(tmp_path, str(script))
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    name = build.file_name(build.variants()[-1])
    with zipfile.ZipFile(wheel) as archive:
        engines = [name for name in archive.namelist() if name.endswith(".so")]
        assert engines == [f"llmasos/drivers/native/lib/{name}"]
        archive.extract(engines[0], tmp_path)
        [about] = [name for name in archive.namelist() if name.endswith("/WHEEL")]
        assert b"Root-Is-Purelib: false" in archive.read(about)
    assert build.is_sealed(tmp_path / engines[0])
