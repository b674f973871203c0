"""/metrics: what kernel and gateway count, in Prometheus' text, under our names and under those that
dashboards made for vLLM look for.

Without API keys whoever is on this machine may read it; with keys, who holds the right `audit`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.responses import Response

from .callers import Caller, authenticated
from .errors_doc import documented
from .record import Record

router = APIRouter(tags=["system"])

FRESH_S = 1.0
"""So old may be what is told of the kernel: scrapers share one look."""

# vLLM's name -> ours. What ours tells by class is summed; `model` becomes `model_name`.
ALIASES = {
    "vllm:num_requests_running": "requests_running",
    "vllm:num_requests_waiting": "requests_waiting",
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "generated_tokens",
    "vllm:prefix_cache_queries": "prompt_tokens",
    "vllm:prefix_cache_hits": "cached_tokens",
    "vllm:num_preemptions": "preemptions",
    "vllm:spec_decode_num_draft_tokens": "drafted_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:request_queue_time_seconds": "queue_seconds",
    "vllm:time_to_first_token_seconds": "first_token_seconds",
    "vllm:inter_token_latency_seconds": "between_tokens_seconds",
    "vllm:e2e_request_latency_seconds": "request_seconds",
}

# What vLLM calls the ends of a request; all others are an abort.
_REASONS = {"stop": "stop", "length": "length", "error": "error", "encoded": "stop"}

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of the buckets of HTTP requests: an answer may take minutes."""

_MAKERS: dict[t.FamilyKind, Callable[..., Any]] = {
    t.FamilyKind.COUNTER: CounterMetricFamily,
    t.FamilyKind.GAUGE: GaugeMetricFamily,
    t.FamilyKind.HISTOGRAM: HistogramMetricFamily,
}


def collected(families: Iterable[t.Family]) -> Iterator[Metric]:
    """What Prometheus' library writes of the kernel's families."""
    by_name = {family.name: family for family in families}
    for family in by_name.values():
        yield _metric(f"llmasos_{family.name}", family.labels, family, family.samples)
    for alias, name in ALIASES.items():
        if (found := by_name.get(name)) is not None:
            yield _metric(alias, ["model_name"], found, _by_model(found))
    if (requests := by_name.get("requests")) is not None:
        made = CounterMetricFamily(
            "vllm:request_success", requests.help, None, ["model_name", "finished_reason"]
        )
        counts: defaultdict[tuple[str, str], float] = defaultdict(float)
        for sample in requests.samples:
            model, _, finish = sample.labels
            counts[model, _REASONS.get(finish, "abort")] += sample.value
        for labels, value in counts.items():
            made.add_metric(labels, value)
        yield made
    blocks, free = by_name.get("kv_blocks"), by_name.get("kv_blocks_free")
    if blocks is not None and free is not None:
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use.", None, ["model_name"]
        )
        unused = {sample.labels[1]: 0.0 for sample in blocks.samples}
        total = dict(unused)
        for sums, samples in ((total, blocks.samples), (unused, free.samples)):
            for sample in samples:  # one for each device
                sums[sample.labels[1]] += sample.value
        for model, count in total.items():
            usage.add_metric([model], 1 - unused[model] / count if count else 0.0)
        yield usage
    yield _adapters(by_name)


def _adapters(by_name: dict[str, t.Family]) -> Metric:
    """Which adapters are asked, as vLLM tells it: in labels, with the time as the value."""
    busy = {
        state: sorted(
            {s.labels[0].partition("+")[2] for s in family.samples if s.value and "+" in s.labels[0]}
        )
        for state in ("running", "waiting")
        if (family := by_name.get(f"requests_{state}")) is not None
    }
    made = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters with requests.",
        labels=["running_lora_adapters", "waiting_lora_adapters"],
    )
    made.add_metric([",".join(busy.get(state, [])) for state in ("running", "waiting")], time.time())
    return made


def _metric(name: str, labels: list[str], family: t.Family, samples: list[t.Sample]) -> Metric:
    made = _MAKERS[family.kind](name, family.help, labels=labels)
    for sample in samples:
        if family.kind is not t.FamilyKind.HISTOGRAM:
            made.add_metric(sample.labels, sample.value)
            continue
        total, buckets = 0, []
        for bound, count in zip([*map(str, family.bounds), "+Inf"], sample.buckets, strict=True):
            total += count
            buckets.append((bound, total))
        made.add_metric(sample.labels, buckets, sample.value)
    return made  # type: ignore[no-any-return]


def _by_model(family: t.Family) -> list[t.Sample]:
    """Samples by the first label alone, which is the model."""
    sums: dict[str, t.Sample] = {}
    for sample in family.samples:
        before = sums.get(sample.labels[0])
        buckets = sample.buckets
        if before is not None:
            buckets = [a + b for a, b in zip(before.buckets, buckets, strict=True)]
        value = sample.value + (before.value if before else 0)
        sums[sample.labels[0]] = t.Sample([sample.labels[0]], value, buckets)
    return list(sums.values())


class _Kernel(Collector):
    """The families that were asked for last."""

    def __init__(self) -> None:
        self.families: list[t.Family] = []

    def collect(self) -> Iterator[Metric]:
        return collected(self.families)


class GatewayMetrics:
    """Of one gateway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._kernel = _Kernel()
        self._registry.register(self._kernel)
        labels = ["route", "method", "status"]
        self._requests = Counter("llmasos_http_requests", "HTTP requests.", labels, registry=self._registry)
        self._seconds = Histogram(
            "llmasos_http_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.open = Gauge("llmasos_http_open", "Requests that are being answered.", registry=self._registry)
        self._hang_ups = Counter(
            "llmasos_http_hang_ups",
            "Clients that left before their answer's end.",
            ["route"],
            registry=self._registry,
        )
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    def observe(self, record: Record) -> None:
        """A request is over."""
        method = record.method if record.method in _METHODS else "other"
        self._requests.labels(record.route, method, str(record.status)).inc()
        self._seconds.labels(record.route).observe(time.perf_counter() - record.begun)
        if record.hung_up:
            self._hang_ups.labels(record.route).inc()

    async def text(self, kernel: Caller) -> bytes:
        """All of it. Raises Unavailable, PermissionDenied."""
        async with self._asking:
            if time.monotonic() - self._asked_at > FRESH_S:
                reply = await kernel.aio.call(table.Stats())
                self._kernel.families, self._asked_at = reply.families, time.monotonic()
        return generate_latest(self._registry)


@router.get("/metrics", summary="Counters for Prometheus", responses=documented())
async def metrics(request: Request, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """Needs the right `audit` where API keys are asked for: it tells of all tenants."""
    callers = request.app.state.callers
    if callers.keys is not None and t.Capability.AUDIT not in caller.rights:
        raise errors.PermissionDenied(
            "metrics of all tenants need the right audit",
            hint="llsh key api new scraper --as prometheus --only --right see --right audit",
        )
    kernel = await callers.own() if callers.keys is None else caller
    return Response(await request.app.state.metrics.text(kernel), media_type=CONTENT_TYPE_LATEST)
