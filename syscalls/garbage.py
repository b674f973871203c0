"""Python's search for garbage that its counts do not free, which stops a process that serves."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def collect_rarely() -> None:
    """Has Python search less often: nearly all garbage is freed by its counts, and where many requests are
    open a search is the longest pause there is. What is there now is never looked at again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of torch and transformers, which make a million things that stay: half of the time went
    into looking for garbage among them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()
