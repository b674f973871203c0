"""Snapshots of processes on disk: /sessions of the model filesystem, apart for each owner.

    <folder>/of-<owner>/<name>   a record: magic, msgpack of Snapshot, BLAKE2b of both
    <folder>/kv/<number>.kv      the KV that one record names; written by a worker (drivers/kv_file.py)
    <folder>/kv/<number>.run/    what a training run had in work (runs.py)
    <folder>/kv/<number>.link    a second name of such a file, for a process that was restored from it

A record appears complete and synced under its name (temporary name, fsync, rename, fsync of the folder),
after its KV has; so a crash at any moment leaves at most files that `sweep` removes at boot. Never reads KV:
whoever imports it verifies it block by block.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import msgspec
from llmasos.drivers.base import KvStamp
from llmasos.syscalls.errors import Corrupt, LLMasOSError, StorageFailed
from llmasos.syscalls.types import FileInfo, FileKind, Sampling, SchedClass
from msgspec import Struct

from . import owners
from .durable import sync_folder, write_file
from .names import is_part
from .runs import RunRow

ROOT = "/sessions"
NOUN = "snapshot"
MAGIC = b"LLMASSN1"
HASH = 32
MOST_LINEAGE = 16
MOST_BYTES = 32 << 20
"""Bytes of the biggest record that is read: a context of some million tokens."""


class Layout(Struct, frozen=True):
    """What KV means: only a device that has loaded the model with all of this can take it."""

    dtype: str
    kv_dtype: str
    kv_layout: str
    block_bytes: int


class Kv(Struct, frozen=True):
    """The KV that belongs to a snapshot: its file in kv/, that file's bytes, and how many of its positions
    belong to the context."""

    file: str
    size: int
    positions: int
    stamp: KvStamp
    layout: Layout


class Unfinished(Struct, frozen=True):
    """An infer that ran: of the context the first `prompt_length` tokens were given, and up to `max_tokens`
    more were to be generated."""

    sampling: Sampling
    prompt_length: int
    max_tokens: int


class SavedRun(Struct, frozen=True):
    """A training run: its row, the folder in kv/ with what it had in work and that folder's bytes, and how
    many of its steps were done."""

    row: RunRow
    folder: str
    size: int
    step: int
    steps: int


class Snapshot(Struct, frozen=True):
    """A process: `tokens` (packed u32) is its context, `model` and `digest` name its model, `dtype` is what
    was asked of its weights. `created` is seconds since the epoch. `lineage`: the snapshots it descends
    from."""

    created: float
    model: str
    digest: str
    dtype: str
    sched_class: SchedClass
    nice: int
    label: str
    generated: int
    tokens: bytes
    lineage: list[str]
    kv: Kv | None
    unfinished: Unfinished | None
    run: SavedRun | None = None

    @property
    def parts(self) -> list[str]:
        """What of kv/ belongs to it."""
        return ([self.kv.file] if self.kv else []) + ([self.run.folder] if self.run else [])

    @property
    def size(self) -> int:
        """Bytes of what belongs to it."""
        return (self.kv.size if self.kv else 0) + (self.run.size if self.run else 0)


_record = msgspec.msgpack.Decoder(Snapshot)


def parse_path(path: str) -> str | None:
    """The NAME of /sessions/NAME, "" for /sessions, None for what lies elsewhere. Raises InvalidArgument."""
    return owners.parse_path(path, ROOT, NOUN)


class SessionFiles:
    """The snapshots below one folder, which is made (0700) if it is missing."""

    def __init__(self, folder: Path) -> None:
        self._owners = owners.Owners(folder, ROOT, NOUN)
        self._kv = folder / "kv"
        self._kv.mkdir(mode=0o700, exist_ok=True)

    # -- looking --------------------------------------------------------------------------------------

    def ls(self, owner: str) -> list[FileInfo]:
        """The snapshots of an owner, by name."""
        return [self.stat(owner, name) for name in self._owners.names(owner)]

    def stat(self, owner: str, name: str) -> FileInfo:
        """One snapshot. A damaged one is shown with its problem. Raises NoSuchFile."""
        path = f"{ROOT}/{name}"
        try:
            found = self.load(owner, name)
        except Corrupt as problem:
            return FileInfo(path, FileKind.SESSION, 0, details={"problem": problem.message[:200]})
        return info(name, found)

    def load(self, owner: str, name: str) -> Snapshot:
        """A snapshot, verified. Raises NoSuchFile (somebody else's is one that does not exist), Corrupt."""
        try:
            return _read(self._owners.place(owner, name))
        except FileNotFoundError:
            raise self._owners.missing(owner, name) from None

    def kv_path(self, file: str) -> Path:
        return self._kv / file

    def usage(self) -> int:
        """Bytes of all snapshots of all owners."""
        return sum(path.lstat().st_size for path in self._owners.folder.rglob("*") if path.is_file())

    def used(self, path: str) -> int:
        """Bytes of the snapshots of an owner and those below it, as far as their records can be read."""
        total = 0
        for folder in self._owners.below(path):
            for record in folder.iterdir():
                if is_part(record.name):
                    found = self._known(record)
                    total += record.stat().st_size + (found.size if found else 0)
        return total

    def check(self) -> list[str]:
        """Problems found, one a line: every record is read and hashed."""
        problems = []
        for path in self._owners.files():
            where = f"sessions/{path.parent.name}/{path.name}"
            try:
                found = _read(path)
            except Corrupt as problem:
                problems.append(f"{where}: {problem.message}")
                continue
            if found.kv:
                size = self.kv_path(found.kv.file)
                if not size.exists() or size.stat().st_size != found.kv.size:
                    problems.append(f"{where}: its KV is missing or cut short; it will be recomputed")
            if found.run and not self.kv_path(found.run.folder).is_dir():
                problems.append(f"{where}: what its run had in work is missing")
        return problems

    # -- changing -------------------------------------------------------------------------------------

    def commit(self, owner: str, name: str, snapshot: Snapshot) -> FileInfo:
        """Makes `name` this snapshot, whose KV is there; replaces what had the name before. Raises
        StorageFailed; the name then stands for what it did, or, if only the last sync failed, for this
        one."""
        folder = self._owners.of(owner)
        before = self._known(folder / name)
        unfinished = folder / f".{name}.tmp"
        try:
            self._owners.made(owner)
            write_file(unfinished, _packed(snapshot))
            os.replace(unfinished, folder / name)
            sync_folder(folder)
        except OSError as problem:
            with suppress(OSError):
                os.unlink(unfinished)
            raise StorageFailed(f"snapshot {name}: {problem.strerror}", hint="see `llsh df`") from None
        self._drop(before)
        return info(name, snapshot)

    def remove(self, owner: str, name: str) -> None:
        """Removes a snapshot. Processes that were restored from it keep what they have. Raises NoSuchFile,
        StorageFailed."""
        path = self._owners.place(owner, name)
        before = self._known(path)
        try:
            os.unlink(path)
            sync_folder(path.parent)
        except FileNotFoundError:
            self.load(owner, name)  # raises what there is to say
        except OSError as problem:
            raise StorageFailed(f"snapshot {name}: {problem.strerror}") from None
        self._drop(before)

    def forget_kv(self, file: str) -> None:
        """Removes KV, or what a run had in work, that no record came to name."""
        path = self.kv_path(file)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # what is left is swept at boot
                os.unlink(path)

    def borrow(self, kv: Kv, link: str) -> Path | None:
        """A second name for a KV file, which a process may use up; None when the file is not there."""
        target = self.kv_path(f"{link}.link")
        try:
            os.link(self.kv_path(kv.file), target)
        except OSError:
            return None
        return target

    def sweep(self) -> None:
        """Removes what no record names and what was not finished. While a record is damaged, nobody can tell
        which KV it needs, so all stays."""
        needed, damaged = set(), False
        for path in self._owners.folder.glob("of-*/.*.tmp"):
            path.unlink(missing_ok=True)
        for path in self._owners.files():
            try:
                needed |= set(_read(path).parts)
            except Corrupt:
                damaged = True
        for path in self._kv.iterdir():
            if path.suffix not in (".kv", ".run") or (path.name not in needed and not damaged):
                self.forget_kv(path.name)

    # -- inside ---------------------------------------------------------------------------------------

    def _known(self, path: Path) -> Snapshot | None:
        try:
            return _read(path)
        except (FileNotFoundError, LLMasOSError):
            return None

    def _drop(self, snapshot: Snapshot | None) -> None:
        for part in snapshot.parts if snapshot else []:
            self.forget_kv(part)


def info(name: str, snapshot: Snapshot) -> FileInfo:
    """What `ls` shows of a snapshot."""
    kv = snapshot.kv
    details: dict[str, str | int | float] = {
        "model": snapshot.model,
        "tokens": len(snapshot.tokens) // 4,
        "kv_tokens": kv.positions if kv else 0,
        "unfinished": snapshot.unfinished.max_tokens if snapshot.unfinished else 0,
        "lineage": " < ".join(reversed(snapshot.lineage)),
    }
    if snapshot.run is not None:
        details |= {"step": snapshot.run.step, "steps": snapshot.run.steps}
    size = len(snapshot.tokens) + snapshot.size
    return FileInfo(f"{ROOT}/{name}", FileKind.SESSION, size, modified=snapshot.created, details=details)


def now() -> float:
    """Seconds since the epoch, as snapshots are dated."""
    return time.time()


def _packed(snapshot: Snapshot) -> bytes:
    body = MAGIC + msgspec.msgpack.encode(snapshot)
    return body + hashlib.blake2b(body, digest_size=HASH).digest()


def _read(path: Path) -> Snapshot:
    """Raises FileNotFoundError, Corrupt."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise Corrupt(f"snapshot {path.name} cannot be read: {problem.strerror}") from None
    body, mark = data[:-HASH], data[-HASH:]
    right = hashlib.blake2b(body, digest_size=HASH).digest() == mark
    if not right or body[: len(MAGIC)] != MAGIC or len(data) > MOST_BYTES:
        raise Corrupt(f"snapshot {path.name} is damaged", hint="remove it: llsh rm /sessions/" + path.name)
    try:
        return _record.decode(body[len(MAGIC) :])
    except msgspec.DecodeError:
        raise Corrupt(f"snapshot {path.name} is of another version of LLMasOS") from None
