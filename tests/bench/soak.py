"""A mixed load for some minutes against a real daemon, and whether its memory grows.

    python tests/bench/soak.py --minutes 30

Chats that come back with their whole history, batch work, forks, kills, suspended processes and clients
that vanish. Every few seconds the resident memory of each of the daemon's processes is noted; the slope of
the part after warm-up is printed in MB an hour. Exits with 1 when a call failed that should not, or a process
died.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import daemon
import numpy
import peers
from tokenizers import Tokenizer
from workloads import TEXT

# A pool that has soon been used whole: a block that is used for the first time adds to worker and kernel.
SMALL = "kv_fraction=0.01"


class Load:
    """Threads that use the daemon in their ways until `over` is set."""

    def __init__(self, text: list[int], dtype: str) -> None:
        self.text, self.dtype = text, dtype
        self.over = threading.Event()
        self.did: Counter[str] = Counter()
        self.problems: list[str] = []

    def threads(self) -> list[threading.Thread]:
        works: list[Callable[[random.Random], None]] = [self.chat, self.chat, self.batch, self.forks]
        works += [self.kills, self.vanish]
        return [
            threading.Thread(target=self._repeat, args=(work, n), daemon=True) for n, work in enumerate(works)
        ]

    def _repeat(self, work: Callable[[random.Random], None], seed: int) -> None:
        dice = random.Random(seed)
        while not self.over.is_set():
            try:
                work(dice)
                self.did[work.__name__] += 1
            except Exception as problem:
                self.problems.append(f"{work.__name__}: {problem!r}")
                self.over.wait(1.0)

    def _some(self, dice: random.Random, count: int) -> list[int]:
        start = dice.randrange(len(self.text) - count)
        return self.text[start : start + count]

    def _infer(self, tokens: list[int], new: int, **more: object):  # type: ignore[no-untyped-def]
        from llmasos.syscalls import table
        from llmasos.syscalls import types as t

        given = {"tokens": t.pack_tokens(tokens), "max_tokens": new} | more
        if "pid" not in given:
            given |= {"model": peers.MODEL, "dtype": self.dtype}
        return table.Infer(**given)

    def chat(self, dice: random.Random) -> None:
        from llmasos.userland.client import Client

        with Client() as client:
            history = self._some(dice, 40)
            for _ in range(6):
                with client.stream(self._infer(history, 32)) as stream:
                    history += [token for event in stream for token in event.tokens]
                history += self._some(dice, 20)
                if self.over.wait(dice.random()):
                    return

    def batch(self, dice: random.Random) -> None:
        from llmasos.syscalls import types as t
        from llmasos.userland.client import Client

        with Client() as client:
            calls = [
                self._infer(
                    self._some(dice, dice.randrange(16, 400)),
                    dice.randrange(8, 96),
                    sched_class=t.SchedClass.BATCH,
                    sampling=t.Sampling(temperature=1.0, seed=dice.randrange(2**31)),
                )
                for _ in range(12)
            ]
            for _ in client.gather(calls):
                pass

    def forks(self, dice: random.Random) -> None:
        from llmasos.syscalls import table
        from llmasos.userland.client import Client

        with Client() as client:
            parent = client.call(table.SpawnModel(peers.MODEL, dtype=self.dtype)).pid
            client.call(self._infer(self._some(dice, 200), 0, pid=parent))
            children = client.call(table.Fork(parent, 6)).pids
            calls = [self._infer(self._some(dice, 8), 24, pid=pid, exit=True) for pid in children]
            for _ in client.gather(calls):
                pass
            client.kill(parent)
            for pid in (*children, parent):
                client.wait(pid, 30.0)

    def kills(self, dice: random.Random) -> None:
        from llmasos.syscalls import errors, table
        from llmasos.userland.client import Client

        with Client() as client:
            pid = client.call(table.SpawnModel(peers.MODEL, dtype=self.dtype)).pid
            with client.stream(self._infer(self._some(dice, 64), 400, pid=pid)) as stream:
                next(stream)
                client.kill(pid, "STOP")
                self.over.wait(0.5 * dice.random())
                client.kill(pid, "CONT")
                next(stream)
                client.kill(pid, dice.choice(["TERM", "KILL"]))
                try:
                    stream.result()
                except errors.LLMasOSError:
                    pass
            client.wait(pid, 30.0)

    def vanish(self, dice: random.Random) -> None:
        """Leaves in the middle of an answer."""
        from llmasos.userland.client import Client

        client = Client()
        stream = client.stream(self._infer(self._some(dice, 100), 300))
        next(stream)
        client.close()
        self.over.wait(1.0)


def slope(samples: list[tuple[float, float]]) -> float:
    """Least squares: what is added a second."""
    times, values = numpy.array(samples).T
    return float(numpy.polyfit(times, values, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between samples")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--home", type=Path, default=peers.CACHE / "home")
    arguments = parser.parse_args()
    peers.pull(arguments.home, sys.executable)
    tokenizer = Tokenizer.from_file(peers.files(arguments.home)["tokenizer.json"]["path"])
    load = Load(list(tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids), arguments.dtype)
    begun = time.monotonic()
    ends = begun + 60 * arguments.minutes
    samples: dict[str, list[tuple[float, float]]] = {}
    with daemon.running(arguments.home, SMALL) as supervisor:
        threads = load.threads()
        for thread in threads:
            thread.start()
        pids: dict[str, int] = {}
        while time.monotonic() < ends:
            time.sleep(arguments.every)
            for name, process in daemon.parts(supervisor).items():
                if pids.setdefault(name, process.pid) != process.pid:
                    load.problems.append(f"{name} was started anew")
                    pids[name] = process.pid
                point = time.monotonic() - begun, process.memory_info().rss / 1e6
                samples.setdefault(name, []).append(point)
        load.over.set()
        for thread in threads:
            thread.join(60)
    for name, points in samples.items():
        # What is allocated once is allocated in the first third.
        late = [point for point in points if point[0] >= 60 * arguments.minutes / 3]
        growth = round(3600 * slope(late), 2) if len(late) > 2 else None
        figures = {"process": name, "samples": len(late), "rss_mb": round(points[-1][1], 1)}
        print(json.dumps(figures | {"most_mb": round(max(p[1] for p in points), 1), "mb_an_hour": growth}))
    print(json.dumps({"minutes": arguments.minutes, "did": dict(load.did), "problems": load.problems[:20]}))
    return 1 if load.problems else 0


if __name__ == "__main__":
    sys.exit(main())
