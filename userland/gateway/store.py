"""What the gateway keeps over its restarts: objects of tenants (files, responses, batches, jobs) with their
lines in SQLite, and what files hold in a folder beside it.

Every question is asked by (tenant, kind, id): what is another's is not there. One thread does all the work on
the database; what it answered survives a power cut. Several gateways may share the folder: each holds a lock
while it lives, and work that nobody alive holds is anybody's to go on with.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from llmasos.syscalls import address, errors

from .http import new_id

R = TypeVar("R")

MOST_OBJECTS = 100_000
MOST_BYTES = 8 << 30
"""Objects and bytes of one tenant."""

MOST_RESPONSES = 10_000
MOST_RESPONSE_BYTES = 1 << 30
"""Responses of one tenant, which nobody deletes: the oldest make room for new ones."""

LEAST_ROOM = 256 << 20
"""Bytes of the disk that nobody fills."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    kind TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,
    created INTEGER NOT NULL,
    expires INTEGER,                -- seconds since the epoch
    size INTEGER NOT NULL,          -- bytes, with those of its file and its lines
    holder TEXT,                    -- the gateway that works on it; NULL: nothing is to be done
    body BLOB NOT NULL,             -- what the API shows
    inner BLOB NOT NULL             -- what it does not
);
CREATE INDEX IF NOT EXISTS of_tenant ON objects (tenant, kind, number, size);
CREATE INDEX IF NOT EXISTS ends ON objects (expires) WHERE expires IS NOT NULL;
CREATE INDEX IF NOT EXISTS held ON objects (kind) WHERE holder IS NOT NULL;
CREATE TABLE IF NOT EXISTS lines (
    id TEXT NOT NULL REFERENCES objects (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (id, number)
) WITHOUT ROWID;
"""


@dataclass(slots=True)
class Kept:
    """An object. `body` is shown, `inner` is not; whether it is worked on says `held`."""

    tenant: str
    kind: str
    id: str
    body: dict[str, Any]
    inner: dict[str, Any]
    expires: int | None = None
    held: bool = False
    size: int = 0
    """Bytes of its file and of its lines."""


def gateway_folder() -> Path:
    return address.home_folder() / "gateway"


async def stored(request: Request) -> Store:
    """FastAPI dependency: the gateway's store."""
    store: Store = request.app.state.store
    return store


class Store:
    """Opened and closed with the gateway. Raises StorageFailed when the disk fails, NotFound for what is not
    there, QuotaExceeded."""

    def __init__(self, folder: Path) -> None:
        self._files, self._holders = folder / "files", folder / "holders"
        self._thread = ThreadPoolExecutor(1, "gateway-store")
        self._name = new_id("")
        try:
            for made in (folder, self._files, self._holders):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._holders / self._name, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._db = self._thread.submit(self._open, folder / "objects.sqlite").result()
        except (OSError, sqlite3.Error) as problem:
            raise errors.StorageFailed(f"{folder}: {problem}", hint="make room, or mend the folder") from None

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, timeout=30)
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.executescript(_SCHEMA)
        return db

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()
        (self._holders / self._name).unlink(missing_ok=True)
        os.close(self._lock)

    async def _do(self, work: Callable[[sqlite3.Connection], R]) -> R:
        """`work` as one transaction."""

        def transaction() -> R:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    done = work(self._db)
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
                return done
            except (sqlite3.Error, OSError) as problem:
                raise errors.StorageFailed(
                    f"the gateway's store: {problem}", hint="is the disk full?"
                ) from None

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)

    async def add(self, kept: Kept) -> None:
        await self._do(lambda db: self._insert(db, kept, bounded=True))

    def _insert(self, db: sqlite3.Connection, kept: Kept, *, bounded: bool) -> None:
        body, inner = msgspec.json.encode(kept.body), msgspec.json.encode(kept.inner)
        size = kept.size + len(body) + len(inner)
        if bounded:
            (_forget if kept.kind == "response" else _within_bounds)(db, kept.tenant, size)
            self._fits(size)
        created = int(kept.body.get("created_at", time.time()))
        holder = self._name if kept.held else None
        db.execute(
            "INSERT INTO objects (tenant, kind, id, created, expires, size, holder, body, inner) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (kept.tenant, kept.kind, kept.id, created, kept.expires, size, holder, body, inner),
        )

    def _fits(self, size: int) -> None:
        free = os.statvfs(self._files)
        if free.f_bavail * free.f_frsize < size + LEAST_ROOM:
            raise errors.StorageFailed("the disk is nearly full", hint="make room", retry_after=60)

    async def has_room(self, tenant: str, size: int) -> None:
        """Raises QuotaExceeded, StorageFailed when `size` more bytes are too many."""
        self._fits(size)
        await self._do(lambda db: _within_bounds(db, tenant, size))

    async def get(self, tenant: str, kind: str, id: str) -> Kept:
        return await self._do(lambda db: _get(db, tenant, kind, id))

    async def change(
        self,
        kept: Kept,
        change: Callable[[Kept], Iterable[tuple[int, Any]] | None],
        *,
        bear: Iterable[Kept] = (),
        without_lines: bool = False,
    ) -> Kept:
        """What `change` made of the object as it is now. In the same step come the numbered lines that it
        gives back and the objects that it bears, which no bound refuses: they are its lines in another shape.
        `without_lines` these go, and its file."""

        def work(db: sqlite3.Connection) -> Kept:
            now = _get(db, kept.tenant, kept.kind, kept.id)
            lines = change(now) or ()
            rows = [(kept.id, number, msgspec.json.encode(line)) for number, line in lines]
            body, inner = msgspec.json.encode(now.body), msgspec.json.encode(now.inner)
            db.executemany("INSERT INTO lines (id, number, body) VALUES (?, ?, ?)", rows)
            if without_lines:
                db.execute("DELETE FROM lines WHERE id = ?", (kept.id,))
                now.size = 0
            else:
                now.size += sum(len(row[2]) for row in rows)
            db.execute(
                "UPDATE objects SET size = ?, body = ?, inner = ?, expires = ?, "
                "holder = CASE WHEN ? THEN coalesce(holder, ?) END WHERE id = ?",
                (
                    now.size + len(body) + len(inner),
                    body,
                    inner,
                    now.expires,
                    now.held,
                    self._name,
                    kept.id,
                ),
            )
            for born in bear:
                self._insert(db, born, bounded=False)
            return now

        done = await self._do(work)
        if without_lines:
            self.path(kept.id).unlink(missing_ok=True)
        return done

    async def delete(self, tenant: str, kind: str, id: str) -> Kept:
        def work(db: sqlite3.Connection) -> Kept:
            kept = _get(db, tenant, kind, id)
            db.execute("DELETE FROM objects WHERE id = ?", (id,))
            return kept

        kept = await self._do(work)
        if kind == "file":
            self.path(id).unlink(missing_ok=True)
        return kept

    async def page(
        self,
        tenant: str,
        kind: str,
        *,
        after: str | None,
        limit: int,
        newest_first: bool = True,
        matches: Mapping[str, str] = {},
    ) -> tuple[list[Kept], bool]:
        """At most `limit` objects behind the one with id `after`, whose bodies have the values of `matches`;
        and whether there are more."""

        def work(db: sqlite3.Connection) -> tuple[list[Kept], bool]:
            order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
            place: tuple[Any, ...] = (tenant, kind, int(time.time()))
            where = f"tenant = ? AND kind = ? AND {_LASTS}"
            if after is not None:
                where += f" AND number {beyond} (SELECT number FROM objects WHERE id = ?)"
                _get(db, tenant, kind, after)
                place += (after,)
            for field, value in matches.items():
                where += " AND json_extract(CAST(body AS TEXT), ?) = ?"
                place += (f"$.{field}", value)
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM objects WHERE {where} ORDER BY number {order} LIMIT ?",
                (*place, limit + 1),
            ).fetchall()
            return [_kept(row) for row in rows[:limit]], len(rows) > limit

        return await self._do(work)

    async def orphans(self, kind: str) -> list[Kept]:
        """Work that no gateway alive holds: from now on it is this one's."""

        def work(db: sqlite3.Connection) -> list[Kept]:
            found = []
            rows = db.execute(
                f"SELECT {_COLUMNS}, holder FROM objects WHERE kind = ? AND holder IS NOT NULL", (kind,)
            ).fetchall()
            for *row, holder in rows:
                if holder != self._name and not self._lives(holder):
                    db.execute("UPDATE objects SET holder = ? WHERE id = ?", (self._name, row[2]))
                    found.append(_kept(row))
            return found

        return await self._do(work)

    def _lives(self, holder: str) -> bool:
        try:
            lock = os.open(self._holders / holder, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    async def lines(
        self, id: str, *, after: int = -1, limit: int = 1000, newest_first: bool = False
    ) -> list[tuple[int, Any]]:
        """At most `limit` lines behind number `after` (newest first: before it; -1 is the end)."""

        def work(db: sqlite3.Connection) -> list[tuple[int, Any]]:
            order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
            start = 2**62 if newest_first and after < 0 else after
            rows = db.execute(
                f"SELECT number, body FROM lines WHERE id = ? AND number {beyond} ? "
                f"ORDER BY number {order} LIMIT ?",
                (id, start, limit),
            )
            return [(number, msgspec.json.decode(body)) for number, body in rows]

        return await self._do(work)

    async def line_numbers(self, id: str) -> set[int]:
        def work(db: sqlite3.Connection) -> set[int]:
            return {row[0] for row in db.execute("SELECT number FROM lines WHERE id = ?", (id,))}

        return await self._do(work)

    async def purge(self) -> None:
        """Removes what has expired, and files of which no row knows: their upload was cut short."""

        def work(db: sqlite3.Connection) -> set[str]:
            db.execute("DELETE FROM objects WHERE expires < ? AND holder IS NULL", (int(time.time()),))
            return {row[0] for row in db.execute("SELECT id FROM objects WHERE kind != 'response'")}

        await asyncio.to_thread(self._sweep, await self._do(work))

    def _sweep(self, known: set[str]) -> None:
        """What is young may be about to be known, or locked."""
        old = time.time() - UNFINISHED_S
        with contextlib.suppress(OSError):
            for path in (*self._files.iterdir(), *self._holders.iterdir()):
                if path.stat().st_mtime < old and path.name not in known and not self._lives(path.name):
                    path.unlink()

    def path(self, id: str) -> Path:
        """Where the bytes of object `id` are, if it has any."""
        return self._files / id


UNFINISHED_S = 3600
"""A file of which no row knows after this time was never finished."""

_LASTS = "(expires IS NULL OR expires > ? OR holder IS NOT NULL)"
_COLUMNS = "tenant, kind, id, body, inner, expires, holder IS NOT NULL, size"


def _within_bounds(db: sqlite3.Connection, tenant: str, size: int) -> None:
    count, used = db.execute(
        "SELECT count(*), coalesce(sum(size), 0) FROM objects WHERE tenant = ? AND kind != 'response'",
        (tenant,),
    ).fetchone()
    if count >= MOST_OBJECTS or used + size > MOST_BYTES:
        raise errors.QuotaExceeded(
            f"{count} objects of {used} bytes are kept for {tenant} already",
            hint=f"at most {MOST_OBJECTS} and {MOST_BYTES} bytes: delete files",
            retry_after=60,
        )


def _forget(db: sqlite3.Connection, tenant: str, size: int) -> None:
    """Makes room for a response of `size` bytes; some more than that, so that it is not done each time."""
    mine = "FROM objects WHERE tenant = ? AND kind = 'response'"
    count, used = db.execute(f"SELECT count(*), coalesce(sum(size), 0) {mine}", (tenant,)).fetchone()
    if count < MOST_RESPONSES and used + size <= MOST_RESPONSE_BYTES:
        return
    latest = "OVER (ORDER BY number DESC)"
    db.execute(
        "DELETE FROM objects WHERE number IN (SELECT number FROM (SELECT number, holder, "
        f"sum(size) {latest} AS total, row_number() {latest} AS place {mine}) "
        "WHERE holder IS NULL AND (place > ? OR total > ?))",
        (tenant, MOST_RESPONSES * 9 // 10, MOST_RESPONSE_BYTES * 9 // 10 - size),
    )


def _kept(row: Any) -> Kept:
    tenant, kind, id, body, inner, expires, held, size = row
    decode = msgspec.json.decode
    size -= len(body) + len(inner)
    return Kept(tenant, kind, id, decode(body), decode(inner), expires, bool(held), size)


def _get(db: sqlite3.Connection, tenant: str, kind: str, id: str) -> Kept:
    row = db.execute(
        f"SELECT {_COLUMNS} FROM objects WHERE tenant = ? AND kind = ? AND {_LASTS} AND id = ?",
        (tenant, kind, int(time.time()), id),
    ).fetchone()
    if row is None:
        raise errors.NotFound(f"No {kind} found with id '{id[:128]}'.", hint="it was deleted, or has expired")
    return _kept(row)
