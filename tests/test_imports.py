"""Who may import whom (design.md section 3), and what never appears anywhere."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("syscalls", "drivers", "kernel", "userland")
ALLOWED = {
    "syscalls": (),
    "drivers": ("llmasos.syscalls",),
    "kernel": ("llmasos.syscalls", "llmasos.drivers.base"),
    "userland": ("llmasos.syscalls",),
}
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, relative level) of every import of a file, type checking ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module or ''}.{alias.name}", node.level) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_the_table(path: Path) -> None:
    where = path.relative_to(ROOT)
    folder = where.parts[0]
    for module, level in imports(path):
        if level:
            assert level < len(where.parts), f"{where} reaches out of its folder"
        elif module.split(".")[0] == "llmasos":
            inside = module.startswith(f"llmasos.{folder}")
            assert not inside, f"{where}: inside a folder imports are relative, not {module}"
            assert module.startswith(ALLOWED[folder] or ("nothing",)), f"{where}: {module}"
        top = module.split(".")[0]
        assert top not in FORBIDDEN, f"{where} imports {top}"
        if top in ("torch", "transformers"):
            inside = where.parts[:2] in (("drivers", "torch"), ("drivers", "trainer"))
            chooses = level and str(where) in ("drivers/worker.py", "drivers/cpu.py")
            assert inside or chooses, f"{where} imports {module}"
        if top not in sys.stdlib_module_names and folder == "syscalls" and not level:
            assert top in ("msgspec", "msgpack"), f"{where} imports {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_evaluates_text(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            assert name not in ("eval", "exec", "__import__"), f"{path}:{node.lineno}"
            assert attribute not in ("recv_pyobj", "send_pyobj"), f"{path}:{node.lineno}"
            if attribute == "load" and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                assert not (isinstance(owner, ast.Name) and owner.id == "torch"), f"{path}:{node.lineno}"


def test_no_file_is_called_after_nothing() -> None:
    vague = {"utils", "util", "common", "core", "manager", "helpers", "misc"}
    assert not [path for path in FILES if path.stem in vague]
