"""The devices as the kernel sees them: which worker drives one, which models are resident, what is in
flight. Builds the messages of a step and books their results in the processes' tables.

A Device is STARTING until its worker attaches, then READY; DOWN from a worker's death to the next attach.
A Pool (one model in one dtype on one device) is loading until the worker says it is resident; its Memory
dies with the worker, its processes do not.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llmasos.drivers import base
from llmasos.syscalls import errors
from llmasos.syscalls.types import DeviceInfo, PoolInfo, pack_tokens

from .infer import Infer
from .memory import Memory, Table
from .process import Mirror, Process
from .scheduler import Share

Ready = Callable[[errors.LLMasOSError | None], None]


@dataclass(slots=True, eq=False)
class Pool:
    """A model on a device. `waiters` are told when it is resident or cannot be."""

    handle: int
    model: str
    digest: str
    dtype: str
    device_name: str
    files: dict[str, base.File]
    wanted_since: float
    memory: Memory = field(default_factory=lambda: Memory(0))
    loaded: base.Loaded | None = None
    processes: set[Process] = field(default_factory=set)
    closes: list[int] = field(default_factory=list)
    waiters: list[Ready] = field(default_factory=list)
    retried: bool = False
    deaths: int = 0

    @property
    def ready(self) -> bool:
        return self.loaded is not None

    def forget(self) -> None:
        """The worker is gone: nothing is resident, nothing computed."""
        self.loaded = None
        self.memory = Memory(0)
        self.closes.clear()
        for process in self.processes:
            process.table = Table(process.table.salt)
            process.computed = 0
            process.running = False
            process.mirror = Mirror()

    def close(self, process: Process) -> None:
        """Has the worker forget its mirror of a process, with the next step."""
        if process.mirror.opened:
            self.closes.append(process.pid)
        process.mirror = Mirror()

    def info(self) -> PoolInfo:
        loaded = self.loaded
        return PoolInfo(
            model=self.model,
            dtype=loaded.dtype if loaded else self.dtype,
            weights_bytes=loaded.weights_bytes if loaded else 0,
            block_bytes=loaded.block_bytes if loaded else 0,
            blocks_total=self.memory.total,
            blocks_free=self.memory.free,
            processes=sum(1 for p in self.processes if p.beam_of is None and p.exit is None),
        )


@dataclass(slots=True, eq=False)
class Flight:
    """The step that is on the device: what was asked for whom, in the order of the batch."""

    ticket: int
    pool: Pool
    shares: list[tuple[Process, Infer, int]]


@dataclass(slots=True, eq=False)
class Device:
    """One device and its worker, if it has one."""

    name: str
    description: base.Description | None = None
    worker: int | None = None  # the bus connection
    worker_pid: int = 0
    restarts: int = 0
    memory_free: int = 0
    pools: list[Pool] = field(default_factory=list)
    loading: Pool | None = None
    flight: Flight | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def state(self) -> str:
        if self.worker is None:
            return "down" if self.restarts else "starting"
        return "busy" if self.flight or self.loading else "ready"

    def info(self) -> DeviceInfo:
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
            pools=[pool.info() for pool in self.pools],
        )


def build(pool: Pool, shares: list[Share], copies: list[tuple[int, int]], ticket: int) -> base.Batch:
    """The message for a step; brings the worker's mirrors up to date with the tables."""
    opens, work = [], []
    for share in shares:
        process, mirror = share.process, share.process.mirror
        infer = process.infer
        assert infer is not None
        if mirror.stale:
            opens.append(_open(process, infer))
            mirror.stale, mirror.opened = False, True
            mirror.tokens, mirror.blocks = len(process.tokens), len(process.table.blocks)
        ends = process.computed + share.count == len(process.tokens)
        work.append(
            base.Work(
                seq=process.pid,
                start=process.computed,
                count=share.count,
                tokens=process.tokens[mirror.tokens :],
                blocks=process.table.blocks[mirror.blocks :],
                sample=ends and infer.samples,
                beams=infer.beams.width if infer.beams and ends else 0,
            )
        )
        mirror.tokens, mirror.blocks = len(process.tokens), len(process.table.blocks)
        process.running = True
    closes, pool.closes = pool.closes, []
    return base.Batch(ticket=ticket, handle=pool.handle, closes=closes, opens=opens, copies=copies, work=work)


def _open(process: Process, infer: Infer) -> base.SeqOpen:
    return base.SeqOpen(
        seq=process.pid,
        tokens=pack_tokens(process.tokens),
        prompt_length=infer.start,
        blocks=list(process.table.blocks),
        sampling=infer.sampling,
    )
