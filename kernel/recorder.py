"""The flight recorder: the last decisions of the scheduler, so that a driver's death or a slow minute can be
looked into afterwards.

Numbers only, never a token or a text. Recording a step is one tuple a process and nothing is formatted before
somebody asks. Times are the kernel's clock, seconds since boot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from .devices import Flight

DUMP_PAUSE_S = 10.0
"""Dumps are written no more often than this: steps may fail in a row."""


class Push(msgspec.Struct, frozen=True):
    """`victim` gave `blocks` KV blocks to `claimant`, which ranks higher or for which it waits."""

    victim: int
    claimant: int
    blocks: int


class Work(msgspec.Struct, frozen=True, array_like=True):
    """What a step did for one process: `count` positions, or of an encoder texts, from `start`; a token if
    `sample`, guessing at most `draft` more a round."""

    pid: int
    start: int
    count: int
    sample: bool
    draft: int


class Decision(msgspec.Struct):
    """A step that was sent, to be repeated `rounds` times at most (what it was, once landed); `expected`
    seconds a round. Of `queue` processes that could run, those of `work` did; `pushed` lost their blocks for
    it or since the step before it. One that `overtakes` interrupted the one before it. `seconds` is the time
    on the device; `outcome` "flying", "done", "lost" with its worker, or the error that it ended with."""

    time: float
    device: str
    model: str
    ticket: int
    queue: int
    rows: int
    tokens: int
    rounds: int
    expected: float | None
    work: list[Work]
    pushed: list[Push]
    landed: float | None = None
    seconds: float | None = None
    outcome: str = "flying"
    overtakes: bool = False


class Recorder:
    """The ring. `pushes` counts over the whole life of the kernel."""

    def __init__(self, now: Callable[[], float], size: int) -> None:
        self._now = now
        self._ring: deque[Decision] = deque(maxlen=size)
        self._flying: dict[int, Decision] = {}
        self._pushed: list[Push] = []
        self._next_dump = 0.0
        self.pushes = 0

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._ring)

    def pushed(self, victim: int, claimant: int, blocks: int) -> None:
        """Books that somebody lost its blocks, on account of the step being planned."""
        self.pushes += 1
        self._pushed.append(Push(victim, claimant, blocks))

    def sent(self, device: str, flight: Flight, queue: int) -> None:
        """Books a step as it is sent, before its parts count as ahead."""
        work = [
            Work(p.process.pid, p.process.computed + p.process.ahead, p.count, p.sample, p.draft)
            for p in flight.parts
        ]
        work += [Work(one.process.pid, one.first, one.count, False, 0) for one in flight.texts]
        decision = Decision(
            self._now(),
            device,
            flight.pool.model,
            flight.ticket,
            queue,
            flight.rows,
            flight.tokens,
            flight.rounds,
            flight.pool.pace.expected(flight.rows, flight.tokens),
            work,
            self._pushed,
            overtakes=flight.overtakes,
        )
        self._pushed = []
        self._ring.append(decision)
        self._flying[flight.ticket] = decision

    def landed(self, ticket: int, seconds: float | None, outcome: str, rounds: int | None = None) -> None:
        """Books how a step ended, and after how many rounds."""
        if decision := self._flying.pop(ticket, None):
            decision.landed, decision.seconds, decision.outcome = self._now(), seconds, outcome
            decision.rounds = rounds or decision.rounds

    def dump_due(self) -> bool:
        """Whether a dump may be written now; then the next one has to wait."""
        if self._now() < self._next_dump:
            return False
        self._next_dump = self._now() + DUMP_PAUSE_S
        return True

    def text(self, limit: int | None = None) -> bytes:
        """JSON lines, oldest first: all, or the newest that fit into `limit` bytes."""
        lines: list[bytes] = []
        room = limit
        for decision in reversed(self._ring):
            line = msgspec.json.encode(decision) + b"\n"
            if room is not None:
                room -= len(line)
                if room < 0:
                    break
            lines.append(line)
        return b"".join(reversed(lines))
