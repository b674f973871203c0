"""Two steps in flight: what is sent ahead, what is not, when, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from llmasos.drivers import base
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.planning import LEAD_S
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from .conftest import ROOT, Machine, World, infer, reference


@pytest.fixture
def world(world: World) -> World:
    """With a model that is resident and whose steps are known to be short."""
    world.attach()
    warm = world.send(infer([9], model="tiny", max_tokens=3))
    world.turn(4)
    world.result(warm)
    world.holds_steps = True
    world.sent.clear()
    return world


def test_the_next_step_is_sent_before_the_result_of_the_one_before(world: World) -> None:
    id_ = world.send(infer(list(range(40)), model="tiny", max_tokens=20))
    world.flush()
    first, second = world.sent
    assert [(w.count, w.sample) for w in first.work] == [(40, True)]
    assert [(w.count, w.tokens, w.sample) for w in second.work] == [(1, [], True)]
    assert not second.opens
    assert len(msgspec.msgpack.encode(base.Step(second))) < 80
    for _ in range(20):
        world.land()
        assert len(world.held) <= 2
    assert world.tokens(id_) == reference(list(range(40)), 20)
    assert len(world.sent) == 20, "no step more than tokens"
    assert world.result(id_).body["finish"] == "length"


def test_prompts_go_on_in_chunks_ahead(world: World) -> None:
    world.send(infer([1] * 4000, model="tiny", max_tokens=5))
    world.flush()
    assert [w.count for batch in world.sent for w in batch.work] == [2048, 1952]
    assert [w.sample for batch in world.sent for w in batch.work] == [False, True]


def test_what_may_not_be_wanted_is_not_sent_ahead(world: World) -> None:
    def sent_for(**arguments: object) -> int:
        credits_ = int(str(arguments.pop("credits_", 64)))
        world.sent.clear()
        id_ = world.send(infer([5] * 10, model="tiny", **arguments), credits_=credits_)
        world.flush()
        sent = len(world.sent)
        world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
        while world.held:
            world.land()
        return sent

    assert sent_for(max_tokens=2) == 2
    assert sent_for(max_tokens=1) == 1, "the limit is reached"
    assert sent_for(max_tokens=9, credits_=0) == 1, "its reader has no room"
    assert sent_for(max_tokens=9, credits_=1) == 2
    assert sent_for(max_tokens=9, beams=t.Beams(num_beams=2)) == 1, "the search has to choose"
    assert sent_for(max_tokens=9, sampling=t.Sampling(prompt_logprobs=True)) == 1, "scores are to come"


def test_a_stop_token_makes_nothing_of_the_step_behind(world: World) -> None:
    stop = reference([3, 4], 5)[4]
    pid = world.spawn_now()
    id_ = world.send(infer([3, 4], pid=pid, max_tokens=50, sampling=t.Sampling(stop_token_ids=[stop])))
    world.flush()
    while not world.answers(id_) or world.answers(id_)[-1].kind == wire.Kind.ITEMS:
        world.land()
    assert len(world.held) == 1
    more = world.send(infer([7], pid=pid, max_tokens=6))
    world.flush()
    while world.held:
        world.land()
    assert world.tokens(id_) == reference([3, 4], 5)
    assert world.tokens(more) == reference([3, 4, *reference([3, 4], 5), 7], 6)


def test_who_asks_anew_while_old_steps_are_in_flight_gets_the_new_answer(world: World) -> None:
    pid = world.spawn_now()
    old = world.send(infer([1, 2], pid=pid, max_tokens=50))
    world.flush()
    world.land()
    assert len(world.held) == 2
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(old))
    world.send(table.Truncate(pid, 2))
    new = world.send(infer([3], pid=pid, max_tokens=8))
    fork = world.send(table.Fork(pid))
    world.flush()
    assert world.error(fork) is errors.ProcessBusy
    while world.held:
        world.land()
    assert world.tokens(new) == reference([1, 2, 3], 8)
    assert len(world.tokens(old)) == 1


def test_who_claims_more_gets_the_blocks_of_who_is_always_in_flight(world: World) -> None:
    """Going on ahead must not keep a weaker process in flight for ever."""
    world.model("small", llmasos_null_blocks=8, max_position_embeddings=128)
    weak = world.send(
        infer([1] * 60, model="small", max_tokens=60, sched_class=t.SchedClass.BATCH), credits_=999
    )
    world.flush()
    for _ in range(3):
        world.land()
    chat = world.send(infer([2] * 60, model="small", max_tokens=60), credits_=999)
    world.flush()
    steps = 0
    while not world.answers(chat) or world.answers(chat)[-1].kind == wire.Kind.ITEMS:
        world.land()
        steps += 1
    assert steps < 70, "it waited until the other was done"
    while world.held:
        world.land()
    assert world.tokens(chat) == reference([2] * 60, 60)
    assert world.tokens(weak) == reference([1] * 60, 60)


def test_room_is_made_for_all_guesses_that_may_come_true(world: World) -> None:
    """A step without guesses behind one with guesses still needs the room they may have taken."""
    world.model("echo", llmasos_null_memory=1, vocab_size=1, max_position_embeddings=512)
    for length in range(1, 18):
        talking = world.send(infer([0] * length, model="echo", max_tokens=60), credits_=999)
        world.flush()
        for step in range(12):
            if world.held:
                world.land()
            if step % 3 == 0:  # a prompt fills the step: no guesses in it
                world.send(infer([0] * (17 + step), model="echo", max_tokens=1))
                world.flush()
        while world.held:
            world.land()
        assert world.tokens(talking) == [0] * 60, world.result(talking)


def test_after_a_failed_step_who_holds_its_copies_starts_anew(world: World) -> None:
    parent = world.spawn_now()
    world.send(infer(list(range(20)), pid=parent, max_tokens=0))
    world.flush()
    world.land()
    fork = world.send(table.Fork(parent))
    world.flush()
    child = int(world.result(fork).body["pids"][0])
    cancelled = world.send(infer([5], pid=child, max_tokens=9))  # copies the tail that it shares
    world.flush()
    assert world.sent[-2].copies or world.sent[-1].copies
    world.kernel.message(b"\0a", ROOT, wire.encode_cancel(cancelled))
    twin = world.send(table.Fork(child))
    ahead = world.send(infer([6], pid=child, max_tokens=4))
    world.flush()
    twin_pid = int(world.result(twin).body["pids"][0])
    driver = world.drivers[1]
    worker, step = world.held.popleft()  # raises before it has copied anything
    failed = base.Failed(0, step.batch.ticket, errors.to_wire(errors.DeviceFault("raised")))
    driver._residents[step.batch.handle].mirror.forget(step.batch)
    world.kernel.worker_message(worker, failed)
    world.flush()
    while world.held:
        world.land()
    other = world.send(infer([7], pid=twin_pid, max_tokens=4))
    world.flush()
    while world.held:
        world.land()
    assert world.tokens(other) == reference([*range(20), 5, 7], 4)
    if world.result(ahead).kind == wire.Kind.REPLY:
        assert world.tokens(ahead) == reference([*range(20), 5, 6], 4)
    else:
        assert world.error(ahead) is errors.DeviceFault


def test_a_death_with_two_steps_in_flight_is_a_pause(world: World) -> None:
    id_ = world.send(infer([4], model="tiny", max_tokens=12))
    world.flush()
    world.land()
    assert len(world.held) == 2
    world.die()
    world.attach(2)
    world.flush()
    while world.held:
        world.land()
    assert world.tokens(id_) == reference([4], 12)


SLOW = StepTime(fixed=0.05, prefill_token=0.0005, decode_sequence=0.002, context_token=0.0)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path, SLOW)
    made.model("tiny", llmasos_null_blocks=4096)
    made.attach()
    warm = made.send(infer([9], model="tiny", max_tokens=20))
    made.run(lambda: made.ended(warm))
    return made


def test_the_step_behind_is_sent_shortly_before_the_running_one_ends(machine: Machine) -> None:
    id_ = machine.send(infer([1], model="tiny", max_tokens=30))
    machine.run(lambda: len(machine.seen.get(id_, ())) == 10)
    assert not machine.held, "sent with the result"
    begun, ends = machine.now, machine.now + 0.052
    machine.run(ends - 2 * LEAD_S)
    assert not machine.held, "sent long before it is needed"
    idle = machine.idle
    machine.run(ends - LEAD_S / 4)
    assert len(machine.held) == 1, "sent too late"
    machine.run(lambda: machine.ended(id_))
    assert machine.idle == idle, "the device waited for the kernel"
    assert machine.now == pytest.approx(begun + 20 * 0.052)


def test_who_arrives_waits_for_one_step(machine: Machine) -> None:
    machine.send(infer([1], model="tiny", max_tokens=200))
    machine.run(machine.now + 1.0)
    for n in range(5):
        came = machine.now
        id_ = machine.send(infer([n] * 8, model="tiny", max_tokens=2))
        machine.run(lambda id_=id_: machine.ended(id_))
        own = 0.05 + 8 * 0.0005 + 0.002
        assert machine.first_token_s(id_) - came <= 0.052 + LEAD_S + own
        machine.run(machine.now + 0.011 * n)


def test_short_steps_are_sent_ahead_at_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, StepTime(0.002, 0.0, 0.0, 0.0))
    machine.model("tiny")
    machine.attach()
    id_ = machine.send(infer([1], model="tiny", max_tokens=30))
    machine.run(lambda: len(machine.seen.get(id_, ())) == 10)
    assert len(machine.held) == 1
    idle = machine.idle
    machine.run(lambda: machine.ended(id_))
    assert machine.idle == idle
