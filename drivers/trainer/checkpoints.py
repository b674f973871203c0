"""The run's state on disk, so that a run that dies at any moment goes on from the last one.

    <folder>/<step>/*.safetensors    tensors by name; of a group, each rank's part in a file of its own
    <folder>/<step>/manifest.json    what the rest is, with the SHA-256 of each of these files
    <folder>/latest                  the name of the newest whole folder

A folder appears under its name only whole and synced, `latest` after it. The newest KEPT stay; one that is
damaged is passed over for the one before it. Read and, by a group, written by torch's distributed checkpoint,
in its safetensors form: no pickle, and a run may go on with another number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from llmasos.syscalls import errors
from msgspec import Struct
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from .crew import Crew

KEPT = 2
VERSION = 1

_STATE, _MANIFEST, _LATEST = "state.safetensors", "manifest.json", "latest"


class Progress(Struct, frozen=True):
    """How far a run has come: `step` whole steps. `loss` is the last step's, `best` the least loss on the
    validation split, which the last `worse` measurements did not reach."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    eval_step: int = 0
    eval_loss: float | None = None
    best: float | None = None
    worse: int = 0
    stopped: bool = False


class _Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """`files`: size and digest of each."""

    version: int
    run: str
    progress: Progress
    files: dict[str, tuple[int, str]]


class Checkpoints:
    """Those of one run, which `run` identifies: what it learns, from what, and how. Every rank of the crew
    has the whole folder before it."""

    def __init__(self, folder: Path, run: str, crew: Crew) -> None:
        self._folder, self._run, self._crew = folder, run, crew

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        """Raises StorageFailed; what was there before is still there then."""
        with storing(self._folder):
            temporary = Path(self._crew.from_leader(self._begin))
            try:
                if self._crew.ranks is None:
                    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
                    save_file(whole, temporary / _STATE)
                else:
                    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
                    state_dict_saver.save(tensors, storage_writer=writer)
                self._crew.from_leader(lambda: self._finish(temporary, progress))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def _begin(self) -> str:
        """A folder to write into."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        return tempfile.mkdtemp(".tmp", dir=self._folder)

    def _finish(self, temporary: Path, progress: Progress) -> None:
        """Gives the folder its name, whole and durable."""
        folder, name = self._folder, f"{progress.step:08d}"
        files = {path.name: (path.stat().st_size, _digest(path)) for path in temporary.iterdir()}
        manifest = _Manifest(VERSION, self._run, progress, files)
        (temporary / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
        sync_tree(temporary)
        target = folder / name
        if target.exists():  # of this step, and damaged or less far: an evaluation counts too
            target.rename(folder / f"{name}.old.tmp")
        temporary.rename(target)
        pointer = folder / f"{_LATEST}.tmp"
        pointer.write_text(name)
        sync(pointer)
        pointer.replace(folder / _LATEST)
        sync(folder)
        self._sweep()

    def load(self, tensors: dict[str, torch.Tensor]) -> Progress | None:
        """Reads the newest whole state into `tensors`, if there is one. Raises Corrupt if it is another
        run's."""
        found = self._crew.from_leader(self._newest)
        if found is None:
            return None
        name, progress = found
        reader = HuggingFaceStorageReader(str(self._folder / name))
        try:
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=self._crew.ranks is None)
        except (CheckpointException, RuntimeError, ValueError) as problem:
            raise errors.Corrupt("the checkpoint has other tensors than the model") from problem
        return msgspec.convert(progress, Progress)

    def _newest(self) -> tuple[str, Any] | None:
        """Name and progress of the newest whole folder."""
        for name in self._names():
            folder = self._folder / name
            try:
                manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=_Manifest)
                files = {path.name: path for path in folder.iterdir() if path.name != _MANIFEST}
                found = {n: (path.stat().st_size, _digest(path)) for n, path in files.items()}
            except (OSError, msgspec.DecodeError):
                continue
            if found != manifest.files:
                continue
            if (manifest.version, manifest.run) != (VERSION, self._run):
                raise errors.Corrupt(
                    "the checkpoint is of another run, or of another version", hint="start training anew"
                )
            return name, msgspec.to_builtins(manifest.progress)
        return None

    def _names(self) -> list[str]:
        """Whole folders, the newest first."""
        with contextlib.suppress(OSError):
            latest = (self._folder / _LATEST).read_text()
            found = [path.name for path in self._folder.iterdir() if path.name.isdigit()]
            return sorted((name for name in found if name <= latest), reverse=True)
        return []

    def _sweep(self) -> None:
        """Removes what is unfinished and what is too old."""
        old = [self._folder / name for name in self._names()[KEPT:]]
        for path in [*self._folder.glob("*.tmp"), *old]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def storing(folder: Path) -> Iterator[Path]:
    """Failures of the disk as StorageFailed."""
    try:
        yield folder
    except Exception as problem:
        # safetensors wraps the system's error in its own, as text; torch's checkpoint those of all ranks.
        wrapped = isinstance(problem, CheckpointException) or "I/O error" in str(problem)
        if not isinstance(problem, OSError) and not wrapped:
            raise
        reason = getattr(problem, "strerror", None) or str(problem)
        raise errors.StorageFailed(
            f"the run's state cannot be written: {reason}", hint="free disk space, then train again"
        ) from None


def sync_tree(folder: Path) -> None:
    """Makes the files of a folder durable, and their names."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
