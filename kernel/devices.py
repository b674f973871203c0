"""The devices as the kernel sees them: which worker drives one, which models are resident, what is in
flight. Builds the messages of a step and books their results in the processes' tables.

A Device is STARTING until its worker attaches, then READY; DOWN from a worker's death to the next attach.
A Pool (one model in one dtype on one device) is loading until the worker says it is resident; its Memory
dies with the worker, its processes do not.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.drivers import base
from llmasos.syscalls import errors
from llmasos.syscalls.types import DeviceInfo, PoolInfo, pack_tokens
from msgspec import Struct

from .infer import Infer
from .memory import Memory
from .modelfs.store import Sees
from .pace import Pace, Transfer
from .process import Mirror, Process
from .runqueue import RunQueue
from .shares import Shares

if TYPE_CHECKING:
    from .adapters import Adapter
    from .encoding import Encoding

Ready = Callable[[errors.LLMasOSError | None], None]
Answered = Callable[[base.Moved | errors.LLMasOSError], None]


@dataclass(slots=True, eq=False)
class Saving:
    """A snapshot that is being written from `blocks`, by the order `ticket` or from a file that it wrote.
    `spoiled`: it turned out that they held something else then."""

    ticket: int
    blocks: frozenset[int]
    spoiled: bool = False


@dataclass(slots=True, eq=False)
class Pool:
    """A model on a device. `waiters` are told when it is resident or cannot be."""

    handle: int
    model: str
    digest: str
    dtype: str
    device_name: str
    owner: str  # who may know its name, "" for everybody
    files: dict[str, base.File]
    wanted_since: float
    queue: RunQueue
    memory: Memory = field(default_factory=lambda: Memory(0))
    loaded: base.Loaded | None = None
    adapters: list[Adapter] = field(default_factory=list)  # those asked for last at the end
    processes: set[Process] = field(default_factory=set)
    holders: set[Process] = field(default_factory=set)  # those with blocks, and some that had
    admitted: set[Process] = field(default_factory=set)  # with an infer that was let into the memory
    closes: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks to copy with the next step
    savings: list[Saving] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    waiters: list[Ready] = field(default_factory=list)
    retried: bool = False
    deaths: int = 0
    served: int = 0  # the ticket of its last step

    @property
    def ready(self) -> bool:
        return self.loaded is not None

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for it or for an adapter of it."""
        return bool(self.waiters) or any(adapter.waiters for adapter in self.adapters)

    def when_ready(self, ready: Ready) -> None:
        """Tells `ready` when it is resident or cannot be: now, if it is."""
        if self.ready:
            ready(None)
        else:
            self.waiters.append(ready)

    def forget(self) -> None:
        """The worker is gone: nothing is resident, nothing computed."""
        self.loaded = None
        self.memory = Memory(0)
        self.closes.clear()
        self.copies.clear()
        self.holders.clear()
        self.admitted.clear()
        self.pace = Pace()
        for adapter in self.adapters:
            adapter.loaded = adapter.asked = False
        for process in self.processes:
            process.table = process.table.empty()
            process.flights = 0
            process.land()
            if process.swap is None:
                process.computed = 0
            process.mirror = Mirror()
            if process.encoding is not None:
                process.encoding.lose()
            self.queue.touch(process)

    def forsake(self, process: Process) -> None:
        """The infer of a process is over, or goes on elsewhere."""
        self.queue.leave(process)
        self.admitted.discard(process)

    def close(self, process: Process) -> None:
        """Has the worker forget its mirror of a process, with the next step."""
        if process.mirror.opened:
            self.closes.append(process.pid)
        process.mirror = Mirror()

    def info(self, sees: Sees) -> PoolInfo:
        loaded = self.loaded
        return PoolInfo(
            model=self.model if not self.owner or sees(self.owner) else f"(private {self.handle})",
            dtype=loaded.dtype if loaded else self.dtype,
            kv_dtype=loaded.kv_dtype if loaded else "",
            engine=loaded.engine if loaded else "",
            weights_bytes=loaded.weights_bytes if loaded else 0,
            block_bytes=loaded.block_bytes if loaded else 0,
            blocks_total=self.memory.total,
            blocks_free=self.memory.free,
            processes=sum(1 for p in self.processes if p.beam_of is None and p.exit is None),
            encodes=loaded.encodes if loaded else None,
        )


class Part(Struct, frozen=True):
    """What a step does for one process: compute `count` positions; choose a token if `sample`, and guess at
    most `draft` more a round. `extra`: so many further positions its guesses and rounds may compute."""

    process: Process
    infer: Infer
    count: int
    sample: bool
    draft: int
    extra: int
    epoch: int


class Texts(Struct, frozen=True):
    """What a step of an encoder does for one process: encode `count` texts from `first` on."""

    process: Process
    encoding: Encoding
    first: int
    count: int


@dataclass(slots=True, eq=False)
class Flight:
    """A step that was sent and not yet collected: its parts in the order of the batch, or an encoder's texts.
    `keys` name the blocks that it fills with prompts; `rows` and `tokens`, `rounds` times, are what it was
    expected to take its time by, and `left` is what of that time is still to come when it begins or goes on
    (None: nobody knows). One that is `apart` is of newcomers alone; one that `overtakes`, too, and has
    interrupted those behind it; `lost` is the time that this one was kept from running so. One that `cuts`
    ends the rounds of the one before it."""

    ticket: int
    pool: Pool
    parts: list[Part]
    copies: list[tuple[int, int]]
    keys: set[bytes]
    rows: int
    tokens: int
    rounds: int
    texts: list[Texts] = field(default_factory=list)
    apart: bool = False
    overtakes: bool = False
    cuts: bool = False
    left: float | None = None
    lost: float = 0.0

    def expected(self) -> float | None:
        """Seconds of all rounds."""
        once = self.pool.pace.expected(self.rows, self.tokens)
        return None if once is None else once * self.rounds

    def stands(self) -> bool:
        """Whether everybody in it still wants its result, and so keeps the blocks that it writes to."""
        return all(p.process.infer is p.infer and p.process.epoch == p.epoch for p in self.parts)


@dataclass(slots=True, eq=False)
class Device:
    """One device and its worker, if it has one. `flights` are the steps sent, first to end first;
    `ahead_at` is when the one behind the running one is to be sent."""

    name: str
    shares: Shares
    runs: RunQueue  # those that train on it
    description: base.Description | None = None
    worker: int | None = None  # the bus connection
    worker_pid: int = 0
    restarts: int = 0
    memory_free: int = 0
    pools: list[Pool] = field(default_factory=list)
    loading: Pool | None = None
    flights: deque[Flight] = field(default_factory=deque)
    orders: dict[int, Answered] = field(default_factory=dict)  # that are no steps, by ticket, unanswered
    transfer: Transfer = field(default_factory=Transfer)
    ahead_at: float = math.inf
    alarm: Callable[[], None] = lambda: None  # calls off the timer that waits for it
    begun: float = 0.0  # when the first of the flights began, or the load
    watched: bool = False
    hangs: Counter[str] = field(default_factory=Counter)  # loads that hung, by the model's digest
    granted: Process | None = None  # who trains now, or is about to stop
    worked: float | None = None  # when a step ended last
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def flight(self, ticket: int) -> Flight | None:
        return next((flight for flight in self.flights if flight.ticket == ticket), None)

    @property
    def state(self) -> str:
        if self.worker is None:
            return "down" if self.restarts else "starting"
        return "busy" if self.flights or self.loading or self.granted else "ready"

    def info(self, now: float, sees: Sees) -> DeviceInfo:
        d = self.description
        return DeviceInfo(
            name=self.name,
            driver=d.driver if d else "",
            state=self.state,
            description=d.text if d else "",
            memory_total=d.memory_total if d else 0,
            memory_free=self.memory_free,
            worker_pid=self.worker_pid,
            restarts=self.restarts,
            step_ms=round(1000 * statistics.median(self.step_seconds), 3) if self.step_seconds else 0.0,
            pools=[pool.info(sees) for pool in self.pools],
            running_s=round(now - self.begun, 3) if self.flights else 0.0,
            idle_s=None if self.worked is None else round(now - self.worked, 3),
        )


def build(flight: Flight) -> base.Batch:
    """The message for a step; brings the worker's mirrors up to date with the tables, and books in the
    processes what is in flight."""
    opens, work, pool = [], [], flight.pool
    for part in flight.parts:
        process, infer = part.process, part.infer
        mirror, blocks = process.mirror, process.table.blocks
        if mirror.stale:
            opens.append(_open(process, infer))
            mirror.stale, mirror.opened = False, True
            mirror.tokens, mirror.blocks = len(process.tokens), len(blocks)
        work.append(
            base.Work(
                seq=process.pid,
                count=part.count,
                tokens=process.tokens[mirror.tokens :],
                blocks=blocks[mirror.blocks :],
                sample=part.sample,
                beams=infer.beams.width if infer.beams and process.lacking == part.count else 0,
                draft=part.draft,
            )
        )
        mirror.tokens, mirror.blocks = max(mirror.tokens, len(process.tokens)), len(blocks)
        process.flights += 1
        process.ahead += part.count
        process.coming += part.sample
        process.guesses += part.extra
    closes, pool.closes = pool.closes, []
    return base.Batch(
        flight.ticket,
        pool.handle,
        closes,
        opens,
        flight.copies,
        work,
        flight.rounds,
        flight.overtakes,
        flight.cuts,
    )


def _open(process: Process, infer: Infer) -> base.SeqOpen:
    return base.SeqOpen(
        seq=process.pid,
        tokens=pack_tokens(process.tokens),
        prompt_length=infer.prompt_length,
        computed=process.computed,
        limit=infer.limit,
        blocks=list(process.table.blocks),
        sampling=infer.sampling,
        adapter=process.adapter.number if process.adapter else 0,
    )
