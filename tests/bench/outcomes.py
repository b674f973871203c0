"""What became of each request of a trace, simulated or real, and the figures made of it.

Times in seconds. TTFT runs from a request's time in the trace to its first token; inter-token times are the
gaps between a stream's items, divided by an item's tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy


class Outcome(msgspec.Struct):
    """One request. `times` are when its items came, `counts` how many tokens each had; `error` empty:
    it ended well."""

    tenant: str
    sched_class: str
    sent: float
    prompt_tokens: int
    times: list[float] = []
    counts: list[int] = []
    cached: int = 0
    ended: float | None = None
    error: str = ""


def save(path: Path, outcomes: Iterable[Outcome]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in outcomes))


def load(path: Path) -> list[Outcome]:
    return msgspec.json.decode(b"[" + b",".join(path.read_bytes().split()) + b"]", type=list[Outcome])


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds; empty when there is nothing."""
    if not values:
        return {}
    found = numpy.percentile(values, [50, 95, 99]) * 1000
    return {f"p{n}": round(float(value), 2) for n, value in zip((50, 95, 99), found, strict=True)}


def ttft(outcomes: Iterable[Outcome]) -> list[float]:
    return [one.times[0] - one.sent for one in outcomes if one.times]


def gaps(outcomes: Iterable[Outcome]) -> list[float]:
    """Seconds from each token to the next."""
    found: list[float] = []
    for one in outcomes:
        for (before, now), count in zip(itertools.pairwise(one.times), one.counts[1:], strict=True):
            found += [(now - before) / count] * count
    return found


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Figures of all requests together, of each class and of each tenant."""
    over = max((one.ended or 0.0 for one in outcomes), default=0.0)
    begun = min(one.sent for one in outcomes)
    prompt = sum(one.prompt_tokens for one in outcomes)
    rates = list(_rates(outcomes).values())
    return {
        "seconds": round(over - begun, 3),
        "all": _part(outcomes, over - begun),
        "classes": _by(outcomes, lambda one: one.sched_class, over - begun),
        "tenants": _by(outcomes, lambda one: one.tenant, over - begun),
        "prefix_hit_rate": round(sum(one.cached for one in outcomes) / prompt, 4),
        "jain": round(sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates)), 4),
        "max_min_share": round(max(rates) / min(rates), 3),
    }


def _by(outcomes: list[Outcome], key: Callable[[Outcome], str], seconds: float) -> dict[str, Any]:
    names = sorted({key(one) for one in outcomes})
    return {name: _part([one for one in outcomes if key(one) == name], seconds) for name in names}


def _part(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    ended = [one for one in outcomes if not one.error]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(ended),
        "goodput_tokens_per_s": round(sum(sum(one.counts) for one in ended) / max(seconds, 1e-9), 2),
        "ttft_ms": percentiles(ttft(outcomes)),
        "inter_token_ms": percentiles(gaps(outcomes)),
    }


def _rates(outcomes: list[Outcome]) -> dict[str, float]:
    """Tokens a second, prompts included, that each tenant got while it had something running: what fairness
    is about, for who asks for little gets little however fair the scheduler is."""
    rates = {}
    for tenant in {one.tenant for one in outcomes}:
        own = sorted((one.sent, one.ended or one.sent) for one in outcomes if one.tenant == tenant)
        busy, until = 0.0, 0.0
        for begin, end in own:
            busy += max(0.0, end - max(begin, until))
            until = max(until, end)
        served = sum(sum(one.counts) + one.prompt_tokens for one in outcomes if one.tenant == tenant)
        rates[tenant] = served / max(busy, 1e-9)
    return rates


def text(figures: dict[str, Any]) -> str:
    """The summary as a table for a person."""
    lines = [
        f"{'':24}{'requests':>9}{'failed':>7}{'tokens/s':>10}{'TTFT ms p50/p95/p99':>28}{'inter-token':>24}"
    ]
    parts = {"all": figures["all"]}
    parts |= {f"class {name}": part for name, part in figures["classes"].items()}
    parts |= {f"tenant {name}": part for name, part in figures["tenants"].items()}
    for name, part in parts.items():
        first, gap = (
            "/".join(f"{value:.1f}" for value in part[key].values()) or "-"
            for key in ("ttft_ms", "inter_token_ms")
        )
        lines.append(
            f"{name:24}{part['requests']:>9}{part['failed']:>7}{part['goodput_tokens_per_s']:>10.1f}"
            f"{first:>28}{gap:>24}"
        )
    rest = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    return "\n".join([*lines, *(f"{name:32}{value}" for name, value in rest.items())])
