"""How quick the kernel itself is: what it takes to book a step, what a scheduling decision takes with many
processes, and how many tokens a second go through one kernel that need no computing. In processor time:
others on the machine do not count.

    python tests/bench/kernel_speed.py --processes 10000 --streams 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import simulation
from llmasos.drivers import base
from llmasos.drivers.simulated import LightDriver, StepTime
from llmasos.kernel import planning
from llmasos.kernel.config import Config
from llmasos.kernel.effects import ToWorker
from llmasos.kernel.loop import Kernel
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.kernel.sessions import Send
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t
from llmasos.syscalls.garbage import collect_rarely

SESSION = b"\0bench"
TENANTS = 50


class Bench:
    """A kernel with a device whose tokens cost nothing; a step lands when `step` is called."""

    def __init__(self, home: Path, blocks: int, rows: int) -> None:
        store = ModelFS(home)
        simulation.add_model(store, blocks)
        many = 1 << 20
        settings = {"draft_tokens": 0, "max_requests": many, "max_processes": many, "swap_disk_bytes": 0}
        config = Config(**settings, max_processes_per_owner=many)  # type: ignore[arg-type]
        self.kernel = Kernel(config, store, ["null"], time.monotonic, seed=1)
        self.driver = LightDriver(StepTime(1e-4, 1e-7, 1e-6, 0.0), 2048, rows, lambda rows, prompts: 1.0)
        self.kernel.worker_message(1, base.Attach("null", 1, self.driver.describe()))
        self.held: list[base.Batch] = []
        self.tokens = 0
        self.seconds: list[float] = []  # of the kernel, a step
        self.booked: list[float] = []  # until what a step made is ready to be sent
        self.decisions: list[float] = []
        self._sessions: set[bytes] = set()
        self._id = 0
        self.flush()

    def ask(self, tenant: str, prompt: int, new: int) -> None:
        session = SESSION + tenant.encode()
        subject = Subject(tenant, 1000, 1, True)
        if session not in self._sessions:
            self._sessions.add(session)
            hello = table.Hello(table.VERSION, table.table_hash())
            self.kernel.message(session, subject, wire.encode_request(wire.MAX_ID, hello, 0))
        self._id += 1
        tokens = t.pack_tokens((self._id * 7919 + place) % 50_000 for place in range(prompt))
        call = table.Infer(model=simulation.MODEL, tokens=tokens, max_tokens=new)
        frames = wire.encode_request(self._id, call, wire.MAX_CREDITS)
        self.kernel.message(session, subject, frames)

    def flush(self) -> None:
        self.kernel.tick()
        for effect in self.kernel.take_effects():
            match effect:
                case ToWorker(_, base.Step(batch)):
                    self.held.append(batch)
                case ToWorker(worker, base.Load(spec)):
                    loaded = self.driver.load(spec)
                    self.kernel.worker_message(worker, base.LoadDone(loaded, 0, 0.0))
                case Send():
                    pass

    def step(self) -> None:
        """One step lands; the kernel books it, answers and plans the next one."""
        done = self.driver.collect(self.driver.submit(self.held.pop(0)))
        self.tokens += sum(len(out.tokens) for out in done.outputs)
        begun = time.thread_time()
        self.kernel.worker_message(1, base.StepDone(done))
        booked = time.thread_time()
        self.flush()
        ended = time.thread_time()
        self.seconds.append(ended - begun)
        self.booked.append(booked - begun)
        self.decisions.append(ended - booked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="sequences of a step at most")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    planning.MOST_ROUNDS = 1
    collect_rarely()
    figures: dict[str, float] = {}
    for name, count in (("few", arguments.streams), ("many", arguments.processes)):
        with tempfile.TemporaryDirectory() as home:
            bench = Bench(Path(home), 1 << 17, arguments.rows)
            for number in range(count):
                bench.ask(f"tenant{number % TENANTS}", 17, 4096)
            bench.flush()
            for _ in range(arguments.steps):
                while not bench.held:
                    bench.flush()
                bench.step()
            settled = len(bench.seconds) // 4
            for what, seconds in (("booked", bench.booked), ("decision", bench.decisions)):
                ordered = sorted(seconds[settled:])
                figures[f"{what}_{name}_p50_us"] = round(1e6 * statistics.median(ordered), 1)
                figures[f"{what}_{name}_p99_us"] = round(1e6 * ordered[int(len(ordered) * 0.99)], 1)
            figures[f"step_{name}_p50_us"] = round(1e6 * statistics.median(bench.seconds[settled:]), 1)
            figures[f"tokens_per_s_{name}"] = round(bench.tokens / sum(bench.seconds))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
