"""An infer with a deadline ends there with that reason, wherever it is."""

from __future__ import annotations

from pathlib import Path

from llmasos.drivers.simulated import StepTime
from llmasos.syscalls import types as t
from llmasos.syscalls import wire

from .conftest import Machine, World, infer


def machine(home: Path, **settings: object) -> Machine:
    made = Machine(home, StepTime(), **settings)
    made.model("tiny")
    made.attach()
    made.spawn_now()
    return made


def test_who_generates_ends_in_time_with_what_there_is(tmp_path: Path) -> None:
    world = machine(tmp_path)
    pid = world.spawn_now()
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=1000, deadline_ms=400), credits_=4096)
    world.run(lambda: world.ended(id_))
    assert abs(world.now - 0.4) < 0.02
    body = world.result(id_).body
    assert body["finish"] == "deadline"
    assert 5 < body["generated_tokens"] == len(world.tokens(id_)) < 60
    after = world.send(infer([4], pid=pid, max_tokens=3))
    world.run(lambda: world.ended(after))
    assert world.result(after).body["finish"] == "length"


def test_who_waits_in_the_queue_ends_in_time_too(tmp_path: Path) -> None:
    world = machine(tmp_path)
    world.model("small", llmasos_null_blocks=8, max_position_embeddings=128)
    first = world.send(infer([1] * 60, model="small", max_tokens=60), credits_=999)
    world.run(0.1)
    id_ = world.send(infer([2] * 60, model="small", max_tokens=60, deadline_ms=100))
    begun = world.now
    world.run(lambda: world.ended(id_))
    assert abs(world.now - begun - 0.1) < 0.02
    assert (world.result(id_).body["finish"], world.result(id_).body["generated_tokens"]) == ("deadline", 0)
    world.run(lambda: world.ended(first))
    assert world.result(first).body["finish"] == "length"


def test_so_does_who_waits_for_the_model(world: World) -> None:
    """No worker is there."""
    id_ = world.send(infer([1, 2], model="tiny", max_tokens=4, deadline_ms=50))
    world.turn(8)
    assert world.result(id_).body["finish"] == "deadline"
    assert len(world.kernel.processes) == 0


def test_beams_end_in_time_with_the_best_of_what_there_is(tmp_path: Path) -> None:
    world = machine(tmp_path)
    beams = t.Beams(num_beams=3, num_return_sequences=2)
    pid = world.spawn_now()
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=1000, deadline_ms=400, beams=beams))
    world.run(lambda: world.ended(id_))
    assert abs(world.now - 0.4) < 0.02
    body = world.result(id_).body
    assert body["finish"] == "deadline"
    first, second = body["sequences"]
    assert first["finish"] == "deadline"
    assert first["score"] >= second["score"]
    assert 2 < len(first["tokens"]) == len(second["tokens"]) == body["generated_tokens"]
    assert body["context"] == 3 + len(first["tokens"])


def test_beams_that_had_no_time_at_all_have_nothing_to_say(world: World) -> None:
    beams = t.Beams(num_beams=2)
    id_ = world.send(infer([1, 2], model="tiny", max_tokens=4, deadline_ms=50, beams=beams))
    world.turn(8)
    assert (world.result(id_).body["finish"], world.result(id_).body["sequences"]) == ("deadline", [])


def test_who_is_in_time_is_not_touched(tmp_path: Path) -> None:
    world = machine(tmp_path)
    id_ = world.send(infer([1, 2, 3], model="tiny", max_tokens=5, deadline_ms=60_000))
    world.run(lambda: world.ended(id_))
    world.run(100.0)
    assert [a.kind for a in world.answers(id_)].count(wire.Kind.REPLY) == 1
    assert world.result(id_).body["finish"] == "length"
