"""How much of one device each tenant has had: virtual token counters.

After VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a counter for each tenant
and class grows by what the tenant is served, divided by its weight; who has the least goes next; and who
becomes busy again is lifted to the least of those that are, so that having been away is no credit. Service is
counted in seconds of the device, as it was measured: a prompt's token costs another part of it than a row.

Counts only: knows no process, takes no decision.
"""

from __future__ import annotations

from collections.abc import Callable

from llmasos.syscalls.types import SchedClass

CLASSES = len(SchedClass)


def tenant_of(owner: str) -> str:
    """Whose share an owner's work is: the first component of its path."""
    return owner.partition("/")[0]


def paths(owner: str) -> list[str]:
    """An owner's path and those above it, the tenant first."""
    parts = owner.split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def is_below(owner: str, path: str) -> bool:
    """Whether `path` is the owner or above it."""
    return owner == path or owner.startswith(path + "/")


class Shares:
    """Counters of one device, in seconds by weight. `weight` tells a tenant's weight, above 0."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self.weight = weight
        self.served = [float("-inf")] * CLASSES  # when each class was last in a step, or had nothing to do
        self._counters: dict[tuple[int, str], float] = {}
        self._least = [0.0] * CLASSES  # of the busy ones, when somebody was last chosen

    def counter(self, rank: int, tenant: str) -> float:
        return self._counters.get((rank, tenant), 0.0)

    def lift(self, rank: int, tenant: str) -> None:
        """The tenant becomes busy in a class."""
        key = (rank, tenant)
        self._counters[key] = max(self._counters.get(key, 0.0), self._least[rank])

    def chosen(self, rank: int, tenant: str) -> None:
        """The tenant is the one of its class that goes first now."""
        self._least[rank] = max(self._least[rank], self.counter(rank, tenant))

    def charge(self, rank: int, tenant: str, seconds: float, now: float) -> None:
        """The tenant is served."""
        key = (rank, tenant)
        self._counters[key] = self._counters.get(key, 0.0) + seconds / self.weight(tenant)
        self.served[rank] = now
