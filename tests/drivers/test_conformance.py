"""What every driver must do: the paged result is the dense one, whatever shares the batch."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from llmasos.drivers import base, kv_file
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from msgspec.structs import replace

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


def test_a_context_goes_on_from_a_file(subject: Any, tmp_path: Path) -> None:
    kernel, path = subject.kernel, str(tmp_path / "1.kv")
    seq = kernel.open(prompt(40))
    kernel.generate([seq], 2)
    stamp = base.KvStamp("model", b"history", seq.computed)
    loaded = {1: kernel.loaded}
    kv_file.carry_out(kernel.driver, loaded, base.Export(9001, 1, path, stamp, seq.blocks))
    fresh = [kernel.free.pop() for _ in seq.blocks]
    copies = [(seq.blocks[0], fresh[0])]
    order = base.Import(9002, 1, path, stamp, 1, fresh[1:], copies)
    kv_file.carry_out(kernel.driver, loaded, order)
    seq.blocks = fresh
    kernel._announce(seq)
    kernel.generate([seq], 9)
    assert seq.tokens[40:] == subject.greedy(seq.tokens[:40], 11)
    with pytest.raises(errors.Corrupt, match="kv_layout"):
        kv_file.carry_out(kernel.driver, {1: replace(kernel.loaded, kv_layout="other")}, order)


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
    [token], [chosen] = out.tokens, out.chosen
    assert [len(score.top) for score in (*prompts, chosen)] == [3] * 20
    assert chosen.top[0] == t.TokenLogprob(token, chosen.logprob)
    assert all(score.logprob <= score.top[0].logprob for score in prompts)
    [silent] = kernel.step([(kernel.open(prompt(20)), 20)])
    assert silent.chosen == []
    assert silent.prompt == []


def test_beams_list_the_best_and_append_nothing(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(20))
    [out] = kernel.step([(seq, 20)], beams=6)
    assert out.tokens == []
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
    assert (out.tokens, out.stop) == ([first], True)
    held = kernel.open(tokens, stop_token_ids=[first, 10**6], min_new_tokens=2)
    [out] = kernel.step([(held, 20)])
    assert out.tokens != [first]
    assert not out.stop


@pytest.mark.parametrize(
    ("opening", "work", "message"),
    [
        ({"tokens": [1, VOCAB]}, {}, "vocabulary"),
        ({"blocks": [10**6]}, {}, "pool"),
        ({"blocks": [-1]}, {}, "pool"),
        ({"blocks": []}, {}, "no block"),
        ({}, {"count": 3}, "2 tokens known"),
        ({"computed": 3}, {}, "cover 2"),
        ({"computed": -1}, {}, "cover 2"),
        ({}, {"draft": -1}, "2 tokens known"),
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
        base.SeqOpen(
            77,
            t.pack_tokens(tokens),
            2,
            opening.get("computed", 0),
            99,
            opening.get("blocks", [399]),
            t.Sampling(seed=0),
        ),
        *good.pending,
    ]
    bad = {"seq": 77, "count": 2, "tokens": [], "blocks": [], "sample": True, **work}
    works = [base.Work(**bad), base.Work(good.id, 5, [], [], True)]
    batch = base.Batch(900, 1, [], opens, [(10**6, 399_000), (-1, 5)], works)
    outputs = kernel.driver.collect(kernel.driver.submit(batch)).outputs
    assert message in outputs[0].error
    assert outputs[1].tokens == subject.greedy(good.tokens, 1)


def test_a_context_ends_where_the_model_says(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(256))
    [out] = kernel.step([(seq, 256)])
    assert len(out.tokens) == 1
    [out] = kernel.step([(seq, 1)], draft=4)
    assert "context" in out.error


def test_a_step_sent_before_the_one_before_is_collected_continues_it(subject: Any) -> None:
    """Work says how many positions, not where they begin, which who sends it does not know yet."""
    kernel = subject.kernel
    tokens = prompt(30)
    seq, other = kernel.open(tokens), kernel.open(prompt(21, seed=2))
    first = kernel.submit([(seq, 16)])
    second = kernel.submit([(seq, 14), (other, 21)], ahead=16)
    third = kernel.submit([(seq, 1), (other, 1)], ahead=30)
    assert [out.tokens for out in kernel.collect(first)] == [[]]
    kernel.collect(second)
    fourth = kernel.submit([(seq, 1)], ahead=1)
    kernel.collect(third)
    [out] = kernel.collect(fourth)
    assert seq.tokens[30:] == subject.greedy(tokens, 3)
    assert other.tokens[21:] == subject.greedy(prompt(21, seed=2), 2)
    assert out.computed == seq.computed == 32


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 5, "top_p": 0.9}])
def test_guesses_change_nothing(subject: Any, sampling: dict[str, Any]) -> None:
    """Right ones, wrong ones, and those of a sequence that repeats itself."""
    kernel = subject.kernel
    for tokens in (prompt(20) * 3, [7] * 40, prompt(33)):
        plain = kernel.generate([kernel.open(tokens, **sampling)], 40)
        guessing = kernel.open(tokens, **sampling)
        assert kernel.generate([guessing], 40, draft=5) == plain


def test_right_guesses_are_kept_and_wrong_ones_are_not(subject: Any) -> None:
    """The context is made to hold what will be generated, so the first guesses are right."""
    kernel = subject.kernel
    lead = prompt(12)
    coming = subject.greedy(lead, 60)
    # A sequence whose beginning is not computed from these tokens: the guesses can only come from the text.
    seq = kernel.open([*lead, *coming], prompt_length=12)
    kernel.step([(seq, 72)], sample=False)
    seq.tokens, seq.computed = [*lead, *coming[:20]], 31
    kernel._announce(seq)
    outs = [kernel.step([(seq, 1)], draft=8)[0] for _ in range(8)]
    assert seq.tokens[12:] == subject.greedy(lead, len(seq.tokens) - 12)
    for out in outs:
        assert len(out.tokens) <= out.drafted + 1
    assert seq.computed == len(seq.tokens) - 1


def test_guesses_stop_at_stop_tokens_limits_and_scores_stay_with_their_tokens(subject: Any) -> None:
    kernel = subject.kernel
    tokens = [7] * 30
    made = subject.greedy(tokens, 30)
    stop = made[12]
    seq = kernel.open(tokens, stop_token_ids=[stop], logprobs=2)
    found: list[int] = []
    while not found or found[-1] != stop:
        [out] = kernel.step([(seq, len(seq.tokens) - seq.computed)], draft=6)
        assert [c.top[0].token for c in out.chosen] == out.tokens
        found += out.tokens
        assert len(found) < 40
    assert found == made[: made.index(stop) + 1]
    assert out.stop
    [nothing] = kernel.step([(seq, 1)], draft=6)
    assert (nothing.tokens, nothing.error, nothing.computed) == ([], "", seq.computed)
    for limit in range(31, 40):
        bounded = kernel.open(tokens)
        bounded.limit = limit
        kernel._announce(bounded)
        while len(bounded.tokens) < limit:
            kernel.step([(bounded, len(bounded.tokens) - bounded.computed)], draft=6)
        assert bounded.tokens[30:] == made[: limit - 30]
        assert kernel.step([(bounded, 1)])[0].tokens == []


def test_penalised_and_young_sequences_do_not_guess(subject: Any) -> None:
    kernel = subject.kernel
    for sampling in ({"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 9}, {"min_new_tokens": 99}):
        seq = kernel.open([7, 8] * 20, **sampling)
        outs = [kernel.step([(seq, len(seq.tokens) - seq.computed)], draft=6)[0] for _ in range(4)]
        assert [(out.drafted, len(out.tokens)) for out in outs] == [(0, 1)] * 4


def test_prompt_scores_are_of_the_prompt_alone(subject: Any) -> None:
    kernel = subject.kernel
    tokens = [7, 8, 9] * 10
    plain, guessing = (kernel.open(tokens, prompt_logprobs=True, logprobs=1) for _ in range(2))
    [expected] = kernel.step([(plain, 30)])
    [out] = kernel.step([(guessing, 30)], draft=4)
    assert [s.logprob for s in out.prompt] == pytest.approx([s.logprob for s in expected.prompt], abs=1e-4)
    assert len(out.prompt) == 29
    [later] = kernel.step([(guessing, 1)], draft=4)
    assert later.prompt == []


def test_a_sequence_may_be_opened_where_others_have_computed(subject: Any) -> None:
    kernel = subject.kernel
    first = kernel.open(prompt(48))
    kernel.step([(first, 48)])
    second = kernel.open(prompt(40))
    kernel.free += second.blocks[:2]
    second.blocks[:2], second.computed = first.blocks[:2], 32
    kernel._announce(second)
    assert kernel.generate([second], 5) == [subject.greedy(prompt(40), 5)]


def test_the_loaded_model_says_what_computes_it(subject: Any) -> None:
    loaded = subject.kernel.loaded
    assert loaded.engine
    assert loaded.kv_dtype in ("float32", "bfloat16", "int8")


# Grammars: token n is the n-th printable character of ASCII, then two special tokens.

END = 95
SCHEMA = """{"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999},
"b": {"enum": ["x", "yy"]}}, "required": ["a", "b"], "additionalProperties": false}"""
GRAMMARS = [
    t.Grammar(t.GrammarKind.JSON_SCHEMA, SCHEMA),
    t.Grammar(t.GrammarKind.REGEX, r"\d{4}-\d{2}( \w{1,9}){2}!"),
    t.Grammar(t.GrammarKind.CHOICE, '["yes","yellow","no"]'),
    t.Grammar(t.GrammarKind.LARK, 'start: "[" item ("," item)? "]"\nitem: /[a-c]{1,6}/ | "(" /x{0,3}/ ")"'),
]
OPTIONS = [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3}]


def text_of(tokens: list[int]) -> str:
    return "".join(chr(32 + token) for token in tokens if token < END)


def matches(grammar: t.Grammar, text: str) -> bool:
    match grammar.kind:
        case t.GrammarKind.JSON_SCHEMA:
            found = json.loads(text)
            return set(found) == {"a", "b"} and 0 <= found["a"] <= 999 and found["b"] in ("x", "yy")
        case t.GrammarKind.REGEX:
            return re.fullmatch(grammar.text, text, re.ASCII) is not None
        case t.GrammarKind.CHOICE:
            return text in ("yes", "yellow", "no")
    item = r"([a-c]{1,6}|\(x{0,3}\))"
    return re.fullmatch(rf"\[{item}(,{item})?\]", text) is not None


def constrained(kernel: Any, seqs: list[Any], draft: int = 0) -> list[list[int]]:
    """Generates until all have stopped."""
    running = list(seqs)
    for _ in range(200):
        if not running:
            return [seq.tokens[seq.prompt_length :] for seq in seqs]
        outs = kernel.step([(s, len(s.tokens) - s.computed) for s in running], draft=draft)
        assert not [out.error for out in outs if out.error]
        running = [seq for seq, out in zip(running, outs, strict=True) if not out.stop]
    raise AssertionError("it does not end")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.kind)
def test_what_a_grammar_says_comes_alone_beside_others_and_with_guesses(
    subject: Any, grammar: t.Grammar, options: dict[str, Any]
) -> None:
    kernel = subject.kernel
    options = {**options, "grammar": grammar, "stop_token_ids": [END]}
    plain = prompt(30, seed=9)
    alone = constrained(kernel, [kernel.open(prompt(20), **options)])[0]
    assert alone[-1] == END
    assert matches(grammar, text_of(alone)), text_of(alone)
    free = kernel.open(plain)
    beside = [kernel.open(prompt(20), **options), kernel.open(prompt(20), **options)]
    for _ in range(3):
        kernel.step([(seq, len(seq.tokens) - seq.computed) for seq in (*beside, free)])
    assert free.tokens[30:] == subject.greedy(plain, 3)
    assert constrained(kernel, [kernel.open(prompt(20), **options)], draft=6) == [alone]


def test_a_recomputed_sequence_is_where_it_was_in_its_grammar(subject: Any) -> None:
    kernel = subject.kernel
    options = {"grammar": GRAMMARS[0], "stop_token_ids": [END]}
    whole = constrained(kernel, [kernel.open(prompt(20), **options)])[0]
    seq = kernel.open(prompt(20), **options)
    kernel.generate([seq], 6)
    kernel.reopen(seq)
    assert constrained(kernel, [seq], draft=3) == [whole]


def test_beams_keep_to_a_grammar(subject: Any) -> None:
    kernel = subject.kernel
    seq = kernel.open(prompt(20), grammar=GRAMMARS[2], stop_token_ids=[END])
    [out] = kernel.step([(seq, 20)], beams=8)
    assert {text_of([beam.token]) for beam in out.beams} == {"y", "n"}
    ended = kernel.open(
        [*prompt(20), *[ord(c) - 32 for c in "no"]],
        prompt_length=20,
        grammar=GRAMMARS[2],
        stop_token_ids=[END],
    )
    [out] = kernel.step([(ended, 22)], beams=8)
    assert [beam.token for beam in out.beams] == [END]


def test_a_grammar_that_cannot_be_fails_alone(subject: Any) -> None:
    kernel = subject.kernel
    bad = kernel.open(prompt(20), grammar=t.Grammar(t.GrammarKind.REGEX, "(a"), stop_token_ids=[END])
    good = kernel.open(prompt(20))
    broken, fine = kernel.step([(bad, 20), (good, 20)])
    assert "grammar" in broken.error
    assert broken.code == errors.InvalidArgument.code
    assert not fine.error
    assert good.tokens[20:] == subject.greedy(prompt(20), 1)
