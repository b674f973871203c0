"""What training processes have in work, each a folder of its own:

    <folder>/<pid>/run.json       whose it is and which model is trained: Run
    <folder>/<pid>/dataset/<name>     the data set as it was when the run began: another name of the same file
    <folder>/<pid>/data/          that, as tokens (userland/dataset.py)
    <folder>/<pid>/checkpoints/, metrics.jsonl, result/     the trainer's (drivers/trainer/)
    <folder>/<pid>/lineage.json   written when the trainer is done; the importer (`run:<folder>`) wants it

A run keeps its base's blobs: `gc` asks for `bases`. Only the kernel makes and removes folders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from llmasos.syscalls import training
from llmasos.syscalls.errors import Corrupt, NoSuchFile, StorageFailed
from msgspec import Struct

from ..shares import is_below
from .durable import sync_folder, write_file
from .manifest import MAX_MANIFEST, Lineage, Manifest

METRICS = "metrics.jsonl"
DATA = "data"
HEAD = "head.json"
RESULT = "result"
_DATASET = "dataset"
_RUN = "run.json"
_LINEAGE = "lineage.json"


_T = TypeVar("_T")


class Run(Struct, frozen=True):
    """Who trains, and the model that is trained (with its name)."""

    owner: str
    base: Manifest


class RunRow(Struct, frozen=True):
    """What a process trains. `id` is its alone for ever, `digest` the data set's, `target` the name of what
    it makes; `result` and `problem` tell how it ended."""

    id: str
    dataset: str
    digest: str
    target: str
    recipe: training.Recipe
    result: training.TrainResult | None
    problem: dict[str, Any] | None


class Runs:
    """The runs below one folder, which is made (0700) if it is missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def folder(self, pid: int) -> Path:
        return self._folder / str(pid)

    def make(self, pid: int, owner: str, base: Manifest, dataset: Path, name: str) -> Path:
        """The folder of a new run, durable: `base` is trained on the file `dataset`, called `name`. Raises
        StorageFailed."""
        folder = self.folder(pid)
        self.remove(pid)
        try:
            (folder / _DATASET).mkdir(mode=0o700, parents=True)
            os.link(dataset, folder / _DATASET / name)
            sync_folder(folder / _DATASET)
            write_file(folder / _RUN, msgspec.json.encode(Run(owner, base)))
            sync_folder(folder)
            sync_folder(self._folder)
        except OSError as problem:
            self.remove(pid)
            raise StorageFailed(f"run {pid}: {problem.strerror}", hint="see `llsh df`") from None
        return folder

    def dataset(self, pid: int) -> Path:
        """The data set of a run. Raises NoSuchFile."""
        with suppress(OSError, StopIteration):
            return next((self.folder(pid) / _DATASET).iterdir())
        raise NoSuchFile(f"run {pid} has no data set")

    def trained(self, pid: int, lineage: Lineage) -> str:
        """Says how the run's result came to be; the source that an importer takes it from. Raises
        StorageFailed."""
        folder = self.folder(pid)
        try:
            write_file(folder / _LINEAGE, msgspec.json.encode(lineage))
            sync_folder(folder)
        except OSError as problem:
            raise StorageFailed(f"run {pid}: {problem.strerror}", hint="see `llsh df`") from None
        return f"run:{folder}"

    def metrics(self, pid: int, offset: int, length: int) -> tuple[int, bytes]:
        """The size of a run's metrics (JSON lines of training.TrainEvent), and at most `length` bytes of them
        from `offset`. There are none before the first."""
        try:
            with (self.folder(pid) / METRICS).open("rb", buffering=0) as file:
                return os.fstat(file.fileno()).st_size, os.pread(file.fileno(), length, offset)
        except FileNotFoundError:
            return 0, b""

    def size(self, pid: int) -> int:
        """Bytes of a run. The data set counts: it stays as long as the run does."""
        return sum(file.st_size for file in _files(self.folder(pid)))

    def kept(self, path: str) -> list[os.stat_result]:
        """Files of the runs of an owner and those below it."""
        found = []
        for folder in self._folder.iterdir():
            with suppress(Corrupt):
                found += _files(folder) if is_below(run_of(folder).owner, path) else []
        return found

    def data(self, pid: int) -> Path:
        """Where the prepared data set is."""
        return self.folder(pid) / DATA

    def prepared(self, pid: int) -> bool:
        """Whether it is there, whole."""
        return (self.data(pid) / HEAD).exists()

    def trim(self, pid: int) -> None:
        """Removes all of a run but what it told: it is over."""
        with suppress(FileNotFoundError):
            for path in self.folder(pid).iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self, pid: int) -> None:
        """Removes what there is of a run."""
        shutil.rmtree(self.folder(pid), ignore_errors=True)

    def sweep(self, kept: Collection[int]) -> None:
        """Removes all runs but those of the processes `kept`, at boot."""
        for folder in self._folder.iterdir():
            if folder.name not in {str(pid) for pid in kept}:
                shutil.rmtree(folder, ignore_errors=True)

    def save(self, pid: int, folder: Path) -> None:
        """Makes `folder` what the run is now. Raises StorageFailed."""
        _copy(self.folder(pid), folder)

    def bring_back(self, pid: int, folder: Path) -> None:
        """Makes a run what it was when it was saved in `folder`. Raises StorageFailed."""
        self.remove(pid)
        _copy(folder, self.folder(pid))

    def bases(self) -> list[Manifest]:
        """The models that are being trained."""
        found = []
        for folder in self._folder.iterdir():
            with suppress(Corrupt):
                found.append(run_of(folder).base)
        return found


def _copy(source: Path, target: Path) -> None:
    """Copies a run, whose trainer may be at work: what is complete never changes and is shared, what grows
    is copied, what vanishes meanwhile was superseded."""

    def share(file: str, to: str) -> None:
        with suppress(FileNotFoundError):
            if Path(file).name == METRICS:
                shutil.copyfile(file, to)
            else:
                os.link(file, to)

    try:
        shutil.copytree(source, target, copy_function=share, ignore=shutil.ignore_patterns("*.tmp"))
        sync_folder(target)
        sync_folder(target.parent)
    except (OSError, shutil.Error) as problem:
        shutil.rmtree(target, ignore_errors=True)
        why = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise StorageFailed(f"a run cannot be saved: {why}", hint="see `llsh df`") from None


def _files(folder: Path) -> list[os.stat_result]:
    """The files below a folder, of which any may vanish meanwhile."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found.append(os.lstat(os.path.join(parent, name)))
    return found


def run_of(folder: Path) -> Run:
    """What a run is. Raises Corrupt."""
    return _read(folder / _RUN, Run)


def lineage_of(folder: Path) -> Lineage:
    """How a run went. Raises Corrupt."""
    return _read(folder / _LINEAGE, Lineage)


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(2 * MAX_MANIFEST), type=kind)
    except (OSError, msgspec.DecodeError):
        raise Corrupt(f"{path.parent.name}/{path.name} is missing or damaged") from None
