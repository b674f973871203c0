"""Steps that the device repeats by itself while everybody only generates."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmasos.drivers.simulated import StepTime
from llmasos.kernel import planning
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t
from msgspec import structs

from .conftest import Machine, World, infer, reference

SLOW = StepTime(fixed=0.005, prefill_token=1e-5, decode_sequence=0.0001, context_token=0)


@pytest.fixture(autouse=True)
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_ROUNDS", 4)


def finish(world: World, *ids: int) -> None:
    for _ in range(1000):
        world.turn()
        if all(any(a.kind != wire.Kind.ITEMS for a in world.answers(id_)) for id_ in ids):
            return
    raise AssertionError("no end")


def test_the_tokens_are_the_same_in_fewer_messages(world: World) -> None:
    world.attach()
    id_ = world.send(infer([1, 2, 3], model="tiny", max_tokens=101), credits_=999)
    finish(world, id_)
    assert world.tokens(id_) == reference([1, 2, 3], 101)
    assert len(world.sent) < 101 / 2
    assert world.result(id_).body["generated_tokens"] == 101


def test_a_stop_token_ends_the_rounds(world: World) -> None:
    world.attach()
    made = reference([1, 2, 3], 30)
    stop = next(i for i, token in enumerate(made) if made.index(token) == i and i % 4 == 2 and i > 4)
    sampling = t.Sampling(stop_token_ids=[made[stop]], logprobs=1)
    id_ = world.send(infer([1, 2, 3], model="tiny", max_tokens=30, sampling=sampling), credits_=999)
    finish(world, id_)
    assert world.tokens(id_) == made[: stop + 1]
    assert world.result(id_).body["finish"] == "stop"


def test_nothing_is_repeated_beside_a_prompt_or_a_beam(world: World) -> None:
    world.attach()
    one = world.send(infer([1, 2, 3], model="tiny", max_tokens=200), credits_=999)
    world.turn(4)
    world.sent.clear()
    other = world.send(infer(list(range(600)), model="tiny", max_tokens=1), credits_=999)
    beams = world.send(infer([5], model="tiny", max_tokens=4, beams=t.Beams(num_beams=3)), credits_=999)
    finish(world, one, other, beams)
    mixed = [batch for batch in world.sent if any(work.count > 1 or work.beams for work in batch.work)]
    assert mixed
    assert all(batch.rounds == 1 for batch in mixed)
    assert any(batch.rounds > 1 for batch in world.sent)


def test_a_step_and_its_rounds_stay_under_the_limit_and_are_told_as_single_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_ROUNDS", 16)
    machine = Machine(tmp_path, step_time=SLOW)
    machine.model("tiny")
    machine.attach()
    id_ = machine.send(infer([1, 2, 3], model="tiny", max_tokens=300), credits_=999)
    machine.run(3.0)
    assert len(machine.tokens(id_)) == 300
    later = [batch.rounds for batch in machine.sent[20:]]
    assert max(later) == int(planning.ROUNDS_S / 0.0051)
    devices = machine.send(table.Lsdev())
    machine.flush()
    assert machine.result(devices).body["devices"][0]["step_ms"] == pytest.approx(5.1, rel=0.05)


def test_who_arrives_waits_for_one_round_and_no_token_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He has the same tenant and class, so he goes before nobody."""
    monkeypatch.setattr(planning, "MOST_ROUNDS", 16)
    machine = Machine(tmp_path, step_time=SLOW)
    machine.model("tiny")
    machine.attach()
    id_ = machine.send(infer([1, 2, 3], model="tiny", max_tokens=400), credits_=999)
    machine.run(0.8)
    sent = len(machine.sent)
    machine.run(lambda: len(machine.sent) > sent)
    machine.run(machine.now + 0.006)  # the step has begun, and more rounds are to come
    assert machine.sent[-1].rounds == int(planning.ROUNDS_S / 0.0051)
    came = machine.now
    other = machine.send(infer([4, 5, 6], model="tiny", max_tokens=3), credits_=999)
    machine.run(lambda: bool(machine.seen.get(other)))
    assert machine.first_token_s(other) - came < 0.0051 + 0.0055
    machine.run(lambda: machine.ended(id_) and machine.ended(other))
    assert machine.tokens(id_) == reference([1, 2, 3], 400)
    assert machine.tokens(other) == reference([4, 5, 6], 3)


def test_rounds_that_were_cut_are_not_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_ROUNDS", 16)
    spent = []
    for arrivals in (0, 40):
        machine = Machine(tmp_path / str(arrivals), step_time=SLOW)
        machine.model("tiny")
        machine.attach()
        pid = machine.spawn_now()
        id_ = machine.send(infer([1, 2, 3], pid=pid, max_tokens=400), credits_=999)
        for _ in range(arrivals):
            machine.run(machine.now + 0.041)
            machine.send(infer([4, 5, 6], model="tiny", max_tokens=1), credits_=999)
        machine.run(lambda machine=machine, id_=id_: machine.ended(id_))
        spent.append(next(p.vruntime for p in machine.kernel.processes if p.pid == pid))
    assert spent[1] <= 1.05 * spent[0], "steps that are shared cost no more than those that are not"


def test_a_signal_waits_for_the_rounds_and_loses_nothing(world: World) -> None:
    world.attach()
    pid = world.spawn()
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=500), credits_=999)
    world.turn(5)
    world.send(table.Kill(pid, t.Signal.STOP))
    world.turn(5)
    before = world.tokens(id_)
    world.turn(5)
    assert world.tokens(id_) == before
    world.send(table.Kill(pid, t.Signal.CONT))
    finish(world, id_)
    assert world.tokens(id_) == reference([1, 2, 3], 500)


def test_a_model_that_does_one_round_is_asked_for_one(world: World) -> None:
    """Else the kernel would take its steps for several times as long and send the next one late."""
    world.attach()
    world.spawn()
    (pool,) = world.kernel.devices["null"].pools
    assert pool.loaded is not None
    pool.loaded = structs.replace(pool.loaded, repeats=False)
    id_ = world.send(infer([1, 2, 3], model="tiny", max_tokens=40), credits_=999)
    finish(world, id_)
    assert world.tokens(id_) == reference([1, 2, 3], 40)
    assert {batch.rounds for batch in world.sent} == {1}
