"""Whose claim to a pool's memory is the stronger, who is let in, whose blocks are taken; for one decision.

A process is let in when the pool holds what it has to compute, what it will soon generate, and the same of
all that are in already; else it waits in the queue, and who comes after it in its class waits too. So blocks
are taken from a running process only when forecasts were wrong, or for somebody with a stronger claim: of a
stronger class; or of a tenant below its guaranteed blocks or its fair part of the pool, from one that is
above its own. Who lost its blocks keeps the next ones until it has made progress.

Every decision has one order of claims, so whoever is first in it always finds room.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from llmasos.syscalls.types import BLOCK_TOKENS

from .memory import blocks_for
from .process import CLASS_RANK, Process
from .shares import is_below, paths

if TYPE_CHECKING:
    from .devices import Pool
    from .quotas import Quotas

GROWTH_TOKENS = 256
"""So many tokens ahead of what it has a running process is counted on to need room, at most."""

PROGRESS_TOKENS = 16
"""So many tokens a process that lost its blocks generates before it may lose them again to its equals."""

Claim = tuple[int, int, int, int, int]


class Claims:
    """The claims to `pool` as they are when the decision begins."""

    def __init__(self, pool: Pool, quotas: Quotas, slots: int, pushes: bool = True) -> None:
        """`slots` are as many as a step serves. `pushes`: others may lose their blocks."""
        self._pool = pool
        self._quotas = quotas
        self._slots = slots
        self._pushes = pushes
        self._used: dict[str, int] | None = None  # blocks by owner path, those below it included
        self._fair: dict[str, float] = {}
        self._promised: int | None = None
        self._let_in: dict[Process, int] = {}  # by this decision, and not in yet: blocks that each will take
        self._coming = 0  # the sum of them
        self._served: Counter[tuple[int, str]] | None = None  # those in, by class and tenant
        self.lacks = "memory"  # what who was not let in last has to wait for
        self._closed = len(CLASS_RANK)  # the strongest class of which somebody was not let in

    def claim(self, process: Process) -> Claim:
        """The smaller, the stronger. Age decides at last, so that two never push each other out in turn;
        beams stand together, with their leader."""
        head = process.beam_of or process
        return (CLASS_RANK[head.sched_class], self._standing(process), head.nice, head.pid, process.pid)

    def lets_in(self, process: Process) -> bool:
        """Whether the process may take blocks: it is in, or there is room for it now. Who is let in counts as
        in from then on."""
        pool, head = self._pool, process.beam_of or process
        if head in pool.admitted or head in self._let_in:
            return True
        inside = len(pool.admitted) + len(self._let_in)
        rank = CLASS_RANK[head.sched_class]
        if not inside:
            return self._count(head, needed(head))
        self.lacks = "memory"
        if rank >= self._closed:
            return False
        need = needed(head)
        if self._fills_quota(head, need):
            self.lacks = "quota"
            return False
        if inside >= self._slots and self._has_its_slots(head, rank):
            self.lacks = "turn"
            return False
        room = pool.memory.free - need
        if room - self._coming >= inside * (blocks_for(GROWTH_TOKENS) + 1):
            return self._count(head, need)
        if self._promised is None:
            self._promised = sum(needed(p) for p in pool.admitted) + self._coming
        if room < self._promised:
            claim = self.claim(process)
            for p in self._holders():
                if p is not process and (waits(p) or self._yields(p, self.claim(p), claim, rank)):
                    room += len(p.table.blocks) + (needed(p) if p in pool.admitted else 0)
            if room < self._promised:
                self._closed = rank
                return False
        return self._count(head, need)

    def _count(self, head: Process, need: int) -> bool:
        """Counts a process as in."""
        self._let_in[head] = need
        self._coming += need
        if self._promised is not None:
            self._promised += need
        if self._served is not None:
            self._served[CLASS_RANK[head.sched_class], head.tenant] += 1
        return True

    def admit(self, process: Process) -> None:
        """The process has its blocks."""
        head = process.beam_of or process
        self._pool.admitted.add(head)
        self._coming -= self._let_in.pop(head, 0)

    def victim(
        self,
        claimant: Process,
        planned: set[int],
        *,
        flying: bool = False,
        force: bool = False,
        path: str = "",
    ) -> Process | None:
        """Whose blocks `claimant` may take: of those that hold blocks, are not in the step being planned and
        have the weaker claim or wait for somebody, first the waiting ones, then the weakest. None: nobody.

        `flying`: of those that are in flight instead, whose blocks may not be taken before they have landed.
        `force`: of those, too, that have made no progress yet. `path`: of this owner and those below it.
        """
        if not self._pushes:
            return None
        claim, rank = self.claim(claimant), CLASS_RANK[(claimant.beam_of or claimant).sched_class]
        best: tuple[bool, Claim] | None = None
        found = None
        for p in self._holders():
            if p is claimant or p.pid in planned or bool(p.flights) != flying:
                continue
            if path and not is_below(p.owner, path):
                continue
            theirs, waiting = self.claim(p), waits(p)
            weaker = theirs > claim if force or path else self._yields(p, theirs, claim, rank)
            if not (waiting or weaker or _waits_for(p, claimant)):
                continue
            if best is None or (waiting, theirs) > best:
                best, found = (waiting, theirs), p
        return found

    def over(self, process: Process, count: int) -> str:
        """The owner path whose most blocks would be exceeded by `count` more of `process`, or ""."""
        for path, limit in self._quotas.limits_of(process.owner):
            if limit.kv_max is not None and self._usage().get(path, 0) + count > limit.kv_max:
                return path
        return ""

    def took(self, process: Process, count: int) -> None:
        """The process has `count` blocks more than when the decision began, or fewer."""
        if self._used is not None and count:
            for path in paths(process.owner):
                self._used[path] = self._used.get(path, 0) + count

    def _has_its_slots(self, process: Process, rank: int) -> bool:
        """Whether a tenant has its part of a step's places, as far as no stronger class has them: more would
        only make all of its own slower."""
        if self._served is None:
            inside = itertools.chain(self._pool.admitted, self._let_in)
            self._served = Counter((CLASS_RANK[p.sched_class], p.tenant) for p in inside)
        tenant = process.tenant
        peers = {one for of, one in self._served if of <= rank} | {tenant}
        whole = sum(self._quotas.weight(one) for one in peers)
        own = sum(self._served[of, tenant] for of in range(rank + 1))
        return own >= max(1, self._slots * self._quotas.weight(tenant) / whole)

    def _fills_quota(self, process: Process, need: int) -> bool:
        """Whether an owner would have more than its most blocks, with what those of it that are in need."""
        for path, limit in self._quotas.limits_of(process.owner):
            if limit.kv_max is not None:
                own = [p for p in self._pool.admitted | self._let_in.keys() if is_below(p.owner, path)]
                used = self._usage().get(path, 0)
                if own and used + need + sum(needed(p) for p in own) > limit.kv_max:
                    return True
        return False

    def _yields(self, process: Process, theirs: Claim, claim: Claim, rank: int) -> bool:
        progress = len(process.tokens) >= process.keeps_until or theirs[0] > rank
        return theirs > claim and progress

    def _holders(self) -> list[Process]:
        holders = [p for p in self._pool.holders if p.table.blocks]
        if len(holders) < len(self._pool.holders):
            self._pool.holders = set(holders)
        return holders

    def _usage(self) -> dict[str, int]:
        if self._used is None:
            self._used = {}
            for p in self._holders():
                self.took(p, len(p.table.blocks))
            tenants = {path: self._quotas.weight(path) for path in self._used if "/" not in path}
            whole = sum(tenants.values())
            self._fair = {t: self._pool.memory.total * weight / whole for t, weight in tenants.items()}
        return self._used

    def _standing(self, process: Process) -> int:
        """0: without its blocks its owner would be below a guaranteed number; 1: below its tenant's fair part
        of the pool; 2: it would not."""
        used, own = self._usage(), len(process.table.blocks)
        for path, limit in self._quotas.limits_of(process.owner):
            if limit.kv_min and used.get(path, 0) - own < limit.kv_min:
                return 0
        tenant = process.tenant
        fair = self._fair.get(tenant)
        return 1 if fair is None or used.get(tenant, 0) - own < fair else 2


def waits(process: Process) -> bool:
    """Whether a process cannot use its blocks now: it waits for its owner, a reader or a signal."""
    infer = process.infer
    return infer is None or (process.beam_of or process).stopped or infer.blocked


def needed(process: Process) -> int:
    """Blocks that a process with an infer is counted on to take, besides those that it has."""
    infer = process.infer
    if infer is None:
        return 0
    end = blocks_for(min(infer.limit, len(process.tokens) + GROWTH_TOKENS))
    if infer.beams is None:
        return max(0, end - len(process.table.blocks))
    whole = infer.start // BLOCK_TOKENS + infer.beams.params.num_beams * (end - infer.start // BLOCK_TOKENS)
    return max(0, whole - sum(len(p.table.blocks) for p in [process, *infer.members]))


def _waits_for(beam: Process, claimant: Process) -> bool:
    """Whether `beam` has done its part of a round that `claimant`, of the same search, still works on."""
    same = beam.beam_of is not None and beam.beam_of is claimant.beam_of
    return same and beam.infer is not None and beam.pid in beam.infer.tops
