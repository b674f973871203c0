"""Whatever is done to a process, its text, greedy or seeded, is the text of one that was left alone: the
real default model in float32 on the native engine, with room for little more than one context."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmasos.drivers import base
from llmasos.drivers.native.executor import NativeDriver
from llmasos.kernel import swapping
from llmasos.kernel.memory import Memory
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t

from ..kernel.conftest import World, infer

PROMPT = [504, 905, 282, 253, 2713, 1379, 30, 216, 198, 788, 1820] * 4
MOST = 90
# Room for a whole text, 9 blocks of 16 tokens, and beside a squeeze for no more than two blocks.
BLOCKS = 12
SQUEEZE = [list(range(n, n + 150)) for n in (1000, 2000, 3000, 4000)]


class Real(World):
    """Two devices that compute the default model; `pid` is the process that things are done to."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, devices=("cpu", "cpu:1"))
        self.natives = {name: NativeDriver(lambda level, text: None) for name in self.kernel.devices}
        for number, name in enumerate(self.natives, 1):
            self.attach(number, name)
        for name in self.natives:
            self.ask(table.SpawnModel("smollm2", device=name, dtype="float32"))
            (pool,) = self.kernel.devices[name].pools
            pool.memory = Memory(BLOCKS)
        self.pid = 0
        self.sampling = t.Sampling()

    def more(self, count: int, tokens: list[int] | None = None) -> table.Infer:
        return infer(tokens or [], pid=self.pid, max_tokens=count, sampling=self.sampling)

    def attach(self, worker: int = 1, device: str = "cpu") -> None:
        driver: Any = self.natives[device]
        self.drivers[worker] = driver
        self.kernel.worker_message(worker, base.Attach(device, 100 + worker, driver.describe()))

    def until_answered(self, id_: int, turns: int = 400) -> Any:
        for _ in range(turns):
            if any(answer.kind != wire.Kind.ITEMS for answer in self.answers(id_)):
                return self.result(id_).body
            self.turn()
        raise AssertionError("no answer")

    def ask(self, call: table.Call) -> Any:
        return self.until_answered(self.send(call))

    def reset(self) -> None:
        """Ends all processes and takes a new one."""
        for process in list(self.kernel.processes):
            self.send(table.Kill(process.pid, t.Signal.KILL))
            self.send(table.Wait(process.pid))
        self.turn(3)
        self.inbox[b"\0a"].clear()
        self.pid = int(self.ask(table.SpawnModel("smollm2", device="cpu", dtype="float32"))["pid"])
        self.until_answered(self.send(self.more(1, PROMPT)))

    def tokens_of(self, pid: int) -> list[int]:
        return next(list(p.tokens) for p in self.kernel.processes if p.pid == pid)

    def kill_worker(self) -> None:
        device = next(
            d for d in self.kernel.devices.values() for p in d.pools for q in p.processes if q.pid == self.pid
        )
        number = device.worker
        assert number is not None
        for handle in list(self.natives[device.name]._residents):
            self.natives[device.name].unload(handle)
        self.kernel.worker_gone(number)
        self.attach(number, device.name)
        while not all(p.ready for p in device.pools):
            self.turn()
        for pool in device.pools:
            pool.memory = Memory(BLOCKS)


@pytest.fixture(scope="module")
def real(smollm2_home: Path) -> Iterator[Real]:
    home = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))
    shutil.copytree(smollm2_home, home, dirs_exist_ok=True)
    world = Real(home)
    yield world
    for driver in world.natives.values():
        driver.close()
    shutil.rmtree(home)


@pytest.fixture(scope="module", params=["greedy", "seeded"])
def text(real: Real, request: pytest.FixtureRequest) -> list[int]:
    """What the prompt is followed by when nobody disturbs it."""
    real.sampling = (
        t.Sampling(temperature=0.9, top_p=0.95, seed=77) if request.param == "seeded" else t.Sampling()
    )
    real.reset()
    real.until_answered(real.send(real.more(MOST), credits_=999))
    return real.tokens_of(real.pid)


def stop(world: Real) -> None:
    world.ask(table.Kill(world.pid, t.Signal.STOP))
    world.turn(2)
    squeeze(world)
    world.ask(table.Kill(world.pid, t.Signal.CONT))


def squeeze(world: Real) -> None:
    """Others come who need the memory."""
    device = next(p.pool.device_name for p in world.kernel.processes if p.pid == world.pid)
    tokens = SQUEEZE[world.next_id % len(SQUEEZE)]
    call = infer(
        tokens, model="smollm2", device=device, dtype="float32", max_tokens=2, sched_class="realtime"
    )
    world.until_answered(world.send(call))


def save(world: Real) -> None:
    world.ask(table.Snapshot(world.pid, "chain"))


def restore_pushed_out(world: Real) -> None:
    squeeze(world)
    restore(world)


def restore(world: Real) -> None:
    """Goes on with what was saved; the one that was is ended."""
    world.ask(table.Snapshot(world.pid, "chain"))
    reply = world.ask(table.Restore("chain", device="cpu:1" if world.next_id % 2 else "cpu"))
    assert not reply["recomputed"]
    world.ask(table.Kill(world.pid, t.Signal.KILL))
    world.pid = reply["pid"]
    if reply.get("max_tokens"):
        assert reply["sampling"].get("seed", 0) == world.sampling.seed or world.sampling.seed is None
        world.send(world.more(reply["max_tokens"]))


def fork(world: Real) -> None:
    idle(world)
    (child,) = world.ask(table.Fork(world.pid))["pids"]
    world.ask(table.Kill(world.pid, t.Signal.KILL))
    world.pid = child


def cut(world: Real) -> None:
    idle(world)
    length = len(world.tokens_of(world.pid))
    world.ask(table.Truncate(world.pid, max(len(PROMPT), length - 7)))


def move(world: Real) -> None:
    device = next(p.pool.device_name for p in world.kernel.processes if p.pid == world.pid)
    assert not world.ask(table.Migrate(world.pid, "cpu" if device == "cpu:1" else "cpu:1"))["recomputed"]


def die(world: Real) -> None:
    world.kill_worker()


def idle(world: Real) -> None:
    for _ in range(400):
        process = next(p for p in world.kernel.processes if p.pid == world.pid)
        if process.infer is None:
            return
        world.turn()
    raise AssertionError("the infer does not end")


DEEDS = [stop, squeeze, save, restore, restore_pushed_out, fork, cut, move, die]


@given(st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 4)), min_size=2, max_size=6))
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_chain_of_deeds_changes_no_token(real: Real, text: list[int], chain: list[tuple[Any, int]]) -> None:
    real.reset()
    before = swapping.worth_saving
    swapping.worth_saving = lambda kernel, process: True  # type: ignore[assignment]
    try:
        for deed, turns in chain:
            length = len(real.tokens_of(real.pid))
            if length < len(text) - 8:
                real.send(real.more(8))
            real.turn(turns)
            deed(real)
            idle(real)
    finally:
        swapping.worth_saving = before  # type: ignore[assignment]
    made = real.tokens_of(real.pid)
    assert made == text[: len(made)]


def test_the_deeds_were_done(real: Real) -> None:
    """The chains above wrote and read KV, by every way there is."""
    kinds = {type(move) for move in real.moves}
    assert kinds == {base.Export, base.Import, base.Relay}
    assert {Path(m.path).parent.name for m in real.moves if isinstance(m, base.Export)} == {"swap", "kv"}
    assert sum(isinstance(move, base.Import) for move in real.moves) >= 10
