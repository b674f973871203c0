"""Which requests were charged for their input, so that a client that lost its connection is not charged again
when it asks for the rest of an answer, and nobody else is let off by saying so.
"""

from __future__ import annotations

MOST_KNOWN = 1024
"""Requests of one session that are remembered, the newest: those that are open, or were when it broke off."""

MOST_TIMES = 16
"""So often a request that was charged once may come again: each time it may be computed anew."""


class Charges:
    """`trusting`: until then clients of an earlier kernel come back, whose charges are not known any more."""

    def __init__(self, trusting: float) -> None:
        self._trusting = trusting
        self._known: dict[bytes, dict[int, int]] = {}

    def made(self, key: bytes, id_: int) -> None:
        """The request of a session was let in."""
        known = self._known.setdefault(key, {})
        known[id_] = known.pop(id_, 0) + 1
        if len(known) > MOST_KNOWN:
            del known[next(iter(known))]

    def answered(self, key: bytes, id_: int) -> None:
        """Whoever uses its number again asks for something else."""
        known = self._known.get(key, {})
        known.pop(id_, None)
        if not known:
            self.forget(key)

    def forget(self, key: bytes) -> None:
        """The session does not come back."""
        self._known.pop(key, None)

    def knows(self, key: bytes, id_: int, now: float) -> bool:
        """Whether the request comes again and was charged."""
        return now < self._trusting or 0 < self._known.get(key, {}).get(id_, 0) <= MOST_TIMES
