"""What the kernel counts: how long callers wait, what they use, what steps cost. Read by `stats`.

Counters by model and class, and by tenant, both bounded: who is one too many counts as OTHER. Observed once a
stream item, never once a token. No I/O.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.syscalls.types import Family, FamilyKind, Sample

from .shares import tenant_of

if TYPE_CHECKING:
    from .encoding import Encoding
    from .infer import Infer
    from .loop import Kernel
    from .process import Process

BOUNDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
"""Upper bounds of the buckets of all waits, in seconds."""

MOST_SERIES = 64
"""Pairs of model and class that are told apart."""

MOST_TENANTS = 256
"""Tenants that are told apart: the first to come."""

OTHER = "other"
FAILED = "error"


class Waits:
    """A histogram of seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += times
        self.total += seconds * times


@dataclass(slots=True)
class Series:
    """Of one model and class."""

    queue: Waits = field(default_factory=Waits)
    first_token: Waits = field(default_factory=Waits)
    between: Waits = field(default_factory=Waits)
    whole: Waits = field(default_factory=Waits)
    finished: Counter[str] = field(default_factory=Counter)
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class Use:
    """Of one tenant."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Metrics:
    """`now` is the kernel's clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._series: dict[tuple[str, str], Series] = {}
        self._use: dict[str, Use] = {}
        self.steps: Counter[str] = Counter()
        self.step_seconds: defaultdict[str, float] = defaultdict(float)

    def planned(self, process: Process, work: Infer | Encoding) -> None:
        """The first step that has a part of it is sent."""
        work.planned = True
        self._of(process).queue.add(self._now() - work.arrived)

    def took(self, process: Process, infer: Infer, count: int) -> None:
        """`count` tokens of it have come; before `infer.take`."""
        series, now = self._of(process), self._now()
        if infer.first_token is None:
            series.first_token.add(now - infer.arrived)
        else:
            series.between.add((now - infer.last_token) / count, count)
        infer.last_token = now

    def guessed(self, process: Process, drafted: int, accepted: int) -> None:
        series = self._of(process)
        series.drafted += drafted
        series.accepted += accepted

    def preempted(self, process: Process) -> None:
        self._of(process).preemptions += 1

    def ended(self, process: Process, infer: Infer, finish: str, made: int) -> None:
        """An infer is over: `finish` is its reason, or FAILED."""
        self._over(process, infer.arrived, finish, infer.start - infer.first_input, infer.cached, made)

    def encoded(self, process: Process, encoding: Encoding, finish: str) -> None:
        """An encode is over."""
        self._over(process, encoding.arrived, finish, encoding.total, 0, 0)

    def _over(
        self, process: Process, arrived: float, finish: str, prompt: int, cached: int, made: int
    ) -> None:
        series = self._of(process)
        series.whole.add(self._now() - arrived)
        series.finished[finish] += 1
        tenant = tenant_of(process.owner)
        if tenant not in self._use and len(self._use) >= MOST_TENANTS:
            tenant = OTHER
        use = self._use.setdefault(tenant, Use())
        use.requests += 1
        for counted in (series, use):
            counted.prompt += prompt
            counted.cached += cached
            counted.generated += made

    def step(self, device: str, rounds: int, seconds: float) -> None:
        self.steps[device] += rounds
        self.step_seconds[device] += seconds

    def _of(self, process: Process) -> Series:
        key = process.model, str(process.sched_class)
        found = self._series.get(key)
        if found is None:
            if len(self._series) >= MOST_SERIES:
                key = OTHER, OTHER
            found = self._series.setdefault(key, Series())
        return found

    def use_of(self, tenant: str) -> list[Family]:
        """What a tenant may know: what it used itself."""
        return self._tenants([tenant] if tenant in self._use else [])

    def families(self, kernel: Kernel) -> list[Family]:
        """Everything."""
        return [*self._waits(), *self._counts(), *self._moment(kernel), *self._tenants(self._use)]

    def _waits(self) -> Iterable[Family]:
        for name, help_, attribute in (
            ("queue_seconds", "From a request's arrival to its first step.", "queue"),
            ("first_token_seconds", "From a request's arrival to its first token.", "first_token"),
            ("between_tokens_seconds", "Between two tokens of an answer.", "between"),
            ("request_seconds", "From a request's arrival to its end.", "whole"),
        ):
            samples = []
            for key, series in self._series.items():
                waits: Waits = getattr(series, attribute)
                samples.append(Sample(list(key), waits.total, list(waits.counts)))
            yield Family(name, FamilyKind.HISTOGRAM, help_, ["model", "class"], samples, list(BOUNDS))

    def _counts(self) -> Iterable[Family]:
        labels = ["model", "class"]
        for name, help_, attribute in (
            ("prompt_tokens", "Tokens of input.", "prompt"),
            ("cached_tokens", "Of them, those that were computed already.", "cached"),
            ("generated_tokens", "Tokens generated.", "generated"),
            ("drafted_tokens", "Tokens guessed.", "drafted"),
            ("accepted_tokens", "Of them, those that came true.", "accepted"),
            ("preemptions", "Times that a running request lost its memory to others.", "preemptions"),
        ):
            samples = [Sample(list(key), getattr(s, attribute)) for key, s in self._series.items()]
            yield Family(name, FamilyKind.COUNTER, help_, labels, samples)
        samples = [
            Sample([*key, reason], count)
            for key, series in self._series.items()
            for reason, count in series.finished.items()
        ]
        help_ = "Requests that are over, by how they ended."
        yield Family("requests", FamilyKind.COUNTER, help_, [*labels, "finish"], samples)

    def _moment(self, kernel: Kernel) -> Iterable[Family]:
        running: Counter[tuple[str, str]] = Counter()
        waiting: Counter[tuple[str, str]] = Counter()
        states: Counter[str] = Counter()
        for process in kernel.processes:
            states[str(process.state)] += 1
            if process.infer is not None and process.beam_of is None:
                among = running if process in process.pool.admitted else waiting
                among[process.model, str(process.sched_class)] += 1
            elif process.encoding is not None:
                among = running if process.encoding.planned else waiting
                among[process.model, str(process.sched_class)] += 1
        for name, help_, counted in (
            ("requests_running", "Requests in a device's memory, or being encoded.", running),
            ("requests_waiting", "Requests that wait for memory or their turn.", waiting),
        ):
            samples = [Sample(list(key), counted[key]) for key in sorted({*self._series, *counted})]
            yield Family(name, FamilyKind.GAUGE, help_, ["model", "class"], samples)
        samples = [Sample([state], count) for state, count in sorted(states.items())]
        yield Family("processes", FamilyKind.GAUGE, "Processes by their state.", ["state"], samples)
        pools = [(d.name, p) for d in kernel.devices.values() for p in d.pools if p.loaded is not None]
        for name, help_, value in (
            ("kv_blocks", "KV blocks of a model on a device.", lambda p: p.memory.total),
            ("kv_blocks_free", "Of them, those that nobody owns.", lambda p: p.memory.free),
            ("weights_bytes", "Bytes of a model's weights.", lambda p: p.loaded.weights_bytes),
            (
                "adapters",
                "Adapters of a model that are loaded.",
                lambda p: sum(bool(a.loaded) for a in p.adapters),
            ),
        ):
            samples = [Sample([device, pool.model], value(pool)) for device, pool in pools]
            yield Family(name, FamilyKind.GAUGE, help_, ["device", "model"], samples)
        devices = kernel.devices.values()
        for name, help_, values in (
            ("steps", "Steps computed.", {d.name: self.steps[d.name] for d in devices}),
            (
                "step_seconds",
                "Seconds of computing steps.",
                {d.name: self.step_seconds[d.name] for d in devices},
            ),
            ("worker_restarts", "Times that a device's worker died.", {d.name: d.restarts for d in devices}),
        ):
            samples = [Sample([device], value) for device, value in values.items()]
            yield Family(name, FamilyKind.COUNTER, help_, ["device"], samples)
        steps = [Sample([str(pid)], p.run.step) for pid, p in kernel.runs.items() if p.run and p.exit is None]
        yield Family("training_steps", FamilyKind.GAUGE, "Steps of runs that train.", ["pid"], steps)

    def _tenants(self, names: Iterable[str]) -> list[Family]:
        found = []
        for name, help_, attribute in (
            ("tenant_requests", "Requests of a tenant that are over.", "requests"),
            ("tenant_prompt_tokens", "Tokens of a tenant's input.", "prompt"),
            ("tenant_cached_tokens", "Of them, those that were computed already.", "cached"),
            ("tenant_generated_tokens", "Tokens generated for a tenant.", "generated"),
        ):
            samples = [Sample([tenant], getattr(self._use[tenant], attribute)) for tenant in names]
            found.append(Family(name, FamilyKind.COUNTER, help_, ["tenant"], samples))
        return found
