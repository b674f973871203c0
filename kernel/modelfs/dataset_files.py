"""Data sets on disk: /datasets of the model filesystem, apart for each owner.

    <folder>/of-<owner>/<name>            a link to
    <folder>/of-<owner>/.sha256-<hex>     the data, by the hash of their content
    <folder>/of-<owner>/.<name>.part      what is being written

A link appears after its data are complete and synced, and is replaced by a rename; so a crash at any moment
leaves a whole file under a name or none, and things that `sweep` removes at boot. Only the kernel writes.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llmasos.syscalls.errors import InvalidArgument, QueueFull, QuotaExceeded, StorageFailed
from llmasos.syscalls.types import FileInfo, FileKind

from . import owners
from .durable import remove, sync_folder
from .manifest import hash_file
from .names import is_part

if TYPE_CHECKING:
    from hashlib import _Hash

ROOT = "/datasets"
NOUN = "data set"
KEPT_S = 3600.0
"""What nobody has added to for so long will not be finished."""

MOST_UNFINISHED = 16
"""Files that one owner may be writing at a time."""

_FLUSH = 8 << 20
_PREFIX = ".sha256-"


class _Part:
    """A file that is being written: where, its bytes so far, their hash, and when it last grew."""

    __slots__ = ("changed", "digest", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.digest: _Hash = hashlib.sha256()
        self.changed = 0.0

    def add(self, data: bytes) -> None:
        """Raises OSError; the file is then to be dropped."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if self.size // _FLUSH != (self.size + len(data)) // _FLUSH:
                # Has the disk begin to write, so that the last sync need not wait for all of it.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        self.digest.update(data)
        self.size += len(data)


def parse_path(path: str) -> str | None:
    """The NAME of /datasets/NAME, "" for /datasets, None for what lies elsewhere. Raises InvalidArgument."""
    return owners.parse_path(path, ROOT, NOUN)


class DatasetFiles:
    """The data sets below one folder. An `owner` is a tenant's path; a name that is none raises
    InvalidArgument everywhere."""

    def __init__(self, folder: Path) -> None:
        self._owners = owners.Owners(folder, ROOT, NOUN)
        self._parts: dict[tuple[str, str], _Part] = {}

    # -- looking --------------------------------------------------------------------------------------

    def ls(self, owner: str) -> list[FileInfo]:
        """The data sets of an owner, by name."""
        return [self.stat(owner, name) for name in self._owners.names(owner)]

    def stat(self, owner: str, name: str) -> FileInfo:
        """One data set. Raises NoSuchFile."""
        path = self.path(owner, name)
        about = path.stat()
        digest = _digest(path)
        return FileInfo(f"{ROOT}/{name}", FileKind.DATASET, about.st_size, digest, about.st_mtime)

    def read(self, owner: str, name: str, offset: int, length: int) -> tuple[int, bytes]:
        """Its size, and at most `length` bytes from `offset`. Raises NoSuchFile, StorageFailed."""
        try:
            with self.path(owner, name).open("rb", buffering=0) as file:
                return os.fstat(file.fileno()).st_size, os.pread(file.fileno(), length, offset)
        except OSError as problem:
            raise StorageFailed(f"data set {name}: {problem.strerror}") from None

    def path(self, owner: str, name: str) -> Path:
        """Where its data lie; they are never changed, only removed. Raises NoSuchFile."""
        path = _data(self._owners.place(owner, name))
        if path is None or not path.is_file():
            raise self._owners.missing(owner, name)
        return path

    def digest(self, owner: str, name: str) -> str:
        """ "sha256:…" of its content, as it was written. Raises NoSuchFile."""
        return _digest(self.path(owner, name))

    def kept(self, path: str) -> list[os.stat_result]:
        """Files of an owner and those below it, unfinished ones too."""
        return [file.lstat() for folder in self._owners.below(path) for file in folder.iterdir()]

    def check(self) -> list[str]:
        """Problems found, one a line: all data are read and hashed."""
        problems = []
        for link in self._owners.files():
            where = f"datasets/{link.parent.name}/{link.name}"
            path = _data(link)
            try:
                if path is None or hash_file(path) != _digest(path):
                    problems.append(f"{where}: its content is not what its digest says")
            except OSError as problem:
                problems.append(f"{where}: {problem.strerror}")
        return problems

    # -- changing -------------------------------------------------------------------------------------

    def write(
        self, owner: str, name: str, offset: int, data: bytes, last: bool, room: int, now: float
    ) -> int:
        """Adds to a file that is being written, of which the bytes that there are now are returned; with
        `last` it becomes the data set `name`. `offset` 0 begins anew. `room` is how many bytes more the owner
        may have, `now` any clock's seconds.

        Raises InvalidArgument (`offset` is not its end), QuotaExceeded and QueueFull (nothing is added),
        StorageFailed (what there was of it is gone; a data set of the name stays as it is)."""
        place = self._owners.place(owner, name)
        self._drop_stale(now)
        part = self._parts.get((owner, name))
        if offset == 0 and part is not None and part.size:
            self._drop(owner, name)
            part = None
        if offset != (part.size if part else 0):
            raise InvalidArgument(
                f"{name} has {part.size if part else 0} bytes so far, not {offset}",
                hint="go on there, or begin anew at 0: what is not finished goes after an hour and when the "
                "daemon is started again",
                field="offset",
                size=part.size if part else 0,
            )
        if len(data) > room:
            raise QuotaExceeded(
                f"no room for {len(data)} more bytes of the data set {name}",
                hint=f"remove what is not needed: llsh rm {ROOT}/NAME",
            )
        try:
            if part is None:
                part = self._begin(owner, name)
            part.add(data)
            part.changed = now
            if last:
                self._finish(place, part)
                del self._parts[owner, name]
        except OSError as problem:
            self._drop(owner, name)
            raise StorageFailed(f"data set {name}: {problem.strerror}", hint="see `llsh df`") from None
        return part.size

    def remove(self, owner: str, name: str) -> None:
        """Removes a data set. A training run that has begun keeps it. Raises NoSuchFile, StorageFailed."""
        link = self._owners.place(owner, name)
        data = _data(link)
        if data is None:
            raise self._owners.missing(owner, name)
        try:
            link.unlink()
            sync_folder(link.parent)
            _drop_unnamed(data)
        except OSError as problem:
            raise StorageFailed(f"data set {name}: {problem.strerror}") from None

    def sweep(self) -> None:
        """Removes what no name stands for and what was not finished, at boot."""
        self._parts.clear()
        for folder in self._owners.folder.glob("of-*"):
            named = {data for path in folder.iterdir() if (data := _data(path)) is not None}
            for path in folder.iterdir():
                if not is_part(path.name) and path not in named:
                    path.unlink(missing_ok=True)

    # -- inside ---------------------------------------------------------------------------------------

    def _begin(self, owner: str, name: str) -> _Part:
        """Raises OSError, QueueFull."""
        if sum(of == owner for of, _ in self._parts) >= MOST_UNFINISHED:
            raise QueueFull(
                f"{MOST_UNFINISHED} data sets are being written", hint="finish one, or wait for an hour"
            )
        part = _Part(self._owners.made(owner) / f".{name}.part")
        part.path.unlink(missing_ok=True)
        self._parts[owner, name] = part
        return part

    def _finish(self, link: Path, part: _Part) -> None:
        """Raises OSError."""
        before = _data(link)
        data = part.path.with_name(_PREFIX + part.digest.hexdigest())
        fd = os.open(part.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        part.path.replace(data)
        new = part.path  # free again, and swept if it stays
        new.symlink_to(data.name)
        sync_folder(data.parent)
        new.replace(link)
        sync_folder(data.parent)
        if before is not None and before != data:
            with suppress(OSError):  # what stays is swept at boot
                _drop_unnamed(before)

    def _drop(self, owner: str, name: str) -> None:
        part = self._parts.pop((owner, name), None)
        if part is not None:
            with suppress(OSError):
                part.path.unlink()

    def _drop_stale(self, now: float) -> None:
        for (owner, name), part in list(self._parts.items()):
            if now - part.changed > KEPT_S:
                self._drop(owner, name)


def _data(link: Path) -> Path | None:
    """The data that a name stands for; None if it is no such name."""
    try:
        target = os.readlink(link)
    except OSError:
        return None
    return link.with_name(target) if is_part(link.name) and target.startswith(_PREFIX) else None


def _digest(data: Path) -> str:
    return data.name.removeprefix(".").replace("-", ":", 1)


def _drop_unnamed(data: Path) -> None:
    """Removes data that no other name of the owner stands for. Raises OSError."""
    if all(_data(path) != data for path in data.parent.iterdir()):
        with suppress(FileNotFoundError):
            remove(data)
