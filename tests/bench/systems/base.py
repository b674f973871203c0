"""What every system under test implements, and the loop that drives it: standard library only.

A runner is one process of one system, in that system's own virtual environment. It reads a JSON object a
line on standard input and answers each with one on standard output; whatever a library prints goes to
standard error.

    {"op": "load", "settings": {…}}           → {"info": {"version", "format", "compute", "weights_bytes"}}
    {"op": "run", "requests": […], …}         → {"begun", "requests": [{"key", "at", "times", "counts", …}]}
    {"op": "close"}                           → {}

Times are seconds since the run began; `begun` is on the machine's monotonic clock, so that the parent can
count from the moment it started the process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """`tokens` in, exactly `new` tokens out, greedily, starting `at` seconds.

    The first `prefix` tokens are the same in all requests of a run that have one. `background` work gives
    way to the rest where a system knows priorities. `repeat`: when it ends another like it begins.
    `turns`: when it ends the conversation goes on with these tokens, one list a turn.
    """

    key: str
    tokens: list[int]
    new: int
    at: float = 0.0
    prefix: int = 0
    background: bool = False
    repeat: bool = False
    turns: list[list[int]] = field(default_factory=list)


@dataclass
class Record:
    """When a request's tokens came, how many each time, and which."""

    key: str
    at: float
    background: bool
    prompt: int
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    done: bool = False


Events = list[tuple[str, list[int], bool]]


class Engine:
    """A system. `load` returns what it is; `poll` waits at most `timeout_s` and returns
    (key, new tokens, ended) for whatever moved."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self, requests: list[Request]) -> None:
        """Before the clock starts: room for these requests, where a system wants to know beforehand."""

    def submit(self, requests: list[Request]) -> None:
        raise NotImplementedError

    def poll(self, timeout_s: float) -> Events:
        raise NotImplementedError

    def cancel(self, keys: list[str]) -> None:
        """Ends requests; their tokens are no longer wanted. Returns when the system is at rest."""
        raise NotImplementedError

    def close(self) -> None:
        pass


def follow(request: Request, record: Record) -> Request | None:
    """The request that begins when this one has ended."""
    if request.turns:
        history = request.tokens + record.tokens + request.turns[0]
        base, number = request.key.split(".")
        return dataclasses.replace(
            request, key=f"{base}.{int(number) + 1}", tokens=history, turns=request.turns[1:]
        )
    if request.repeat:
        base, _, number = request.key.partition("#")
        # Turned by a few tokens, so that no prefix cache knows it.
        turned = request.tokens[7:] + request.tokens[:7]
        return dataclasses.replace(request, key=f"{base}#{int(number or 0) + 1}", tokens=turned)
    return None


def drive(engine: Engine, requests: list[Request], stop_after: float | None = None) -> dict[str, Any]:
    """Runs requests until all have ended, or for `stop_after` seconds."""
    engine.prepare(requests)
    waiting = sorted(requests, key=lambda r: r.at)
    running: dict[str, tuple[Request, Record]] = {}
    records: list[Record] = []
    begun = time.monotonic()

    def start(some: list[Request]) -> None:
        for request in some:
            records.append(Record(request.key, request.at, request.background, len(request.tokens)))
            running[request.key] = request, records[-1]
        engine.submit(some)

    while waiting or running:
        now = time.monotonic() - begun
        if stop_after is not None and now >= stop_after:
            break
        due = [request for request in waiting if request.at <= now]
        if due:
            waiting = waiting[len(due) :]
            start(due)
        ends = [waiting[0].at] if waiting else []
        ends += [stop_after] if stop_after is not None else []
        for key, tokens, done in engine.poll(max(0.0, min([end - now for end in ends], default=1.0))):
            if key not in running:
                continue
            seconds = time.monotonic() - begun
            request, record = running[key]
            if tokens:
                record.times.append(seconds)
                record.counts.append(len(tokens))
                record.tokens += tokens
            if done:
                record.done = True
                del running[key]
                if following := follow(request, record):
                    following.at = seconds
                    start([following])
    seconds = time.monotonic() - begun
    if running:
        engine.cancel(sorted(running))
    return {"begun": begun, "seconds": seconds, "requests": [dataclasses.asdict(r) for r in records]}


def answer(engine: Engine, message: dict[str, Any]) -> dict[str, Any]:
    match message["op"]:
        case "load":
            return {"info": engine.load(message["settings"])}
        case "run":
            requests = [Request(**request) for request in message["requests"]]
            return drive(engine, requests, message.get("stop_after"))
        case "close":
            engine.close()
            return {}
        case other:
            raise ValueError(f"no op {other!r}")


def main(engine: Engine) -> None:
    """Serves the parent until it closes standard input."""
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = answer(engine, message)
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=wire, flush=True)
        if message["op"] == "close":
            break
