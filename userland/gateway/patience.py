"""Work that nobody waits for takes the kernel's "not now" for what it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llmasos.syscalls import errors

R = TypeVar("R")

FIRST_S, LONGEST_S = 0.2, 10.0
"""Pauses between attempts: each is twice the one before it."""

NOT_NOW = (errors.Unavailable, errors.QueueFull, errors.QuotaExceeded, errors.TooManyProcesses)


async def patiently(attempt: Callable[[], Awaitable[R]], until: float) -> R:
    """The result of `attempt`, made again while the kernel is away or the caller's share is used up, until
    `until` (seconds since the epoch). Raises what the last one did."""
    pause = FIRST_S
    while True:
        try:
            return await attempt()
        except errors.TimedOut:
            raise  # the request's own deadline, which no second attempt changes
        except NOT_NOW as problem:
            pause = min(LONGEST_S, 2 * pause)
            wait = max(pause, min(60.0, float(problem.details.get("retry_after", 0))))
            if time.time() + wait > until:
                raise
            await asyncio.sleep(wait)
