"""The audit log: who did what that others may have to answer for. Append-only, hash-chained, no prompt text.

Holds one record for each act of an administrator, refusal, change of a key, login with a key, import of a
model, process ended by somebody else, and peer shut out. Acts of an administrator are on the disk before they
are done (`before`): an effect would come after. So when the disk is full they are refused, while inference
goes on; other records are then counted, and the count is told when there is room again.

Whoever moves, removes or replaces the file (to rotate it, or to hide something) has the chain go on where the
path then leads, with a record that tells where it was.

Never raises but from `before`. Refusals are bounded, so that nobody can fill the disk by being refused.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmasos.syscalls import chain, errors

LONGEST_FACT = 256
MOST_A_MINUTE = 20
"""Records of one event and user that are kept a minute; more are counted."""
_TAIL_BYTES = 1 << 16


class Audit:
    """The file at `path`, made at need. `wall` is the time of day in seconds since 1970."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._path = path
        self._seq, self._head = 0, chain.GENESIS
        self._lost = 0
        self._dirty = False
        self._minute = 0
        self._seen: dict[tuple[str, str], int] = {}
        self._open()

    def before(self, event: str, subject: str, **facts: str | int) -> None:
        """Records what is about to be done, durably. Raises Unavailable when that cannot be."""
        try:
            self._append(event, subject, facts)
            os.fdatasync(self._file)
            self._dirty = False
        except OSError as problem:
            raise errors.Unavailable(
                f"the audit log cannot be written: {problem.strerror}",
                hint="administration waits until the disk has room again",
            ) from None

    def note(self, event: str, subject: str, **facts: str | int) -> None:
        """Records what was done; on the disk within a second or two (`sync`)."""
        minute = int(self._wall() // 60)
        if minute != self._minute:
            self._minute, seen = minute, self._seen
            self._seen = {}
            for (kind, user), count in seen.items():
                if count > MOST_A_MINUTE:
                    self._try("more of the same", user, {"event": kind, "count": count - MOST_A_MINUTE})
        key = (event, subject.partition("/")[0])  # labels are free to choose
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= MOST_A_MINUTE:
            self._try(event, subject, facts)

    def sync(self) -> None:
        """Makes durable what was noted."""
        if self._dirty:
            self._dirty = False
            try:
                os.fdatasync(self._file)
            except OSError:
                self._lost += 1

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        """(size of the log in bytes, up to `length` bytes from `offset`)."""
        with suppress(OSError):
            self._follow()
        return self._size, os.pread(self._file, max(0, min(length, self._size - offset)), offset)

    def _try(self, event: str, subject: str, facts: dict[str, str | int]) -> None:
        try:
            self._append(event, subject, facts)
            self._dirty = True
        except OSError:
            self._lost += 1

    def _append(self, event: str, subject: str, facts: dict[str, str | int]) -> None:
        if self._lost:
            lost, self._lost = self._lost, 0
            try:
                self._write("records lost", "kernel", {"count": lost})
            except OSError:
                self._lost = lost
                raise
        self._write(event, subject, facts)

    def _write(self, event: str, subject: str, facts: dict[str, str | int]) -> None:
        self._follow()
        short = {name: str(value)[:LONGEST_FACT] for name, value in facts.items()}
        record = chain.Record(self._seq + 1, round(self._wall(), 3), event, subject, short, self._head)
        line, digest = chain.seal(record)
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, self._size)  # half a record is none
            raise
        self._seq, self._head = record.seq, digest
        self._size += len(line)

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._close = weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._seq, self._head = 0, chain.GENESIS
        self._continue()

    def _follow(self) -> None:
        """Opens the file anew if the path leads to another one."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        was: dict[str, str | int] = {"records": self._seq, "head": self._head}
        close = self._close
        self._open()
        close()
        self._write("log replaced", "kernel", was)

    def _continue(self) -> None:
        """Takes the chain up where the file ends. What a power cut tore is cut off and told."""
        start = max(0, self._size - _TAIL_BYTES)
        tail = os.pread(self._file, self._size - start, start)
        whole = tail.rfind(b"\n") + 1
        torn = len(tail) - whole
        if torn:
            self._size = start + whole
            os.ftruncate(self._file, self._size)
        lines = tail[:whole].splitlines()
        if lines:
            try:
                last, self._head = chain.unseal(lines[-1])
                self._seq = last.seq
            except errors.Corrupt:
                # `verify` shows the damaged line, and that the chain begins anew behind it.
                self.note("damage found", "kernel")
        if torn:
            self.note("torn record cut off", "kernel", bytes=torn)
