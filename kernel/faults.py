"""How a bug is told to the log: its type and where it happened, never its text, which may quote a prompt."""

from __future__ import annotations

import resource
import sys
import traceback
from contextlib import suppress
from types import TracebackType


def tell(title: str, bug: BaseException) -> None:
    """Writes the frames of an exception to standard error."""
    frames = "".join(traceback.format_tb(bug.__traceback__))
    with suppress(OSError):
        print(f"llmasosd: {title}: {type(bug).__name__}\n{frames}", end="", file=sys.stderr, flush=True)


def keep_prompts_private() -> None:
    """For a process that holds prompts: an exception that ends it is told without its text, and no core file
    is written, which would hold everybody's. Children inherit the latter."""
    sys.excepthook = _ended
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _ended(kind: type[BaseException], bug: BaseException, trace: TracebackType | None) -> None:
    tell("ended by a bug", bug.with_traceback(trace))
