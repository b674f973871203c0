"""Answers that have to look like something, and labels for texts."""

from __future__ import annotations

import json

import pytest

from ..userland.conftest import STOP, byte_tokenizer, model_files
from .conftest import put_model


@pytest.fixture(scope="module", autouse=True)
def bytes_(home):
    """A model whose tokens are bytes: grammars need to know what tokens spell."""
    files = {path: data.decode() for path, data in model_files(byte_tokenizer()).items()}
    put_model(home, "bytes", files, {"vocab_size": STOP + 1, "max_position_embeddings": 512})


def test_an_answer_is_one_of_the_choices(llsh):
    assert llsh("run", "bytes", "x", "--choice", "yes,no").strip() in ("yes", "no"), llsh.err
    assert llsh("run", "bytes", "x", "--regex", "a[7-8]", "--temperature", "0").strip() in ("a7", "a8")
    assert llsh.code == 0


def test_a_schema_comes_from_a_file(llsh, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [5')
    llsh("run", "bytes", "x", "--schema", str(schema))
    assert llsh.code == 1
    assert "grammar cannot be used" in llsh.err
    llsh("run", "bytes", "x", "--regex", "(a", "--choice", "a,b")
    assert llsh.code == 2


@pytest.mark.parametrize(
    ("words", "tokens", "code"),
    [
        (["--schema", "{schema}"], 2, 1),
        (["--schema", "{schema}"], 4, 0),
        (["--regex", "a{9}"], 8, 1),
        (["--regex", "a{9}"], 9, 0),
        (["--choice", "yes"], 2, 1),
        (["--choice", "yes"], 3, 0),
        (["--regex", "a{9}", "--json"], 8, 1),
    ],
)
def test_a_cut_answer_fails_unless_it_is_whole(llsh, tmp_path, words, tokens, code):
    (schema := tmp_path / "schema.json").write_text('{"const": "ab"}')
    llsh(
        "run",
        "bytes",
        "x",
        *[word.replace("{schema}", str(schema)) for word in words],
        "--max-tokens",
        str(tokens),
    )
    assert (llsh.code, bool(llsh.out)) == (code, True)
    assert ("--max-tokens allows more" in llsh.err) == bool(code)
    assert (f"after {tokens} tokens" in llsh.err) == bool(code)


@pytest.mark.parametrize("words", [["--choice", ""], ["--choice", " , "], ["--regex", ""]])
def test_an_empty_constraint_is_refused(llsh, words):
    llsh("run", "bytes", "x", *words)
    assert (llsh.code, llsh.out) == (2, "")
    assert f"{words[0]} is empty" in llsh.err


def test_texts_get_labels(llsh):
    lines = llsh("classify", "tiny", "--labels", "w1,w2,w3 w4", "--json", stdin="w5 w6\n\nw7\n").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["w5 w6", "", "w7"]
    for line in map(json.loads, lines):
        assert line["label"] in line["probabilities"]
        assert abs(sum(line["probabilities"].values()) - 1) < 1e-6
    assert "w9" in llsh("classify", "tiny", "w9", "--labels", "w1,w2", tty=True)
    llsh("classify", "tiny", "w9")
    assert llsh.code == 2
