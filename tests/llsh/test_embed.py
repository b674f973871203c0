"""`llsh embed`: arguments or lines in, one vector each out."""

from __future__ import annotations

import array
import asyncio
import json
from pathlib import Path

import pytest
from llmasos.drivers.null import vector
from llmasos.syscalls import errors
from llmasos.userland.llm import LLM

from .conftest import add_model


@pytest.fixture(scope="module", autouse=True)
def encoder(home: Path) -> None:
    for name, made in (("encoder", "BertModel"), ("scorer", "BertForSequenceClassification")):
        encodes = {
            "architectures": [made],
            "llmasos_null_encodes": "embed" if name == "encoder" else "classify",
        }
        add_model(home, name, template="", max_position_embeddings=8, **encodes)


def right(*tokens: int) -> list[float]:
    return array.array("f", vector(tokens, 8)).tolist()


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_each_argument_is_a_text(llsh) -> None:
    found = lines(llsh("embed", "encoder", "w1 w2", "w7"))
    assert llsh.code == 0
    assert found == [
        {"text": "w1 w2", "embedding": right(1, 2)},
        {"text": "w7", "embedding": right(7)},
    ]


def test_each_line_of_stdin_is_a_text(llsh) -> None:
    typed = [f"w{n} w{n + 1}" for n in range(300)]
    found = lines(llsh("embed", "encoder", stdin="\n".join(typed)))
    assert [one["text"] for one in found] == typed
    assert found[299]["embedding"] == right(299, 300)


@pytest.mark.parametrize("tty", [False, True])
def test_what_was_done_is_told_when_it_is_interrupted(llsh, monkeypatch, tty) -> None:
    embed, calls = LLM.embed, []

    def interrupted(self, texts, **options):
        calls.append(len(texts))
        if sum(calls) > 100:
            raise KeyboardInterrupt
        return embed(self, texts, **options)

    monkeypatch.setattr(LLM, "embed", interrupted)
    out = llsh("embed", "encoder", stdin="\n".join(f"w{n}" for n in range(300)), tty=tty)
    assert llsh.code == 130
    assert len(out.splitlines()) == sum(calls[:-1]) + tty > 60
    assert ("texts" in llsh.err) == tty


def test_a_person_sees_a_table(llsh) -> None:
    out = llsh("embed", "encoder", "w1 w2", tty=True)
    assert all(word in out for word in ("DIMENSIONS", "VECTOR", "w1 w2", f"{right(1, 2)[0]:+.4f}"))
    assert lines(llsh("embed", "encoder", "w1", "--json", tty=True))[0]["embedding"] == right(1)


def test_too_long_is_an_error_unless_it_may_be_cut(llsh) -> None:
    long = " ".join(f"w{n}" for n in range(600))
    assert llsh("embed", "encoder", long) == ""
    assert llsh.code == 1
    assert "600 tokens" in llsh.err
    (cut,) = lines(llsh("embed", "encoder", "--truncate", long))
    assert len(cut["embedding"]) == 8


def test_a_model_that_generates_is_told_so(llsh) -> None:
    llsh("embed", "tiny", "w1")
    assert llsh.code == 1
    assert "generates text" in llsh.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "encoder", "w1"], "`llsh embed`"),
        (["chat", "scorer"], "/v1/classify"),
        (["embed", "scorer", "w1"], "/v1/classify"),
        (["merge", "tiny", "new"], "MODEL+NAME"),
    ],
)
def test_what_a_model_does_not_do_is_refused_with_what_it_does(llsh, words, hint) -> None:
    llsh(*words, stdin="w1\n")
    assert llsh.code == 1
    assert hint in llsh.err


def test_an_encoder_does_not_chat(client) -> None:
    llm = LLM.from_pretrained("scorer", client=client)
    for ask in (lambda: llm.chat("w1"), lambda: asyncio.run(llm.achat("w1")), lambda: llm.embed("w1")):
        with pytest.raises(errors.UnsupportedModel, match="text") as refused:
            ask()
        assert "encode()" in refused.value.hint


def test_show_tells_what_a_model_is_for(llsh) -> None:
    for model, use in (("encoder", "llsh embed"), ("scorer", "/v1/classify"), ("plain", "--raw text")):
        shown = llsh("show", model)
        assert use in shown
        assert ("--raw" in shown) == (model == "plain")
