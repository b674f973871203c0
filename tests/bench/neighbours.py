"""What a caller notices of those who share the machine with him.

    python tests/bench/neighbours.py [--callers 200] [--set step_ms=50 …] [--only idle batch flood share]

A caller of class interactive sends 24 tokens and takes 8, every 0.2 s or so, one at a time:
  idle     nobody else is there
  batch    24 batch requests at any time (256 tokens in, 128 out), first without callers, then with them
  flood    another tenant of the same class and weight asks as often as the caller, then 100 times as often
  share    two tenants, always busy with 64 requests each (64 in, 64 out), with weights 1:3
Callers and load are processes of their own; tenants have keys and come over tcp, or with --http over the
gateway. A JSON line each; waits are times to the first token in ms.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import daemon
import gateway
import peers
from workloads import percentile

EVERY_S = 0.2
BATCH_STREAMS = 24
TENANTS = ("caller", "one", "three")

Whose = tuple[str, str]
"""The tenant's home, where its key lies, and the daemon's address; or its API key and a gateway's URL."""
SETTLE_S = 4.0
RATE_S = 20.0


def infer(dice: random.Random, given: int, wanted: int, kind: str) -> Any:
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t

    tokens = t.pack_tokens([dice.randrange(1000, 40000) for _ in range(given)])
    return table.Infer(model=peers.MODEL, tokens=tokens, max_tokens=wanted, sched_class=t.SchedClass(kind))


class HttpStream:
    """An `infer` as a streamed completion; an event with text counts for a token."""

    def __init__(self, whose: Whose, call: Any) -> None:
        from llmasos.syscalls import types as t

        key, address = whose
        self._connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=600)
        body = {
            "model": call.model,
            "prompt": t.unpack_tokens(call.tokens),
            "max_tokens": call.max_tokens,
            "temperature": 0,
            "priority": str(call.sched_class),
            "stream": True,
        }
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._connection.request("POST", "/v1/completions", json.dumps(body), headers)
        self._answer = self._connection.getresponse()

    def __iter__(self) -> HttpStream:
        return self

    def __next__(self) -> Any:
        from llmasos.syscalls import types as t

        while line := self._answer.readline():
            if line.startswith(b"data: {") and b'"text":""' not in line:
                return t.InferEvent(tokens=[0])
        raise StopIteration

    def result(self) -> None:
        for _ in self:
            pass
        self._connection.close()

    def __enter__(self) -> HttpStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()


class HttpClient:
    """What the jobs need of a client, over HTTP."""

    def __init__(self, whose: Whose) -> None:
        self._whose = whose

    def stream(self, call: Any) -> HttpStream:
        return HttpStream(self._whose, call)

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def connected(whose: Whose) -> Any:
    from llmasos.userland.client import Client

    home, address = whose
    if address.startswith("http://"):
        return HttpClient(whose)
    os.environ["LLMASOS_HOME"] = home
    return Client(address)


def call(whose: Whose, count: int, answers: Any) -> None:
    """A caller: the waits of `count` requests."""
    dice, waits = random.Random(7), []
    with connected(whose) as client:
        for _ in range(count):
            time.sleep(EVERY_S * dice.uniform(0.5, 1.5))
            begun = time.perf_counter()
            with client.stream(infer(dice, 24, 8, "interactive")) as stream:
                next(stream)
                waits.append(time.perf_counter() - begun)
                for _ in stream:
                    pass
    answers.put(waits)


def keep_busy(
    whose: Whose, streams: int, given: int, wanted: int, kind: str, counter: Any, end: Event
) -> None:
    """`streams` requests at any time; what they generate is added to `counter`."""

    def one(number: int) -> None:
        dice = random.Random(f"{whose}{number}")
        while not end.is_set():
            with client.stream(infer(dice, given, wanted - number % 8, kind)) as stream:
                for event in stream:
                    if end.is_set():
                        return
                    with counter.get_lock():
                        counter.value += len(event.tokens)

    with connected(whose) as client:
        threads = [threading.Thread(target=one, args=(number,)) for number in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def flood(whose: Whose, every_s: float, counter: Any, end: Event) -> None:
    """A request each `every_s` answered or not; a refusal is taken as it comes."""
    from llmasos.syscalls import errors

    def one(number: int) -> None:
        try:
            client.stream(infer(random.Random(f"{whose}{number}"), 24, 8, "interactive")).result()
        except errors.LLMasOSError:
            return
        with counter.get_lock():
            counter.value += 8

    with connected(whose) as client:
        begun, sent = time.perf_counter(), 0
        while not end.is_set():
            due = int((time.perf_counter() - begun) / every_s)
            while sent < due and threading.active_count() < 600:
                threading.Thread(target=one, args=(sent,), daemon=True).start()
                sent += 1
            sent = max(sent, due)
            time.sleep(every_s / 4)


class Load:
    """Processes that keep the daemon busy while the block lasts; `rate` is tokens a second of each."""

    def __init__(self, *jobs: tuple[Callable[..., None], tuple[Any, ...]]) -> None:
        self.end = multiprocessing.Event()
        self.counters = [multiprocessing.Value("q", 0) for _ in jobs]
        self.processes = [
            multiprocessing.Process(target=target, args=(*arguments, counter, self.end))
            for (target, arguments), counter in zip(jobs, self.counters, strict=True)
        ]

    def __enter__(self) -> Load:
        for process in self.processes:
            process.start()
        time.sleep(SETTLE_S)
        self.mark()
        return self

    def mark(self) -> None:
        self._at, self._had = time.perf_counter(), [counter.value for counter in self.counters]

    def rates(self) -> list[float]:
        seconds = time.perf_counter() - self._at
        return [(c.value - had) / seconds for c, had in zip(self.counters, self._had, strict=True)]

    def __exit__(self, *exc: object) -> None:
        self.end.set()
        for process in self.processes:
            process.join(10)
            process.kill()


def callers(whose: Whose, count: int) -> dict[str, float]:
    answers: Any = multiprocessing.Queue()
    process = multiprocessing.Process(target=call, args=(whose, count, answers))
    process.start()
    waits = [1000 * wait for wait in answers.get(timeout=600)]
    process.join()
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {f"wait_{name}": round(percentile(waits, share), 1) for name, share in shares.items()}


def say(name: str, **figures: Any) -> None:
    print(json.dumps({"neighbours": name} | figures), flush=True)


def batch(tenants: dict[str, Whose], count: int) -> None:
    with Load((keep_busy, (tenants["one"], BATCH_STREAMS, 256, 128, "batch"))) as load:
        time.sleep(RATE_S)
        (alone,) = load.rates()
        load.mark()
        waits = callers(tenants["caller"], count)
        (beside,) = load.rates()
    say("batch", **waits, batch_alone=round(alone), batch_beside=round(beside), kept=round(beside / alone, 3))


def floods(tenants: dict[str, Whose], count: int) -> None:
    for name, every_s in (("as often", EVERY_S), ("100 times as often", EVERY_S / 100)):
        with Load((flood, (tenants["one"], every_s))) as load:
            waits = callers(tenants["caller"], count)
            (rate,) = load.rates()
        say(f"another asks {name}", **waits, others_tokens_per_s=round(rate))


def share(tenants: dict[str, Whose]) -> None:
    with Load(
        *((keep_busy, (tenants[name], 64, 64, 64, "interactive")) for name in ("one", "three"))
    ) as load:
        ratios = []
        for _ in range(3):
            load.mark()
            time.sleep(60)
            one, three = load.rates()
            ratios.append(round(three / one, 3))
    say("weights 1:3", ratios=ratios, median=statistics.median(ratios))


def let_in(home: Path, tenants: dict[str, Whose]) -> None:
    """Makes each tenant a key, which the daemon of `home` lets in."""
    from llmasos.syscalls import errors, table
    from llmasos.syscalls import types as t
    from llmasos.userland import keys
    from llmasos.userland.client import Client

    with Client() as admin:
        server = admin.call(table.Keys()).server
        for name, (own, address) in tenants.items():
            with contextlib.suppress(errors.NoSuchKey):
                admin.call(table.RevokeKey(name))
            os.environ["LLMASOS_HOME"] = own
            keys.trust(address, server)
            admin.call(table.AuthorizeKey(t.KeyInfo(name, keys.make_pair().public)))
    os.environ["LLMASOS_HOME"] = str(home)


@contextlib.contextmanager
def with_keys(tenants: dict[str, Whose]) -> Iterator[dict[str, Whose]]:
    """Tenants of a gateway, each with an API key, while the block lasts."""
    from llmasos.syscalls import errors
    from llmasos.syscalls import types as t
    from llmasos.userland.gateway.access import ApiKeys, folder

    keys, found = ApiKeys(folder()), {}
    for name in tenants:
        with contextlib.suppress(errors.NoSuchKey):
            keys.revoke(name)
        found[name] = (keys.make(name, name, t.TENANT_RIGHTS), f"http://127.0.0.1:{gateway.PORT}")
    yield found
    for name in tenants:
        keys.revoke(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the kernel")
    parser.add_argument("--only", nargs="*", default=["idle", "batch", "flood", "share"])
    parser.add_argument("--http", action="store_true", help="over the gateway")
    parser.add_argument("--home", type=Path, default=peers.CACHE / "home")
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    peers.pull(arguments.home, sys.executable)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    settings = [f'listen="{address}"', "draft_tokens=0", "quotas={three={weight=3}}", *arguments.set]
    with (
        daemon.running(arguments.home, *settings),
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        tenants = {name: (str(Path(folder, name)), address) for name in TENANTS}
        if arguments.http:
            tenants = stack.enter_context(with_keys(tenants))
            stack.enter_context(gateway.serving(arguments.home))
        else:
            let_in(arguments.home, tenants)
        callers(tenants["caller"], 20)  # loads the model, and learns what a step takes
        for name in arguments.only:
            match name:
                case "idle":
                    say("nobody", **callers(tenants["caller"], arguments.callers))
                case "batch":
                    batch(tenants, arguments.callers)
                case "flood":
                    floods(tenants, arguments.callers)
                case "share":
                    share(tenants)


if __name__ == "__main__":
    main()
