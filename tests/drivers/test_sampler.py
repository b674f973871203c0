"""Sampling against transformers' logits processors, and its noise."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
import torch
from llmasos.drivers.mirror import Choice, Sequence
from llmasos.drivers.torch import sampler
from llmasos.syscalls import types as t
from transformers.generation import logits_process as hf

VOCAB = 300


def sequence(tokens: list[int], prompt_length: int = 0, **sampling: Any) -> Sequence:
    sampling.setdefault("seed", 1)
    return Sequence(1, array("I", tokens), prompt_length, 0, 999, array("i"), t.Sampling(**sampling))


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
    """The token behind each sequence's last."""
    return sampler.choose(logits, [(s, len(s.tokens)) for s in sequences])


def scores(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def history(length: int = 40) -> list[int]:
    return random.Random(2).choices(range(20), k=length)


PROCESSORS: list[tuple[dict[str, Any], Any]] = [
    ({"repetition_penalty": 1.7}, hf.RepetitionPenaltyLogitsProcessor(1.7)),
    ({"repetition_penalty": 0.6}, hf.RepetitionPenaltyLogitsProcessor(0.6)),
    ({"no_repeat_ngram_size": 1}, hf.NoRepeatNGramLogitsProcessor(1)),
    ({"no_repeat_ngram_size": 2}, hf.NoRepeatNGramLogitsProcessor(2)),
    ({"no_repeat_ngram_size": 4}, hf.NoRepeatNGramLogitsProcessor(4)),
    ({"no_repeat_ngram_size": 99}, hf.NoRepeatNGramLogitsProcessor(99)),
    (
        {"min_new_tokens": 31, "stop_token_ids": [4, 290]},
        hf.MinNewTokensLengthLogitsProcessor(10, 31, [4, 290]),
    ),
    (
        {"min_new_tokens": 30, "stop_token_ids": [4, 290]},
        hf.MinNewTokensLengthLogitsProcessor(10, 30, [4, 290]),
    ),
]


@pytest.mark.parametrize(("options", "processor"), PROCESSORS)
def test_processors_are_those_of_transformers(options: dict[str, Any], processor: Any) -> None:
    tokens, mine = history(), scores()
    expected = processor(torch.tensor([tokens]), scores())
    sampler.process(mine[0], sequence(tokens, 10, **options))
    torch.testing.assert_close(mine, expected)


WARPERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"temperature": 0.3}, []),
    ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
    ({"top_k": 17}, [hf.TopKLogitsWarper(17)]),
    ({"top_k": 10_000}, [hf.TopKLogitsWarper(VOCAB)]),
    ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
    ({"top_p": 0.001}, [hf.TopPLogitsWarper(0.001)]),
    ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
    ({"min_p": 1.0}, [hf.MinPLogitsWarper(1.0)]),
    (
        {"temperature": 1.4, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        [hf.TopKLogitsWarper(50), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02)],
    ),
]


def test_warpers_are_those_of_transformers_in_one_batch() -> None:
    samplings = [t.Sampling(**{"temperature": 1.0, **options}) for options, _ in WARPERS]
    expected = []
    for row, (options, warpers) in enumerate(WARPERS):
        values = hf.TemperatureLogitsWarper(options.get("temperature", 1.0))(
            None, scores(len(WARPERS))[row : row + 1]
        )
        for warper in warpers:
            values = warper(None, values)
        expected.append(values)
    torch.testing.assert_close(sampler.warp(scores(len(WARPERS)), samplings), torch.cat(expected))


def test_a_flat_distribution_keeps_its_whole_nucleus() -> None:
    flat = torch.linspace(0, 0.01, 5000)[None]
    kept = sampler.warp(flat.clone(), [t.Sampling(temperature=1.0, top_p=0.9)]).isfinite()
    assert torch.equal(kept, hf.TopPLogitsWarper(0.9)(None, flat).isfinite())


def test_openai_penalties_count_only_what_was_generated() -> None:
    mine = scores()
    sampler.process(mine[0], sequence([5, 5, 6, 7, 7, 8], 2, presence_penalty=0.5, frequency_penalty=0.25))
    lost = (scores() - mine)[0]
    assert lost[[5, 6, 7, 8]].tolist() == pytest.approx([0, 0.75, 1.0, 0.75], abs=1e-5)
    assert int(lost.count_nonzero()) == 3


def test_the_noise_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(4000, 1)
    tokens = list(range(9))
    rows = [sequence(tokens, temperature=1.0, seed=seed) for seed in range(4000)]
    drawn = torch.tensor([choice.token for choice in choose(logits, rows)])
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)


def test_noise_depends_on_seed_and_position_alone() -> None:
    assert sampler.uniform(2**63 - 1, 10**6) == sampler.uniform(2**63 - 1, 10**6)
    values = {sampler.uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(values) == 900
    assert all(0 <= value < 1 for value in values)


def test_mixed_rows_are_chosen_independently() -> None:
    logits = scores(5)
    logits[3, 7] = float("nan")
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        {"repetition_penalty": 1.3, "logprobs": 4},
        {"temperature": 1.0},
        {"temperature": 0.8, "seed": 6, "top_k": 40, "logprobs": 0},
    ]
    rows = [sequence(history(), 10, **kind) for kind in kinds]
    before = logits.clone()
    together = choose(logits, rows)
    torch.testing.assert_close(logits, before, equal_nan=True)  # raw logits are for the logprobs
    alone = [choose(logits[row : row + 1], [rows[row]])[0] for row in range(5)]
    assert [(c.token, c.error) for c in together] == [(c.token, c.error) for c in alone]
    assert "finite" in together[3].error
    raw = logits.log_softmax(-1)
    for row, length in ((2, 4), (4, 0)):
        chosen = together[row].chosen
        assert chosen is not None
        assert chosen.logprob == pytest.approx(float(raw[row, together[row].token]), abs=1e-5)
        assert len(chosen.top) == length
    assert together[0].chosen is None


def test_when_everything_is_forbidden_the_sequence_says_so() -> None:
    [choice] = choose(scores()[:, :5], [sequence([0, 1, 2, 3, 4], no_repeat_ngram_size=1)])
    assert "no token is left" in choice.error


def test_beams_are_processed_after_the_softmax() -> None:
    tokens = history()
    seq = sequence(
        tokens, 10, repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=99, stop_token_ids=[3]
    )
    expected = scores().log_softmax(-1)
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.5),
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.MinNewTokensLengthLogitsProcessor(10, 99, [3]),
    ):
        expected = processor(torch.tensor([tokens]), expected)
    best = expected[0].topk(12)
    beams = sampler.best_continuations(scores()[0], seq, 12)
    assert [beam.token for beam in beams] == best.indices.tolist()
    assert [beam.logprob for beam in beams] == pytest.approx(best.values.tolist(), abs=1e-5)
