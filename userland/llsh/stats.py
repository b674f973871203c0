"""The command about what the kernel counts: `llsh stats`."""

from __future__ import annotations

from collections import defaultdict

import typer
from llmasos.syscalls import table
from llmasos.syscalls.types import Family, Sample

from . import quantity
from .argument import Json, examples
from .shell import shell_of
from .table import Column, Table

app = typer.Typer()

REQUESTS = (
    "requests_running",
    "requests_waiting",
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "preemptions",
)
WAITS = ("queue_seconds", "first_token_seconds", "between_tokens_seconds", "request_seconds")
TENANTS = ("tenant_requests", "tenant_prompt_tokens", "tenant_cached_tokens", "tenant_generated_tokens")


@app.command(epilog=examples("llsh stats", "llsh stats --json | jq -r '.families[].name'"))
def stats(context: typer.Context, json: Json = False) -> None:
    """Show what the kernel counted since it started: requests, tokens, waits.

    Who may not know of others sees what he used himself. Waits are medians, as exactly as the buckets of the
    histograms tell; /metrics of `llsh serve` has all of it for Prometheus.
    """
    shell = shell_of(context)
    reply = shell.client().call(table.Stats())
    if json:
        shell.terminal.document(reply)
        return
    families = {family.name: family for family in reply.families}
    if reply.everything:
        titles = ("RUN", "WAIT", "DONE", "INPUT", "CACHED", "OUTPUT", "PUSHED OUT", "QUEUE")
        times = ("FIRST TOKEN", "TOKEN", "REQUEST")
        shown = Table(
            [
                Column("MODEL", least=8),
                Column("CLASS"),
                *(Column(title, right=True, drop=place) for place, title in enumerate((*titles, *times), 1)),
            ]
        )
        counts = [_sums(families[name]) for name in REQUESTS]
        waits = [_medians(families[name]) for name in WAITS]
        for key in sorted(waits[0]):
            shown.add(
                *key,
                *(quantity.count(int(of[key])) for of in counts),
                *(of[key] for of in waits),
            )
        shell.terminal.table(shown)
        shell.terminal.line()
    shown = Table([Column("TENANT"), *(Column(t, right=True) for t in ("DONE", "INPUT", "CACHED", "OUTPUT"))])
    uses = [_sums(families[name], labels=1) for name in TENANTS]
    for key in sorted(uses[0], key=lambda key: -uses[-1][key]):
        shown.add(*key, *(quantity.count(int(of[key])) for of in uses))
    shell.terminal.table(shown)


def _sums(family: Family, labels: int = 2) -> dict[tuple[str, ...], float]:
    """By the first labels; the others are summed."""
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for sample in family.samples:
        sums[tuple(sample.labels[:labels])] += sample.value
    return sums


def _medians(family: Family) -> dict[tuple[str, ...], str]:
    return {tuple(sample.labels): _median(sample, family.bounds) for sample in family.samples}


def _median(sample: Sample, bounds: list[float]) -> str:
    """The bucket that has the middle one."""
    total, before = sum(sample.buckets), 0
    if not total:
        return "-"
    for bound, count in zip(bounds, sample.buckets, strict=False):
        before += count
        if 2 * before >= total:
            return f"< {1000 * bound:g} ms" if bound < 1 else f"< {bound:g} s"
    return f"> {bounds[-1]:g} s"
