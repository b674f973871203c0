"""The screen: stdout for results, stderr for everything said beside them.

Owns what a terminal decides: colours (NO_COLOR), width, whether a spinner makes sense, and the cleaning of
text that others wrote. Never talks to the kernel.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from llmasos.syscalls.errors import LLMasOSError

from .table import Table

if TYPE_CHECKING:
    from rich.console import Console

# Everything that can move the cursor or start an escape sequence, but newline and tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """`text` without control characters: a model or another tenant must not drive this terminal."""
    return _CONTROL.sub("", text)


def plain_wanted() -> bool:
    """Whether the user asked for no colours (no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


class Terminal:
    """Where one command writes. `out` and `err` default to the process's own streams."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err

    @functools.cached_property
    def out_console(self) -> Console:
        return _console(self.out)

    @functools.cached_property
    def err_console(self) -> Console:
        return _console(self.err)

    @property
    def is_tty(self) -> bool:
        """Whether a person reads what is written."""
        return self.out.isatty()

    def write(self, text: str) -> None:
        """Result text as it comes, without a newline of its own."""
        self.out.write(clean(text) if self.is_tty else text)
        self.out.flush()

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def data(self, data: bytes) -> None:
        """A file's bytes: untouched in a pipe, as readable text on a terminal."""
        binary = getattr(self.out, "buffer", None)
        if self.is_tty or binary is None:
            self.write(data.decode("utf-8", "replace"))
            return
        self.out.flush()
        binary.write(data)
        binary.flush()

    def document(self, value: Any) -> None:
        """One JSON document (or one line of a JSON stream) on stdout."""
        self.out.write(msgspec.json.encode(value).decode() + "\n")
        self.out.flush()

    def table(self, table: Table) -> None:
        """Fitted and coloured on a terminal, whole and plain in a pipe."""
        if not self.is_tty:
            self.write(table.plain())
            return
        self.out_console.print(table.fitted(self.out_console.width))

    def say(self, text: str) -> None:
        """A remark for the person, on stderr."""
        self.err.write(clean(text) + "\n")
        self.err.flush()

    def fail(self, message: str, hint: str = "") -> None:
        """`llsh: message`, and what to do next in a second line."""
        self.say(f"llsh: {message}")
        if hint:
            self.say(f"hint: {hint}")

    def fail_with(self, error: LLMasOSError) -> None:
        self.fail(error.message, error.hint)

    @contextlib.contextmanager
    def spinner(self, text: str, *, beside: bool | None = None) -> Iterator[Spinner]:
        """Turns on stderr until the block ends or `stop` is called; silent where nobody looks. `beside`: what
        is written meanwhile leaves it room; without it that is so on a terminal."""
        shown = (self.is_tty if beside is None else beside) and self.err.isatty()
        spinner = Spinner(self.err_console if shown else None, text)
        try:
            yield spinner
        finally:
            spinner.stop()


class Spinner:
    """A turning sign that waits for the first word."""

    def __init__(self, console: Console | None, text: str) -> None:
        self._status = console.status(f"[dim]{text}[/dim]", spinner="dots") if console else None
        if self._status:
            self._status.start()

    def say(self, text: str) -> None:
        """Turns beside another text."""
        if self._status:
            self._status.update(f"[dim]{text}[/dim]")

    def stop(self) -> None:
        """Clears the line. Harmless when called twice."""
        if self._status:
            self._status.stop()
            self._status = None


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    plain = plain_wanted() or not stream.isatty()
    return Console(file=stream, highlight=False, color_system=None if plain else "auto", soft_wrap=False)
