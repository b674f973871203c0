"""What every driver must do: the paged result is the dense one, whatever shares the batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
from llmasos.drivers import base
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

VOCAB = 97


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 1000])
def test_a_chunked_prefill_gives_the_dense_result(subject: Any, chunk: int) -> None:
    kernel = subject.kernel
    tokens = prompt(41)
    assert kernel.generate([kernel.open(tokens)], 12, chunk) == [subject.greedy(tokens, 12)]


def test_sharing_a_batch_changes_nothing(subject: Any) -> None:
    kernel = subject.kernel
    prompts = [prompt(length, seed=length) for length in (1, 15, 16, 17, 40, 90)]
    seqs = [kernel.open(tokens) for tokens in prompts]
    assert kernel.generate(seqs, 10, chunk=13) == [subject.greedy(tokens, 10) for tokens in prompts]


def test_decoding_and_prefill_mix(subject: Any) -> None:
    kernel = subject.kernel
    first, second = kernel.open(prompt(20)), kernel.open(prompt(50, seed=2))
    kernel.step([(first, 20)])
    for start in range(0, 50, 10):
        kernel.step([(second, 10), (first, 1)])
        assert second.computed == start + 10
    kernel.step([(first, 1), (second, 1)])
    assert first.tokens[20:] == subject.greedy(first.tokens[:20], 7)
    assert second.tokens[50:] == subject.greedy(second.tokens[:50], 2)


def test_forks_share_blocks_and_diverge(subject: Any) -> None:
    kernel = subject.kernel
    parent = kernel.open(prompt(37))
    kernel.generate([parent], 5)
    children = [kernel.fork(parent) for _ in range(3)]
    for number, child in enumerate(children):
        assert child.blocks[:2] == parent.blocks[:2]
        child.tokens[-1] = number  # another last token: from here they go their own ways
        kernel._announce(child)
    kernel.generate([parent, *children], 20)
    assert parent.tokens[37:] == subject.greedy(parent.tokens[:37], 25)
    for number, child in enumerate(children):
        assert child.tokens[41] == number
        assert child.tokens[42:] == subject.greedy(child.tokens[:42], 20)


def test_a_prefix_filled_in_the_same_batch_can_be_shared(subject: Any) -> None:
    kernel = subject.kernel
    tokens = prompt(48)
    builder = kernel.open(tokens)
    sharer = kernel.open(tokens[:40])
    kernel.free += sharer.blocks[:2]
    sharer.blocks[:2] = builder.blocks[:2]
    sharer.computed = 32
    kernel._announce(sharer)
    kernel.step([(sharer, 8), (builder, 48)])
    assert sharer.tokens[40:] == subject.greedy(tokens[:40], 1)


def test_a_recomputed_sequence_goes_on_as_if_nothing_had_happened(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(30), temperature=0.9, seed=4)
    twin = kernel.open(prompt(30), temperature=0.9, seed=4)
    kernel.generate([seq], 20)
    kernel.generate([twin], 8)
    other = kernel.open(prompt(60, seed=3))
    kernel.reopen(twin)
    kernel.generate([twin, other], 12, chunk=7)
    assert twin.tokens == seq.tokens


def test_closed_sequences_leave_nothing_behind(subject: Any) -> None:
    kernel = subject.kernel
    old = kernel.open(prompt(64, seed=8))
    kernel.generate([old], 3)
    kernel.close(old)
    tokens = prompt(64, seed=9)
    assert kernel.generate([kernel.open(tokens)], 5) == [subject.greedy(tokens, 5)]
    [out] = kernel.step([(old, 1)])
    assert "not open" in out.error


def test_exported_blocks_keep_their_bytes(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(40))
    kernel.generate([seq], 2)
    data = kernel.driver.export_blocks(1, seq.blocks)
    assert len(data) == len(seq.blocks) * kernel.loaded.block_bytes
    fresh = [kernel.free.pop() for _ in seq.blocks]
    kernel.driver.import_blocks(1, fresh, data)
    assert kernel.driver.export_blocks(1, fresh) == data
    seq.blocks = fresh
    kernel._announce(seq)
    kernel.generate([seq], 9)
    assert seq.tokens[40:] == subject.greedy(seq.tokens[:40], 11)
    with pytest.raises(errors.Corrupt):
        kernel.driver.import_blocks(1, fresh, data[:-1])


def test_seeds_decide_and_the_batch_does_not(subject: Any) -> None:
    kernel = subject.kernel
    tokens = prompt(23)
    alone = [kernel.generate([kernel.open(tokens, temperature=1.5, seed=seed)], 12)[0] for seed in range(3)]
    together = [kernel.open(tokens, temperature=1.5, seed=seed) for seed in range(3)]
    assert kernel.generate([*together, kernel.open(prompt(70))], 12, chunk=11)[:3] == alone
    assert len({tuple(made) for made in alone}) == 3


def test_logprobs_and_prompt_logprobs_come_when_asked_for(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(20), logprobs=3, prompt_logprobs=True)
    prompts = []
    for count in (7, 13):
        [out] = kernel.step([(seq, count)])
        prompts += out.prompt
    assert len(prompts) == 19
    assert out.chosen is not None
    assert [len(score.top) for score in (*prompts, out.chosen)] == [3] * 20
    assert out.chosen.top[0] == t.TokenLogprob(out.token, out.chosen.logprob)
    assert all(score.logprob <= score.top[0].logprob for score in prompts)
    [silent] = kernel.step([(kernel.open(prompt(20)), 20)])
    assert silent.chosen is None
    assert silent.prompt == []


def test_beams_list_the_best_and_append_nothing(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(20))
    [out] = kernel.step([(seq, 20)], beams=6)
    assert out.token == -1
    assert len({beam.token for beam in out.beams}) == 6
    assert [beam.logprob for beam in out.beams] == sorted((b.logprob for b in out.beams), reverse=True)
    seq.tokens.append(out.beams[1].token)
    kernel._announce(seq)
    kernel.generate([seq], 3)
    assert seq.tokens[21:] == subject.greedy(seq.tokens[:21], 3)


def test_stop_tokens_are_reported_and_min_new_tokens_holds_them_off(subject: Any) -> None:
    kernel = subject.kernel
    tokens = prompt(20)
    first = subject.greedy(tokens, 1)[0]
    [out] = kernel.step([(kernel.open(tokens, stop_token_ids=[first, 96, 10**6]), 20)])
    assert (out.token, out.stop) == (first, True)
    held = kernel.open(tokens, stop_token_ids=[first, 10**6], min_new_tokens=2)
    [out] = kernel.step([(held, 20)])
    assert out.token != first
    assert not out.stop


@pytest.mark.parametrize(
    ("opening", "work", "message"),
    [
        ({"tokens": [1, VOCAB]}, {}, "vocabulary"),
        ({"blocks": [10**6]}, {}, "pool"),
        ({"blocks": [-1]}, {}, "pool"),
        ({"blocks": []}, {}, "no block"),
        ({}, {"count": 3}, "2 tokens known"),
        ({}, {"start": -1}, "2 tokens known"),
        ({}, {"count": 0}, "2 tokens known"),
        ({}, {"tokens": [VOCAB]}, "vocabulary"),
        ({}, {"tokens": [-1]}, "vocabulary"),
        ({}, {"blocks": [10**6]}, "pool"),
        ({}, {"seq": 999}, "not open"),
    ],
)
def test_nonsense_fails_alone(
    subject: Any, opening: dict[str, Any], work: dict[str, Any], message: str
) -> None:
    kernel = subject.kernel
    good = kernel.open(prompt(5))
    tokens = opening.get("tokens", [1, 2])
    opens = [
        base.SeqOpen(77, t.pack_tokens(tokens), 2, opening.get("blocks", [399]), t.Sampling(seed=0)),
        *good.pending,
    ]
    bad = {"seq": 77, "start": 0, "count": 2, "tokens": [], "blocks": [], "sample": True, "beams": 0, **work}
    works = [base.Work(**bad), base.Work(good.id, 0, 5, [], [], True, 0)]
    batch = base.Batch(900, 1, [], opens, [(10**6, 399_000), (-1, 5)], works)
    outputs = kernel.driver.collect(kernel.driver.submit(batch)).outputs
    assert message in outputs[0].error
    assert outputs[1].token == subject.greedy(good.tokens, 1)[0]


def test_a_context_ends_where_the_model_says(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(256))
    [out] = kernel.step([(seq, 256)])
    assert out.token >= 0
    [out] = kernel.step([(seq, 1)])
    assert "context" in out.error
