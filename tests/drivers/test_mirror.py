"""Drafter and mirror without a device."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st
from llmasos.drivers import base
from llmasos.drivers.draft import NGRAM, Drafter
from llmasos.drivers.mirror import Choice, Mirror
from llmasos.syscalls import types as t


def grown(drafter: Drafter, tokens: list[int], most: int = 8) -> tuple[int, int]:
    """Plays `tokens` as what is generated; (guesses, right ones)."""
    guessed = right = 0
    place = NGRAM
    while place < len(tokens):
        guesses = drafter.propose(array("I", tokens[:place]), most)
        assert len(guesses) <= most
        hits = 0
        while hits < len(guesses) and place + hits < len(tokens) and guesses[hits] == tokens[place + hits]:
            hits += 1
        if guesses:
            drafter.learn(place + hits + 1, len(guesses), hits)
        guessed, right = guessed + len(guesses), right + hits
        place += hits + 1
    return guessed, right


def test_what_repeats_itself_is_guessed_and_noise_is_left_alone() -> None:
    dice = random.Random(1)
    page = dice.choices(range(5000), k=200)
    guessed, right = grown(Drafter(), page * 4)
    assert right > 500
    assert guessed < 1.15 * right
    for period in ([4], [4, 5], [4, 5, 6, 7]):
        guessed, right = grown(Drafter(), period * (200 // len(period)))
        assert right > 150, "short periods too"
    guessed, _ = grown(Drafter(), dice.choices(range(3), k=3000))
    assert guessed < 900, "it does not notice that it does not pay"
    assert grown(Drafter(), dice.choices(range(10**6), k=500))[0] == 0


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(0, 10))
def test_guesses_come_from_the_text(tokens: list[int], most: int) -> None:
    guesses = Drafter().propose(array("I", tokens), most)
    assert len(guesses) <= most
    if guesses:
        last = tokens[-NGRAM:]
        assert any(tokens[at : at + NGRAM] == last for at in range(len(tokens) - NGRAM))
    assert set(guesses) <= set(tokens)


def mirror_of(tokens: list[int], blocks: int = 4, limit: int = 64, **sampling: object) -> Mirror:
    mirror = Mirror(100, 1000, 128)
    opened = base.SeqOpen(
        1, t.pack_tokens(tokens), len(tokens), 0, limit, list(range(blocks)), t.Sampling(seed=0, **sampling)
    )
    assert mirror.apply(base.Batch(1, 1, [], [opened], [], [])).outputs == []
    return mirror


def work(mirror: Mirror, count: int, draft: int = 0) -> base.Batch:
    return base.Batch(2, 1, [], [], [], [base.Work(1, count, [], [], True, 0, draft)])


def test_guesses_keep_within_blocks_limit_and_context() -> None:
    tokens = [5] * 14
    for blocks, limit, most in ((1, 64, 2), (4, 64, 2), (4, 17, 2), (4, 16, 1), (4, 15, 0)):
        [piece] = (found := mirror_of(tokens, blocks, limit)).apply(work(found, 14, 8)).pieces
        assert piece.drafted == most, "a fresh drafter begins with two"
        assert piece.end <= 16 * blocks


def test_a_piece_is_booked_by_what_was_right() -> None:
    for right in range(3):
        mirror = mirror_of([5] * 14)
        [piece] = mirror.apply(work(mirror, 14, 8)).pieces
        assert (piece.start, piece.known, piece.end, piece.drafted) == (0, 14, 16, 2)
        choices = [Choice(5 if row < right else 6) for row in range(3)]
        out = piece.done(choices, [], [])
        assert (out.computed, out.tokens, out.drafted) == (14 + right, [5] * right + [6], 2)
        [behind] = mirror.apply(work(mirror, 1)).pieces
        assert (behind.start, behind.end) == (14 + right, 15 + right)


def test_a_failed_piece_spoils_its_sequence_until_it_is_opened_anew() -> None:
    mirror = mirror_of([5] * 14)
    [piece] = mirror.apply(work(mirror, 14, 8)).pieces
    assert piece.failed("broken").error == "broken"
    step = mirror.apply(work(mirror, 1))
    assert (step.pieces, step.outputs[0].error) == ([], "broken")
