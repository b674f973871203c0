"""The kernel log: a bounded ring of lines and who reads it. Never holds prompt or completion text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llmasos.syscalls import wire
from llmasos.syscalls.table import Done
from llmasos.syscalls.types import LogLine

from .sessions import Request, Sessions

LONGEST_LINE = 1000


class Log:
    """Lines numbered from 1; `now` is the kernel's clock in seconds since boot."""

    def __init__(self, now: Callable[[], float], size: int) -> None:
        self._now = now
        self._lines: deque[LogLine] = deque(maxlen=size)
        self._last = 0
        self.changed: Callable[[], None] = lambda: None

    def write(self, level: str, text: str) -> None:
        """Adds a line. What names and addresses bring in is made harmless to terminals and bounded."""
        self._last += 1
        text = text[:LONGEST_LINE]
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        self._lines.append(LogLine(seq=self._last, time=round(self._now(), 6), level=level, text=text))
        self.changed()

    def info(self, text: str) -> None:
        self.write("info", text)

    def warn(self, text: str) -> None:
        self.write("warn", text)

    def after(self, seq: int) -> list[LogLine]:
        return [line for line in self._lines if line.seq > seq]


@dataclass(slots=True, eq=False)
class _Reader:
    request: Request
    last: int
    follow: bool
    credits: int
    seq: int = 0


class Readers:
    """The `dmesg` calls being served. A reader that is slower than the ring misses lines, and sees it by
    their numbers."""

    def __init__(self, log: Log, sessions: Sessions) -> None:
        self._log = log
        self._sessions = sessions
        self._readers: list[_Reader] = []
        log.changed = self._changed

    def start(self, request: Request, after: int, follow: bool, credits_: int) -> None:
        reader = _Reader(request, after, follow, credits_)
        self._readers.append(reader)
        self._sessions.on_cancel(request, lambda: self._stop(reader))
        self._sessions.on_credit(request, lambda n: self._credit(reader, n))
        self._serve(reader)

    def _changed(self) -> None:
        for reader in list(self._readers):
            self._serve(reader)

    def _credit(self, reader: _Reader, n: int) -> None:
        reader.credits = min(reader.credits + n, wire.MAX_CREDITS)
        self._serve(reader)

    def _serve(self, reader: _Reader) -> None:
        lines = self._log.after(reader.last)
        for line in lines[: reader.credits]:
            self._sessions.item(reader.request, reader.seq, line)
            reader.seq += 1
            reader.credits -= 1
            reader.last = line.seq
        if not reader.follow and (not lines or lines[-1].seq == reader.last):
            self._stop(reader)

    def _stop(self, reader: _Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            self._sessions.reply(reader.request, Done())
