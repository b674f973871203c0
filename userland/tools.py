"""Tools: functions that a model may ask its caller to call.

A request's tools are a `Toolbox`. It writes them into the conversation where the model's chat template does
not, makes the grammar that holds the model to calls that match their schemas, and reads the calls out of the
answer, piece by piece. What tools are (a list of OpenAI's function objects), calls and results in messages
(`tool_calls`, role `tool`) has OpenAI's shape, as chat templates expect it.

How a call is written differs between models; FORMATS lists what is known. A model that was not trained to
call tools writes Hermes's format, because the grammar leaves it no other.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .generation import Options
from .structured import grammar_of
from .tokenizer import overlap

MOST_TOOLS = 128
MOST_CALLS = 16
"""Calls in one answer."""

_LONGEST_NAME = 128
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{_LONGEST_NAME}}}\Z")

# Models write JSON as Python does; a choice of spaces only gives a small model more to go wrong.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Format:
    """How models write calls: `begin`, {"name": "…", "`key`": {…}} and `end`; `between` calls, if there may
    be several. A chat template that holds all `marks` and none of `others` teaches it."""

    name: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    begin: str
    key: str
    end: str
    between: str | None

    @property
    def head(self) -> str:
        return self.begin + '{"name": "'

    @property
    def middle(self) -> str:
        return f'", "{self.key}": '

    @property
    def tail(self) -> str:
        return "}" + self.end

    def taught_by(self, template: str) -> bool:
        """Whether the chat template says so; it may still be deaf to tools."""
        return all(m in template for m in self.marks) and not any(o in template for o in self.others)


HERMES = Format(
    "hermes",  # Qwen 2.5 and 3, Hermes 2 and 3, and many that were trained on their data
    ("<tool_call>", "<function-name>"),
    ("<function=",),  # Qwen's coders write XML
    begin="<tool_call>\n",
    key="arguments",
    end="\n</tool_call>",
    between="\n",
)
LLAMA = Format(
    "llama3_json",  # Llama 3.1 to 3.3; the answer is a call if it begins like one, and only one
    ('"parameters": dictionary of argument name',),
    (),
    begin="",
    key="parameters",
    end="",
    between=None,
)
FORMATS = (HERMES, LLAMA)

_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: `parameters` is the JSON schema of its arguments, an object. `strict`: a schema with
    keywords that the grammar cannot hold to is refused, else they are passed over."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise errors.InvalidArgument(
                f"a tool's name is 1 to {_LONGEST_NAME} letters, digits, '_', '-' and '.', not {self.name!r}",
                field="tools",
            )
        if self.parameters.get("type", "object") != "object":
            raise errors.InvalidArgument(
                f"the parameters of the tool {self.name} are not an object", field="tools"
            )

    @classmethod
    def from_openai(cls, given: Any) -> Tool:
        """From {"type": "function", "function": {"name", "description", "parameters", "strict"}}, or with
        all in one object, as the Responses API has it."""
        function = given.get("function", given) if isinstance(given, Mapping) else None
        if not isinstance(function, Mapping) or given.get("type", "function") != "function":
            raise errors.InvalidArgument(
                "a tool has to be a function",
                hint='{"type": "function", "function": {"name": …, "parameters": {…}}}',
                field="tools",
            )
        name, description = function.get("name"), function.get("description") or ""
        parameters, strict = function.get("parameters") or {}, function.get("strict") or False
        if not isinstance(name, str) or not isinstance(description, str):
            raise errors.InvalidArgument("a tool's name and description are texts", field="tools")
        if not isinstance(parameters, Mapping) or not isinstance(strict, bool):
            raise errors.InvalidArgument(
                f"the tool {name}: parameters is a JSON schema, strict true or false", field="tools"
            )
        return cls(name, description, parameters, strict)

    def shown(self) -> dict[str, Any]:
        """As templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def schema(self) -> dict[str, Any]:
        """What the arguments have to match, in the words of the grammar's engine."""
        schema = {"type": "object", **self.parameters}
        combined = {"anyOf", "allOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties"}
        if "additionalProperties" not in schema and not combined & schema.keys():
            # Arguments that the schema does not name match, too, but no function takes them.
            schema["additionalProperties"] = False
            schema.setdefault("properties", {})
        schema["x-guidance"] = {**_SPACING, "lenient": not self.strict}
        return schema


@dataclass(frozen=True, slots=True)
class Call:
    """What a model wants to be called. `arguments` is JSON; one that was cut off is not whole."""

    id: str
    name: str
    arguments: str

    def shown(self) -> dict[str, Any]:
        """As an entry of OpenAI's `tool_calls`."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True)
class Begun:
    """Call `index` of the answer has begun."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments of call `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The arguments of call `index` are whole."""

    index: int


Piece = str | Begun | Arguments | Ended


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request.

    `only` are the names of those that may be called (None: all). `required`: the answer is calls and nothing
    else, else the model may answer in words. `parallel`: several calls in one answer.
    """

    tools: Sequence[Tool]
    only: frozenset[str] | None = None
    required: bool = False
    parallel: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if not names or len(names) > MOST_TOOLS:
            raise errors.InvalidArgument(f"1 to {MOST_TOOLS} tools, not {len(names)}", field="tools")
        if twice := {name for name in names if names.count(name) > 1}:
            raise errors.InvalidArgument(f"more than one tool has the name {min(twice)!r}", field="tools")
        if self.only is not None and (missing := self.only - set(names)):
            raise errors.InvalidArgument(f"no tool has the name {min(missing)!r}", field="tool_choice")

    @classmethod
    def from_openai(
        cls, tools: Sequence[Any] | None, choice: Any = None, parallel: bool = True
    ) -> Toolbox | None:
        """From `tools`, `tool_choice` and `parallel_tool_calls` of OpenAI. None: nothing may be called,
        and the model is not told of the tools. Raises InvalidArgument."""
        only, mode = None, "auto" if choice is None else choice
        if isinstance(choice, Mapping):
            mode = "required"
            wanted: Any = [choice]
            if choice.get("type") == "allowed_tools":
                inner = choice.get("allowed_tools", choice)
                mode, wanted = inner.get("mode"), inner.get("tools")
            only = frozenset(_name_of(one) for one in wanted)
        if mode not in ("none", "auto", "required"):
            raise errors.InvalidArgument(
                "tool_choice is none, auto, required, or an object that names a function", field="tool_choice"
            )
        if not tools and mode == "required":
            raise errors.InvalidArgument("tool_choice needs tools", field="tool_choice")
        if not tools or mode == "none":
            return None
        known = [tool if isinstance(tool, Tool) else Tool.from_openai(tool) for tool in tools]
        return cls(known, only, mode == "required", parallel)

    @property
    def callable(self) -> list[Tool]:
        return [tool for tool in self.tools if self.only is None or tool.name in self.only]

    def applied(self, options: Options, form: Format) -> Options:
        """`options` with the grammar of the tools; what they ask for themselves, words have to match. Raises
        InvalidArgument."""
        words = grammar_of(options.get("response_format"), options.get("structured_outputs"))
        grammar = self.grammar(form, words)
        return {**options, "response_format": None, "structured_outputs": grammar}

    def grammar(self, form: Format, answer: t.Grammar | None = None) -> t.Grammar:
        """What answers of a model that calls in this form have to match; what is no call `answer`, if given.
        Raises InvalidArgument."""
        if answer is not None and answer.kind is not t.GrammarKind.JSON_SCHEMA:
            raise errors.InvalidArgument(
                "only JSON goes together with tools",
                hint="leave out the tools, or tool_choice none",
                field="structured_outputs",
            )
        try:
            schema = json.loads(answer.text) if answer else None
            if answer is not None and not isinstance(schema, dict):
                raise ValueError
            text = self._lark(form, schema)
            return msgspec.convert({"kind": t.GrammarKind.LARK, "text": text}, t.Grammar)
        except (msgspec.ValidationError, RecursionError):
            raise errors.InvalidArgument("the schemas of the tools are too big", field="tools") from None
        except ValueError:
            raise errors.InvalidArgument(
                "a JSON schema is an object", field="structured_outputs.json"
            ) from None

    def _lark(self, form: Format, answer: Mapping[str, Any] | None) -> str:
        trigger = form.begin.strip()
        names = [f"call_{number}" for number in range(len(self.callable))]
        opening, words = _quoted(trigger) if trigger else "", []
        if not self.required and answer is not None:
            words = [f"words: %json {json.dumps({**answer, 'x-guidance': _SPACING})}"]
        elif not self.required and trigger:
            # In words, a call begins wherever its first mark stands.
            opening = "opening"
            words = ["words: WORDS", "WORDS: /(.|\\n)*/", f"opening[lazy]: WORDS {_quoted(trigger)}"]
        elif not self.required:
            words = ["words: WORDS", "WORDS: /([^{](.|\\n)*)?/"]
        several = self.parallel and form.between is not None
        lines = [
            "%llguidance {}",
            "start: words | calls" if words else "start: calls",
            *words,
            f"calls: {opening} call more{{0,{MOST_CALLS - 1}}}" if several else f"calls: {opening} call",
            *([f"more: {_quoted((form.between or '') + trigger)} call"] if several else []),
            f"call: {_quoted(form.head.removeprefix(trigger))} ({' | '.join(names)}) {_quoted(form.tail)}",
            *(
                f"{name}: {_quoted(tool.name + form.middle)} %json {json.dumps(tool.schema())}"
                for name, tool in zip(names, self.callable, strict=True)
            ),
        ]
        return "\n".join(lines) + "\n"

    def reader(self, form: Format, prefix: str = "call_") -> CallReader:
        """For an answer of a model that calls in this form; ids of calls begin with `prefix`."""
        return CallReader(form, {tool.name for tool in self.tools}, prefix)


class CallReader:
    """Tells calls from words while an answer comes.

    It knows the one way of writing a call that the grammar admits, and takes everything else for words. White
    space before a call is dropped.
    """

    def __init__(self, form: Format, names: set[str], prefix: str) -> None:
        self._form, self._names, self._prefix = form, names, prefix
        self._rest = ""  # what came and has not been understood
        self._state: Callable[[], Iterator[Piece]] = self._words
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls: list[Call] = []
        """So far. All have come whole when `whole`."""
        self.content = ""

    @property
    def whole(self) -> bool:
        """Whether there are calls, and none is cut off."""
        return bool(self.calls) and self._state not in (self._name, self._arguments)

    def feed(self, piece: str) -> list[Piece]:
        """What is certain now: words, and calls in pieces."""
        self._rest += piece
        found: list[Piece] = []
        while True:
            before = (self._state, len(self._rest))
            found += self._state()
            if before == (self._state, len(self._rest)):
                return found

    def flush(self, *, cut: bool = False) -> list[Piece]:
        """The end: what was held back are words, unless it is the end of a call, or the beginning of one that
        was `cut` off."""
        words = ""
        if self._state == self._words and not (cut and overlap(self._rest, self._form.head)):
            words = self._rest
        elif self._state == self._name and not cut:
            words = self._form.head + self._rest
        self._rest = ""
        return [] if self.calls and not words.strip() else [*self._said(words)]

    def _words(self) -> Iterator[Piece]:
        head, anywhere = self._form.head, bool(self._form.begin)
        at = self._rest.find(head)
        if at == 0 or (at > 0 and anywhere):
            words, self._rest = self._rest[:at].rstrip(), self._rest[at + len(head) :]
            self._state = self._name
        elif anywhere:
            words = self._rest[: len(self._rest) - overlap(self._rest, head)].rstrip()
            self._rest = self._rest[len(words) :]
        elif head.startswith(self._rest):
            words = ""
        else:
            words, self._rest = self._rest, ""
            self._state = self._only_words
        yield from self._said(words)

    def _only_words(self) -> Iterator[Piece]:
        """In formats in which a call begins the answer."""
        words, self._rest = self._rest, ""
        yield from self._said(words)

    def _said(self, words: str) -> Iterator[Piece]:
        if words:
            self.content += words
            yield words

    def _name(self) -> Iterator[Piece]:
        name, found, rest = self._rest.partition(self._form.middle)
        if not found and len(self._rest) <= _LONGEST_NAME + len(self._form.middle):
            return
        self._rest = rest
        if name not in self._names:
            self._state = self._words
            yield from self._said(self._form.head + name + found)
            return
        call = Call(f"{self._prefix}{uuid.uuid4().hex[:24]}", name, "")
        self.calls.append(call)
        self._state = self._arguments
        self._depth, self._quoted, self._escaped = 0, False, False
        yield Begun(len(self.calls) - 1, call.id, name)

    def _arguments(self) -> Iterator[Piece]:
        """Arguments are an object: they end with its last brace."""
        size, ended = len(self._rest), False
        for at, char in enumerate(self._rest):
            if self._quoted:
                self._quoted = char != '"' or self._escaped
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    size, ended = at + 1, True
                    break
        piece, self._rest = self._rest[:size], self._rest[size:]
        index = len(self.calls) - 1
        if piece:
            call = self.calls[index]
            self.calls[index] = Call(call.id, call.name, call.arguments + piece)
            yield Arguments(index, piece)
        if ended:
            self._state = self._end
            yield Ended(index)

    def _end(self) -> Iterator[Piece]:
        tail = self._form.tail
        if not tail.startswith(self._rest) or self._rest == tail:
            self._rest = self._rest.removeprefix(tail)
            self._state = self._words if self._form.begin else self._only_words
        yield from ()


def in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation for a template that knows of no tools, which are as `Tool.shown` shows them.

    They are listed at the end of the system message, calls are written into the assistant's text in Hermes's
    format, and results into the user's, as <tool_response>, those that follow each other into one message.
    """
    written: list[dict[str, Any]] = []
    results: list[str] | None = None
    for message in messages:
        if message["role"] == "tool":
            if results is None:
                results = []
                written.append({"role": "user", "content": ""})
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            written[-1]["content"] = "\n".join(results)
            continue
        results = None
        made = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls := message.get("tool_calls"):
            said = [message["content"]] if message["content"] else []
            made["content"] = "\n".join([*said, *map(_in_hermes, calls)])
        written.append(made)
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _INSTRUCTIONS.format(tools=listed)
        if written and written[0]["role"] == "system":
            written[0]["content"] = f"{written[0]['content']}\n\n{text}".lstrip()
        else:
            written.insert(0, {"role": "system", "content": text})
    return written


def _in_hermes(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{HERMES.begin}{{"name": {name}, "{HERMES.key}": {arguments}{HERMES.tail}'


def _name_of(choice: Any) -> str:
    """Of {"type": "function", "function": {"name": …}}, or the same in one object."""
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise errors.InvalidArgument(
            "tool_choice names no function",
            hint='{"type": "function", "function": {"name": …}}',
            field="tool_choice",
        )
    return name


def _quoted(text: str) -> str:
    """A literal of the grammar."""
    return json.dumps(text)
