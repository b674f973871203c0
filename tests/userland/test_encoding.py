"""Texts as an encoder reads them, and as calls that fit the wire."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t
from llmasos.userland import encoding
from llmasos.userland.tokenizer import Framed, Tokenizer
from tokenizers import models, pre_tokenizers, processors

CLS, SEP, UNK = 0, 1, 2


def tokenizer(between: str = "[SEP]", told: bool = True) -> Tokenizer:
    """Words a to z; BERT's frame, or RoBERTa's."""
    vocab = {"[CLS]": CLS, "[SEP]": SEP, "[UNK]": UNK} | {chr(97 + n): 3 + n for n in range(26)}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    kind = int(told)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A {between} $B:{kind} [SEP]:{kind}",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    made.enable_truncation(4)  # as files have it; we cut nothing unasked
    made.enable_padding(length=9)
    config = {"unk_token": "[UNK]"}
    return Tokenizer(
        {
            "tokenizer.json": made.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
            "generation_config.json": b"{}",
        }
    )


def ids(text: str) -> list[int]:
    return [3 + ord(letter) - 97 for letter in text]


def test_texts_and_pairs_get_the_models_frame() -> None:
    assert tokenizer().frame(["a b", ("a b", "c"), "", ("", "z")]) == [
        Framed([CLS, *ids("ab"), SEP]),
        Framed([CLS, *ids("ab"), SEP, *ids("c"), SEP], 4),
        Framed([CLS, SEP]),
        Framed([CLS, SEP, *ids("z"), SEP], 2),
    ]
    assert tokenizer("[SEP] [SEP]", told=False).frame([("a b", "c")]) == [
        Framed([CLS, *ids("ab"), SEP, SEP, *ids("c"), SEP])
    ]


@pytest.mark.parametrize("texts", [["a", ("b", "c", "d")], [("a",)], None, b"ab"])
def test_what_is_neither_a_text_nor_a_pair_is_refused(texts: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        encoding.framed(TOKENIZER, texts, 10, truncate=False)


def test_one_text_is_not_taken_for_a_list_of_letters() -> None:
    whole = encoding.framed(TOKENIZER, "a b", 10, truncate=False)
    assert whole == encoding.framed(TOKENIZER, ["a b"], 10, truncate=False)


def test_a_persons_text_holds_no_special_token() -> None:
    (one,) = tokenizer().frame(["a [SEP] b [CLS]"])
    assert one.ids[0] == CLS
    assert one.ids[-1] == SEP
    assert not {CLS, SEP} & set(one.ids[1:-1])


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(3, 30))
def test_the_longer_of_a_pair_is_cut_first(first: int, second: int, most: int) -> None:
    (one,) = TOKENIZER.frame([("a " * first, "b " * second)], most)
    a, b = one.ids.count(ids("a")[0]), one.ids.count(ids("b")[0])
    assert len(one.ids) == a + b + 3 == min(first + second + 3, most)
    assert one.second == a + 2
    if a < first and b < second:
        assert abs(a - b) <= 1
    elif a < first:
        assert a >= b - 1
    elif b < second:
        assert b >= a - 1


TOKENIZER = tokenizer()


def test_what_is_too_long_is_told_before_anything_is_sent() -> None:
    with pytest.raises(errors.ContextOverflow) as raised:
        encoding.framed(TOKENIZER, ["a", "a " * 9], 10, truncate=False)
    assert raised.value.details["index"] == 1
    assert [len(one.ids) for one in encoding.framed(TOKENIZER, ["a", "a " * 9], 10, truncate=True)] == [3, 10]


@settings(deadline=None)
@given(st.lists(st.integers(1, 70_000), max_size=600))
def test_calls_fit_the_wire_and_hold_all_texts_in_order(lengths: list[int]) -> None:
    shared = [7] * max(lengths, default=1)
    lengths = lengths[:20] + [length % 500 + 1 for length in lengths[20:]]
    texts = [Framed(shared[:length], length // 2) for length in lengths]
    made = list(encoding.calls(table.Encode("m"), texts))
    assert [length for call in made for length in call.lengths] == [len(one.ids) for one in texts]
    assert [second for call in made for second in (call.pairs or [0] * len(call.lengths))] == [
        one.second for one in texts
    ]
    for call in made:
        assert len(call.lengths) <= encoding.CALL_TEXTS
        assert sum(call.lengths) <= max(encoding.CALL_TOKENS, call.lengths[0])
        wire.encode_request(1, call, 0)


def test_rows_of_several_calls_are_one_matrix() -> None:
    texts = [Framed([n]) for n in range(1, 300)]
    flow = encoding.encoded(table.Encode("m", t.Encodes.EMBED), texts)
    step = next(flow)
    try:
        while True:
            tokens = t.unpack_tokens(step.call.tokens)
            data = np.array([[token, -token] for token in tokens], "<f4").tobytes()
            step = flow.send(table.EncodeReply(len(tokens), 2, data))
    except StopIteration as end:
        rows = end.value
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[:, 0], range(1, 300))
