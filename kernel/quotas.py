"""What each owner may use of the machine: a tree of limits by owner path (tenant, user, agent).

A limit counts for an owner and all below it, and all limits on the way up count. They are charged before
memory is taken: processes and open infers when they come, input tokens with them. What is generated is booked
as it comes, so an infer that goes over runs to its end and the next ones wait for that. KV blocks are counted
where they are given out (claims.py), from the limits kept here.

Counts only: no clock of its own, no processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmasos.syscalls.errors import QuotaExceeded
from llmasos.syscalls.types import Quota, QuotaInfo

from .shares import paths

RETRY_S = 1.0
"""When to try again for what comes free when somebody ends, in seconds."""

_NONE = Quota()


@dataclass(slots=True)
class Bucket:
    """Tokens of so many a minute: full at first, never more than a minute's worth. It may owe."""

    level: float
    filled: float

    def fill(self, limit: int, now: float) -> None:
        self.level = min(float(limit), self.level + (now - self.filled) * limit / 60)
        self.filled = now


@dataclass(slots=True)
class Node:
    """One path: its limits, if it has any of its own, and what it and those below it use."""

    limit: Quota | None = None
    processes: int = 0
    infers: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)  # by the name of the limit

    def bucket(self, name: str, limit: int, now: float) -> Bucket:
        bucket = self.buckets.setdefault(name, Bucket(float(limit), now))
        bucket.fill(limit, now)
        return bucket

    def info(self, path: str, blocks: int, disk: int, now: float) -> QuotaInfo:
        """What a caller is told; `blocks` it holds on all devices, `disk` bytes."""
        left: dict[str, int] = {}
        for name in ("tokens_in", "tokens_out"):
            limit: int | None = getattr(self.limit, name, None)
            if limit is not None:
                left[name] = int(self.bucket(name, limit, now).level)
        return QuotaInfo(path, self.limit, blocks, self.processes, self.infers, disk, **left)


class Quotas:
    """The tree. `limits` by path come from the configuration."""

    def __init__(self, limits: Mapping[str, Quota]) -> None:
        self._nodes: dict[str, Node] = {}
        self.limited = False
        self.configure({}, limits)

    def configure(self, before: Mapping[str, Quota], limits: Mapping[str, Quota]) -> list[str]:
        """The configuration has other limits than before; what was set by a call stays, but where it has.
        Returns those paths."""
        changed = [path for path in {**before, **limits} if before.get(path) != limits.get(path)]
        for path in changed:
            self.set(path, limits.get(path))
        return changed

    def set(self, path: str, limit: Quota | None) -> None:
        """Replaces the limits of a path; None: it has none of its own."""
        node = self._nodes.setdefault(path, Node())
        node.limit = limit
        node.buckets.clear()
        self._forget(path, node)
        self.limited = any(node.limit is not None for node in self._nodes.values())

    def nodes(self) -> list[tuple[str, Node]]:
        """Every path that has limits or uses something."""
        return sorted(self._nodes.items())

    def weight(self, tenant: str) -> float:
        return self._limit(tenant).weight

    def limits_of(self, owner: str) -> list[tuple[str, Quota]]:
        """The limits that count for an owner, by path, the tenant's first."""
        if not self.limited:
            return []
        found = ((path, self._nodes.get(path)) for path in paths(owner))
        return [(path, node.limit) for path, node in found if node is not None and node.limit is not None]

    def processes(self, path: str) -> int:
        node = self._nodes.get(path)
        return node.processes if node else 0

    def room_for(self, owner: str, count: int) -> None:
        """Raises QuotaExceeded when `count` processes more are too many."""
        for path, limit in self.limits_of(owner):
            if limit.processes is not None and self._nodes[path].processes + count > limit.processes:
                raise exceeded(path, "processes", limit.processes, RETRY_S)

    def born(self, owner: str, count: int = 1) -> None:
        """A process is there; with -1 it is gone."""
        for path in paths(owner):
            node = self._nodes.setdefault(path, Node())
            node.processes += count
            self._forget(path, node)

    def start(self, owner: str, tokens: int, now: float) -> Callable[[], None]:
        """Charges an infer with so many tokens of input; returns what is to be called when it is over. Raises
        QuotaExceeded, and nothing is charged then."""
        taken: list[Bucket] = []
        for path, limit in self.limits_of(owner):
            node = self._nodes[path]
            if limit.queue is not None and node.infers >= limit.queue:
                raise exceeded(path, "queue", limit.queue, RETRY_S)
            if limit.tokens_in is not None:
                bucket = node.bucket("tokens_in", limit.tokens_in, now)
                lacking = min(tokens, limit.tokens_in) - bucket.level
                if lacking > 0:
                    raise exceeded(path, "tokens_in", limit.tokens_in, 60 * lacking / limit.tokens_in)
                taken.append(bucket)
            if limit.tokens_out is not None:
                lacking = 1 - node.bucket("tokens_out", limit.tokens_out, now).level
                if lacking > 0:
                    raise exceeded(path, "tokens_out", limit.tokens_out, 60 * lacking / limit.tokens_out)
        for bucket in taken:
            bucket.level -= tokens
        for path in paths(owner):
            self._nodes.setdefault(path, Node()).infers += 1
        open_ = True

        def over() -> None:
            nonlocal open_
            if open_:
                open_ = False
                for path in paths(owner):
                    node = self._nodes[path]
                    node.infers -= 1
                    self._forget(path, node)

        return over

    def generated(self, owner: str, tokens: int, now: float) -> None:
        """Books tokens that came out."""
        for path, limit in self.limits_of(owner):
            if limit.tokens_out is not None:
                self._nodes[path].bucket("tokens_out", limit.tokens_out, now).level -= tokens

    def _limit(self, path: str) -> Quota:
        node = self._nodes.get(path)
        return node.limit if node is not None and node.limit is not None else _NONE

    def _forget(self, path: str, node: Node) -> None:
        if node.limit is None and not node.processes and not node.infers:
            self._nodes.pop(path, None)


def exceeded(path: str, what: str, limit: int, retry_after: float) -> QuotaExceeded:
    """The error for a limit; `retry_after` in seconds."""
    return QuotaExceeded(
        f"{path} has used its quota of {limit} {what}",
        hint=f"try again in {retry_after:.1f} s, or see `llsh quota`",
        path=path,
        quota=what,
        limit=limit,
        retry_after=round(retry_after, 3),
    )
