"""What an answer has to look like, as people say it: OpenAI's `response_format`, vLLM's `structured_outputs`,
a pydantic model. Becomes a Grammar. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

ANY_OBJECT = '{"type":"object"}'

_KINDS = {
    "json": t.GrammarKind.JSON_SCHEMA,
    "json_object": t.GrammarKind.JSON_SCHEMA,
    "regex": t.GrammarKind.REGEX,
    "choice": t.GrammarKind.CHOICE,
    "grammar": t.GrammarKind.LARK,
}
"""The names of `structured_outputs`."""


def grammar_of(
    response_format: Any = None, structured_outputs: Mapping[str, Any] | t.Grammar | None = None
) -> t.Grammar | None:
    """The grammar that either asks for, or is; None: none. Raises InvalidArgument naming the field."""
    if response_format is not None and structured_outputs is not None:
        raise _invalid("structured_outputs", "either response_format or structured_outputs")
    if isinstance(structured_outputs, t.Grammar):
        return structured_outputs
    if structured_outputs is not None:
        return _from_outputs(structured_outputs)
    if response_format is None:
        return None
    if hasattr(response_format, "model_json_schema"):  # a pydantic model
        return json_schema(response_format.model_json_schema(), "response_format")
    if not isinstance(response_format, Mapping):
        raise _invalid("response_format", 'an object like {"type": "json_schema", …}, or a pydantic model')
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return _checked(t.GrammarKind.JSON_SCHEMA, ANY_OBJECT, "response_format")
        case "json_schema":
            inner = response_format.get("json_schema", response_format)
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if schema is None:
                raise _invalid("response_format.json_schema", "the schema is missing")
            return json_schema(schema, "response_format.json_schema.schema")
        case other:
            raise _invalid("response_format.type", f"{other!r} is none of text, json_object, json_schema")


def _from_outputs(wanted: Mapping[str, Any]) -> t.Grammar:
    if not isinstance(wanted, Mapping):
        raise _invalid("structured_outputs", f"an object with one of {', '.join(_KINDS)}")
    given = {name: value for name, value in wanted.items() if value is not None and value is not False}
    if unknown := given.keys() - _KINDS.keys():
        raise _invalid("structured_outputs", f"there is no {sorted(unknown)[0]!r}, only {', '.join(_KINDS)}")
    if len(given) != 1:
        raise _invalid("structured_outputs", f"one of {', '.join(_KINDS)}")
    ((name, value),) = given.items()
    field = f"structured_outputs.{name}"
    match name:
        case "json":
            return json_schema(value, field)
        case "json_object":
            return _checked(t.GrammarKind.JSON_SCHEMA, ANY_OBJECT, field)
        case "choice":
            if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
                raise _invalid(field, "a list of strings")
            return _checked(t.GrammarKind.CHOICE, json.dumps(list(value)), field)
    if not isinstance(value, str):
        raise _invalid(field, "a string")
    return _checked(_KINDS[name], value, field)


def json_schema(schema: Any, field: str) -> t.Grammar:
    """The grammar of JSON texts that match `schema`: an object, or its JSON. Raises InvalidArgument."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, separators=(",", ":"))
    except (TypeError, ValueError) as problem:
        raise _invalid(field, f"it is no JSON: {problem}") from None
    return _checked(t.GrammarKind.JSON_SCHEMA, text, field)


def _checked(kind: t.GrammarKind, text: str, field: str) -> t.Grammar:
    try:
        return msgspec.convert({"kind": kind, "text": text}, t.Grammar)
    except msgspec.ValidationError:
        raise _invalid(field, f"it is empty or longer than 32768 characters ({len(text)})") from None


def _invalid(field: str, problem: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"{field}: {problem}", field=field)
