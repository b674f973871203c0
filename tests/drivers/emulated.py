"""A pytest plugin that runs the tests of the native driver where there is no torch: under an emulator.

With $LLMASOS_RECORD a folder, beside conftest.py: writes there the tiny models that the tests use and every
answer of transformers that they ask for. With $LLMASOS_REPLAY that folder, $LLMASOS_ENGINE a compiled engine
and --noconftest: the same tests with these answers, computed by that engine.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

RECORD, REPLAY = os.environ.get("LLMASOS_RECORD", ""), os.environ.get("LLMASOS_REPLAY", "")


def helpers() -> Any:
    """conftest.py of this folder, without torch."""
    ours = [f"llmasos.drivers.torch{name}" for name in ("", ".executor", ".group")]
    for name in ("torch", "transformers", *ours):
        sys.modules.setdefault(name, MagicMock())
    sys.path.insert(0, str(Path(__file__).parent))
    return importlib.import_module("conftest")


def use_engine(path: Path) -> Any:
    """Makes every driver of this process compute with the engine at `path`."""
    library = importlib.import_module("llmasos.drivers.native.library")
    engine = library._open(path.name, path, "under test")
    library.load = lambda variant="": engine
    return engine


def key_of(folder: Path, tokens: list[int], count: int) -> str:
    # Tests ask for different numbers of the same tokens.
    config = (folder / "config.json").read_bytes()
    return hashlib.sha256(config + repr((tokens, count)).encode()).hexdigest()[:24]


class Recorded:
    """Stands for conftest's Tiny."""

    def __init__(self, folder: Path, answers: dict[str, list[int]]) -> None:
        self.folder, self._answers = folder, answers

    @property
    def files(self) -> Any:
        return helpers().files_of(self.folder)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Fails if the question was never asked: then something was computed differently before."""
        return self._answers[key_of(self.folder, tokens, count)]


if RECORD:
    _answers: dict[str, list[int]] = {}
    _folders: set[Path] = set()

    def pytest_plugin_registered(plugin: Any) -> None:
        if not hasattr(plugin, "Tiny"):
            return
        greedy, files = plugin.Tiny.greedy, plugin.Tiny.files.fget

        def recording(self: Any, tokens: list[int], count: int) -> list[int]:
            made: list[int] = greedy(self, tokens, count)
            _answers[key_of(self.folder, tokens, count)] = made
            return made

        def noting(self: Any) -> Any:
            _folders.add(self.folder)
            return files(self)

        plugin.Tiny.greedy, plugin.Tiny.files = recording, property(noting)

    def pytest_sessionfinish() -> None:
        for folder in _folders:
            shutil.copytree(folder, Path(RECORD) / folder.name[:-1], dirs_exist_ok=True)
        (Path(RECORD) / "answers.json").write_text(json.dumps(_answers))


if REPLAY:
    use_engine(Path(os.environ["LLMASOS_ENGINE"]))
    _conftest = helpers()

    @pytest.fixture(scope="session")
    def tiny() -> Callable[[str], Any]:
        answers = json.loads((Path(REPLAY) / "answers.json").read_text())
        return lambda name: Recorded(Path(REPLAY) / name, answers)

    @pytest.fixture
    def kernel_of(tiny: Callable[[str], Any]) -> Iterator[Callable[..., Any]]:
        drivers: list[Any] = []

        def make(name: str, dtype: str = "float32", device: str = "native", kv_dtype: str = "") -> Any:
            assert device == "native"
            drivers.append(_conftest.NativeDriver(lambda *_: None))
            return _conftest.start(drivers[-1], tiny(name).files, dtype, kv_dtype)

        yield make
        for driver in drivers:
            driver.close()

    @pytest.fixture
    def subject(tiny: Callable[[str], Any]) -> Iterator[Any]:
        driver = _conftest.NativeDriver(lambda *_: None)
        model = tiny("llama")
        yield _conftest.Subject(_conftest.start(driver, model.files), model.greedy)
        driver.close()
