"""`import llmasos`: light, and everything it names is there."""

from __future__ import annotations

import subprocess
import sys

import llmasos
import pytest


def test_the_names_are_sorted_and_exist() -> None:
    public = [name for name in llmasos.__all__ if not name.startswith("_")]
    assert public == sorted(public, key=lambda name: (not name[0].isupper(), not name.isupper(), name))
    for name in llmasos.__all__:
        assert getattr(llmasos, name) is getattr(llmasos, name)
        assert name in dir(llmasos)
    assert llmasos.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="nothing_such"):
        llmasos.nothing_such  # noqa: B018


def imported(code: str) -> tuple[set[str], int]:
    """Modules that running `code` imports, and the microseconds `import llmasos` takes."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    rows = [line.split("|") for line in run.stderr.splitlines() if line.count("|") == 2]
    took = {row[2].strip(): int(row[1]) for row in rows if row[1].strip().isdigit()}
    return set(took), took["llmasos"]


def test_importing_it_is_cheap() -> None:
    modules, microseconds = imported("import llmasos")
    roots = {name.partition(".")[0] for name in modules}
    assert roots.isdisjoint({"torch", "transformers", "numpy", "zmq", "tokenizers", "jinja2", "rich"})
    assert microseconds < 150_000


def test_using_it_needs_no_torch() -> None:
    modules, _ = imported("import llmasos; llmasos.LLM, llmasos.AsyncClient, llmasos.Agent, llmasos.errors")
    assert {name.partition(".")[0] for name in modules}.isdisjoint({"torch", "transformers"})
