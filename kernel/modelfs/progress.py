"""What an importer tells the kernel on its standard output: one JSON object a line.

{"phase": …, "file": …, "done": bytes, "total": bytes, 0 if unknown}    at most ten a second
{"ok": {…}} or {"error": {code, message, hint, details}}                last
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

INTERVAL_S = 0.1


class Progress:
    """Writes progress lines; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0.0
        self._phase = ""

    def show(self, phase: str, file: str = "", done: int = 0, total: int = 0) -> None:
        """Tells how far `phase` is; left out when the last line is too fresh, unless a phase begins."""
        with self._lock:
            now = time.monotonic()
            if phase == self._phase and now - self._last < INTERVAL_S:
                return
            self._phase, self._last = phase, now
            self._write({"phase": phase, "file": file, "done": done, "total": total})

    def end(self, outcome: dict[str, Any]) -> None:
        """The last line."""
        with self._lock:
            self._write(outcome)

    @contextmanager
    def watching(self, phase: str, file: str, total: int, size: Callable[[], int]) -> Iterator[None]:
        """Shows `size()` as progress until the block ends: for downloads by others into a file that grows."""
        ended = threading.Event()

        def watch() -> None:
            shown = 0
            while not ended.wait(INTERVAL_S):
                if (done := size()) == shown:
                    continue
                shown = done
                self.show(phase, file, min(done, total) if total else done, total)

        self.show(phase, file, 0, total)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _write(self, line: dict[str, Any]) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()
