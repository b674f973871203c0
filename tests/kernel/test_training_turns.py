"""When training runs compute: beside stronger and equal work, one after the other, and stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmasos.drivers import base
from llmasos.kernel.grants import FROZEN_S
from llmasos.kernel.programs import Program
from llmasos.kernel.training import TURN_S
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t
from msgspec.structs import replace

from .conftest import infer
from .test_training import ALICE, BOB, Runs, world

__all__ = ["world"]


def test_who_is_stronger_goes_at_once_and_who_trains_goes_on_when_nobody_is(world: Runs) -> None:
    pid = world.spawn_now()
    world.dataset()
    run = world.train(sched_class=t.SchedClass.IDLE)
    world.prepared(run)
    connection, _ = world.attached()
    assert world.grant(connection)
    world.holds_steps = True
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=2))
    world.flush()
    assert world.grant(connection) is None
    assert world.held, "the step does not wait until the trainer has stopped"
    world.stopped(connection)
    while world.held:
        assert world.grant(connection) is None
        world.land()
    assert len(world.tokens(id_)) == 2
    assert world.grant(connection)


def test_in_one_class_tenants_train_and_generate_by_turns(world: Runs) -> None:
    world.dataset(session=b"\0b", subject=BOB)
    run = world.train(b"\0b", BOB)
    world.prepared(run)
    connection, _ = world.attached()
    world.holds_steps = True
    call = infer([1, 2, 3], model="tiny", max_tokens=200, sched_class=t.SchedClass.BATCH)
    id_ = world.send(call, b"\0c", 512, ALICE)
    trained = served = 0.0
    for _ in range(400):
        world.flush()
        if world.grant(connection):
            trained += 0.02
        elif isinstance(world.told[connection][-1], base.CallIn):
            world.stopped(connection)
        if world.held:
            served += 0.02
            world.now += 0.02
            worker, step = world.held.popleft()
            done = world.drivers[worker].collect(world.drivers[worker].submit(step.batch))
            world.kernel.worker_message(worker, base.StepDone(replace(done, seconds=0.02)))
        else:
            world.now += 0.02
        if any(a.kind == wire.Kind.REPLY for a in world.inbox[b"\0c"] if a.id == id_):
            break
    assert trained > 0.5
    assert 0.5 < trained / served < 2


def test_a_stopped_run_computes_nothing_and_gives_up_its_memory_after_a_while(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    world.prepared(pid)
    connection, trainer = world.attached()
    world.reply(world.send(table.Kill(pid, t.Signal.STOP)))
    world.stopped(connection)
    assert world.grant(connection) is None
    assert world.reply(world.send(table.StatProcess(pid)))["state"] == "stopped"
    world.passes(31)
    assert isinstance(world.told[connection][-1], base.Leave)
    world.trainer_dies(connection, trainer)
    world.passes(60)
    assert world.kernel.programs.to_start == []
    world.reply(world.send(table.Kill(pid, t.Signal.CONT)))
    connection, _ = world.attached(step=4)
    assert world.grant(connection)


def test_only_so_many_trainers_are_loaded_and_a_stronger_run_has_a_weaker_one_leave(tmp_path: Path) -> None:
    world = Runs(tmp_path, max_trainers=1)
    world.model("tiny")
    world.attach()
    world.dataset()
    weak = world.train(sched_class=t.SchedClass.IDLE, target="weak")
    world.prepared(weak)
    connection, trainer = world.attached()
    strong = world.train(sched_class=t.SchedClass.BATCH, target="strong")
    world.prepared(strong)
    world.flush()
    assert world.reply(world.send(table.StatProcess(strong)))["waiting_for"] == "its turn to be loaded"
    assert base.Leave() in world.told[connection]
    world.trainer_dies(connection, trainer)
    connection, _ = world.attached()
    assert world.kernel.trainers[connection].pid == strong


def over(world: Runs, program: Program) -> None:
    """A program that was told to has ended."""
    assert world.kernel.programs.to_stop == [program.number]
    world.kernel.programs.to_stop.clear()
    world.kernel.programs.over(program.number)
    world.flush()


@pytest.mark.parametrize(
    ("weaker", "turn"), [(t.SchedClass.IDLE, 0.0), (t.SchedClass.BATCH, TURN_S)], ids=["weaker", "equal"]
)
def test_preparing_waits_for_no_weaker_run_and_for_equal_ones_by_turns(
    tmp_path: Path, weaker: t.SchedClass, turn: float
) -> None:
    world = Runs(tmp_path, max_trainers=1)
    world.model("tiny")
    world.attach()
    world.dataset()
    first = world.train(sched_class=weaker, target="first")
    preparer = world.program()
    second = world.train(sched_class=t.SchedClass.BATCH, target="second")
    if turn:
        world.passes(turn - 1)
        assert world.kernel.programs.to_stop == []
        world.passes(1)
    over(world, preparer)
    assert world.reply(world.send(table.StatProcess(first)))["waiting_for"] == "its turn to be loaded"
    if turn:
        restarted = world.program()
        world.passes(turn)
        over(world, restarted)
        preparer = world.program()  # the first one's: it has twice as long
        world.passes(turn)
        assert world.kernel.programs.to_stop == []
        world.passes(turn)
        over(world, preparer)
    world.prepared(second)
    run = world.kernel.runs[first].run
    assert run is not None
    assert run.deaths == 0
    assert run.problem is None


def test_a_stopped_run_is_not_prepared_until_it_goes_on(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    preparer = world.program()
    world.reply(world.send(table.Kill(pid, t.Signal.STOP)))
    over(world, preparer)
    world.passes(60)
    assert world.kernel.programs.to_start == []
    assert world.reply(world.send(table.StatProcess(pid)))["state"] == "stopped"
    world.reply(world.send(table.Kill(pid, t.Signal.CONT)))
    world.prepared(pid)
    world.attached()


def test_a_trainer_that_does_not_stop_computing_is_killed(world: Runs) -> None:
    pid = world.spawn_now()
    world.dataset()
    run = world.train(sched_class=t.SchedClass.IDLE)
    world.prepared(run)
    _, trainer = world.attached()
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=2))
    world.flush()
    assert len(world.tokens(id_)) == 2, "steps go on meanwhile"
    assert world.kernel.programs.to_stop == []
    world.passes(FROZEN_S + 1)
    assert world.kernel.programs.to_stop == [trainer.number]
