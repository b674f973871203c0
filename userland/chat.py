"""Chat templates: messages become the text a model was trained on.

What people write in messages must not become control tokens, however the template cuts, strips or joins it:
before rendering (template.py), the first and last two characters of every special token are replaced in all
strings of the messages by private characters; after rendering these mark the untrusted text, which is encoded
as plain text (`Tokenizer.encode_parts`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmasos.syscalls import errors

from .template import run
from .tokenizer import Part, Tokenizer
from .tools import FORMATS, HERMES, Format, Tool, in_words

Message = Mapping[str, Any]

# Bounds of a rendering, in characters.
_OUTPUT_FACTOR = 4
_OUTPUT_FLOOR = 64 * 1024

_DEEPEST = 128
"""Levels of lists and objects in messages and tools."""

# Planes 15 and 16 of Unicode are private use; people's own characters from there are shielded too.
_PRIVATE_FIRST = 0xF0000
_PRIVATE_LAST = 0x10FFFD
_PRIVATE = re.compile(f"[{chr(_PRIVATE_FIRST)}-{chr(0x10FFFF)}]")


def as_messages(messages: str | Sequence[Message]) -> list[dict[str, Any]]:
    """Checked messages; a lone string is what the user says. Raises InvalidArgument naming the place.

    All values are strings, except for `tool_calls` of the assistant: there, arguments that are the text of a
    JSON object become the object, as templates want them. With tool_calls, the content may be missing.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise errors.InvalidArgument(
            f"messages are a list, or a str that the user says, not {type(messages).__name__}",
            field="messages",
        )
    checked = []
    for place, message in enumerate(messages):
        at = f"messages[{place}]"
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not {"role", "content"} <= (
            message.keys() | ({"content"} if calls else set())
        ):
            raise errors.InvalidArgument(f"message {place} needs a role and a content", field=at)
        made = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls:
            made["content"] = made.get("content") or ""
        for key, value in made.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise errors.InvalidArgument(f"message {place}: {key} must be a string", field=f"{at}.{key}")
        if calls:
            made["tool_calls"] = _calls(calls, f"{at}.tool_calls")
        checked.append(made)
    if not checked:
        raise errors.InvalidArgument("no messages", field="messages")
    return checked


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    made = []
    for call in calls if isinstance(calls, (list, tuple)) else [None]:
        call = call if isinstance(call, Mapping) else {}
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise errors.InvalidArgument("a tool call needs a function with a name", field=place)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                parsed = json.loads(arguments or "{}")
                arguments = parsed if isinstance(parsed, dict) else arguments
        elif not isinstance(arguments, Mapping):
            raise errors.InvalidArgument("a tool call's arguments are an object, or its text", field=place)
        made.append(
            {
                "id": str(call.get("id") or ""),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return made


def encode_chat(
    tokenizer: Tokenizer,
    messages: str | Sequence[Message],
    *,
    model: str = "",
    tools: Sequence[Tool] = (),
    answer: bool = True,
    continue_final_message: bool = False,
    most: int | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the model's answer if `answer`; it is told of `tools`.
    `continue_final_message`: if the assistant has said something last, the answer goes on with it. `most` is
    as of `Tokenizer.encode`.

    Raises UnsupportedModel when the model has no chat template, InvalidArgument when the template refuses
    the messages (for example their order).
    """
    begun = ""
    if continue_final_message and not isinstance(messages, str) and len(messages) > 1:
        last = messages[-1]
        if last.get("role") == "assistant" and not last.get("tool_calls"):
            messages, begun = messages[:-1], last["content"]
    parts = render(tokenizer, messages, model=model, tools=tools, answer=answer)
    return [*tokenizer.encode_parts(parts, most), *tokenizer.encode(begun, start=False, most=most)]


def render(
    tokenizer: Tokenizer,
    messages: str | Sequence[Message],
    *,
    model: str = "",
    tools: Sequence[Tool] = (),
    answer: bool = True,
) -> list[Part]:
    """The conversation as the template writes it: its own words trusted, the messages' and tools' not."""
    checked = as_messages(messages)
    if not tokenizer.template:
        tokenizer.check_generates(model)
        raise errors.UnsupportedModel(
            f"{model or 'the model'} has no chat template: it was not trained to chat",
            hint="it continues texts: generate() in Python, `llsh run`, /v1/completions; "
            "or use an instruct model such as smollm2",
        )
    shield = _Shield(tokenizer.special.values())
    shielded = shield.cover(checked)
    shown = shield.cover([tool.shown() for tool in tools]) or None
    if _taught(tokenizer.template) is None:
        shielded, shown = in_words(shielded, shown or []), None
    variables = {
        "messages": shielded,
        "add_generation_prompt": answer,
        "tools": shown,
        "documents": None,
        **{name: tokenizer.token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    }
    limit = _OUTPUT_FACTOR * (shield.covered + len(tokenizer.template)) + _OUTPUT_FLOOR
    return shield.uncover(run(tokenizer.template, variables, limit))


def call_format(template: str) -> Format:
    """How a model with this chat template writes calls of tools."""
    return _taught(template) or HERMES


@functools.lru_cache(maxsize=64)
def _taught(template: str) -> Format | None:
    """The format of calls that the template teaches when it is given tools. None if it does not listen, or
    teaches one that is not known here: then the tools are told of in words."""
    form = next((form for form in FORMATS if form.taught_by(template)), None)
    probe = Tool("probe-of-tools")
    variables = {
        "messages": [{"role": "user", "content": ""}],
        "add_generation_prompt": True,
        "tools": [probe.shown()],
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), ""),
    }
    try:
        return form if form is not None and probe.name in run(template, variables, _OUTPUT_FLOOR) else None
    except errors.InvalidArgument:
        return None


class _Shield:
    """Replaces what could become part of a special token by single private characters, and back."""

    def __init__(self, specials: Iterable[str]) -> None:
        edges = {edge for special in specials if special for edge in (special[:2], special[-2:])}
        longest_first = sorted(edges, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), _PRIVATE.pattern]))
        self._marks: dict[str, str] = {}
        self.covered = 0
        """Characters so far."""

    def cover(self, value: Any, depth: int = 0) -> Any:
        """A text, or the same JSON value with all its texts covered."""
        if depth > _DEEPEST:
            raise errors.InvalidArgument("messages or tools are nested too deeply", field="messages")
        match value:
            case str():
                self.covered += len(value)
                return self._pattern.sub(lambda match: self._mark(match.group()), value)
            case Mapping():
                return {self.cover(k): self.cover(inner, depth + 1) for k, inner in value.items()}
            case list() | tuple():
                return [self.cover(inner, depth + 1) for inner in value]
        return value

    def uncover(self, text: str) -> list[Part]:
        """Text with the marks turned back: each is an untrusted part, the rest trusted."""
        covered = {mark: fragment for fragment, mark in self._marks.items()}
        parts: list[Part] = []
        for piece in re.split(f"({_PRIVATE.pattern})", text):
            if piece:
                parts.append(Part(covered.get(piece, piece), piece not in covered))
        return parts

    def _mark(self, fragment: str) -> str:
        if (mark := self._marks.get(fragment)) is None:
            code = _PRIVATE_FIRST + len(self._marks)
            if code > _PRIVATE_LAST:
                raise errors.InvalidArgument("too many private Unicode characters", field="messages")
            mark = self._marks[fragment] = chr(code)
        return mark
