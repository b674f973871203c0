"""Short turns at the processors, for threads that mostly wait for messages (Linux 6.12 and later).

Whoever is woken while all processors compute waits for the end of a turn, 3 to 4 ms, at every hop of a
message; who takes short turns himself goes at once. Everybody may ask for that. Who computes is only
interrupted more often by it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SHORT_NS = 100_000
"""The least that Linux takes."""

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


def short() -> None:
    """The calling thread takes short turns, and threads and processes that it starts from now on. Its policy
    and nice value stay; where the system does not know of this nothing happens."""
    _take(SHORT_NS)


@contextmanager
def ordinary() -> Iterator[None]:
    """Meanwhile a thread of short turns takes those of everybody, for who is started then to have them."""
    _take(0)
    try:
        yield
    finally:
        _take(SHORT_NS)


def _take(nanoseconds: int) -> None:
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    # struct sched_attr of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period.
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)
