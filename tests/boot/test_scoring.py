"""Choices scored by likelihood on a real daemon, against transformers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.decisions import ANSWER, EXAMPLES, NOTHING, Option, Question, yes_or_no
from llmasos.userland.llm import LLM
from tokenizers import decoders, models, pre_tokenizers

from .test_real import TINY_CONFIGS

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def byte_pairs() -> tokenizers.Tokenizer:
    """Bytes, and a few merges, one of them over a space."""
    vocab = {piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s"), ("n", "o")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    made = tokenizers.Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scored")
    torch.manual_seed(3)
    config = copy.deepcopy(TINY_CONFIGS["llama"])
    config.max_position_embeddings = 2048
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # sure of itself, so that choices differ
        model.lm_head.weight *= 2
    model.save_pretrained(made)
    byte_pairs().save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return made


@pytest.fixture(scope="module")
def daemon(daemons: Callable):
    return daemons('devices=["cpu"]')


@pytest.fixture
def llm(daemon, folder: Path) -> Iterator[LLM]:
    with LLM.from_pretrained(folder, address=daemon.address, dtype="float32", progress=False) as made:
        yield made
        assert made.client.ps() == []
        pools = [pool for device in made.client.call(table.Lsdev()).devices for pool in device.pools]
        assert all(pool.blocks_free == pool.blocks_total for pool in pools)


@pytest.fixture(scope="module")
def dense(folder: Path) -> Callable[[list[int], int], float]:
    """The log probability of the tokens from a place on, as transformers has it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()

    def of(tokens: list[int], start: int) -> float:
        with torch.inference_mode():
            logs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        return sum(float(logs[place - 1, tokens[place]]) for place in range(start, len(tokens)))

    return of


def softmax(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).softmax(-1).tolist()


def test_scores_are_those_of_transformers(llm: LLM, dense) -> None:
    prompt = "Does it rain today?"
    choices = [" yes", " no", " perhaps so", " yesterday"]
    found = llm.score(prompt, choices)
    ids = [llm.tokenizer.encode(prompt + choice) for choice in choices]
    start = len(llm.tokenizer.encode(prompt))
    right = [dense(one, start) for one in ids]
    assert list(found.logprobs) == pytest.approx(right, abs=1e-4)
    assert list(found.tokens) == [len(one) - start for one in ids]
    assert list(found.probabilities) == pytest.approx(softmax(right), abs=1e-4)
    assert found.prompt_tokens == start + sum(found.tokens)
    assert found.label == choices[right.index(max(right))]
    again = asyncio.run(llm.ascore(prompt, choices))
    assert again.logprobs == pytest.approx(found.logprobs, abs=1e-4)


def test_what_merges_with_the_prompts_end_is_scored_with_it(llm: LLM, dense) -> None:
    prompt, choices = "Say a", ["b", "c"]  # "ab" is one token
    found = llm.score(prompt, choices)
    ids = [llm.tokenizer.encode(prompt + choice) for choice in choices]
    start = len(ids[0]) - 1
    assert start == len(llm.tokenizer.encode(prompt)) - 1
    right = [dense(one, start) for one in ids]
    assert list(found.logprobs) == pytest.approx(right, abs=1e-4)
    assert list(found.tokens) == [1, 2]


def test_a_conversation_is_scored_behind_its_template(llm: LLM, dense) -> None:
    found = llm.score([{"role": "user", "content": "Well?"}], ["yes", "no"])
    start = len(llm.tokenizer.encode("[Well?]>"))
    right = [dense(llm.tokenizer.encode("[Well?]>" + choice), start) for choice in ("yes", "no")]
    assert list(found.logprobs) == pytest.approx(right, abs=1e-4)


def test_means_temperatures_and_calibration(llm: LLM, dense) -> None:
    prompt, nothing, choices = "It is red:", "It is N/A:", [" yes", " no", " green"]

    def of(prompt: str) -> list[float]:
        start = len(llm.tokenizer.encode(prompt))
        return [dense(llm.tokenizer.encode(prompt + choice), start) for choice in choices]

    right, prior = of(prompt), of(nothing)
    found = llm.score(prompt, choices, per_token=True)
    lengths = list(found.tokens)
    means = [value / length for value, length in zip(right, lengths, strict=True)]
    assert list(found.probabilities) == pytest.approx(softmax(means), abs=1e-4)
    cooler = llm.score(prompt, choices, temperature=3)
    assert list(cooler.probabilities) == pytest.approx(softmax([v / 3 for v in right]), abs=1e-4)
    fair = llm.score(prompt, choices, against=[nothing])
    gained = [value - before for value, before in zip(right, prior, strict=True)]
    assert list(fair.probabilities) == pytest.approx(softmax(gained), abs=1e-4)
    assert sum(fair.probabilities) == pytest.approx(1)
    neutral = llm.score(nothing, choices, against=[nothing])
    assert list(neutral.probabilities) == pytest.approx([1 / 3] * 3, abs=1e-4)


def test_decisions_are_calibrated_scores(llm: LLM) -> None:
    questions = [
        yes_or_no("Is it so?"),
        Question("Which?", (Option("up", "to the sky"), Option("down"), Option("aside", "left or right"))),
    ]
    texts = ["The bird flies.", "A stone."]
    rows = llm.decide_all(texts, questions)
    for text, row in zip(texts, rows, strict=True):
        for question, answer in zip(questions, row, strict=True):
            alone = llm.score(
                question.asked(text) + ANSWER,
                [f" {name}" for name in question.names],
                against=[question.asked(NOTHING) + ANSWER],
            )
            assert answer.options == question.names
            assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
            assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    assert questions[1].asked("X") == (
        EXAMPLES + "Text: X\nQuestion: Which?\nup: to the sky\naside: left or right\n"
    )


def test_many_texts_are_decided_in_waves(llm: LLM) -> None:
    texts, question = [f"text {n}" for n in range(150)], Question("?", (Option("up"), Option("down")))
    found = llm.decide_all(texts, question)  # 302 options
    assert len(found) == len(texts)
    for place in (0, 77, 149):
        (alone,) = llm.decide(texts[place], question)
        assert found[place][0].probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    tokens = sum(one.prompt_tokens for (one,) in found)
    each = len(llm.tokenizer.encode(f"{texts[149]}\nQuestion: ?\nAnswer:")) + sum(found[0][0].tokens)
    assert tokens < len(EXAMPLES) + 151 * each  # what all have in common was computed once
    assert asyncio.run(llm.aclassify("text", {"up": "", "down": ""})).options == ("up", "down")
    assert llm.decide_all([], question) == []


@pytest.mark.parametrize("choices", [[], ["a", "a"], ["", "a"], "ab", ["x"] * 257, [1, 2], None])
def test_choices_that_cannot_be_scored_are_refused(llm: LLM, choices) -> None:
    with pytest.raises(errors.InvalidArgument):
        llm.score("A prompt", choices)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_above_nothing(llm: LLM, temperature) -> None:
    with pytest.raises(errors.InvalidArgument):
        llm.score("Ready?", ["yes", "no"], temperature=temperature)
    with pytest.raises(errors.InvalidArgument):
        llm.classify("Ready.", ["yes", "no"], temperature=temperature)
    assert llm.client.ps() == []


def test_nothing_is_cut_off(llm: LLM) -> None:
    with pytest.raises(errors.ContextOverflow):
        llm.classify("long " * llm.context_length, ["up", "down"])
    with pytest.raises(errors.InvalidArgument):
        llm.score("", ["a", "b"])


def test_a_cancelled_decision_leaves_nothing_behind(llm: LLM, daemon) -> None:
    async def cancelled() -> None:
        texts = [f"{'text ' * 20}{n}" for n in range(400)]
        work = asyncio.ensure_future(llm.adecide_all(texts, yes_or_no("?")))
        while not await asyncio.to_thread(llm.client.ps) and not work.done():
            await asyncio.sleep(0.005)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    assert llm.client.ps() == []


def test_who_is_killed_on_the_way_raises(llm: LLM, daemon) -> None:
    async def killed() -> None:
        texts = [f"{'text ' * 20}{n}" for n in range(400)]
        work = asyncio.ensure_future(llm.adecide_all(texts, yes_or_no("?")))
        while not work.done():
            for row in await asyncio.to_thread(llm.client.ps):
                with contextlib.suppress(errors.LLMasOSError):
                    llm.client.kill(row.pid, t.Signal.KILL)
        with pytest.raises(errors.LLMasOSError):
            await work

    asyncio.run(killed())
