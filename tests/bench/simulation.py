"""The kernel in virtual time: its own code, clients made of a trace, devices made of a step-time model.

The simulation moves the clock from event to event and measures with the real one how long the kernel's code
takes. Nothing sleeps, no token is computed, guessing ahead is off: whether guesses come true is the model's
affair.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy
from llmasos.drivers import base
from llmasos.drivers.simulated import LightDriver, SimulatedWorker, StepTime
from llmasos.kernel.config import Config
from llmasos.kernel.effects import ToWorker
from llmasos.kernel.loop import Kernel
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import Manifest, ManifestFile, ModelFS
from llmasos.kernel.sessions import Send
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t
from outcomes import Outcome
from traces import Request

MODEL = "simulated"
PLENTY = 1 << 20
RIGHTS = frozenset(t.Capability) - {t.Capability.ADMIN}


class Wake(msgspec.Struct, frozen=True, array_like=True):
    """To a device that was `idle` so long: what a step that comes takes beside its time, and what the step
    behind that takes beside its time and a pause. Seconds."""

    idle: float = 0.0
    first: float = 0.0
    second: float = 0.0


class Factors(msgspec.Struct, frozen=True, array_like=True):
    """Equally likely ones of steps in which up to so many rows generate."""

    rows: int = PLENTY
    values: tuple[float, ...] = (1.0,)


class Machine(msgspec.Struct, frozen=True):
    """What is simulated: `devices` equal ones, each with `blocks` KV blocks, at most `step_tokens` tokens of
    `sequences` sequences in a step, `pause` seconds between two; `transit` seconds from a client to the
    kernel, and as much back. What lies between two `wakes` is interpolated. A step takes its time by a factor
    that is drawn from `decode_factors`, or from `prefill_factors` if there is a prompt in it: what else the
    machine does, as it was measured."""

    step_time: StepTime = StepTime()
    devices: int = 1
    blocks: int = 4096
    step_tokens: int = 256
    sequences: int = 64
    pause: float = 0.0
    wakes: tuple[Wake, ...] = (Wake(),)
    transit: float = 0.0
    decode_factors: tuple[Factors, ...] = (Factors(),)
    prefill_factors: tuple[float, ...] = (1.0,)


class Simulation:
    """Runs one trace on one machine. `settings` are the kernel's."""

    def __init__(
        self, home: Path, machine: Machine, requests: list[Request], settings: dict[str, Any]
    ) -> None:
        self.now = 0.0
        self.kernel_seconds: list[float] = []  # of each turn in which a step was planned
        self._spent = 0.0  # since then
        self._requests = requests
        self._transit = machine.transit
        self._outcomes: dict[int, Outcome] = {}
        self._ended = 0
        store = ModelFS(home)
        add_model(store, machine.blocks)
        names = [f"simulated:{n}" for n in range(machine.devices)]
        config = msgspec.convert(
            {
                "draft_tokens": 0,
                "max_requests": PLENTY,
                "max_processes": PLENTY,
                "max_processes_per_owner": PLENTY,
                "flight_steps": 1,
                "swap_disk_bytes": 0,  # a LightDriver has no KV to write
            }
            | settings,
            Config,
        )
        self.kernel = Kernel(config, store, names, lambda: self.now, seed=1)
        dice = random.Random(1)

        def factor(rows: int, prompts: bool) -> float:
            if prompts:
                return dice.choice(machine.prefill_factors)
            like = next(
                (one for one in machine.decode_factors if rows <= one.rows), machine.decode_factors[-1]
            )
            return dice.choice(like.values)

        idles, *parts = zip(*map(msgspec.structs.astuple, machine.wakes), strict=True)

        def wake(idle: float) -> tuple[float, float]:
            first, second = (float(numpy.interp(idle, idles, part)) for part in parts)
            return first, second

        self._workers = {
            number: SimulatedWorker(
                LightDriver(machine.step_time, machine.step_tokens, machine.sequences, factor),
                machine.pause,
                wake,
            )
            for number in range(len(names))
        }
        self._names = names
        for number, name in enumerate(names):
            described = self._workers[number].driver.describe()
            self.kernel.worker_message(number, base.Attach(name, number, described))
        self._tenants = {request.tenant: f"tenant {request.tenant}".encode() for request in requests}
        hello = table.Hello(table.VERSION, table.table_hash())
        for number, (tenant, session) in enumerate(self._tenants.items()):
            subject = Subject(tenant, 1000 + number, 1, False, RIGHTS)
            self.kernel.message(session, subject, wire.encode_request(wire.MAX_ID, hello, 0))
        self._turn()

    def run(self, progress: Callable[[int], object]) -> list[Outcome]:
        """The outcomes in the trace's order. `progress` is told how many requests have ended."""
        place, count = 0, len(self._requests)
        while self._ended < count:
            for worker in self._workers.values():
                worker.begin(self.now)
            arrival = self._requests[place].time + self._transit if place < count else float("inf")
            timer = self.kernel.next_timer()
            due = float("inf") if timer is None else max(timer, self.now)
            self.now = min(arrival, due, *(worker.ends for worker in self._workers.values()))
            if self.now == float("inf"):
                raise RuntimeError(f"nothing is going to happen, {count - self._ended} requests wait")
            while place < count and self._requests[place].time + self._transit <= self.now:
                self._arrive(place)
                place += 1
            for number, worker in self._workers.items():
                if done := worker.land(self.now):
                    with self._measured():
                        self.kernel.worker_message(number, base.StepDone(done))
            self._turn()
            progress(self._ended)
        return [self._outcomes[id_] for id_ in sorted(self._outcomes)]

    @property
    def pushes(self) -> int:
        return self.kernel.recorder.pushes

    def _arrive(self, place: int) -> None:
        request = self._requests[place]
        call = table.Infer(
            model=MODEL,
            tokens=t.pack_tokens(request.tokens(place)),
            max_tokens=request.output_tokens,
            sched_class=request.sched_class,
            device=self._names[place % len(self._names)],
        )
        session = self._tenants[request.tenant]
        subject = self.kernel.sessions.by_id[session].subject
        frames = wire.encode_request(place + 1, call, wire.MAX_CREDITS)
        self._outcomes[place + 1] = Outcome(
            request.tenant, request.sched_class, request.time, request.prompt_tokens
        )
        with self._measured():
            self.kernel.message(session, subject, frames)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Counts what the block takes as the kernel's time of this turn."""
        begun = time.perf_counter()
        yield
        self._spent += time.perf_counter() - begun

    def _turn(self) -> None:
        planned = False
        while True:
            with self._measured():
                self.kernel.tick()
                effects = self.kernel.take_effects()
            if not effects:
                break
            for effect in effects:
                match effect:
                    case Send(_, frames):
                        self._hear(frames)
                    case ToWorker(worker, base.Step() as step):
                        self._workers[worker].held.append(step)
                        planned = True
                    case ToWorker(worker, base.Load(spec)):
                        loaded = self._workers[worker].driver.load(spec)
                        self.kernel.worker_message(worker, base.LoadDone(loaded, 0, 0.0))
                    case _:
                        raise RuntimeError(f"not in a simulation: {effect}")
        if planned:
            self.kernel_seconds.append(self._spent)
            self._spent = 0.0

    def _hear(self, frames: list[bytes]) -> None:
        for answer in wire.decode_answers(frames):
            outcome = self._outcomes.get(answer.id)
            if outcome is None:
                continue  # hello's
            if answer.kind == wire.Kind.ITEMS:
                outcome.times.append(self.now + self._transit)
                outcome.counts.append(len(answer.body["tokens"]))
                continue
            self._ended += 1
            outcome.ended = self.now + self._transit
            if answer.kind == wire.Kind.ERROR:
                outcome.error = str(answer.body.get("message", "failed"))
            else:
                outcome.cached = answer.body["cached_tokens"]


def add_model(store: ModelFS, blocks: int, **more: object) -> None:
    longest = min(1 << 17, blocks * base.BLOCK_TOKENS)
    config = {"model_type": "null", "llmasos_null_blocks": blocks, "max_position_embeddings": longest} | more
    digest, size = store.put_bytes(json.dumps(config).encode())
    files = [ManifestFile("config.json", digest, size)]
    store.commit(parse_name(MODEL), Manifest(1, "simulator", "null", 0, "", longest, "", 0.0, files))
