"""Python's search for garbage that its counts do not free, which stops a process that serves."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Has Python search less often: nearly all garbage is freed by its counts, and where many requests are
    open a search is the longest pause there is. What is there now is never looked at again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
