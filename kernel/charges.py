"""Which requests were charged for their input, so that a client that lost its connection is not charged again
when it asks for the rest of an answer, and nobody else is let off by saying so.
"""

from __future__ import annotations

from collections import OrderedDict

MOST_KNOWN = 8192
"""Requests that are remembered, the newest."""

MOST_TIMES = 16
"""So often a request that was charged once may come again: each time it may be computed anew."""


class Charges:
    """`trusting`: until then clients of an earlier kernel come back, whose charges are not known any more."""

    def __init__(self, trusting: float) -> None:
        self._trusting = trusting
        self._known: OrderedDict[tuple[bytes, int], int] = OrderedDict()

    def made(self, key: bytes, id_: int) -> None:
        """The request of a session was let in."""
        self._known[key, id_] = self._known.get((key, id_), 0) + 1
        self._known.move_to_end((key, id_))
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def answered(self, key: bytes, id_: int) -> None:
        """Whoever uses its number again asks for something else."""
        self._known.pop((key, id_), None)

    def knows(self, key: bytes, id_: int, now: float) -> bool:
        """Whether the request comes again and was charged."""
        return now < self._trusting or 0 < self._known.get((key, id_), 0) <= MOST_TIMES
