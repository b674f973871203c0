"""When something is due. A timer that is called off costs nothing for long: the heap is cleaned when half of
it is dead, so clients that set and cancel timeouts cannot make it grow.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator


class Timers:
    """Calls by time, on whatever clock the caller uses."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._calls: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, call: Callable[[], None]) -> Callable[[], None]:
        """Returns what calls the timer off; calling that again, or too late, does nothing."""
        number = next(self._numbers)
        self._calls[number] = call
        heapq.heappush(self._heap, (when, number))

        def call_off() -> None:
            self._calls.pop(number, None)
            if len(self._heap) > 2 * len(self._calls) + 64:
                self._heap = [entry for entry in self._heap if entry[1] in self._calls]
                heapq.heapify(self._heap)

        return call_off

    def due(self, now: float) -> Iterator[Callable[[], None]]:
        """What is due, first to last, each removed as it is given."""
        while self._heap and self._heap[0][0] <= now:
            _, number = heapq.heappop(self._heap)
            call = self._calls.pop(number, None)
            if call is not None:
                yield call

    def next(self) -> float | None:
        """When the next timer is due."""
        while self._heap and self._heap[0][1] not in self._calls:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
