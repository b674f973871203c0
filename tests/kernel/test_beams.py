"""The beam policy against a brute-force search and its own rules."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.kernel.beams import BeamSearch
from llmasos.syscalls.types import Beams, Finish, TokenLogprob

VOCABULARY = 3
STOP = 2


def logprobs(prefix: tuple[int, ...], seed: int) -> list[float]:
    """A fixed random distribution after each prefix."""
    weights = [1 + hash((seed, prefix, token)) % 97 for token in range(VOCABULARY)]  # ints: hash is fixed
    return [math.log(w / sum(weights)) for w in weights]


def search(seed: int, max_new: int, stop: bool, **options: object) -> BeamSearch:
    beams = BeamSearch(Beams(**options), frozenset({STOP} if stop else ()), max_new)  # type: ignore[arg-type]
    while not beams.done:
        tops = []
        for generated in beams.generated:
            best = sorted(enumerate(logprobs(tuple(generated), seed)), key=lambda pair: -pair[1])
            tops.append([TokenLogprob(token, score) for token, score in best[: beams.width]])
        beams.advance(tops)
    return beams


@given(seed=st.integers(0, 10**6), length=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_wide_beams_find_the_best_of_all_sequences(seed: int, length: int) -> None:
    """With as many beams as there are prefixes nothing is ever cut off."""
    found = search(seed, length, stop=False, num_beams=16, length_penalty=0.0).results()[0]
    best = max(
        sum(logprobs(sequence[:i], seed)[sequence[i]] for i in range(length))
        for sequence in itertools.product(range(VOCABULARY), repeat=length)
    )
    assert found.score == pytest.approx(best)


@given(
    seed=st.integers(0, 10**6),
    num_beams=st.integers(2, 6),
    penalty=st.floats(-2, 2),
    early=st.sampled_from(["true", "false", "never"]),
)
@settings(max_examples=100, deadline=None)
def test_results_are_ordered_scored_right_and_end_for_a_reason(
    seed: int, num_beams: int, penalty: float, early: str
) -> None:
    beams = search(
        seed,
        8,
        stop=True,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=penalty,
        early_stopping=early,
    )
    results = beams.results()
    assert results
    assert [r.score for r in results] == sorted((r.score for r in results), reverse=True)
    for r in results:
        total = sum(logprobs(tuple(r.tokens[:i]), seed)[token] for i, token in enumerate(r.tokens))
        assert r.score == pytest.approx(total / len(r.tokens) ** penalty)
        assert STOP not in r.tokens[:-1]
        assert (r.finish == Finish.STOP) == (r.tokens[-1] == STOP)
        assert r.finish == Finish.STOP or len(r.tokens) == 8
