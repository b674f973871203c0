"""Who could run on one resident model, or train on one device, in the order in which they go; a decision
costs O(log n) for each process that it takes.

Order: a class that has waited for too long, then the classes; inside a class the tenant with the least
counter (shares.py), among equals the one who became busy last, for he was lifted to the other's counter;
inside a tenant who is in memory before who is not (claims.py tells how many get in), then the process with
the least weighted service (nice), among equals those whose prompt shares the longest computed prefix, among
the arrivals of a moment, then by age. While a decision takes processes each is counted as served at once, so
that a step is divided between the tenants too.

What a process could do follows from its facts (`Process.runnable`): whoever changes them calls `touch`. A
process that is found not to be runnable when its turn comes is dropped until it is touched again.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .process import CLASS_RANK, Process
from .shares import CLASSES, Shares

CACHE_WINDOW_S = 0.25
"""Processes that arrived within so long of each other count as equally old: the longest cached prefix goes
first among them. It bounds what a cached prefix can gain."""

MANY = 256
PLACES_S = 0.5
"""Places in a queue of more than MANY are found anew so often at most: it costs O(n log n)."""

_Entry = tuple[bool, float, int, int, int, int, Process]
_Offer = tuple[float, int, int, "_Line"]


@dataclass(slots=True, eq=False)
class _Line:
    """A tenant's processes in one class: those that could run by the order in which they go, and `busy`, all
    that could or are in a step. `offer` is its valid entry among the tenants."""

    rank: int
    tenant: str
    heap: list[_Entry] = field(default_factory=list)
    busy: set[Process] = field(default_factory=set)
    since: int = 0  # the later it became busy, the greater
    least: float = 0.0  # weighted service of the busy ones, when the line was last chosen
    taken: float = 0.0  # by the decision that goes on
    offer: _Offer | None = None


class RunQueue:
    """The runnable processes of one pool. `now` is the kernel's clock."""

    def __init__(self, shares: Shares, now: Callable[[], float]) -> None:
        self.shares = shares
        self._now = now
        self._lines: dict[tuple[int, str], _Line] = {}
        self._offers: list[list[_Offer]] = [[] for _ in range(CLASSES)]
        self._entries: dict[Process, _Entry] = {}
        self._homes: dict[Process, _Line] = {}
        self._busy = [0] * CLASSES
        self._taken: dict[Process, None] = {}  # by the decision that goes on, in order
        self._passed: list[_Line] = []  # of which it takes nobody more
        self._places: dict[int, int] = {}
        self._places_at = float("-inf")
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many could run, those included that the decision has taken."""
        return len(self._entries) + len(self._taken)

    def __iter__(self) -> Iterator[Process]:
        """In no order."""
        return itertools.chain(self._entries, self._taken)

    def touch(self, process: Process) -> None:
        """Something about a process changed that may let it run, or keep it from it."""
        if process in self._taken:
            return  # `settle` looks at it
        if process.runnable:
            self._put(process)
            return
        self._entries.pop(process, None)
        if not process.flights:
            self._leave(process)

    def take(self, aging_s: float, cost: Callable[[Process], float]) -> Iterator[Process]:
        """Takes processes out, in order; `settle` puts them back. `cost` estimates in seconds what each gets
        of the step. A class that had something to do and got nothing for `aging_s` seconds goes first."""
        for rank in sorted(range(CLASSES), key=lambda rank: not self._aged(rank, aging_s)):
            first = True
            while (line := self._first_line(rank)) is not None:
                process = self._pop(line)
                if process is None:
                    continue
                if first:
                    self.shares.chosen(rank, line.tenant)
                    first = False
                if not line.taken:
                    line.least = max(line.least, (process.beam_of or process).vruntime)
                line.taken += cost(process) / self.shares.weight(line.tenant)
                self._taken[process] = None
                self._offer(line)
                yield process

    def pass_over(self, process: Process) -> None:
        """The decision that goes on takes nobody more of this process's tenant in its class."""
        line = self._homes[process]
        if line.offer is not None:
            line.offer = None
            self._passed.append(line)

    def settle(self) -> None:
        """The decision is over: what was taken and could run on is put back."""
        passed, self._passed = self._passed, []
        for each in passed:
            self._offer(each)
        taken, self._taken = self._taken, {}
        for process in taken:
            line = self._homes.get(process)
            if line is not None and line.taken:
                line.taken = 0.0
                self._offer(line)
        for process in taken:
            self.touch(process)

    def head(self, aging_s: float) -> tuple[bool, int, float, int] | None:
        """What tells how early the first process goes, among the pools of a device; None: nobody."""
        process = next(self.take(aging_s, lambda _: 0.0), None)
        if process is None:
            return None
        line = self._homes[process]
        self.settle()
        counter = self.shares.counter(line.rank, line.tenant)
        return (not self._aged(line.rank, aging_s), line.rank, counter, process.pid)

    def places(self, aging_s: float, cost: Callable[[Process], float]) -> dict[int, int]:
        """Places from 1, by pid, of those that could run and are not in a step."""
        if len(self) > MANY and self._now() < self._places_at + PLACES_S:
            return self._places
        waiting = (process.pid for process in self.take(aging_s, cost) if not process.flights)
        self._places, self._places_at = {pid: place for place, pid in enumerate(waiting, 1)}, self._now()
        self.settle()
        return self._places

    def leave(self, process: Process) -> None:
        """Its infer is over."""
        self._entries.pop(process, None)
        self._leave(process)

    def _aged(self, rank: int, aging_s: float) -> bool:
        return bool(self._busy[rank]) and self._now() - self.shares.served[rank] >= aging_s

    def _put(self, process: Process) -> None:
        head = process.beam_of or process
        key = (CLASS_RANK[head.sched_class], head.tenant)
        line = self._homes.get(process)
        if line is None or (line.rank, line.tenant) != key:
            if line is not None:
                self._entries.pop(process, None)
                self._leave(process)
            line = self._join(process, key)
        entry = self._entries.get(process)
        outside = head not in process.pool.admitted
        if entry is not None and entry[:2] == (outside, head.vruntime):
            return
        arrived, prefix = (head.infer.arrived, head.infer.prefix) if head.infer else (head.born, 0)
        moment, number = int(arrived / CACHE_WINDOW_S), next(self._numbers)
        entry = (outside, head.vruntime, moment, -prefix, process.pid, number, process)
        self._entries[process] = entry
        heapq.heappush(line.heap, entry)
        if line.offer is None:
            self._offer(line)

    def _join(self, process: Process, key: tuple[int, str]) -> _Line:
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(*key)
        if not line.busy:
            self.shares.lift(*key)
            line.since = next(self._numbers)
        if not self._busy[line.rank]:
            self.shares.served[line.rank] = max(self.shares.served[line.rank], self._now())
        head = process.beam_of or process
        least = max(line.least, line.heap[0][1]) if line.heap else line.least
        head.vruntime = max(head.vruntime, least)
        line.busy.add(process)
        self._busy[line.rank] += 1
        self._homes[process] = line
        return line

    def _leave(self, process: Process) -> None:
        line = self._homes.pop(process, None)
        if line is not None:
            line.busy.discard(process)
            self._busy[line.rank] -= 1

    def _offer(self, line: _Line) -> None:
        """Enters a line among the tenants of its class, where it belongs now."""
        counter = self.shares.counter(line.rank, line.tenant) + line.taken
        line.offer = (counter, -line.since, next(self._numbers), line)
        heapq.heappush(self._offers[line.rank], line.offer)

    def _first_line(self, rank: int) -> _Line | None:
        """Takes the line of the tenant that goes first out of its class."""
        offers = self._offers[rank]
        while offers:
            offer = heapq.heappop(offers)
            line = offer[-1]
            if line.offer is not offer:
                continue  # it was entered anew
            line.offer = None
            if self.shares.counter(rank, line.tenant) + line.taken > offer[0]:
                self._offer(line)  # it was served, here or in another pool
                continue
            return line
        return None

    def _pop(self, line: _Line) -> Process | None:
        """Takes the first process out of a line."""
        while line.heap:
            entry = heapq.heappop(line.heap)
            process = entry[-1]
            if self._entries.get(process) is not entry:
                continue
            del self._entries[process]
            head = process.beam_of or process
            now = (head not in process.pool.admitted, head.vruntime)
            if not process.runnable or now > entry[:2]:
                self.touch(process)
                continue
            return process
        return None
