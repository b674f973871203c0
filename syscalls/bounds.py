"""What a value has to be, in words: msgspec's errors name a type and the one bound that was broken, people
want to know what would be right."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .types import IN_WORDS

_LISTED = re.compile(r"\^\(([\w|]+)\)\$")


def refused(problem: msgspec.ValidationError, kind: type) -> tuple[str, str]:
    """The field of `kind` that a validation error is about, as a path ("" if about all of it), and what it
    must be: ("lora.r", "must be a whole number from 1 to 256")."""
    text, _, path = str(problem).partition(" - at `$.")
    path = path.rstrip("`")
    for pattern, words in IN_WORDS.items():
        if repr(pattern) in text:
            return path, f"is not {words}"
    right = _wanted(_find(msgspec.inspect.type_info(kind), path)) if path else ""
    return path, f"must be {right}" if right else f"is wrong: {text[0].lower()}{text[1:]}"


def wanted(kind: Any) -> str:
    """What a value of a type with its bounds is, like "a whole number from 1 to 256"; "" where there is no
    more to say than its name."""
    return _wanted(msgspec.inspect.type_info(kind))


def _find(found: msgspec.inspect.Type | None, path: str) -> msgspec.inspect.Type | None:
    """The type of what is at `path`, like "sampling.stop_token_ids[0]"."""
    for step in path.replace("[", ".[").split("."):
        match found:
            case msgspec.inspect.StructType():
                found = next((field.type for field in found.fields if field.encode_name == step), None)
            case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
                found = found.item_type
            case _:
                return None
        if isinstance(found, msgspec.inspect.UnionType):  # with None
            found = next(one for one in found.types if not isinstance(one, msgspec.inspect.NoneType))
    return found


def _wanted(kind: msgspec.inspect.Type | None) -> str:
    match kind:
        case msgspec.inspect.EnumType():
            return f"one of {', '.join(str(one.value) for one in kind.cls)}"
        case msgspec.inspect.StrType(pattern=str(pattern)) if listed := _LISTED.fullmatch(pattern):
            return f"one of {', '.join(word for word in listed[1].split('|') if word)}"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            noun = "a whole number" if isinstance(kind, msgspec.inspect.IntType) else "a number"
            if kind.ge is not None and kind.le is not None:
                return f"{noun} from {_shown(kind.ge)} to {_shown(kind.le)}"
            limits = {"above": kind.gt, "at least": kind.ge, "below": kind.lt, "at most": kind.le}
            told = [f"{words} {_shown(limit)}" for words, limit in limits.items() if limit is not None]
            return f"{noun}, {' and '.join(told)}" if told else noun
    return ""


def _shown(limit: float) -> str:
    return str(int(limit)) if limit == int(limit) else str(limit)
