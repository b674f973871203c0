"""Step times learnt, and what is made of them: how long people wait beside a saturated device."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.pace import FIRST_CHUNK, LEAST_CHUNK, Pace
from llmasos.syscalls import types as t

from .conftest import Machine, infer

FIXED, ROW, TOKEN = 0.012, 0.002, 0.0006


def taught(steps: int = 200, noise: float = 0.0) -> Pace:
    """Has seen steps of a device: mostly few generating rows, sometimes a prompt."""
    pace, dice = Pace(), random.Random(1)
    for _ in range(steps):
        rows, tokens = dice.randint(0, 16), dice.choice([0, 0, 0, 32, 128, 256])
        seconds = FIXED + ROW * rows + TOKEN * tokens
        pace.learn(rows, tokens, seconds * dice.uniform(1 - noise, 1 + noise))
    return pace


def test_it_learns_what_a_step_takes() -> None:
    assert Pace().expected(1, 0) is None
    for pace, tolerance in ((taught(), 0.1), (taught(noise=0.1), 0.2)):
        for rows, tokens in ((1, 0), (16, 0), (4, 256)):
            seconds = FIXED + ROW * rows + TOKEN * tokens
            assert pace.expected(rows, tokens) == pytest.approx(seconds, rel=tolerance)


def test_steps_that_are_all_alike_are_learnt_in_no_time() -> None:
    pace = Pace()
    for _ in range(8):
        pace.learn(1, 0, 0.03)
    assert pace.expected(1, 0) == pytest.approx(0.03, rel=0.02)


def test_a_step_that_was_held_up_changes_little_and_a_slower_device_is_followed() -> None:
    pace = taught()
    before = pace.expected(1, 0)
    assert before is not None
    pace.learn(1, 0, 5.0)
    assert pace.expected(1, 0) == pytest.approx(before, rel=0.3)
    for _ in range(30):
        pace.learn(1, 0, 3 * before)
    assert pace.expected(1, 0) == pytest.approx(3 * before, rel=0.05)


def test_chunks_fit_the_time_that_is_left() -> None:
    assert Pace().tokens_within(4, 0.1) == FIRST_CHUNK
    pace = taught()
    assert pace.tokens_within(4, 0.1) == pytest.approx((0.1 - FIXED - 4 * ROW) / TOKEN, rel=0.05)
    assert pace.tokens_within(16, 0.02) == LEAST_CHUNK


CPU = StepTime(fixed=0.012, prefill_token=0.0006, decode_sequence=0.003, context_token=0.0)


@pytest.fixture
def machine_of(tmp_path: Path) -> Callable[..., Machine]:
    def make(**settings: object) -> Machine:
        machine = Machine(tmp_path / str(len(settings)), CPU, **settings)
        machine.model("tiny", llmasos_null_blocks=8192, max_position_embeddings=8192)
        machine.attach()
        for n in range(3):
            warm = machine.send(infer([9, n] * 50, model="tiny", max_tokens=10))
            machine.run(lambda warm=warm: machine.ended(warm))
        return machine

    return make


def tokens_made(machine: Machine, ids: list[int]) -> int:
    return sum(len(machine.tokens(id_)) for id_ in ids)


def test_a_running_chat_never_waits_long_for_a_prompt(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of()
    chat = machine.send(infer([1], model="tiny", max_tokens=300), credits_=999)
    machine.run(machine.now + 0.5)
    machine.send(infer([2] * 3000, model="tiny", max_tokens=1))
    machine.send(infer([3] * 3000, model="tiny", max_tokens=1, sched_class=t.SchedClass.BATCH))
    machine.run(lambda: machine.ended(chat))
    times = [at for at, _ in machine.seen[chat]]
    gaps = [b - a for a, b in itertools.pairwise(times[10:-1])]
    assert max(gaps) < 0.115, "a step took longer than step_ms"
    assert max(gaps) > 0.045, "the room in a step is not used"


def test_alone_a_prompt_goes_in_large_steps(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of()
    machine.sent.clear()
    machine.run(lambda id_=machine.send(infer([2] * 1000, model="tiny", max_tokens=1)): machine.ended(id_))
    assert [w.count for batch in machine.sent for w in batch.work] == [256, 256, 256, 232]


def test_a_chat_prompt_beside_24_batch_requests_waits_for_one_step(
    machine_of: Callable[..., Machine],
) -> None:
    prompt, pause = 120, 1.0
    idle = machine_of()
    came = idle.now
    alone = idle.send(infer([7] * prompt, model="tiny", max_tokens=2))
    idle.run(lambda: idle.ended(alone))
    idle_s = idle.first_token_s(alone) - came

    def saturated(chats: int, **settings: object) -> tuple[float, list[float]]:
        """Tokens a second of 24 batch requests in 10 s, and the chats' times to the first token."""
        machine = machine_of(**settings)
        batch = [
            machine.send(
                infer([n] * 100, model="tiny", max_tokens=2000, sched_class=t.SchedClass.BATCH), credits_=4000
            )
            for n in range(24)
        ]
        machine.run(lambda: all(id_ in machine.seen for id_ in batch))
        begun, made, waits = machine.now, tokens_made(machine, batch), []
        for n in range(chats):
            machine.run(begun + pause * n + 0.0137 * n)
            came = machine.now
            chat = machine.send(infer([n + 50, *[8] * (prompt - 1)], model="tiny", max_tokens=8))
            machine.run(lambda chat=chat: machine.ended(chat))
            if n:  # from the first one is learnt what steps with prompts take
                waits.append(machine.first_token_s(chat) - came)
        machine.run(begun + 10.0)
        return (tokens_made(machine, batch) - made) / 10.0, waits

    undisturbed, _ = saturated(0)
    beside, waits = saturated(10, max_sessions=1000)
    step_s = 0.012 + 24 * 0.003
    assert statistics.median(waits) <= idle_s + step_s
    assert max(waits) <= 2 * idle_s + step_s
    assert beside >= 0.85 * undisturbed
