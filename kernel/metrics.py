"""What the kernel counts: how long callers wait, what they use, what steps cost. Read by `stats`.

Counters by model and class, and by tenant, both bounded: who is one too many counts as OTHER. Observed once a
stream item, never once a token, and told without a look at every process. No I/O.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.syscalls.types import Family, FamilyKind, Sample

if TYPE_CHECKING:
    from .devices import Device, Pool
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

MOST_NAMED = 256
"""Tenants that are told apart to who may know of all: the first to come, so that no counter ever falls."""

MOST_TENANTS = 10_000
"""Tenants for whom is counted what they may know themselves."""

OTHER = "(other)"
"""No tenant and no model is called so."""

FAILED = "error"


class Waits:
    """A histogram of seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class Series:
    """Of one model and class. `open` requests are not over, `encoding` of them are encodes in work."""

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
    open: int = 0
    encoding: int = 0


@dataclass(slots=True)
class Use:
    """Of one tenant."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(slots=True, eq=False)
class Tally:
    """Where one request is counted, as long as it lives: in the class that it came with."""

    series: Series
    uses: list[Use]
    planned: bool = False  # a step that has a part of it was sent
    last_token: float | None = None

    def take_in(self, prompt: int, cached: int) -> None:
        counters: list[Series | Use] = [self.series, *self.uses]
        for counted in counters:
            counted.prompt += prompt
            counted.cached += cached


class Metrics:
    """`now` is the kernel's clock, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._series: dict[tuple[str, str], Series] = {}
        self._use: dict[str, Use] = {}
        self._named: set[str] = set()
        self._rest = Use()  # of the tenants that are not named
        self.steps: Counter[str] = Counter()
        self.step_seconds: defaultdict[str, float] = defaultdict(float)
        self.training_steps: Counter[str] = Counter()
        self.training_tokens: Counter[str] = Counter()

    def came(self, process: Process) -> Tally:
        """A process has a request."""
        tally = Tally(self._of(process), self._uses(process.tenant))
        tally.series.open += 1
        return tally

    def planned(self, work: Infer | Encoding) -> None:
        """The first step that has a part of it is sent."""
        work.tally.planned = True
        work.tally.series.queue.add(self._now() - work.arrived)

    def encoding(self, encoding: Encoding) -> None:
        """The first step that has texts of it is sent."""
        self.planned(encoding)
        encoding.tally.series.encoding += 1

    def took(self, infer: Infer, count: int, now: float) -> None:
        """`count` tokens of it have come. Written for speed: of all here only this is called so often."""
        tally = infer.tally
        series, last = tally.series, tally.last_token
        if last is None:
            series.first_token.add(now - infer.arrived)
            tally.take_in(infer.start - infer.first_input, infer.cached)
        else:
            between = series.between
            between.counts[bisect_left(BOUNDS, (now - last) / count)] += count
            between.total += now - last
        tally.last_token = now
        series.generated += count
        for use in tally.uses:
            use.generated += count

    def guessed(self, infer: Infer, drafted: int, accepted: int) -> None:
        infer.tally.series.drafted += drafted
        infer.tally.series.accepted += accepted

    def preempted(self, infer: Infer) -> None:
        infer.tally.series.preemptions += 1

    def ended(self, infer: Infer, finish: str, made: int) -> None:
        """An infer is over: `finish` is its reason, or FAILED. `made` tokens came of it."""
        tally = infer.tally
        if tally.last_token is None:
            tally.take_in(infer.start - infer.first_input, infer.cached)
        if infer.beams is not None:  # its tokens are chosen in the end
            tally.series.generated += made
            for use in tally.uses:
                use.generated += made
        self._over(tally, infer.arrived, finish)

    def encoded(self, encoding: Encoding, finish: str) -> None:
        """An encode is over."""
        encoding.tally.take_in(encoding.total, 0)
        encoding.tally.series.encoding -= encoding.tally.planned
        self._over(encoding.tally, encoding.arrived, finish)

    def _over(self, tally: Tally, arrived: float, finish: str) -> None:
        tally.series.open -= 1
        tally.series.whole.add(self._now() - arrived)
        tally.series.finished[finish] += 1
        for use in tally.uses:
            use.requests += 1

    def step(self, device: str, rounds: int, seconds: float) -> None:
        self.steps[device] += rounds
        self.step_seconds[device] += seconds

    def trained(self, device: str, steps: int, tokens: int) -> None:
        self.training_steps[device] += steps
        self.training_tokens[device] += tokens

    def _of(self, process: Process) -> Series:
        key = process.model, str(process.sched_class)
        found = self._series.get(key)
        if found is None:
            if len(self._series) >= MOST_SERIES:
                key = OTHER, OTHER
            found = self._series.setdefault(key, Series())
        return found

    def _uses(self, tenant: str) -> list[Use]:
        use = self._use.get(tenant)
        if use is None and len(self._use) < MOST_TENANTS:
            use = self._use[tenant] = Use()
            if len(self._named) < MOST_NAMED:
                self._named.add(tenant)
        rest = [] if tenant in self._named else [self._rest]
        return rest if use is None else [use, *rest]

    def use_of(self, path: str) -> list[Family]:
        """What `path` used, if it is a tenant. What a whole tenant used is not a sub-tenant's to know."""
        return list(self._tenants({path: self._use[path]} if path in self._use else {}))

    def families(self, kernel: Kernel) -> list[Family]:
        """Everything."""
        tenants = {tenant: self._use[tenant] for tenant in sorted(self._named)}
        if len(self._named) == MOST_NAMED:
            tenants[OTHER] = self._rest
        return [*self._waits(), *self._counts(), *self._moment(kernel), *self._tenants(tenants)]

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
        admitted: Counter[int] = Counter(
            id(process.infer.tally.series)
            for device in kernel.devices.values()
            for pool in device.pools
            for process in pool.admitted
            if process.infer is not None and process.beam_of is None
        )
        running, waiting = [], []
        for key, series in self._series.items():
            count = admitted[id(series)] + series.encoding
            running.append(Sample(list(key), count))
            waiting.append(Sample(list(key), series.open - count))
        for name, help_, samples in (
            ("requests_running", "Requests in a device's memory, or being encoded.", running),
            ("requests_waiting", "Requests that wait for memory or their turn.", waiting),
        ):
            yield Family(name, FamilyKind.GAUGE, help_, ["model", "class"], samples)
        yield from self._of_pools(kernel)
        yield from self._of_devices(kernel)
        samples = [
            Sample(["disk" if tier.folder == kernel.store.swap else "memory"], tier.used)
            for tier in kernel.tiers.tiers
        ]
        help_ = "Bytes of contexts that were pushed out of the devices' memory."
        yield Family("swapped_bytes", FamilyKind.GAUGE, help_, ["tier"], samples)
        steps = [Sample([str(pid)], p.run.step) for pid, p in kernel.runs.items() if p.run and p.exit is None]
        yield Family("training_step", FamilyKind.GAUGE, "How far runs that train are.", ["pid"], steps)

    def _of_pools(self, kernel: Kernel) -> Iterable[Family]:
        pools: defaultdict[tuple[str, str], list[Pool]] = defaultdict(list)
        for device in kernel.devices.values():
            for pool in device.pools:
                pools[device.name, pool.model].append(pool)  # one for each dtype
        of: Callable[[Pool], int]
        for name, help_, of in (
            ("processes", "Processes of a model on a device.", lambda p: len(p.processes)),
            ("kv_blocks", "KV blocks of a model on a device.", lambda p: p.memory.total),
            ("kv_blocks_free", "Of them, those that nobody owns.", lambda p: p.memory.free),
            (
                "weights_bytes",
                "Bytes of a model's weights.",
                lambda p: p.loaded.weights_bytes if p.loaded else 0,
            ),
            (
                "adapters",
                "Adapters of a model that are loaded.",
                lambda p: sum(bool(a.loaded) for a in p.adapters),
            ),
        ):
            samples = [Sample(list(key), sum(map(of, same))) for key, same in pools.items()]
            yield Family(name, FamilyKind.GAUGE, help_, ["device", "model"], samples)

    def _of_devices(self, kernel: Kernel) -> Iterable[Family]:
        of: Callable[[Device], float]
        for name, help_, of in (
            ("steps", "Steps computed.", lambda d: self.steps[d.name]),
            ("step_seconds", "Seconds of computing steps.", lambda d: self.step_seconds[d.name]),
            ("worker_restarts", "Times that a device's worker died.", lambda d: d.restarts),
            ("training_steps", "Steps of training.", lambda d: self.training_steps[d.name]),
            ("training_tokens", "Tokens trained on.", lambda d: self.training_tokens[d.name]),
        ):
            samples = [Sample([device.name], of(device)) for device in kernel.devices.values()]
            yield Family(name, FamilyKind.COUNTER, help_, ["device"], samples)

    def _tenants(self, uses: dict[str, Use]) -> Iterable[Family]:
        for name, help_, attribute in (
            ("tenant_requests", "Requests of a tenant that are over.", "requests"),
            ("tenant_prompt_tokens", "Tokens of a tenant's input.", "prompt"),
            ("tenant_cached_tokens", "Of them, those that were computed already.", "cached"),
            ("tenant_generated_tokens", "Tokens generated for a tenant.", "generated"),
        ):
            samples = [Sample([tenant], getattr(use, attribute)) for tenant, use in uses.items()]
            yield Family(name, FamilyKind.COUNTER, help_, ["tenant"], samples)
