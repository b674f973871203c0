"""Text to tokens and back: no control tokens from people, no half characters, stop strings never shown."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.completion import Answer
from llmasos.userland.tokenizer import Detokenizer, Part, StopStrings, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

ENGLISH = st.text(
    st.sampled_from("abcdefghijklmnopqrstuvwxyz <>|/_") | st.characters(exclude_categories=["Cs"])
)
SPICY = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<|im_", "end|>", "<", ">", "s"]) | ENGLISH
).map("".join)


@pytest.fixture(scope="module")
def byte_level(bytes_model: dict[str, bytes]) -> Tokenizer:
    return Tokenizer(bytes_model)


@pytest.fixture(scope="module")
def spm(spm_model: dict[str, bytes]) -> Tokenizer:
    return Tokenizer(spm_model)


@pytest.fixture(scope="module")
def unigram(bytes_model: dict[str, bytes]) -> Tokenizer:
    """Its vocabulary holds the special tokens as ordinary pieces, which Viterbi would love to use."""
    pieces = [("<unk>", -10.0), ("<s>", 0.0), ("</s>", 0.0), *((chr(i), -5.0) for i in range(32, 127))]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = b'{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": false}'
    return Tokenizer(
        {**bytes_model, "tokenizer.json": made.to_str().encode(), "tokenizer_config.json": config}
    )


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_much_of_little_is_refused(bytes_model: dict[str, bytes], part: str) -> None:
    made = tokenizers.Tokenizer.from_str(bytes_model["tokenizer.json"].decode())
    kinds: Any = {"normalizer": normalizers, "decoder": decoders}[part]
    setattr(made, part, kinds.Sequence([kinds.Replace("a", "a" * 9)] * 2))
    with pytest.raises(errors.UnsupportedModel, match="81 times"):
        Tokenizer({**bytes_model, "tokenizer.json": made.to_str().encode()})


def test_a_tokenizer_that_gives_up_is_an_error_of_the_model(bytes_model: dict[str, bytes]) -> None:
    made = tokenizers.Tokenizer.from_str(bytes_model["tokenizer.json"].decode())
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), "isolated")
    tokenizer = Tokenizer({**bytes_model, "tokenizer.json": made.to_str().encode()})
    assert tokenizer.encode("xy")
    with pytest.raises(errors.UnsupportedModel, match="fails on this text"):
        tokenizer.encode("x" * 40)


@given(text=SPICY)
@example(text="</s>")
@example(text="<s></s><s>")
def test_no_control_token_comes_from_a_persons_text(
    byte_level: Tokenizer, spm: Tokenizer, unigram: Tokenizer, text: str
) -> None:
    assert not {256, 257, 258} & set(byte_level.encode(text))
    assert not {0, 1, 2} & set(spm.encode(text, start=False))
    assert not {1, 2} & set(unigram.encode(text))
    assert byte_level.decode(byte_level.encode(text)) == text


def test_bos_is_added_where_the_configuration_says_so(byte_level: Tokenizer, spm: Tokenizer) -> None:
    assert spm.encode("the")[0] == 1 == spm.bos_id
    assert spm.encode("the", start=False)[0] != 1
    assert byte_level.encode("") == []
    assert byte_level.eos_ids == [258]
    assert spm.eos_ids == [2]


@given(parts=st.lists(st.tuples(SPICY, st.booleans())))
def test_special_tokens_come_from_trusted_parts_alone(
    byte_level: Tokenizer, parts: list[tuple[str, bool]]
) -> None:
    ids = byte_level.encode_parts([Part(text, trusted) for text, trusted in parts])
    wanted = [
        id_
        for text, trusted in parts
        if trusted
        for id_ in byte_level._trusting.encode(text).ids
        if id_ > 255
    ]
    assert [id_ for id_ in ids if id_ > 255] == wanted
    assert byte_level.decode(ids, special=True) == "".join(text for text, _ in parts)


def test_an_unknown_token_with_another_role_is_a_control_token_too(bytes_model: dict[str, bytes]) -> None:
    """GPT-2 and SmolLM2 name <|endoftext|> as their unknown token."""
    config = b'{"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "add_bos_token": false}'
    tokenizer = Tokenizer({**bytes_model, "tokenizer_config.json": config})
    ids = tokenizer.encode_parts([Part("<|im_start|>", True), Part("a<|endoftext|>b", False)])
    assert [id_ for id_ in ids if id_ > 255] == [257]
    assert 256 not in tokenizer.encode("<|endoftext|>")


def test_unknown_characters_are_no_control_tokens(unigram: Tokenizer) -> None:
    assert unigram.encode("aéb").count(0) == unigram.encode("ab").count(0) + 1
    assert unigram.encode_parts([Part("aé</s>", True), Part("é</s>", False)]).count(2) == 1


def test_benign_parts_are_encoded_as_one_text(spm: Tokenizer) -> None:
    parts = [Part("<s>th", True), Part("e in", False), Part("</s>", True)]
    assert spm.encode_parts(parts) == spm._trusting.encode("<s>the in</s>", add_special_tokens=False).ids


@given(text=ENGLISH, cuts=st.lists(st.integers(1, 5)), tail=st.integers(0, 30))
def test_pieces_add_up_to_the_text_of_the_whole(
    byte_level: Tokenizer, spm: Tokenizer, text: str, cuts: list[int], tail: int
) -> None:
    for tokenizer in (byte_level, spm):
        ids = tokenizer.encode(text)
        context, rest = ids[:tail], ids[tail:]
        detokenizer = Detokenizer(tokenizer, context)
        pieces, at = [], 0
        while at < len(rest):
            step = cuts[at % len(cuts)] if cuts else 1
            pieces.append(detokenizer.feed(rest[at : at + step]))
            at += step
        assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in text
        before = Detokenizer(tokenizer).feed(context)
        assert before + "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 258), max_size=80))
def test_any_bytes_come_out_as_the_whole_would(byte_level: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(byte_level)
    text = "".join(detokenizer.feed([id_]) for id_ in ids) + detokenizer.flush()
    assert text == byte_level.decode(ids)


@given(text=ENGLISH)
def test_the_bytes_of_tokens_make_the_text(byte_level: Tokenizer, spm: Tokenizer, text: str) -> None:
    for tokenizer, before in ((byte_level, ""), (spm, " ")):
        shown = [tokenizer.shown(id_) for id_ in tokenizer.encode(text, start=False)]
        assert b"".join(token.data for token in shown) == (before + text if text else "").encode()
        assert all(token == token.data.decode(errors="replace") for token in shown)
    assert (spm.shown(2), spm.shown(2).data) == ("</s>", b"")  # no text holds it


@given(text=ENGLISH | st.text(st.sampled_from("e\u0301\u0327\u1fbe\u0308\u212a\u1100\u1161\u11a8 \x04")))
def test_a_text_has_at_least_as_many_tokens_as_is_said(
    bytes_model: dict[str, bytes], spm_model: dict[str, bytes], text: str
) -> None:
    def changed(files: dict[str, bytes], **changes: Any) -> Tokenizer:
        made = json.loads(files["tokenizer.json"])
        for part, change in changes.items():
            made[part] = change(made[part])
        return Tokenizer({**files, "tokenizer.json": json.dumps(made).encode()})

    known = [
        changed(bytes_model),
        changed(bytes_model, normalizer=lambda _: {"type": "NFC"}),
        changed(spm_model),
    ]
    for tokenizer in known:
        assert 0 <= tokenizer._least(text) <= len(tokenizer.encode(text, start=False))
        assert tokenizer._least("a" * 4000) >= 50
    unknown = [
        changed(bytes_model, normalizer=lambda _: {"type": "StripAccents"}),
        changed(bytes_model, pre_tokenizer=lambda one: sequence(one, {"type": "WhitespaceSplit"})),
        changed(bytes_model, added_tokens=lambda tokens: [{**token, "rstrip": True} for token in tokens]),
        changed(spm_model, model=lambda model: {**model, "byte_fallback": False}),
    ]
    assert [tokenizer._least("a" * 4000) for tokenizer in unknown] == [0] * 4


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def test_a_text_that_is_far_too_long_is_refused_before_it_becomes_tokens(byte_level: Tokenizer) -> None:
    assert len(byte_level.encode("a" * 99, most=99)) == 99
    with pytest.raises(errors.ContextOverflow, match="the prompt has at least"):
        byte_level.encode("a" * 4000, most=99)
    with pytest.raises(errors.ContextOverflow, match="the prompt has 100 tokens"):
        byte_level.encode("a" * 100, most=99)
    with pytest.raises(errors.ContextOverflow, match="at least"):
        byte_level.encode_parts([Part("<|im_start|>", True), Part("a" * 4000, False)], most=99)


def test_half_a_character_waits(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("é€😀")
    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.feed([id_]) for id_ in ids] == ["", "é", "", "", "€", "", "", "", "😀"]
    detokenizer.feed(ids[:1])
    assert detokenizer.flush() == "\ufffd"


def test_a_leading_space_is_kept_after_a_context(spm: Tokenizer) -> None:
    the = spm.encode("the", start=False)
    assert Detokenizer(spm).feed(the) == "the"
    assert Detokenizer(spm, the).feed(the) == " the"


def cut_at_first(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first."""
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(places)[1]] if places else text


@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
)
def test_stop_strings_cut_wherever_the_pieces_end(text: str, stops: list[str], size: int) -> None:
    filter_ = StopStrings(stops)
    seen = ""
    for at in range(0, len(text), size):
        seen += filter_.feed(text[at : at + size])
        assert cut_at_first(text, stops).startswith(seen)  # nothing shown is ever taken back
    seen += "" if filter_.stopped else filter_.flush()
    assert filter_.stopped == any(stop in text for stop in stops)
    assert seen == cut_at_first(text, stops)


def test_long_stop_strings_cost_no_more_than_short_ones() -> None:
    """Sixty-four of 256 characters, of which long beginnings come again and again, took 1.6 ms a token."""

    def seconds(length: int) -> float:
        first = "a" * length
        stops = StopStrings([f"{first}b", *(f"a{chr(200 + n) * length}" for n in range(63))])
        stops.feed(first)
        begun = time.process_time()
        assert "".join(stops.feed("aaaa") for _ in range(300)) == "a" * 1200
        return time.process_time() - begun

    assert min(seconds(255) for _ in range(3)) < 4 * min(seconds(3) for _ in range(3))


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    stops = StopStrings(["\nUser:"])
    assert stops.feed("Hello\nUs") == "Hello"
    assert stops.feed("ually so\n") == "\nUsually so"
    assert stops.feed("User: and more") == ""
    assert stops.stopped


def test_a_model_without_a_tokenizer_says_what_is_missing(kernel: object) -> None:
    kernel.models["bare:latest"] = {"config.json": b"{}"}  # type: ignore[attr-defined]
    missing = pytest.raises(errors.UnsupportedModel, match=r"tokenizer\.json")
    with Client(kernel.address) as client, missing:  # type: ignore[attr-defined]
        Tokenizer.load(client, "bare:latest")


@given(cuts=st.lists(st.integers(1, 6), min_size=1))
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(
    byte_level: Tokenizer, cuts: list[int]
) -> None:
    """However many tokens the device made at once."""
    tokens = byte_level.encode("one two STOP three four five six")
    whole = [byte_level.decode(tokens[:end]) for end in range(len(tokens) + 1)]
    ends = next(end for end, text in enumerate(whole) if "STOP" in text)
    answer, at, shown = Answer(byte_level, [], ["STOP"]), 0, ""
    for size in itertools.cycle(cuts):
        if at >= len(tokens) or answer.stopped:
            break
        shown += answer.feed(t.InferEvent(tokens=tokens[at : at + size]))
        at += size
    assert answer.stopped
    assert answer.tokens == tokens[:ends]
    assert shown == answer.text == "one two "


def test_others_go_on_while_a_long_text_becomes_tokens(byte_level: Tokenizer) -> None:
    text = "a long text, " * 100_000
    encoding = threading.Thread(target=byte_level.encode, args=(text,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10
