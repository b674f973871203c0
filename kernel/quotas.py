"""What each owner may use of the machine: a tree of limits by owner path (tenant, user, agent)."""

from __future__ import annotations

from collections.abc import Mapping

from llmasos.syscalls.types import Quota

from .shares import paths


class Quotas:
    def __init__(self, limits: Mapping[str, Quota]) -> None:
        self._limits = dict(limits)

    def weight(self, tenant: str) -> float:
        limit = self._limits.get(tenant)
        return limit.weight if limit else 1.0

    def limits_of(self, owner: str) -> list[tuple[str, Quota]]:
        """The limits that count for an owner, by path, the tenant's first."""
        if not self._limits:
            return []
        return [(path, self._limits[path]) for path in paths(owner) if path in self._limits]
