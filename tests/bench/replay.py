"""A trace against a real daemon, in real time, and what the daemon's devices did meanwhile.

Each tenant is a client of its own (a label of the caller), each request a thread: what is measured is what a
program sees.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import daemon
import msgspec
import peers
from llmasos.kernel.recorder import Decision
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from outcomes import Outcome
from traces import VOCABULARY, Request

POLL_S = 1.0
RESTS = (0.003, 0.1, 0.3, 1, 3, 8)
ALONE = 6
LONELY = 24  # tokens
REPEATS = 3
GRID = [
    (rows, context)
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24)
    for context in (24, 200, 400, 700, 1500)
    if rows * context <= 6000
]


@contextmanager
def serving(home: Path) -> Iterator[Client]:
    """A client of a daemon for `home`, which holds the model; guessing ahead is off as in the simulator."""
    with daemon.running(home, "draft_tokens=0"), Client() as client:
        until = time.monotonic() + 60
        while client.call(table.Lsdev()).devices[0].state == "starting":
            if time.monotonic() > until:
                raise RuntimeError("the device does not attach")
            time.sleep(0.1)
        for _ in range(2):  # loads the model, and teaches the kernel the device's pace
            client.call(infer(list(VOCABULARY[:600]), 64))
        yield client


def infer(tokens: list[int], new: int, kind: t.SchedClass = t.SchedClass.INTERACTIVE) -> table.Infer:
    return table.Infer(model=peers.MODEL, tokens=t.pack_tokens(tokens), max_tokens=new, sched_class=kind)


def replay(requests: list[Request], progress: Callable[[int], object]) -> list[Outcome]:
    """What becomes of a trace's requests, in the trace's order."""
    clients = {tenant: Client(label=tenant) for tenant in sorted({r.tenant for r in requests})}
    calls = [infer(r.tokens(n), r.output_tokens, r.sched_class) for n, r in enumerate(requests)]
    found = [Outcome(r.tenant, r.sched_class, r.time, r.prompt_tokens) for r in requests]
    threads = [
        threading.Thread(target=_one, args=(clients[r.tenant], call, one))
        for r, call, one in zip(requests, calls, found, strict=True)
    ]
    begun = time.monotonic()
    for n, (request, thread) in enumerate(zip(requests, threads, strict=True)):
        time.sleep(max(0.0, begun + request.time - time.monotonic()))
        thread.start()
        progress(n)
    for thread in threads:
        thread.join()
    for client in clients.values():
        client.close()
    # A thread may have been started late; what counts is the trace's time.
    for one in found:
        one.times = [at - begun for at in one.times]
        one.ended = None if one.ended is None else one.ended - begun
    return found


def _one(client: Client, call: table.Infer, outcome: Outcome) -> None:
    try:
        with client.stream(call, window=1024) as stream:
            for event in stream:
                outcome.times.append(time.monotonic())
                outcome.counts.append(len(event.tokens))
            outcome.cached = stream.reply.cached_tokens
    except errors.LLMasOSError as problem:
        outcome.error = problem.message
    outcome.ended = time.monotonic()


def decisions(client: Client) -> list[Decision]:
    """The newest of the steps that are done."""
    lines = client.read_file("/proc/flight").splitlines()
    found = [msgspec.json.decode(line, type=Decision) for line in lines]
    return [one for one in found if one.outcome == "done"]


class Watch:
    """Collects the flight recorder's decisions while the block runs: what a read brings is only its newest
    part."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._found: dict[int, Decision] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    @property
    def decisions(self) -> list[Decision]:
        return [self._found[ticket] for ticket in sorted(self._found)]

    def _poll(self) -> None:
        while True:
            over = self._over.wait(POLL_S)
            self._found |= {one.ticket: one for one in decisions(self._client)}
            if over:
                return


class Rest(NamedTuple):
    """What a prompt of LONELY tokens met after `seconds` of nothing: medians of its TTFT, of its step, and of
    the time from the first token to what comes next."""

    seconds: float
    ttft: float
    step: float
    then: float


def rests(client: Client, progress: Callable[[int], object]) -> list[Rest]:
    """Prompts by themselves after each of RESTS, shortest first."""
    found = []
    for seconds in RESTS:
        waits, steps, gaps = [], [], []
        for n in range(ALONE):
            time.sleep(seconds)
            begun = time.monotonic()
            with client.stream(infer(_fresh(200 + int(10 * seconds), n, LONELY), 8)) as stream:
                next(stream)
                first = time.monotonic()
                next(stream)
                waits.append(first - begun)
                gaps.append(time.monotonic() - first)
                stream.result()
            last = [one for one in decisions(client) if one.tokens == LONELY][-1]
            steps.append(last.seconds or 0.0)
            progress(len(found) * ALONE + n)
        found.append(Rest(seconds, *map(statistics.median, (waits, steps, gaps))))
    return found


def grid(client: Client, progress: Callable[[int], object]) -> list[Decision]:
    """Steps of many shapes: so many streams with so long contexts, begun together."""
    with Watch(client) as watch:
        for place, (rows, context) in enumerate(GRID * REPEATS):
            # The device repeats steps of few rows by itself, so those need more tokens for as many steps.
            calls = [infer(_fresh(place, n, context), max(24, 192 // rows)) for n in range(rows)]
            for _ in client.gather(calls):
                pass
            progress(place)
    return watch.decisions


def _fresh(place: int, number: int, count: int) -> list[int]:
    """Tokens that no other cell's prompt begins with."""
    start = 37 * place + 997 * number
    return [VOCABULARY[(start + 7 * n * (place + 1)) % len(VOCABULARY)] for n in range(count)]
