"""No spelling of a name or a path leads outside the model filesystem."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.kernel.modelfs.names import did_you_mean, parse_name, parse_path
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls.errors import InvalidArgument, NotFound

PIECES = [*"abAB01._-/:+\\ \n\0~*é", "..", "/../", "/models/", ".json", "latest"]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=40)


@pytest.mark.parametrize(
    ("text", "name", "tag", "adapter"),
    [
        ("smollm2", "smollm2", "latest", ""),
        ("smollm2:q4", "smollm2", "q4", ""),
        ("HuggingFaceTB/SmolLM2-135M:v1.0", "HuggingFaceTB/SmolLM2-135M", "v1.0", ""),
        ("a/b/c", "a/b/c", "latest", ""),
        ("smollm2+my-adapter", "smollm2", "latest", "my-adapter"),
        ("a/b:c+d.json", "a/b", "c", "d.json"),
    ],
)
def test_names_have_a_tag_and_up_to_three_parts(text: str, name: str, tag: str, adapter: str) -> None:
    model = parse_name(text)
    assert model == (name, tag, adapter)
    assert parse_name(str(model)) == model == parse_name(model.short)
    assert model.short == text
    assert model.base == (name, tag, "")


NO_NAMES = ["a\n", "a\0", "ü", "a/b/c/d", "a" * 97, "a:" + "b" * 97, "a.json", "a/b.json/c", "a\\b", "~"]
NO_NAMES += [
    "",
    ":",
    "a:",
    ":a",
    "..",
    "a/..",
    "a/../b",
    "/a",
    "a//b",
    "a/",
    ".a",
    "-a",
    "a:b:c",
    "a:b/c",
    "a b",
    "+",
    "a+",
    "+b",
    "a+b+c",
    "a+b:c",
    "a+b/c",
    "a+.b",
    "a:+b",
]


@pytest.mark.parametrize("text", NO_NAMES)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_name(text)
    assert caught.value.details["field"] == "model"


def hostile_texts(count: int) -> Iterator[str]:
    """Like HOSTILE, thousands a second."""
    dice = random.Random(7)
    for _ in range(count):
        yield "".join(dice.choices(PIECES, k=dice.randrange(12)))


def test_a_name_never_leaves_the_folder() -> None:
    valid = 0
    for text in hostile_texts(50_000):
        try:
            model = parse_name(text)
        except InvalidArgument:
            continue
        valid += 1
        path = Path("/root/manifests") / model.name / f"{model.variant}.json"
        assert path.is_relative_to("/root/manifests")
        assert not any(part.startswith(".") for part in path.parts)
        assert text.isascii()
        assert text.isprintable()
    assert valid > 100


def test_a_path_is_a_model_a_file_or_an_error() -> None:
    for text in hostile_texts(50_000):
        try:
            meanings = parse_path("/models/" + text)
        except InvalidArgument:
            continue
        for meaning in meanings:
            assert parse_name(str(meaning.model)) == meaning.model
            assert "/" not in meaning.file
            assert not meaning.file.startswith(".")


@settings(max_examples=500, deadline=None)
@given(HOSTILE)
def test_the_store_opens_nothing_outside(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    home = tmp_path_factory.getbasetemp() / "names"
    store = ModelFS(home)
    (home / "secret.json").write_text("{}")
    for call in (store.resolve, store.stat, lambda path: store.read("/models/" + path, 0, 10)):
        try:
            call(text)
        except (InvalidArgument, NotFound):
            continue
        assert text.rstrip("/") in ("", "/models")


def test_a_path_without_a_tag_can_mean_a_model_or_a_file() -> None:
    assert parse_path("/models/a/b") == [(("a/b", "latest", ""), ""), (("a", "latest", ""), "b")]
    assert parse_path("/models/a/b:c/config.json") == [(("a/b", "c", ""), "config.json")]
    assert parse_path("/models/a+b/config.json") == [(("a", "latest", "b"), "config.json")]
    assert parse_path("/models/a:b+c") == [(("a", "b", "c"), "")]
    assert parse_path("/models/") == []


def test_slips_are_recognised() -> None:
    assert did_you_mean("SmolLm", ["gpt2", "smollm2"]) == "smollm2"
    assert did_you_mean("zzz", ["gpt2"]) == ""
