"""`llsh classify`: arguments or lines in, a label each out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmasos.userland.llm import LLM

from ..userland.conftest import STOP, byte_tokenizer, model_files
from .conftest import Typist, put_model


@pytest.fixture(scope="module", autouse=True)
def model(home: Path) -> None:
    files = {path: data.decode() for path, data in model_files(byte_tokenizer()).items()}
    put_model(home, "bytes", files, {"vocab_size": STOP + 1, "max_position_embeddings": 2048})


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_texts_are_labelled_as_the_library_does(llsh: Typist, client) -> None:
    found = lines(llsh("classify", "bytes", "--labels", "up, down", "--ask", "Where?", "a bird", "a stone"))
    llm = LLM.from_pretrained("bytes", client=client)
    for row, text in zip(found, ("a bird", "a stone"), strict=True):
        right = llm.classify(text, ["up", "down"], instructions="Where?")
        assert row["text"] == text
        assert row["label"] == right.label
        assert list(row["probabilities"]) == ["up", "down"]
        assert list(row["probabilities"].values()) == pytest.approx(right.probabilities, abs=1e-5)


def test_each_line_of_stdin_is_labelled_an_empty_one_too(llsh: Typist) -> None:
    typed = ["one", "", "two", "three"]
    found = lines(llsh("classify", "bytes", "--labels", "up,down", stdin="\n".join(typed)))
    assert [row["text"] for row in found] == typed


def test_a_person_sees_a_table(llsh: Typist) -> None:
    out = llsh("classify", "bytes", "--labels", "up,down", "one", tty=True)
    assert "PROBABILITY" in out
    assert "one" in out


def test_labels_are_needed(llsh: Typist) -> None:
    llsh("classify", "bytes", "one")
    assert llsh.code == 2
    assert "--labels" in llsh.err
