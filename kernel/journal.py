"""What survives a power cut: rows by name in SQLite, changed together, durable when `commit` returns.

Owns the folder HOME/journal. Knows nothing of what a row means (ledger.py does). Never silently wrong: each
row carries a BLAKE2b of its name and data, a head row the number of the last commit and the sum of all
digests, so that a changed, lost or stale row is found when the journal is opened. What SQLite takes for the
end of its log after a damaged frame is found by the witness, a file of 16 bytes that is written, not synced,
after each commit: it may be behind the journal (after a power cut), never before it.

RESERVE_BYTES of the database and of its log are kept on the disk for what is to come: on one that is full
processes can still be ended and changed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from llmasos.syscalls import errors

from .modelfs.durable import sync_folder

_HEAD = ""
_DIGEST_BYTES = 16
_NUMBER_BYTES = 8

RESERVE_BYTES = 4 << 20
"""As much as SQLite's log has before it begins anew."""


def is_foreign(folder: Path, schema: int) -> bool:
    """Whether the journal in `folder`, which nobody has open, has rows of another schema. Changes nothing."""
    source = f"file:{quote(str(folder / 'kernel.db'))}?immutable=1"
    try:
        with closing(sqlite3.connect(source, uri=True)) as db:
            (written,) = db.execute("PRAGMA user_version").fetchone()
            (rows,) = db.execute("SELECT count(*) FROM rows WHERE name != ?", (_HEAD,)).fetchone()
            return bool(rows) and written != schema
    except sqlite3.Error:
        return False


def of_another_version(folder: Path) -> errors.Corrupt:
    """What is said of a journal that is foreign."""
    return errors.Corrupt(
        f"the journal in {folder} is of another version of LLMasOS",
        hint="start that version, or start without the processes and limits that it holds: "
        f"mv {folder} {folder}.old",
    )


class Journal:
    """The open journal. `rows` are those found when it was opened; nobody else may open it meanwhile.
    `schema` tells journals apart whose rows mean something else (32 bits).

    Raises Corrupt when what is there is not what was committed or has another schema, Unavailable when it
    cannot be opened.
    """

    def __init__(self, folder: Path, schema: int = 0) -> None:
        self._folder = folder
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
            raise of_another_version(folder)
        self._digests: dict[str, int] = {}
        self.rows = self._verified(found)
        self._number, self._total = self._verified_head(self.rows.pop(_HEAD, None))
        self._reserve()

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
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM rows WHERE name = ?", gone)
            self._db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", sets)
            self._db.execute("COMMIT")
        except sqlite3.Error as problem:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise errors.Unavailable(f"the journal cannot be written: {problem}") from None
        self._number, self._total = number, total
        for name in changes:
            self._digests.pop(name, None)
        self._digests |= digests
        os.pwrite(self._witness, _witness(number), 0)

    def _reserve(self) -> None:
        """Has database and log take the room that they will need: free pages are used before the one grows,
        the other is written over from its beginning, and zeros at its end are no frames. On a full disk there
        is none to take."""
        (pages,) = self._db.execute("PRAGMA freelist_count").fetchone()
        (page_bytes,) = self._db.execute("PRAGMA page_size").fetchone()
        with suppress(sqlite3.OperationalError, OSError):
            if pages * page_bytes < RESERVE_BYTES:
                self._db.execute("CREATE TABLE IF NOT EXISTS reserve (room BLOB)")
                self._db.execute("INSERT INTO reserve VALUES (zeroblob(?))", (RESERVE_BYTES,))
                self._db.execute("DROP TABLE reserve")
                self._db.execute("PRAGMA wal_checkpoint(RESTART)")
            log = os.open(self._folder / "kernel.db-wal", os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(log, 0, RESERVE_BYTES)
            finally:
                os.close(log)

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
            hint="put a copy of the folder in its place, or start without the processes and limits that it "
            f"holds: mv {self._folder} {self._folder}.damaged",
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
