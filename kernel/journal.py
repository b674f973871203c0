"""What survives a power cut: rows by name in SQLite, changed together, durable when `commit` returns.

Owns the folder HOME/journal. Knows nothing of what a row means (ledger.py does). Never silently wrong: each
row carries a BLAKE2b of its name and data, a head row the number of the last commit and the sum of all
digests, so that a changed, lost or stale row is found when the journal is opened. What SQLite takes for the
end of its log after a damaged frame is found by the witness, a file of 16 bytes that is written, not synced,
after each commit: it may be behind the journal (after a power cut), never before it.

A file of BALLAST_BYTES keeps room on the disk: when that is full it is given up for what has to be written,
so that processes can still be ended and changed, and made anew when there is room again."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from llmasos.syscalls import errors

from .modelfs.durable import sync_folder

_HEAD = ""
_DIGEST_BYTES = 16
_NUMBER_BYTES = 8

BALLAST_BYTES = 8 << 20
"""More than SQLite's log has before it begins anew (4 MB)."""


class Journal:
    """The open journal. `rows` are those found when it was opened; nobody else may open it meanwhile.
    `schema` tells journals apart whose rows mean something else (32 bits).

    Raises Corrupt when what is there is not what was committed or has another schema, Unavailable when it
    cannot be opened.
    """

    def __init__(self, folder: Path, schema: int = 0) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"
        self._witness = -1
        try:
            self._open(folder, schema)
        except BaseException:
            if self._witness >= 0:  # the connection closes itself when it is forgotten
                os.close(self._witness)
            raise

    def _open(self, folder: Path, schema: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "kernel.db"
        is_new = not path.exists()
        try:
            self._witness = os.open(folder / "witness", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._db = db = sqlite3.connect(path, isolation_level=None)
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS rows "
                "(name TEXT PRIMARY KEY, data BLOB NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID"
            )
            if is_new:
                sync_folder(folder)
            found = db.execute("SELECT name, data, digest FROM rows").fetchall()
            sound = db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            (written,) = db.execute("PRAGMA user_version").fetchone()
            is_other = written != schema and any(name != _HEAD for name, _, _ in found)
            if written != schema and not is_other:
                db.execute(f"PRAGMA user_version = {schema:d}")
        except sqlite3.OperationalError as problem:
            raise errors.Unavailable(f"the journal in {folder} cannot be opened: {problem}") from None
        except (sqlite3.Error, UnicodeDecodeError) as problem:
            raise self._damaged(str(problem)) from None
        if not sound:
            raise self._damaged("its pages do not fit together")
        if is_other:
            self._db.close()
            raise errors.Corrupt(
                f"the journal in {folder} is of another version of LLMasOS",
                hint="start that version, or start without the processes that it holds: "
                f"mv {folder} {folder}.old",
            )
        self._digests: dict[str, int] = {}
        self.rows = self._verified(found)
        self._number, self._total = self._verified_head(self.rows.pop(_HEAD, None))
        self._load_ballast()

    def commit(self, changes: Mapping[str, bytes | None]) -> None:
        """Sets rows, or removes them (None), all or none. Raises Unavailable when the disk refuses: then
        nothing was changed."""
        digests = {name: _digest(name, data) for name, data in changes.items() if data is not None}
        total = self._total
        for name in changes:
            total ^= self._digests.get(name, 0) ^ digests.get(name, 0)
        number = self._number + 1
        head = number.to_bytes(_NUMBER_BYTES, "big") + total.to_bytes(_DIGEST_BYTES, "big")
        gone = [(name,) for name, data in changes.items() if data is None]
        sets = [(name, data, _bytes(digests[name])) for name, data in changes.items() if data is not None]
        sets.append((_HEAD, head, _bytes(_digest(_HEAD, head))))
        try:
            try:
                self._write(gone, sets)
            except sqlite3.OperationalError as problem:
                if problem.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._ballast.exists():
                    raise
                self._ballast.unlink()
                self._write(gone, sets)
        except (sqlite3.Error, OSError) as problem:
            raise errors.Unavailable(f"the journal cannot be written: {problem}") from None
        self._number, self._total = number, total
        for name in changes:
            self._digests.pop(name, None)
        self._digests |= digests
        os.pwrite(self._witness, _witness(number), 0)
        self._load_ballast()

    def _write(self, gone: list[tuple[str]], sets: list[tuple[str, bytes, bytes]]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM rows WHERE name = ?", gone)
            self._db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", sets)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _load_ballast(self) -> None:
        """Makes the ballast where there is room enough for it and others."""
        with suppress(OSError):
            if self._ballast.exists() and self._ballast.stat().st_size == BALLAST_BYTES:
                return
            disk = os.statvfs(self._folder)
            if disk.f_bavail * disk.f_frsize < 8 * BALLAST_BYTES:
                return
            with self._ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)

    def close(self) -> None:
        self._db.close()
        os.close(self._witness)

    def _verified(self, found: Iterable[tuple[object, object, object]]) -> dict[str, bytes]:
        rows: dict[str, bytes] = {}
        for name, data, digest in found:
            if not isinstance(name, str) or not isinstance(data, bytes):
                raise self._damaged("a row is of the wrong kind")
            expected = _digest(name, data)
            if digest != _bytes(expected):
                raise self._damaged("a row is not what its digest says")
            rows[name] = data
            if name != _HEAD:
                self._digests[name] = expected
        return rows

    def _verified_head(self, head: bytes | None) -> tuple[int, int]:
        """The number of the last commit, and the sum of all digests."""
        number = expected = total = 0
        if head is not None:
            number = int.from_bytes(head[:_NUMBER_BYTES], "big")
            expected = int.from_bytes(head[_NUMBER_BYTES:], "big")
        for digest in self._digests.values():
            total ^= digest
        if total != expected:
            raise self._damaged("rows are missing")
        witness = os.pread(self._witness, 64, 0)
        seen = int.from_bytes(witness[:_NUMBER_BYTES], "big")
        if witness and witness != _witness(seen):
            raise self._damaged("the witness is not what its digest says")
        if seen > number:
            raise self._damaged(f"the last {seen - number} commits are missing")
        return number, total

    def _damaged(self, what: str) -> errors.Corrupt:
        return errors.Corrupt(
            f"the journal in {self._folder} is damaged: {what}",
            hint="put a copy of the folder in its place, or start without the processes that it holds: "
            f"mv {self._folder} {self._folder}.damaged",
        )


def _digest(name: str, data: bytes) -> int:
    mark = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    word = name.encode()
    mark.update(len(word).to_bytes(4, "big") + word + data)
    return int.from_bytes(mark.digest(), "big")


def _bytes(digest: int) -> bytes:
    return digest.to_bytes(_DIGEST_BYTES, "big")


def _witness(number: int) -> bytes:
    word = number.to_bytes(_NUMBER_BYTES, "big")
    return word + hashlib.blake2b(word, digest_size=8).digest()
