"""When clients must wait outside: descriptors and memory of the process. Policy over two readings.

libzmq aborts the process when descriptors run out on a local socket, and takes memory without bound for a
message of endless parts, which no limit of its own stops (both measured: docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import enum
import os
import resource
from contextlib import suppress

SHUT_PERIOD_S = 0.1
OPEN_PERIOD_S = 0.25
RESERVE = 8192
"""Descriptors beyond the sessions': for connections that have not shaken hands and last a second at most.
Where so many may be open, a flood of them ends by itself and costs nobody his connection."""

MOST_ARRIVALS = 64
"""After so many connections the readings are taken at once."""


class Verdict(enum.Enum):
    OPEN = "open"  # accept
    SHUT = "shut"  # throw everybody out, and accept nobody until they have left
    DROP = "drop"  # throw everybody out and free what was held for them: memory of no one we could name


class Guard:
    """Accepts while fewer than `most_fds` descriptors are open, and again when a quarter of them are free;
    throws everybody out when more than `most_bytes` are resident."""

    def __init__(self, most_fds: int, most_bytes: int) -> None:
        self._most_fds = most_fds
        self._most_bytes = self._limit = most_bytes
        self._shut = False
        self._dropped = False

    def judge(self, fds: int, resident: int) -> Verdict:
        if self._dropped:
            # What the allocator did not give back must not throw everybody out again and again.
            self._limit = max(self._most_bytes, resident + self._most_bytes // 4)
            self._dropped = False
        if resident > self._limit:
            self._dropped = True
            return Verdict.DROP
        self._shut = fds >= (self._most_fds * 3 // 4 if self._shut else self._most_fds)
        return Verdict.SHUT if self._shut else Verdict.OPEN


def most_descriptors(max_sessions: int) -> int:
    """How many may be open before connections are refused: far below the process's limit, for libzmq's thread
    goes on accepting until it is told."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(max_sessions + RESERVE, soft // 2)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Has the C library return what it holds of freed memory (glibc; others do it by themselves)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
