"""Hugging Face's meanings of the options, their defaults and their errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from llmasos.userland.generation import DEFAULT_NEW_TOKENS, Model, Plan, check_names, plan


def make(
    options: Any = None, *, prompt: int = 10, context: int = 1024, results: int = 1, **generation: Any
) -> Plan:
    return plan(options or {}, Model(context, [2], generation), prompt_tokens=prompt, results=results)


def test_the_default_is_greedy_and_ends_at_eos() -> None:
    made = make()
    assert made.sampling == t.Sampling(stop_token_ids=[2])
    assert made.beams is None
    assert made.max_tokens == DEFAULT_NEW_TOKENS


@pytest.mark.parametrize(
    ("options", "generation", "expected"),
    [
        ({"max_new_tokens": 7}, {}, 7),
        ({"max_length": 25}, {}, 15),  # counts the prompt
        ({}, {"max_new_tokens": 33}, 33),
        ({}, {"max_length": 50}, 40),
        ({}, {"max_length": 5}, DEFAULT_NEW_TOKENS),  # the model's own limit is below the prompt: no limit
        ({}, {"max_length": 4096}, 1014),
        ({"max_new_tokens": 7}, {"max_length": 50}, 7),
        ({"max_new_tokens": 0}, {}, 0),
        ({"max_new_tokens": None, "max_length": None}, {}, DEFAULT_NEW_TOKENS),
    ],
)
def test_lengths(options: Any, generation: Any, expected: int) -> None:
    assert make(options, **generation).max_tokens == expected


def test_the_default_length_stays_within_the_context() -> None:
    assert make(prompt=1000).max_tokens == 24
    with pytest.raises(errors.ContextOverflow, match="1024"):
        make(prompt=1024)


def test_both_lengths_warn_and_max_new_tokens_wins() -> None:
    with pytest.warns(UserWarning, match="max_new_tokens wins"):
        assert make({"max_new_tokens": 7, "max_length": 12}).max_tokens == 7


def test_sampling_options_act_only_with_do_sample() -> None:
    with pytest.warns(UserWarning, match=r"temperature, top_p: no effect without do_sample"):
        made = make({"temperature": 0.5, "top_p": 0.9})
    assert made.sampling == t.Sampling(stop_token_ids=[2])
    sampled = make({"do_sample": True, "temperature": 0.5, "seed": 3}).sampling
    assert (sampled.temperature, sampled.top_k, sampled.top_p, sampled.seed) == (0.5, 50, 1.0, 3)


def test_the_models_generation_config_gives_defaults_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1, unknown_key=3)
        greedy = make({"do_sample": False}, do_sample=True, temperature=0.6)
    assert (made.sampling.temperature, made.sampling.top_p) == (0.6, 0.9)
    assert made.sampling.repetition_penalty == 1.1
    assert greedy.sampling.temperature == 0


@pytest.mark.parametrize(
    ("stopping", "expected"), [(True, "true"), (False, "false"), ("never", "never"), (None, "false")]
)
def test_beams(stopping: Any, expected: str) -> None:
    made = make({"num_beams": 5, "early_stopping": stopping, "length_penalty": 2}, results=3)
    assert made.beams == t.Beams(5, 3, 2.0, expected)
    assert made.samples == 1


def test_several_samples_have_seeds_of_their_own() -> None:
    made = make({"do_sample": True, "seed": 5}, results=3)
    assert made.samples == 3
    assert [made.seeded(i).seed for i in range(3)] == [5, 6, 7]
    assert make({"do_sample": True}, results=2).seeded(1).seed is None


@pytest.mark.parametrize(
    ("options", "results", "told"),
    [
        ({}, 2, "num_return_sequences"),
        ({}, 0, "num_return_sequences"),
        ({"num_beams": 2}, 3, "num_return_sequences"),
        ({"num_beams": 4, "do_sample": True}, 1, "do_sample"),
        ({"num_beams": 40}, 1, "num_beams: must be a whole number from 2 to 16"),
        ({"num_beams": 0}, 1, "num_beams: must be a whole number from 2 to 16 (1 searches without beams)"),
        ({"num_beams": 2, "early_stopping": "maybe"}, 1, "early_stopping"),
        ({"do_sample": True, "temperature": 0}, 1, "temperature"),
        ({"do_sample": True, "temperature": -1}, 1, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, 1, "top_p"),
        ({"repetition_penalty": "high"}, 1, "repetition_penalty"),
        ({"logprobs": 21}, 1, "logprobs"),
        ({"max_length": 10}, 1, "max_length"),
        ({"max_new_tokens": -1}, 1, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, 1, "max_new_tokens"),
        ({"stop": ["a", ""]}, 1, "stop"),
        ({"max_time": float("inf")}, 1, "max_time: must be seconds, above 0"),
        ({"max_time": "soon"}, 1, "max_time: must be seconds, above 0"),
        ({"do_sample": "False"}, 1, "do_sample: must be True or False, not 'False'"),
        ({"return_full_text": "no"}, 1, "return_full_text: must be True or False"),
        ({"num_beams": 2}, "2", "num_return_sequences: must be a whole number"),
        ({"do_sample": True}, 2.0, "num_return_sequences: must be a whole number"),
        ({"num_beams": 2, "length_penalty": "long"}, 1, "length_penalty: must be a number from -10 to 10"),
        ({"num_beams": 2, "early_stopping": 1}, 1, "early_stopping: must be one of true, false, never"),
        ({"min_length": -1}, 1, "min_length"),
        ({"eos_token_id": "."}, 1, "eos_token_id: must be a token's id, or a list of some"),
        ({"eos_token_id": [3, -1]}, 1, "eos_token_id"),
        ({"stop": 5}, 1, "stop: must be a string, or a list of some"),
        ({"stop": b"end"}, 1, "stop: must be a string, or a list of some"),
        ({"structured_outputs": "json"}, 1, "structured_outputs: an object with one of json"),
        ({"structured_outputs": {"json": {"enum": {1}}}}, 1, "structured_outputs.json: it is no JSON"),
    ],
)
def test_mistakes_are_named(options: Any, results: Any, told: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        make(options, results=results)
    assert str(caught.value).startswith(told)
    assert caught.value.details["field"] == told.partition(":")[0]


def test_unknown_names_are_type_errors_with_a_suggestion() -> None:
    with pytest.raises(
        TypeError, match=r"generate\(\) has no option 'max_tokens'; did you mean 'max_new_tokens'"
    ):
        check_names({"max_tokens": 3}, "generate")
    with pytest.raises(TypeError, match=r"structured_outputs=\{'json'"):
        check_names({"json_schema": {}}, "chat")
    with pytest.raises(TypeError, match=r"no option 'streamer': stream\(\) yields"):
        check_names({"streamer": None}, "generate")
    with pytest.raises(TypeError, match=r"no option 'zzz'$"):
        check_names({"zzz": 3}, "generate")


def test_unused_beam_options_warn_of_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="length_penalty") as caught:
        make({"length_penalty": 2.0})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "generation", "expected"),
    [
        ({"min_length": 25}, {}, 15),  # counts the prompt
        ({"min_length": 5}, {}, 0),
        ({"min_length": 25, "min_new_tokens": 3}, {}, 3),
        ({}, {"min_length": 25}, 15),
        ({"min_length": 0}, {"min_length": 25}, 0),
    ],
)
def test_least_lengths(options: Any, generation: Any, expected: int) -> None:
    assert make(options, **generation).sampling.min_new_tokens == expected


@pytest.mark.parametrize(("ids", "expected"), [(7, [7]), ([7, 8], [7, 8]), ([], []), (None, [2])])
def test_stop_tokens_can_be_others_than_the_models(ids: Any, expected: list[int]) -> None:
    assert make({"eos_token_id": ids}).sampling.stop_token_ids == expected


@given(
    prompt=st.integers(1, 2000),
    new=st.none() | st.integers(0, 3000),
    length=st.none() | st.integers(0, 3000),
)
def test_no_answer_is_longer_than_was_asked_for(prompt: int, new: int | None, length: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = make({"max_new_tokens": new, "max_length": length}, prompt=prompt)
        except (errors.InvalidArgument, errors.ContextOverflow):
            assert prompt >= 1024 or (new is None and length is not None and length <= prompt)
            return
    if new is not None:
        assert made.max_tokens == new
    elif length is not None:
        assert made.max_tokens + prompt == length
    else:
        assert 0 < made.max_tokens <= min(DEFAULT_NEW_TOKENS, 1024 - prompt)
