"""Guessing ahead: who may, how much, and that nobody can tell by the result."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.drivers.null import next_token
from llmasos.kernel.scheduler import PASS_ROWS
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t

from .conftest import World, infer


def echoing(home: Path, blocks: int = 256, **settings: object) -> World:
    """A world with a model whose text repeats itself."""
    world = World(home, **settings)
    world.model("echo", llmasos_null_memory=1, vocab_size=5, llmasos_null_blocks=blocks)
    world.attach()
    return world


def finish(world: World, *ids: int) -> None:
    for _ in range(2000):
        world.turn()
        if all(world.answers(id_) and world.answers(id_)[-1].kind != wire.Kind.ITEMS for id_ in ids):
            return
    pytest.fail("it does not end")


@given(
    prompts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=40), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 0.7]),
    stop=st.sampled_from([[], [3]]),
    logprobs=st.sampled_from([None, 2]),
)
@settings(max_examples=40, deadline=None)
def test_with_and_without_guesses_the_result_is_the_same(
    prompts: list[list[int]], temperature: float, stop: list[int], logprobs: int | None
) -> None:
    def results(draft_tokens: int) -> tuple[list[object], int]:
        with tempfile.TemporaryDirectory() as home:
            world = echoing(Path(home), draft_tokens=draft_tokens)
            sampling = t.Sampling(
                temperature=temperature, seed=4, stop_token_ids=stop, logprobs=logprobs, prompt_logprobs=True
            )
            ids = [
                world.send(infer(p, model="echo", max_tokens=70, sampling=sampling), credits_=999)
                for p in prompts
            ]
            finish(world, *ids)
            found: list[object] = []
            for id_ in ids:
                items = [a.body for a in world.answers(id_) if a.kind == wire.Kind.ITEMS]
                found.append(
                    (
                        [token for item in items for token in item["tokens"]],
                        [score for item in items for score in item["logprobs"]],
                        # The first token has nothing to be scored by: NaN, which equals nothing.
                        [score for item in items for score in item["prompt_logprobs"]][1:],
                        {k: v for k, v in world.result(id_).body.items() if k != "cached_tokens"},
                    )
                )
            return found, sum(len(batch.work) for batch in world.sent)

    (guessed, few), (plain, many) = results(8), results(0)
    assert guessed == plain
    assert few <= many


def test_guesses_that_come_true_save_steps_and_are_counted(tmp_path: Path) -> None:
    world = echoing(tmp_path)
    pid = world.spawn("echo")
    world.sent.clear()
    id_ = world.send(infer([1, 2, 3], pid=pid, max_tokens=200), credits_=999)
    finish(world, id_)
    context = [1, 2, 3]
    for token in world.tokens(id_):
        assert token == next_token(context, 5, memory=1)
        context.append(token)
    assert len(context) == 203
    assert len(world.sent) < 100
    stat = world.send(table.StatProcess(pid))
    world.turn()
    row = world.result(stat).body
    assert row["drafted"] >= row["accepted"] > 100
    assert row["generated"] == 200


@pytest.mark.parametrize(("streams", "most"), [(1, 8), (2, 7), (5, 2), (8, 1), (9, 0)])
def test_a_step_has_no_more_rows_than_one_pass_serves(tmp_path: Path, streams: int, most: int) -> None:
    world = echoing(tmp_path)
    ids = [world.send(infer([n % 5], model="echo", max_tokens=50), credits_=999) for n in range(streams)]
    finish(world, *ids)
    decoding = [batch for batch in world.sent if len(batch.work) == streams]
    assert decoding
    assert {work.draft for batch in decoding[2:] for work in batch.work} == {most}
    assert all(sum(w.count + w.draft for w in batch.work) <= max(PASS_ROWS, streams) for batch in decoding)


def test_nobody_guesses_beside_a_prompt_with_penalties_or_when_switched_off(tmp_path: Path) -> None:
    world = echoing(tmp_path / "on")
    talk = world.send(infer([1], model="echo", max_tokens=50), credits_=999)
    world.turn(4)
    world.sent.clear()
    world.send(infer([2] * 40, model="echo", max_tokens=1))
    finish(world, talk)
    beside = [batch for batch in world.sent if any(work.count > 1 for work in batch.work)]
    assert beside
    assert all(work.draft == 0 for batch in beside for work in batch.work)
    world.sent.clear()
    penalised = t.Sampling(repetition_penalty=1.1)
    finish(world, world.send(infer([1], model="echo", max_tokens=20, sampling=penalised)))
    off = echoing(tmp_path / "off", draft_tokens=0)
    finish(off, off.send(infer([1], model="echo", max_tokens=20)))
    assert all(work.draft == 0 for batch in (*world.sent, *off.sent) for work in batch.work)


def test_guesses_push_nobody_out(tmp_path: Path) -> None:
    """Contexts that just fit: nobody is opened anew, and blocks are left for who needs them for certain."""
    world = echoing(tmp_path, blocks=256)
    world.model(
        "small", llmasos_null_memory=1, vocab_size=5, llmasos_null_blocks=8, max_position_embeddings=64
    )
    finish(world, world.send(infer([0], model="small", max_tokens=1)))
    (pool,) = [pool for pool in world.kernel.devices["null"].pools if pool.model.startswith("small")]
    world.holds_steps = True
    world.sent.clear()
    ids = [world.send(infer([n] * 44, model="small", max_tokens=20), credits_=999) for n in range(2)]
    world.flush()
    while world.held:
        before = len(world.sent)
        world.land()
        if any(work.draft and work.blocks for batch in world.sent[before:] for work in batch.work):
            assert pool.memory.free >= 2
    opens = [opened.seq for batch in world.sent for opened in batch.opens]
    assert len(opens) == len(set(opens)) == 2, "somebody was pushed out and opened anew"
    for n, id_ in enumerate(ids):
        context = [n] * 44
        for token in world.tokens(id_):
            assert token == next_token(context, 5, memory=1)
            context.append(token)
        assert len(context) == 64
