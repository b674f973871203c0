"""What drivers share of grammars: what is refused before it costs anybody anything, and what is kept."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest
from llmasos.drivers.grammar import Constraint, Vocabulary, blank, problem_of
from llmasos.drivers.grammar_checker import verdict
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .conftest import VOCAB, characters, file_of

END = 95
CHOICE = t.Grammar(t.GrammarKind.CHOICE, '["ab", "ac", "d"]')


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = Path(tmp_path_factory.mktemp("words")) / "tokenizer.json"
    path.write_text(characters())
    return Vocabulary({"tokenizer.json": file_of(path)}, VOCAB)


def allowed(constraint: Constraint, text: str) -> str:
    """What may follow `text`, $ for the end."""
    mask, tokens = blank(VOCAB), array("I", [ord(sign) - 32 for sign in text])
    assert not constraint.mask(tokens, 0, len(tokens), mask)
    found = [token for token in range(VOCAB) if mask[token // 32] >> token % 32 & 1]
    return "".join("$" if token == END else chr(32 + token) for token in found)


def test_answers_of_one_grammar_go_their_own_ways(vocabulary: Vocabulary) -> None:
    first = vocabulary.constraint(CHOICE, [END])
    assert allowed(first, "a") == "bc"
    second = vocabulary.constraint(CHOICE, [END])
    assert allowed(second, "") == "ad"
    assert allowed(second, "d") == "$"
    assert allowed(first, "ab") == "$"
    assert allowed(first, "a") == "bc"  # guesses that did not come true


@pytest.mark.parametrize("kind", ["string", ["string", "null"]])
def test_a_time_has_an_end(vocabulary: Vocabulary, kind: object) -> None:
    schema = json.dumps({"type": kind, "format": "time"})
    time = vocabulary.constraint(t.Grammar(t.GrammarKind.JSON_SCHEMA, schema), [END])
    assert allowed(time, '"12:30:59.123456') == "+-Z"
    assert allowed(time, '"12:30:5') == "0123456789"
    assert allowed(time, '"12:30:') == "012345"  # no leap seconds


@pytest.mark.parametrize(
    ("schema", "longest", "more"),
    [
        ({"type": "integer"}, "9" + "0" * 18, "$"),
        ({"type": ["integer", "null"]}, "-9" + "0" * 18, "$"),
        ({"type": "integer", "minimum": 0}, "9" + "0" * 17, "$0"),
        ({"type": "integer", "exclusiveMaximum": 5}, "-9" + "0" * 17, "$0"),
        ({"type": "integer"}, "123456789", "$0123456789"),
        ({"type": "integer", "multipleOf": 10}, "1" * 30, "0123456789"),
    ],
)
def test_an_integer_has_an_end(
    vocabulary: Vocabulary, schema: dict[str, object], longest: str, more: str
) -> None:
    integer = vocabulary.constraint(t.Grammar(t.GrammarKind.JSON_SCHEMA, json.dumps(schema)), [END])
    assert set(allowed(integer, longest)) <= set(more)


@pytest.mark.parametrize("kind", [True, {}, {"type": "integer"}, {"enum": ["integer", "string"]}])
def test_a_property_may_be_called_type(kind: object) -> None:
    schema = {"type": "object", "properties": {"type": kind, "format": {"type": "string"}}}
    assert problem_of(t.Grammar(t.GrammarKind.JSON_SCHEMA, json.dumps(schema))) == ""


@pytest.mark.parametrize("rest", [{"minimum": 0, "maximum": 10}, {"multipleOf": 10}, {"enum": [1, 20]}])
def test_an_integer_may_be_bounded_elsewhere(rest: dict[str, object]) -> None:
    schema = {"allOf": [{"type": "integer"}, rest]}
    assert problem_of(t.Grammar(t.GrammarKind.JSON_SCHEMA, json.dumps(schema))) == ""


def test_a_grammar_that_costs_too_much_is_refused() -> None:
    assert verdict(CHOICE, most_s=60) == ""
    assert verdict(CHOICE, most_s=0) == "it takes too much time to compile"


@pytest.mark.parametrize("text", ["[1", "[" * 100_000, "3", '{"pattern": "("}'])
def test_a_bad_grammar_that_nobody_looked_at_fails_alone(vocabulary: Vocabulary, text: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        vocabulary.constraint(t.Grammar(t.GrammarKind.JSON_SCHEMA, text), [END])


@pytest.mark.parametrize("depth", [200, 600, 3000])
def test_a_schema_that_is_nested_too_deeply_is_refused(depth: int) -> None:
    schema = '{"items":' * depth + "{}" + "}" * depth
    assert problem_of(t.Grammar(t.GrammarKind.JSON_SCHEMA, schema))
    assert not problem_of(t.Grammar(t.GrammarKind.JSON_SCHEMA, json.dumps({"items": {"items": {}}})))
