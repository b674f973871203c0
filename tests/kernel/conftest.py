"""The sans-IO kernel in virtual time: events in, effects out, the null driver in the same process."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llmasos.drivers import base, kv_file
from llmasos.drivers.mirror import Step
from llmasos.drivers.null import NullDriver, next_token
from llmasos.drivers.simulated import SimulatedDriver, SimulatedWorker, StepTime
from llmasos.kernel import planning
from llmasos.kernel.config import Config
from llmasos.kernel.effects import Exited, KillWorker, ToWorker
from llmasos.kernel.loop import Kernel
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import Manifest, ManifestFile, ModelFS
from llmasos.kernel.sessions import Send
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

ROOT = Subject("root", 0, 1, True)


@pytest.fixture(scope="package", autouse=True)
def one_round() -> Iterator[None]:
    """A step of the null driver takes no time, so it would be repeated: here a token is a turn, but in the
    tests of rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MOST_ROUNDS", 1)
        yield


class World:
    """A kernel, its clients and its workers; `now` is the clock."""

    def __init__(
        self,
        home: Path,
        devices: tuple[str, ...] = ("null",),
        rows: dict[str, bytes] | None = None,
        **settings: object,
    ) -> None:
        self.now = 0.0
        self.store = ModelFS(home)
        config = Config(**settings)  # type: ignore[arg-type]
        self.kernel = Kernel(config, self.store, list(devices), lambda: self.now, seed=1, rows=rows)
        self.drivers: dict[int, NullDriver] = {}
        self.inbox: dict[bytes, list[wire.FromKernel]] = {}
        self.killed: list[int] = []
        self.signals: list[int] = []
        self.exited = False
        self.next_id = 0
        self.holds_steps = False  # a device that takes its time: `land` ends a step
        self.held: deque[tuple[int, Any]] = deque()
        self.begun: dict[int, Step] = {}  # of those that are held, by ticket
        self.sent: list[base.Batch] = []
        self.encodes: list[base.Encode] = []
        self.loaded: dict[int, dict[int, base.Loaded]] = {}  # by worker and handle
        self.moves: list[base.Export | base.Import | base.Relay] = []
        self.adapters: list[base.LoadAdapter | base.UnloadAdapter] = []
        self.fail_moves = False
        self.refuse_load: errors.LLMasOSError | None = None
        self.holds_loads = False  # none is answered
        self.loads: list[base.LoadSpec] = []

    def model(self, name: str, **config: object) -> None:
        data = json.dumps({"model_type": "null", "llmasos_null_blocks": 256, **config}).encode()
        digest, size = self.store.put_bytes(data)
        files = [ManifestFile("config.json", digest, size)]
        context = int(str(config.get("max_position_embeddings", 4096)))
        manifest = Manifest(1, "test", "null", 0, "", context, "", time.time(), files)
        self.store.commit(parse_name(name), manifest)

    def attach(self, worker: int = 1, device: str = "null") -> None:
        self.drivers[worker] = NullDriver()
        self.kernel.worker_message(worker, base.Attach(device, 100 + worker, self.drivers[worker].describe()))

    def die(self, worker: int = 1) -> None:
        del self.drivers[worker]
        self.held.clear()
        self.begun.clear()
        self.kernel.worker_gone(worker)

    def send(
        self, call: table.Call, session: bytes = b"\0a", credits_: int = 64, subject: Subject = ROOT
    ) -> int:
        """Makes a call; returns its id."""
        if session not in self.inbox:
            self.inbox[session] = []
            if not isinstance(call, table.Hello):
                hello = table.Hello(table.VERSION, table.table_hash())
                self.kernel.message(session, subject, wire.encode_request(10**6, hello, 0))
        self.next_id += 1
        self.kernel.message(session, subject, wire.encode_request(self.next_id, call, credits_))
        return self.next_id

    def turn(self, steps: int = 1) -> None:
        """Lets the kernel act; workers answer up to `steps` messages each."""
        for _ in range(steps):
            self.kernel.tick()
            self.now += 0.01
            for effect in self.kernel.take_effects():
                self.carry_out(effect)

    def carry_out(self, effect: object) -> None:
        match effect:
            case Send(session, frames):
                self.inbox.setdefault(session, []).extend(wire.decode_answers(frames))
            case ToWorker(worker, message) if worker in self.drivers:
                self.answer(worker, message)
            case KillWorker(pid, number):
                self.killed.append(pid)
                self.signals.append(number)
            case Exited():
                self.exited = True

    def answer(self, worker: int, message: base.ToWorker) -> None:
        driver = self.drivers[worker]
        match message:
            case base.Load(spec) if self.holds_loads:
                self.loads.append(spec)
            case base.Load(spec) if self.refuse_load is not None:
                failed = base.Failed(spec.handle, 0, errors.to_wire(self.refuse_load))
                self.kernel.worker_message(worker, failed)
            case base.Load(spec):
                try:
                    loaded = self.loaded.setdefault(worker, {})[spec.handle] = driver.load(spec)
                    self.kernel.worker_message(worker, base.LoadDone(loaded, 0, 0.1))
                except errors.LLMasOSError as problem:
                    self.kernel.worker_message(worker, base.Failed(spec.handle, 0, errors.to_wire(problem)))
            case base.Unload(handle):
                driver.unload(handle)
            case base.LoadAdapter() | base.UnloadAdapter():
                self.adapters.append(message)
                self.load_adapter(worker, message)
            case base.Export() | base.Import() | base.Relay():
                self.moves.append(message)
                if self.holds_steps:
                    self.held.append((worker, message))
                else:
                    self.move(worker, message)
            case base.Step(batch):
                self.sent.append(batch)
                if self.holds_steps:
                    # What is overtaken has taken its batch in, and computes when the other is done.
                    self.begin()
                    (self.held.appendleft if batch.overtakes else self.held.append)((worker, message))
                else:
                    self.kernel.worker_message(worker, base.StepDone(driver.collect(driver.submit(batch))))
            case base.Encode():
                self.encodes.append(message)
                if self.holds_steps:
                    self.held.append((worker, message))
                else:
                    self.kernel.worker_message(worker, driver.encode(message))

    def load_adapter(self, worker: int, message: base.LoadAdapter | base.UnloadAdapter) -> None:
        driver = self.drivers[worker]
        if isinstance(message, base.UnloadAdapter):
            driver.unload_adapter(message.handle, message.adapter)
            return
        try:
            size = driver.load_adapter(message.handle, message.adapter, message.files)
            self.kernel.worker_message(worker, base.Moved(message.ticket, size, 0.1))
        except errors.LLMasOSError as problem:
            failed = base.Failed(message.handle, message.ticket, errors.to_wire(problem))
            self.kernel.worker_message(worker, failed)

    def move(self, worker: int, message: base.Export | base.Import | base.Relay) -> None:
        """Carries out an order about KV files, or fails it."""
        try:
            if self.fail_moves:
                raise errors.StorageFailed("told to fail")
            answer: base.FromWorker = kv_file.carry_out(self.drivers[worker], self.loaded[worker], message)
        except errors.LLMasOSError as problem:
            answer = base.Failed(0, message.ticket, errors.to_wire(problem))
        self.kernel.worker_message(worker, answer)

    def begin(self) -> None:
        """The first step that is held takes its batch in, after the orders that were sent before it."""
        while self.held and not isinstance(self.held[0][1], base.Step | base.Encode):
            self.move(*self.held.popleft())
        if not self.held:
            return
        worker, step = self.held[0]
        if isinstance(step, base.Step) and step.batch.ticket not in self.begun:
            driver = self.drivers[worker]
            self.begun[step.batch.ticket] = driver.begin(driver.submit(step.batch))

    def land(self, fails: bool = False, late: bool = False) -> None:
        """The first step that is held ends, or raises half-way; what was asked about KV files before it,
        too. `late`: it was to be overtaken, but its end came first."""
        tickets = [step.batch.ticket for _, step in self.held if isinstance(step, base.Step)]
        if late and len(tickets) == len(self.held) > 1 and tickets[0] > tickets[1]:
            self.held[0], self.held[1] = self.held[1], self.held[0]
        self.begin()
        if not self.held:
            self.flush()
            return
        worker, step = self.held.popleft()
        driver = self.drivers[worker]
        if isinstance(step, base.Encode):
            error = errors.to_wire(errors.DeviceFault("raised"))
            self.kernel.worker_message(
                worker, base.Failed(0, step.ticket, error) if fails else driver.encode(step)
            )
            self.flush()
            return
        is_cut = any(isinstance(other, base.Step) and other.batch.cuts for _, other in self.held)
        result = driver.end(
            self.begun.pop(step.batch.ticket), base.Interrupt(-1, lambda: None, is_cut=is_cut)
        )
        if fails:
            driver._residents[step.batch.handle].mirror.forget(step.batch)
            error = errors.to_wire(errors.DeviceFault("raised"))
            self.kernel.worker_message(worker, base.Failed(0, step.batch.ticket, error))
        else:
            self.kernel.worker_message(worker, base.StepDone(result))
        self.flush()

    def flush(self) -> None:
        """Lets the kernel act and carries out what it wants, at this moment."""
        while True:
            self.kernel.tick()
            if not (effects := self.kernel.take_effects()):
                return
            for effect in effects:
                self.carry_out(effect)

    def answers(self, id_: int, session: bytes = b"\0a") -> list[wire.FromKernel]:
        return [answer for answer in self.inbox[session] if answer.id == id_]

    def result(self, id_: int, session: bytes = b"\0a") -> wire.FromKernel:
        """The one final answer."""
        final = [a for a in self.answers(id_, session) if a.kind != wire.Kind.ITEMS]
        assert len(final) == 1, f"{len(final)} final answers"
        assert self.answers(id_, session)[-1] is final[0], "an item after the final answer"
        return final[0]

    def error(self, id_: int, session: bytes = b"\0a") -> type[errors.LLMasOSError]:
        final = self.result(id_, session)
        assert final.kind == wire.Kind.ERROR
        return type(errors.from_wire(final.body))

    def tokens(self, id_: int) -> list[int]:
        items = [a for a in self.answers(id_) if a.kind == wire.Kind.ITEMS]
        assert [a.seq for a in items] == list(range(len(items)))
        return [token for a in items for token in a.body["tokens"]]

    def spawn_now(self, model: str = "tiny") -> int:
        """Of a model that is resident."""
        id_ = self.send(table.SpawnModel(model=model))
        self.flush()
        return int(self.result(id_).body["pid"])

    def spawn(self, model: str = "tiny") -> int:
        id_ = self.send(table.SpawnModel(model=model))
        self.turn(3)
        return int(self.result(id_).body["pid"])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.model("tiny")
    yield made
    for device in made.kernel.devices.values():
        for pool in device.pools:
            pool.memory.check([p.table for p in pool.processes])
            if pool.ready:
                assert {p for p in pool.processes if p.runnable} <= set(pool.queue), "forgotten by the queue"


class Machine(World):
    """A kernel beside a device whose steps take the time that a model of it says."""

    def __init__(self, home: Path, step_time: StepTime, **settings: object) -> None:
        super().__init__(home, **settings)
        self.step_time = step_time
        self.seen: dict[int, list[tuple[float, wire.FromKernel]]] = {}  # answers by request, with their time
        self.idle = 0.0  # seconds that the device had nothing to do

    def attach(self, worker: int = 1, device: str = "null") -> None:
        driver = SimulatedDriver(step_time=self.step_time)
        self.drivers[worker] = driver
        self.device = SimulatedWorker(driver)
        self.held = self.device.held
        self.kernel.worker_message(worker, base.Attach(device, 100 + worker, driver.describe()))
        self.flush()

    def answer(self, worker: int, message: base.ToWorker) -> None:
        if isinstance(message, base.Step | base.Encode):
            if isinstance(message, base.Step):
                self.sent.append(message.batch)
            self.held.append(message)
        elif isinstance(message, base.Export | base.Import | base.Relay):
            self.moves.append(message)
            self.held.append(message)
        else:
            super().answer(worker, message)

    def carry_out(self, effect: object) -> None:
        known = len(self.inbox.get(effect.session, ())) if isinstance(effect, Send) else 0
        super().carry_out(effect)
        if isinstance(effect, Send):
            for answer in self.inbox[effect.session][known:]:
                self.seen.setdefault(answer.id, []).append((self.now, answer))

    def run(self, until: Callable[[], Any] | float) -> None:
        """Moves the clock from event to event, to a moment or until something is so."""
        stops = until if isinstance(until, float) else float("inf")
        while True:
            self.flush()
            while (
                not self.device.running
                and self.held
                and not isinstance(self.held[0], base.Step | base.Encode)
            ):
                self.move(1, self.held.popleft())
            self.device.begin(self.now)
            if not isinstance(until, float) and until():
                return
            timer = self.kernel.next_timer()
            moment = min(self.device.ends, float("inf") if timer is None else max(timer, self.now), stops)
            assert moment < float("inf"), "nothing is going to happen"
            if not self.device.running:
                self.idle += moment - self.now
            self.now = moment
            if done := self.device.land(self.now):
                self.kernel.worker_message(
                    1, base.StepDone(done) if isinstance(done, base.StepResult) else done
                )
            if self.now >= stops:
                self.flush()
                return

    def ended(self, id_: int) -> bool:
        return any(answer.kind != wire.Kind.ITEMS for _, answer in self.seen.get(id_, ()))

    def first_token_s(self, id_: int) -> float:
        """When the first token of a request came."""
        return next(at for at, answer in self.seen[id_] if answer.kind == wire.Kind.ITEMS)


def infer(tokens: list[int], **arguments: object) -> table.Infer:
    return table.Infer(tokens=t.pack_tokens(tokens), **arguments)  # type: ignore[arg-type]


def reference(tokens: list[int], count: int) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        made.append(next_token([*tokens, *made]))
    return made
