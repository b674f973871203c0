"""What the kernel wants done to the world: the I/O shell carries these out (and `sessions.Send`)."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from llmasos.drivers import base

from .sessions import Send


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Effect: a message for the worker behind a bus connection."""

    worker: int
    message: base.ToWorker


@dataclass(frozen=True, slots=True)
class KillWorker:
    """Effect: a worker that broke the protocol, or hangs, is sent a signal (the supervisor starts
    another)."""

    pid: int
    number: int = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Dump:
    """Effect: the flight recorder's lines are kept as a file of the home folder, named after `why`."""

    why: str
    lines: bytes


@dataclass(frozen=True, slots=True)
class Exited:
    """Effect: the kernel is done; the process ends with code 0."""


Effect = Send | ToWorker | KillWorker | Dump | Exited
