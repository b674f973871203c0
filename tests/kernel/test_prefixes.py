"""Prefixes are computed once: across requests, across turns, and when they arrive together."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t

from .conftest import World, infer, reference


@pytest.fixture
def world(world: World) -> World:
    world.attach()
    world.turn(2)
    return world


def computed(world: World) -> int:
    """Positions of all steps so far, and forgets them."""
    total = sum(work.count for batch in world.sent for work in batch.work)
    world.sent.clear()
    return total


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=length)


def run(world: World, *ids: int, turns: int = 400) -> None:
    for _ in range(turns):
        if all(world.answers(id_) and world.answers(id_)[-1].kind != wire.Kind.ITEMS for id_ in ids):
            return
        world.turn()
    pytest.fail("it does not end")


@pytest.mark.parametrize("holds_steps", [False, True])
def test_agents_that_arrive_together_compute_their_common_prefix_once(
    tmp_path: Path, holds_steps: bool
) -> None:
    """Also where it takes several steps, of which the second is sent before the first is back."""
    world = World(tmp_path / "small-steps", step_tokens=128)
    world.model("tiny")
    world.attach()
    run(world, world.send(infer([1], model="tiny", max_tokens=1)))
    computed(world)
    world.holds_steps = holds_steps
    shared = prompt(512, 1)
    calls = [infer([*shared, n, n + 1], model="tiny", max_tokens=4) for n in range(16)]
    ids = [world.send(call) for call in calls]
    for _ in range(400):
        world.turn()
        if world.held:
            world.land()
    for n, id_ in enumerate(ids):
        assert world.tokens(id_) == reference([*shared, n, n + 1], 4)
    cached = [world.result(id_).body["cached_tokens"] for id_ in ids]
    assert sum(512 - number for number in cached) == 512
    assert computed(world) == 512 + 16 * (2 + 3)


def test_who_waits_for_a_prefix_goes_on_when_its_maker_is_gone(world: World) -> None:
    shared = prompt(64, 2)
    world.holds_steps = True
    pids = [world.spawn_now() for _ in range(3)]
    ids = [world.send(infer([*shared, n], pid=pid, max_tokens=3)) for n, pid in enumerate(pids)]
    world.flush()
    assert [len(batch.work) for batch in world.sent[-1:]] == [1]
    world.send(table.Kill(pids[0]))
    world.flush()
    for _ in range(30):
        if world.held:
            world.land()
    for n, id_ in list(enumerate(ids))[1:]:
        assert world.tokens(id_) == reference([*shared, n], 3)


def test_a_conversation_of_eight_turns_computes_only_its_tails(world: World) -> None:
    """Each turn sends the whole history as a new one-shot infer."""
    history: list[int] = []
    for turn in range(8):
        history += prompt(50, turn)
        computed(world)
        id_ = world.send(infer(history, model="tiny", max_tokens=40))
        run(world, id_)
        said = world.tokens(id_)
        assert said == reference(history, 40)
        cached = world.result(id_).body["cached_tokens"]
        if turn:
            # All is there but the newest words, and a block that was not full.
            assert cached >= len(history) - 50 - 16
        assert computed(world) == len(history) - cached + 39
        history += said


def test_prefixes_go_in_the_order_in_which_they_were_last_used(world: World) -> None:
    world.model("small", llmasos_null_blocks=12, max_position_embeddings=128)

    def ask(seed: int) -> int:
        id_ = world.send(infer(prompt(48, seed), model="small", max_tokens=1))
        run(world, id_)
        return int(world.result(id_).body["cached_tokens"])

    assert [ask(1), ask(2), ask(3)] == [0, 0, 0]  # 9 blocks
    assert ask(1) == 32  # used again; its last block holds the last token, which has to be computed
    assert [ask(4), ask(5)] == [0, 0]  # takes the rest, then the place of 2
    assert ask(1) == 32
    assert ask(2) == 0


def test_cached_prefixes_never_cost_running_work_its_room(world: World) -> None:
    world.model("small", llmasos_null_blocks=8, max_position_embeddings=128)
    for seed in range(4):
        run(world, world.send(infer(prompt(100, seed), model="small", max_tokens=20)))
    (pool,) = [pool for pool in world.kernel.devices["null"].pools if pool.model.startswith("small")]
    assert pool.memory.free == pool.memory.total == 8
    call = infer(prompt(28, 9), model="small", max_tokens=100, sched_class=t.SchedClass.IDLE)
    id_ = world.send(call, credits_=999)
    run(world, id_)
    assert world.tokens(id_) == reference(prompt(28, 9), 100)
