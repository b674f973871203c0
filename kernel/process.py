"""What a process is: one model context with an owner, a priority, memory and a parent.

Its state is derived from facts, never stored:
    ZOMBIE   ended; only `wait` applies
    STOPPED  a STOP signal came
    NEW      its model is not resident yet
    RUNNING  in a step that is on the device, or sent to it
    SWAPPED  its KV is in a file, not in a device's memory
    READY    has tokens to compute
    WAITING  for its owner's next infer, or for a slow reader
A process has tokens known and tokens computed; everything the scheduler does is to let the second catch up
with the first. A step may be planned while the one before it computes: `computed` and `tokens` are what has
been collected, `ahead`, `coming` and `guesses` what steps in flight will add for certain, or at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.syscalls.types import ProcessInfo, SchedClass, State

from .memory import Table
from .shares import tenant_of
from .tiers import KvFile

if TYPE_CHECKING:
    from .adapters import Adapter
    from .devices import Pool
    from .encoding import Encoding
    from .infer import Infer
    from .modelfs.session_files import Unfinished
    from .run import Run

INIT = 1
"""The pid that orphans belong to."""

CLASS_RANK = {sched_class: rank for rank, sched_class in enumerate(SchedClass)}
"""0 is the strongest."""


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
    """One row of the process table. `session` (its key) is None when detached; `named`: its pid was told, so
    it survives the kernel; `vruntime` is weighted service in seconds
    of the device."""

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
    named: bool = False
    flights: int = 0  # steps not yet collected that it is in, whatever became of their infer
    ahead: int = 0  # positions that those of this infer compute
    coming: int = 0  # tokens that they choose for certain
    guesses: int = 0  # tokens, and positions, that they may add by guesses and further rounds
    drafted: int = 0
    accepted: int = 0
    exit: Exit | None = None
    vruntime: float = 0.0
    mirror: Mirror = field(default_factory=Mirror)
    moving: bool = False  # to another device, as soon as it is in no step
    unfinished: Unfinished | None = None  # an infer that was interrupted and may be gone on with
    lineage: list[str] = field(default_factory=list)  # snapshots that it descends from, oldest first
    swap: KvFile | None = None  # the KV of its first `computed` positions, if not in its table's blocks
    epoch: int = 0  # counts how often its KV was lost while steps might be in flight: their results are void
    preemptions: int = 0  # how often it lost its place in memory with an infer running
    refused: str = ""  # what it lacked when its turn came last
    keeps_until: int = 0  # having lost its blocks, it keeps the next ones until it knows so many tokens
    beam_of: Process | None = None  # a beam's group leader; beams live and die with it
    adapter: Adapter | None = None  # what its model adds to the pool's
    run: Run | None = None  # it trains, and has no infers
    encoding: Encoding | None = None  # it encodes, and has none either
    tenant: str = field(init=False)  # of the owner, who never changes

    def __post_init__(self) -> None:
        self.tenant = tenant_of(self.owner)

    @property
    def model(self) -> str:
        return self.adapter.model if self.adapter else self.pool.model

    @property
    def digest(self) -> str:
        """Of the manifest of its model."""
        return self.adapter.digest if self.adapter else self.pool.digest

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
    def lacking(self) -> int:
        """Positions that a step planned now could compute."""
        infer = self.infer
        if infer is None:
            return 0
        goal = self.goal if infer.beams is not None else len(self.tokens) - (not infer.samples)
        return goal + self.coming - self.computed - self.ahead

    @property
    def runnable(self) -> bool:
        """Whether a step planned now could do something for it; of one that trains, a grant."""
        infer = self.infer
        if self.run is not None:
            return self.run.waits and self.exit is None and not self.stopped
        if self.encoding is not None:
            return self.encoding.waits and not self.stopped
        return (
            infer is not None
            and self.exit is None
            and not infer.blocked
            and not (self.beam_of or self).stopped
            and not self.moving
            and (self.adapter is None or self.adapter.loaded)
            and (self.swap is None or self.swap.available)
            and self.lacking > 0
            and (not self.ahead or self._foreseeable(infer))
        )

    def _foreseeable(self, infer: Infer) -> bool:
        """Whether the step after those in flight is certain to be wanted: they do not end it, and the reader
        will have room."""
        if infer.scoring:
            return False
        surely_over = len(self.tokens) + self.coming >= infer.limit
        return not self.coming or (infer.credits >= self.coming and not surely_over)

    def reach(self, count: int, extra: int = 0) -> tuple[int, int]:
        """The first position that `count` more and `extra` by guesses and rounds may write to, and the end of
        what they may write at most: nobody knows yet how many guesses of the steps in flight are right."""
        start = self.computed + self.ahead
        end = start + count
        guesses = self.guesses + extra
        if guesses and self.infer is not None:
            # The last token that an infer chooses is never computed by it.
            end = max(end, min(end + guesses, self.infer.limit - 1))
        return start, end

    def lose(self) -> None:
        """Its KV is gone or worthless: the context is computed anew, and what steps in flight say of it is
        void. Its blocks are the caller's to give back."""
        self.forget_swap()
        self.computed = 0
        self.epoch += 1
        self.land()
        self.mirror.stale = True
        self.pool.queue.touch(self)

    def forget_swap(self) -> None:
        if self.swap is not None:
            self.swap.release()
            self.swap = None

    def land(self) -> None:
        """Nothing of this infer is in flight any more: it is over, or its worker is."""
        self.ahead = self.coming = self.guesses = 0

    @property
    def state(self) -> State:
        if self.exit is not None:
            return State.ZOMBIE
        if (self.beam_of or self).stopped:
            return State.STOPPED
        if self.run is not None:
            return State.RUNNING if self.flights else State.READY if self.run.waits else State.NEW
        if not self.pool.ready or (self.adapter and not self.adapter.loaded):
            return State.NEW
        steps = [self, *self.infer.members] if self.infer else [self] if self.encoding else []
        if any(p.flights for p in steps):
            return State.RUNNING
        if self.swap is not None:
            return State.SWAPPED
        return State.READY if any(p.runnable for p in steps) else State.WAITING

    @property
    def waiting_for(self) -> str:
        if self.state is State.NEW:
            return self.run.waiting_for if self.run else f"model {self.model} on {self.pool.device_name}"
        if self.moving or (self.swap and not self.swap.available):
            return "its move to another device"
        if self.state is State.SWAPPED and self.runnable:
            return self.refused or "memory"
        if self.state in (State.WAITING, State.SWAPPED):
            return "reader" if self.infer is not None and self.infer.blocked else "owner"
        if self.state is State.READY:
            return self.refused or "turn"
        return "wait" if self.state is State.ZOMBIE else ""

    def info(self, now: float, queue_place: int) -> ProcessInfo:
        work = self.encoding
        return ProcessInfo(
            pid=self.pid,
            parent=self.parent,
            owner=self.owner,
            name=self.label,
            model=self.model,
            device=self.pool.device_name,
            sched_class=self.sched_class,
            nice=self.nice,
            state=self.state,
            waiting_for=self.waiting_for,
            context=self.run.steps if self.run else work.total if work else len(self.tokens),
            computed=self.run.step
            if self.run
            else work.computed
            if work
            else 0
            if self.swap
            else self.computed,
            blocks=sum(len(p.table.blocks) for p in [self, *(self.infer.members if self.infer else [])]),
            generated=self.run.tokens if self.run else self.generated,
            tokens_per_s=round(self.infer.rate(now) if self.infer else self.run.pace if self.run else 0.0, 2),
            queue_place=queue_place,
            age_s=round(now - self.born, 3),
            drafted=self.drafted,
            accepted=self.accepted,
            preemptions=self.preemptions,
        )
