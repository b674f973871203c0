"""What a process is: one model context with an owner, a priority, memory and a parent.

Its state is derived from facts, never stored:
    ZOMBIE   ended; only `wait` applies
    STOPPED  a STOP signal came
    NEW      its model is not resident yet
    RUNNING  in the step that is on the device now
    READY    has tokens to compute
    WAITING  for its owner's next infer, or for a slow reader
A process has tokens known and tokens computed; everything the scheduler does is to let the second catch up
with the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.syscalls.types import ProcessInfo, SchedClass, State

from .memory import Table

if TYPE_CHECKING:
    from .devices import Pool
    from .infer import Infer

INIT = 1
"""The pid that orphans belong to."""

CLASSES = list(SchedClass)
"""Strongest first."""


@dataclass(slots=True)
class Exit:
    """How a process ended, as `wait` tells it."""

    code: int
    reason: str


@dataclass(slots=True)
class Mirror:
    """What the worker knows of a process: so many tokens and blocks, from the front; nothing that counts
    when `stale`. `opened`: it holds something that has to be closed one day."""

    stale: bool = True
    opened: bool = False
    tokens: int = 0
    blocks: int = 0


@dataclass(slots=True, eq=False)
class Process:
    """One row of the process table. `session` is None when detached; `vruntime` is weighted service."""

    pid: int
    parent: int
    owner: str
    session: bytes | None
    pool: Pool
    sched_class: SchedClass
    nice: int
    label: str
    table: Table
    born: float
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    generated: int = 0
    infer: Infer | None = None
    stopped: bool = False
    running: bool = False
    exit: Exit | None = None
    vruntime: float = 0.0
    last_run: float = 0.0
    mirror: Mirror = field(default_factory=Mirror)
    beam_of: Process | None = None  # a beam's group leader; beams live and die with it

    @property
    def goal(self) -> int:
        """Tokens that have to be computed: all, if a next one is to be sampled, else all but the last,
        which the next infer computes with its own."""
        if self.infer is None or (self.infer.members and self.beam_of is None):
            return self.computed
        if self.pid in self.infer.tops:
            return self.computed  # a beam that has done its part of the round
        return len(self.tokens) - (0 if self.infer.samples else 1)

    @property
    def runnable(self) -> bool:
        """Whether a step could do something for it now."""
        return (
            self.exit is None
            and self.infer is not None
            and not self.running
            and not (self.beam_of or self).stopped
            and not self.infer.blocked
            and self.computed < self.goal
        )

    @property
    def state(self) -> State:
        if self.exit is not None:
            return State.ZOMBIE
        if (self.beam_of or self).stopped:
            return State.STOPPED
        if not self.pool.ready:
            return State.NEW
        steps = [self, *self.infer.members] if self.infer else []
        if any(p.running for p in steps):
            return State.RUNNING
        return State.READY if any(p.runnable for p in steps) else State.WAITING

    @property
    def waiting_for(self) -> str:
        if self.state is State.NEW:
            return f"model {self.pool.model} on {self.pool.device_name}"
        if self.state is State.WAITING:
            return "reader" if self.infer is not None and self.infer.blocked else "owner"
        return "wait" if self.state is State.ZOMBIE else ""

    def rank(self) -> tuple[int, int, int, int]:
        """Claim to memory: who ranks lower (bigger tuple) gives way. Age decides among equals, so that
        two processes never push each other out in turn; beams stand together, with their leader."""
        head = self.beam_of or self
        return (CLASSES.index(head.sched_class), head.nice, head.pid, self.pid)

    def info(self, now: float, queue_place: int) -> ProcessInfo:
        return ProcessInfo(
            pid=self.pid,
            parent=self.parent,
            owner=self.owner,
            name=self.label,
            model=self.pool.model,
            device=self.pool.device_name,
            sched_class=self.sched_class,
            nice=self.nice,
            state=self.state,
            waiting_for=self.waiting_for,
            context=len(self.tokens),
            computed=self.computed,
            blocks=sum(len(p.table.blocks) for p in [self, *(self.infer.members if self.infer else [])]),
            generated=self.generated,
            tokens_per_s=round(self.infer.rate(now), 2) if self.infer else 0.0,
            queue_place=queue_place,
            age_s=round(now - self.born, 3),
        )
