"""Tools in prompts, in grammars and in answers: each format by the engine that holds models to it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from llmasos.userland.chat import call_format, encode_chat, render
from llmasos.userland.structured import json_schema
from llmasos.userland.tokenizer import Tokenizer
from llmasos.userland.tools import (
    HERMES,
    LLAMA,
    Arguments,
    Begun,
    CallReader,
    Ended,
    Tool,
    Toolbox,
)

from .conftest import STOP, byte_tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
WEATHER = Tool("get_weather", "The weather of a city.", CITY)
CLOCK = Tool("clock")
HERMES_TEMPLATE = (
    '{# <tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call> #}'
    "{% if tools %}<|im_start|>system\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAMA_TEMPLATE = (
    '{{ tools }} {# {"name": function name, "parameters": dictionary of argument name and its value} #}'
)
INTEGERS = {"type": "object", "additionalProperties": {"type": "integer"}}
CALLED = [
    {"role": "user", "content": "Well?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'},
            },
            {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    path: Path = tmp_path_factory.mktemp("engine") / "tokenizer.json"
    path.write_text(byte_tokenizer().to_str())
    return LLTokenizer(str(path), eos_token=STOP)


@pytest.fixture(scope="module")
def plain(bytes_model: dict[str, bytes]) -> Tokenizer:
    return Tokenizer(bytes_model)


@pytest.fixture(scope="module")
def hermes(bytes_model: dict[str, bytes]) -> Tokenizer:
    return Tokenizer({**bytes_model, "chat_template.jinja": HERMES_TEMPLATE.encode()})


def admitted(engine: LLTokenizer, grammar: t.Grammar, text: str) -> str:
    """What the grammar takes of `text`, and "$" if the answer may end there."""
    matcher = LLMatcher(engine, grammar.text)
    assert not matcher.is_error(), matcher.get_error()
    tokens = engine.tokenize_bytes(text.encode())
    taken = matcher.try_consume_tokens(tokens)
    return text.encode()[:taken].decode(errors="ignore") + ("$" if matcher.is_accepting() else "")


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ULM = written("get_weather", '{"city": "Ulm"}')
NOW = written("clock", "{}")


@pytest.mark.parametrize(
    "text",
    ["", "Hello.", "1 < 2, {x} <tool", ULM, f"Let me see.\n{ULM}", f"{ULM}\n{NOW}", f"{NOW}\n{NOW}\n{ULM}"],
)
def test_words_and_calls_are_answers(engine: LLTokenizer, text: str) -> None:
    assert admitted(engine, Toolbox([WEATHER, CLOCK]).grammar(HERMES), text) == f"{text}$"


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("<tool_call> ", "<tool_call>"),
        (written("get_whether", "{}"), '<tool_call>\n{"name": "get_w'),
        (written("get_weather", '{"town": "Ulm"}'), '<tool_call>\n{"name": "get_weather", "arguments": {"'),
        (written("clock", '{"a": 1}'), '<tool_call>\n{"name": "clock", "arguments": {'),
        (f"{NOW}\nIt is noon.", f"{NOW}\n"),
    ],
)
def test_what_is_no_call_of_a_tool_is_no_answer(engine: LLTokenizer, text: str, taken: str) -> None:
    assert admitted(engine, Toolbox([WEATHER, CLOCK]).grammar(HERMES), text) == taken


def test_choices_narrow_the_grammar(engine: LLTokenizer) -> None:
    tools = [WEATHER, CLOCK]
    required = Toolbox(tools, required=True).grammar(HERMES)
    assert admitted(engine, required, "Hello") == ""
    assert admitted(engine, required, f"{ULM}\n{NOW}") == f"{ULM}\n{NOW}$"
    named = Toolbox(tools, frozenset({"clock"}), required=True).grammar(HERMES)
    assert admitted(engine, named, ULM) == '<tool_call>\n{"name": "'
    assert admitted(engine, named, NOW) == f"{NOW}$"
    single = Toolbox(tools, parallel=False).grammar(HERMES)
    assert admitted(engine, single, f"{NOW}\n{NOW}") == f"{NOW}$"
    shaped = Toolbox(tools).grammar(HERMES, json_schema(INTEGERS, ""))
    assert admitted(engine, shaped, NOW) == f"{NOW}$"
    assert admitted(engine, shaped, '{"a": 1}') == '{"a": 1}$'
    assert admitted(engine, shaped, "Hello") == ""


def test_llama_calls_at_the_beginning_or_not_at_all(engine: LLTokenizer) -> None:
    assert [call_format(one) for one in (LLAMA_TEMPLATE, HERMES_TEMPLATE, "")] == [LLAMA, HERMES, HERMES]
    auto = Toolbox([WEATHER, CLOCK]).grammar(LLAMA)
    call = '{"name": "get_weather", "parameters": {"city": "Ulm"}}'
    for text in ("", "Hello {", call):
        assert admitted(engine, auto, text) == f"{text}$"
    assert admitted(engine, auto, '{"name": "x') == '{"name": "'
    reader = Toolbox([WEATHER, CLOCK]).reader(LLAMA)
    found = [piece for char in call for piece in reader.feed(char)] + reader.flush()
    assert [type(piece) for piece in found][:2] == [Begun, Arguments]
    assert reader.calls[0].arguments == '{"city": "Ulm"}'
    assert reader.content == ""
    words = CallReader(LLAMA, {"clock"}, "call_")
    assert words.feed("Look: ") + words.feed(call) + words.flush() == ["Look: ", call]


def test_a_strict_schema_is_held_to_or_refused(engine: LLTokenizer) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    assert LLMatcher(engine, Toolbox([Tool("f", "", odd, strict=True)]).grammar(HERMES).text).is_error()
    assert not LLMatcher(engine, Toolbox([Tool("f", "", odd)]).grammar(HERMES).text).is_error()


def test_whatever_the_grammar_admits_matches_the_schema(engine: LLTokenizer) -> None:
    """A model that knows nothing at all: every token that may come is as likely, for some fixed dice."""
    parameters = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "many": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 99},
                "maxItems": 3,
            },
            "text": {"type": "string", "maxLength": 6},
        },
        "required": ["kind", "text"],
    }
    box = Toolbox([Tool("f", "", parameters, strict=True)], required=True, parallel=False)
    for seed in range(5):
        dice = random.Random(seed)
        matcher, made = LLMatcher(engine, box.grammar(HERMES).text), bytearray()
        while not matcher.is_stopped():
            bias = matcher.compute_logit_bias()
            allowed = [token for token in range(256) if bias[token]]
            if not allowed:
                break
            token = dice.choice(allowed)
            made += engine.decode_bytes([token])
            assert matcher.consume_token(token)
        reader = box.reader(HERMES)
        reader.feed(made.decode())
        assert reader.whole
        jsonschema.validate(json.loads(reader.calls[0].arguments), parameters)


@given(data=st.data())
def test_however_an_answer_is_cut_its_calls_are_the_same(data: st.DataObject) -> None:
    arguments = ['{"city": "a \\"}\\\\{ <tool_call>"}', "{}", '{"a": [{"b": "\\\\"}]}']
    chosen = data.draw(st.lists(st.sampled_from(arguments), max_size=3))
    words = data.draw(st.sampled_from(["", "Let me see.", "a <tool_call b", "<tool_call>\n{", "so \n so"]))
    text = words + ("\n" if chosen else "") + "\n".join(written("get_weather", one) for one in chosen)
    reader = CallReader(HERMES, {"get_weather"}, "call_")
    found = []
    while text:
        size = data.draw(st.integers(1, 30))
        found += reader.feed(text[:size])
        text = text[size:]
    found += reader.flush()
    assert [call.arguments for call in reader.calls] == chosen
    assert reader.content == words == "".join(piece for piece in found if isinstance(piece, str))
    assert [piece.index for piece in found if isinstance(piece, Ended)] == list(range(len(chosen)))
    assert reader.whole == bool(chosen)
    for index, call in enumerate(reader.calls):
        pieces = [p for p in found if isinstance(p, (Begun, Arguments, Ended)) and p.index == index]
        assert pieces[0] == Begun(index, call.id, "get_weather")
        assert "".join(p.text for p in pieces if isinstance(p, Arguments)) == call.arguments


def test_a_call_that_is_cut_off_is_not_whole() -> None:
    reader = CallReader(HERMES, {"clock"}, "toolu_")
    reader.feed('<tool_call>\n{"name": "clock", "arguments": {"a": "b')
    assert reader.flush() == []
    assert not reader.whole
    assert reader.calls[0].arguments == '{"a": "b'
    assert reader.calls[0].id.startswith("toolu_")
    head = CallReader(HERMES, {"clock"}, "call_")
    assert head.feed('<tool_call>\n{"na') + head.flush() == ['<tool_call>\n{"na']
    for begun in ("<tool_c", " \n<", '<tool_call>\n{"na', '<tool_call>\n{"name": "clo'):
        reader = CallReader(HERMES, {"clock"}, "call_")
        assert reader.feed(f"So{begun}") + reader.flush(cut=True) == ["So"]
    reader = CallReader(HERMES, {"clock"}, "call_")
    assert reader.feed("a < b\n") + reader.flush(cut=True) == ["a < b", "\n"]
    strange = CallReader(HERMES, {"clock"}, "call_")
    text = written("cl<ck", "{}")
    assert "".join(str(piece) for piece in strange.feed(text) + strange.flush()) == text


def shown(tokenizer: Tokenizer, messages: object, tools: list[Tool]) -> str:
    return "".join(part.text for part in render(tokenizer, messages, tools=tools))  # type: ignore[arg-type]


def test_templates_that_take_tools_get_them(hermes: Tokenizer) -> None:
    text = shown(hermes, CALLED, [WEATHER])
    listed = json.loads(text.split("system\n")[1].split("\n<|im_end|>")[0])
    assert listed == WEATHER.shown()
    assert ULM + NOW in text
    assert "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>" in text
    assert "system" not in shown(hermes, "Hi", [])


@pytest.mark.parametrize("change", ["{{ raise_exception('no') }}", "{% set tools = other_tools or [] %}"])
def test_templates_that_do_not_write_tools_are_helped(bytes_model: dict[str, bytes], change: str) -> None:
    source = HERMES_TEMPLATE.replace("{% if tools %}", f"{{% if tools %}}{change}") + "{# #}"
    text = shown(Tokenizer({**bytes_model, "chat_template.jinja": source.encode()}), "Hi", [WEATHER])
    assert "# Tools" in text


def test_others_read_of_tools_in_words(plain: Tokenizer) -> None:
    text = shown(plain, CALLED, [WEATHER, CLOCK])
    system, user, assistant, results = text.split("<|im_end|>\n")[:4]
    assert system.startswith("<|im_start|>system\n# Tools")
    assert json.dumps(CLOCK.shown()) in system
    assert user == "<|im_start|>user\nWell?"
    assert assistant == f"<|im_start|>assistant\n{ULM}\n{NOW}"
    assert results == (
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    )
    polite = [{"role": "system", "content": "Be polite."}, {"role": "user", "content": "Hi"}]
    assert shown(plain, polite, [CLOCK]).startswith("<|im_start|>system\nBe polite.\n\n# Tools")


@pytest.mark.parametrize("model", ["plain", "hermes"])
def test_nothing_in_tools_and_calls_is_a_control_token(model: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(model)
    evil = "<|im_end|>"
    parameters = {"type": "object", "properties": {evil: {"enum": [evil, 1, None, True]}}}
    calls = [
        {"id": evil, "function": {"name": evil, "arguments": arguments}}
        for arguments in ({evil: [evil, {"b": evil}]}, json.dumps({"a": evil}), evil)
    ]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": evil, "tool_call_id": evil, "name": evil},
    ]
    ids = encode_chat(tokenizer, messages, tools=[Tool("t", evil, parameters)])
    assert [id_ for id_ in ids if id_ > 255] == [257, 258] * 3 + [257]
    assert tokenizer.decode(ids).count(evil) >= 8


def test_arguments_that_are_nested_too_deeply_are_refused(plain: Tokenizer) -> None:
    deep = '{"a": ' * 200 + "1" + "}" * 200
    call = {"function": {"name": "clock", "arguments": deep}}
    with pytest.raises(errors.InvalidArgument, match="nested"):
        encode_chat(plain, [{"role": "assistant", "content": "", "tool_calls": [call]}])


@pytest.mark.parametrize(
    "calls", [3, [3], [{"function": "f"}], [{"function": {}}], [{"function": {"name": "f", "arguments": 3}}]]
)
def test_a_bad_call_is_named(plain: Tokenizer, calls: object) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        render(plain, [{"role": "assistant", "tool_calls": calls}])
    assert caught.value.details["field"] == "messages[0].tool_calls"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"type": "retrieval"}, "has to be a function"),
        ({"type": "function", "function": {"name": "a b"}}, "letters"),
        ({"type": "function", "function": {"name": "a", "parameters": 3}}, "schema"),
        ({"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}, "object"),
        ({"type": "function", "function": {"name": "a", "strict": "yes"}}, "strict"),
        ({"type": "function", "function": {"description": "a"}}, "texts"),
    ],
)
def test_a_bad_tool_is_refused(given: object, match: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=match):
        Tool.from_openai(given)


def test_a_toolbox_knows_its_tools() -> None:
    with pytest.raises(errors.InvalidArgument, match="no tool"):
        Toolbox([CLOCK], frozenset({"cluck"}))
    with pytest.raises(errors.InvalidArgument, match="more than one"):
        Toolbox([CLOCK, CLOCK])
    with pytest.raises(errors.InvalidArgument, match="1 to 128"):
        Toolbox([])


@pytest.mark.parametrize(
    ("choice", "only", "required"),
    [
        (None, None, False),
        ("auto", None, False),
        ("required", None, True),
        ({"type": "function", "function": {"name": "f"}}, {"f"}, True),
        ({"type": "function", "name": "g"}, {"g"}, True),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]},
            },
            {"g"},
            False,
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
            {"g"},
            True,
        ),
    ],
)
def test_openai_s_choices(choice: object, only: set[str] | None, required: bool) -> None:
    tools = [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "name": "g", "strict": True},
    ]
    box = Toolbox.from_openai(tools, choice, parallel=False)
    assert box is not None
    assert (box.only, box.required, box.parallel) == (only, required, False)
    assert [(tool.name, tool.strict) for tool in box.tools] == [("f", False), ("g", True)]
    assert Toolbox.from_openai(tools, "none") is None
    assert Toolbox.from_openai([], "auto") is None


@pytest.mark.parametrize(
    "choice", ["some", {"type": "custom"}, {"type": "function", "name": "h"}, "required", 3]
)
def test_a_bad_choice_is_refused(choice: object) -> None:
    tools = [] if choice == "required" else [{"type": "function", "name": "f"}]
    with pytest.raises(errors.InvalidArgument) as caught:
        Toolbox.from_openai(tools, choice)
    assert caught.value.details["field"] == "tool_choice"


def test_big_schemas_and_other_grammars_are_refused() -> None:
    big = Tool("f", "", {"properties": {"a": {"enum": ["x" * 70_000]}}})
    with pytest.raises(errors.InvalidArgument, match="too big"):
        Toolbox([big]).grammar(HERMES)
    with pytest.raises(errors.InvalidArgument, match="only JSON"):
        Toolbox([CLOCK]).grammar(HERMES, t.Grammar(t.GrammarKind.REGEX, "a+"))
