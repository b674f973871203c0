"""Who shares KV blocks with whom, and what the time to the first token tells about others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.memory import Memory, Table
from llmasos.kernel.tenants import LABEL_RIGHTS, Subject
from llmasos.syscalls import errors, table

from ..smirnov import smirnov
from .conftest import Machine, World, infer, reference

ALICE = Subject("alice", 1000, 2, False, LABEL_RIGHTS)
MALLORY = Subject("mallory", 1001, 3, False, LABEL_RIGHTS)
PROMPT = list(range(1, 97))


def cached(world: World, subject: Subject, tokens: list[int], public: int = 0) -> int:
    """Runs a prompt; returns how many of its tokens were found."""
    session = b"\0" + subject.path.encode()
    call = infer(tokens, model="tiny", max_tokens=2, public=public)
    id_ = world.send(call, session, subject=subject)
    world.turn(12)
    reply = world.result(id_, session).body
    assert reply["generated_tokens"] == 2
    return int(reply["cached_tokens"])


def test_only_published_prompts_are_shared_between_tenants(world: World) -> None:
    world.attach()
    assert cached(world, ALICE, PROMPT) == 0
    assert cached(world, MALLORY, PROMPT) == 0
    assert cached(world, ALICE, PROMPT) == 80
    assert cached(world, ALICE, PROMPT, public=64) == 0, "a published prompt is another one"
    assert cached(world, MALLORY, PROMPT) == 80
    assert cached(world, MALLORY, PROMPT, public=96) == 64, "what follows Alice's 64 is Alice's"
    assert cached(world, MALLORY, PROMPT[:64] + [7] * 32, public=64) == 64


def test_what_follows_a_published_beginning_stays_private(world: World) -> None:
    world.attach()
    pid = world.spawn()
    first = world.send(infer(PROMPT[:64], pid=pid, max_tokens=1, public=64))
    world.turn(6)
    world.result(first)
    world.send(table.Truncate(pid, 20))
    again = world.send(infer([9] * 60, pid=pid, max_tokens=1))
    world.turn(6)
    world.result(again)
    prompt = PROMPT[:20] + [9] * 60
    assert cached(world, MALLORY, prompt, public=80) == 16
    late = world.send(infer([1], pid=pid, public=1))
    world.turn()
    assert world.error(late) is errors.InvalidArgument


def test_generation_is_the_same_whoever_computed_the_beginning(world: World) -> None:
    world.attach()
    cached(world, ALICE, PROMPT, public=64)
    id_ = world.send(infer(PROMPT, model="tiny", max_tokens=5, public=64))
    world.turn(12)
    assert world.tokens(id_) == reference(PROMPT, 5)


@pytest.mark.parametrize("public", [0, 1, 3])
def test_keys_differ_between_tenants_behind_the_public_blocks(public: int) -> None:
    memory = Memory(0)
    alice = Table(b"alice", commons=b"all", public=public)
    bob = Table(b"bob", commons=b"all", public=public)
    equal = [memory.key(alice, PROMPT, i) == memory.key(bob, PROMPT, i) for i in range(6)]
    assert equal == [i < public for i in range(6)]


def test_the_first_token_does_not_tell_what_others_have_asked(tmp_path: Path) -> None:
    """A prompt that another tenant has just had computed takes as long as one that nobody ever sent; one's
    own is quicker, so the test could tell."""
    machine = Machine(tmp_path, StepTime(0.001, 0.0001, 0.0001))
    machine.model("tiny", llmasos_null_blocks=4096)
    machine.attach()
    dice = random.Random(5)

    def first_token(subject: Subject, prompt: list[int]) -> float:
        begun = machine.now
        call = infer(prompt, model="tiny", max_tokens=1)
        id_ = machine.send(call, b"\0" + subject.path.encode(), subject=subject)
        machine.run(lambda: machine.ended(id_))
        machine.run(machine.now + dice.random() * 0.01)
        return machine.first_token_s(id_) - begun

    def prompt() -> list[int]:
        return [dice.randrange(1, 1000) for _ in range(64 + 16 * dice.randrange(8))]

    hot, cold, own = [], [], []
    first_token(MALLORY, prompt())
    for _ in range(60):
        theirs, mine = prompt(), prompt()
        first_token(ALICE, theirs)
        hot.append(first_token(MALLORY, theirs))
        cold.append(first_token(MALLORY, mine))
        own.append(first_token(MALLORY, mine))
    assert smirnov(hot, cold) > 0.05
    assert smirnov(own, cold) < 0.001
