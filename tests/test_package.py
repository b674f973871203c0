"""The built wheel holds every module of the tree, and gives the two commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("syscalls", "drivers", "kernel", "userland")


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py", "py.typed"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("llmasos/")}
        metadata = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        commands = archive.read(metadata).decode()
    tree = {
        f"llmasos/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".h", ".cpp") and "__pycache__" not in path.parts
    }
    assert packed == tree | {"llmasos/__init__.py", "llmasos/py.typed"}
    assert "llmasosd = llmasos.kernel.main:main" in commands
    assert "llsh = llmasos.userland.llsh.main:main" in commands
