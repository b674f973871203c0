"""Where an import collects a model's files until all of them are there and found good.

Files copied in lie in a folder of tmp/ and are hashed on the way; files of the Hugging Face cache stay where
they are and are only hashed. Nothing is visible to anybody before `ModelFS.commit`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llmasos.syscalls.errors import Corrupt, RefusedFile

from . import adapter_layout, layout
from .manifest import ManifestFile
from .names import is_part
from .progress import Progress
from .store import ModelFS

MAX_TEXT = 128 * 1024 * 1024
"""Bytes of the biggest file that is read into memory: a tokenizer.json."""

SPARE = 64 * 1024 * 1024
"""Bytes that an import leaves free on the disk."""

_CHUNK = 4 * 1024 * 1024


class Weights:
    """A weight file: where it can be read, its hash and size, and whether it is somebody else's file."""

    __slots__ = ("digest", "foreign", "path", "size")

    def __init__(self, path: Path, digest: str, size: int, foreign: bool) -> None:
        self.path = path
        self.digest = digest
        self.size = size
        self.foreign = foreign


class Staging:
    """The files of one import, of a model or an adapter: `texts` in memory, `weights` on disk, by their names
    there."""

    def __init__(self, store: ModelFS, folder: Path, progress: Progress, adapter: bool) -> None:
        self.adapter = adapter
        self.store = store
        self.folder = folder
        self.progress = progress
        self.texts: dict[str, bytes] = {}
        self.weights: dict[str, Weights] = {}

    def choose(self, names: Iterable[str], read: Callable[[str], bytes]) -> layout.Chosen:
        """Which files to take of a source's folder. Raises RefusedFile, UnsupportedModel, Corrupt."""
        choose = adapter_layout.choose if self.adapter else layout.choose
        return choose(names, read)

    def add_text(self, name: str, data: bytes) -> None:
        """A small file. Raises RefusedFile when it is too big for one."""
        if len(data) > MAX_TEXT:
            raise RefusedFile(f"{name} has {len(data)} bytes, at most {MAX_TEXT} are read", file=name)
        self.texts[_checked(layout.kept_as(name))] = data

    def copy(self, name: str, source: IO[bytes], size: int) -> None:
        """A weight file of `size` bytes, read from `source`. Raises Corrupt when there are more or fewer."""
        self.need(size)
        path = self.folder / _checked(name)
        digest = hashlib.sha256()
        done = 0
        with path.open("xb") as target:
            while chunk := source.read(_CHUNK):
                done += len(chunk)
                if done > size:
                    break
                target.write(chunk)
                digest.update(chunk)
                self.progress.show("copy", name, done, size)
        if done != size:
            raise Corrupt(f"{name} is not {size} bytes long as announced", file=name)
        self.weights[name] = Weights(path, "sha256:" + digest.hexdigest(), size, foreign=False)

    def refer(self, name: str, path: Path, foreign: bool = True) -> None:
        """A weight file that stays where it is; one that is not `foreign` was made in `folder`."""
        original = path.resolve(strict=True)
        size = original.stat().st_size
        digest = hashlib.sha256()
        done = 0
        with original.open("rb") as file:
            while chunk := file.read(_CHUNK):
                done += len(chunk)
                digest.update(chunk)
                self.progress.show("verify", name, done, size)
        self.weights[_checked(name)] = Weights(original, "sha256:" + digest.hexdigest(), size, foreign)

    @property
    def room(self) -> int:
        """Bytes that an import may still take."""
        return shutil.disk_usage(self.folder).free - SPARE

    def need(self, size: int) -> None:
        """Raises OSError (ENOSPC) when `size` bytes do not fit on the disk, before they are fetched."""
        if self.room < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

    def store_all(self, texts: dict[str, bytes]) -> list[ManifestFile]:
        """Makes the weight files and `texts` blobs; what a manifest lists, in order of the names."""
        files = []
        for name, weights in self.weights.items():
            self.progress.show("store", name, 0, weights.size)
            put = self.store.link_blob if weights.foreign else self.store.put_blob
            put(weights.path, weights.digest)
            files.append(ManifestFile(name, weights.digest, weights.size))
        for name, data in texts.items():
            files.append(ManifestFile(_checked(name), *self.store.put_bytes(data)))
        return sorted(files, key=lambda file: file.path)


@contextmanager
def staging(store: ModelFS, progress: Progress, adapter: bool) -> Iterator[Staging]:
    """An empty Staging whose folder goes away at the end, whatever happens."""
    with tempfile.TemporaryDirectory(dir=store.tmp, prefix="import-", ignore_cleanup_errors=True) as folder:
        yield Staging(store, Path(folder), progress, adapter)


def _checked(name: str) -> str:
    if not is_part(name):
        raise RefusedFile(f"a file may not be called {name[:120]!r}", file=name[:120])
    return name
