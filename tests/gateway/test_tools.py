"""Tools and structured output through OpenAI's own client. The model knows nothing, so all form is the
gateway's and the grammar's."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest

from .conftest import Gateway

ASK = [{"role": "user", "content": "Well?"}]
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}},
    "required": ["colour", "dark"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "item": {"enum": ["tea", "cake"]},
        "many": {"type": "integer", "minimum": 1, "maximum": 20},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["item", "many"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "paint", "parameters": COLOURS, "strict": True}},
    {"type": "function", "function": {"name": "order", "description": "Orders.", "parameters": ORDER}},
]
SCHEMAS = {"paint": COLOURS, "order": ORDER}


class Colour(pydantic.BaseModel):
    name: Literal["red", "blue"]
    shades: list[Literal["dark", "light"]] = pydantic.Field(max_length=2)


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def ask(**options: Any) -> dict[str, Any]:
    return {"model": "bytes", "messages": ASK, "temperature": 0, "max_tokens": 2600, **options}


def check(calls: Any) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.type == "function" and call.id.startswith("call_") for call in calls)


@pytest.mark.parametrize("seed", range(4))
def test_required_calls_match_their_schemas(ai: openai.OpenAI, seed: int) -> None:
    done = ai.chat.completions.create(
        **ask(tools=TOOLS, tool_choice="required", temperature=1, seed=seed)
    ).choices[0]
    assert done.finish_reason == "tool_calls"
    assert done.message.content is None
    assert done.message.tool_calls
    check(done.message.tool_calls)


def test_a_named_tool_is_called_once(ai: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "paint"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for choice in (named, allowed):
        asked = ask(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=1, n=3, seed=1)
        done = ai.chat.completions.create(**asked)
        for each in done.choices:
            assert each.message.tool_calls is not None
            assert [call.function.name for call in each.message.tool_calls] == ["paint"]
            check(each.message.tool_calls)


def test_calls_may_be_parallel(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(**ask(tools=TOOLS, tool_choice="required", temperature=1, seed=0, n=8))
    assert {choice.finish_reason for choice in done.choices} == {"tool_calls"}
    calls = [choice.message.tool_calls or [] for choice in done.choices]
    assert max(map(len, calls)) > 1
    check([call for each in calls for call in each])


def test_a_stream_assembles_to_the_same_calls(ai: openai.OpenAI) -> None:
    asked = ask(tools=TOOLS, tool_choice="required")
    whole = ai.chat.completions.create(**asked).choices[0]
    with ai.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == len(whole.message.tool_calls or [])
    streamed = final.choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.content is None
    assert final.usage is not None

    def shown(message: Any) -> list[tuple[str, str]]:
        return [(call.function.name, call.function.arguments) for call in message.tool_calls]

    assert shown(streamed.message) == shown(whole.message)
    check(streamed.message.tool_calls)


def test_deltas_of_calls_are_openai_s(http: httpx.Client) -> None:
    body = ask(tools=TOOLS, tool_choice="required", stream=True, logprobs=True)
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": None, "refusal": None}
    calls = [choice["delta"]["tool_calls"][0] for choice in choices if choice["delta"].get("tool_calls")]
    assert set(calls[0]) == {"index", "id", "type", "function"}
    assert calls[0]["function"]["arguments"] == ""
    assert set(calls[1]) == {"index", "function"}
    first = [call["function"]["arguments"] for call in calls if call["index"] == 0]
    assert len(first) > 3
    assert isinstance(json.loads("".join(first)), dict)
    assert choices[-1]["finish_reason"] == "tool_calls"
    scored = [
        score["bytes"] for choice in choices if choice["logprobs"] for score in choice["logprobs"]["content"]
    ]
    assert bytes(byte for one in scored for byte in one).startswith(b"<tool_call>")


def test_without_a_choice_the_model_may_speak(ai: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        done = ai.chat.completions.create(**ask(tools=TOOLS, tool_choice=choice, max_tokens=5)).choices[0]
        assert done.message.tool_calls is None
        assert done.message.content
        assert done.finish_reason == "length"
    told = ai.chat.completions.create(**ask(tools=TOOLS, max_tokens=1)).usage
    untold = ai.chat.completions.create(**ask(tools=TOOLS, tool_choice="none", max_tokens=1)).usage
    assert told is not None
    assert untold is not None
    assert told.prompt_tokens > untold.prompt_tokens + 500


def test_a_call_that_is_cut_off_ends_with_length(ai: openai.OpenAI) -> None:
    done = ai.chat.completions.create(**ask(tools=TOOLS, tool_choice="required", max_tokens=60)).choices[0]
    assert done.finish_reason == "length"
    assert done.message.tool_calls is not None
    assert done.message.tool_calls[0].function.arguments


@pytest.mark.parametrize("length", [6, 11, 16, 24])
def test_the_beginning_of_a_call_that_is_cut_off_is_no_content(http: httpx.Client, length: int) -> None:
    body = ask(tools=TOOLS, tool_choice="required", max_tokens=length)
    whole = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("", "length")
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    choices = [line["choices"][0] for line in lines]
    assert not any(choice["delta"].get("content") for choice in choices)
    assert choices[-1]["finish_reason"] == "length"
    tools = [{"name": "paint", "input_schema": COLOURS}]
    theirs = {**body, "tools": tools, "tool_choice": {"type": "any"}}
    told = http.post("/v1/messages", json=theirs).json()
    assert not any(block.get("text") for block in told["content"])
    assert told["stop_reason"] == "max_tokens"


def test_results_go_back_into_the_conversation(ai: openai.OpenAI) -> None:
    asked = ask(tools=openai_tools(), tool_choice="required")
    with ai.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    message = ai.chat.completions.parse(**asked).choices[0].message
    assert message.tool_calls is not None
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Colour)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "done"}]}
        for call in message.tool_calls
    ]
    more, same = (
        ai.chat.completions.create(**ask(messages=[*ASK, said, *results], max_tokens=3))
        for said in (message, streamed)
    )
    assert more.choices[0].message == same.choices[0].message
    alone = ai.chat.completions.create(**ask(max_tokens=3))
    assert more.usage is not None
    assert alone.usage is not None
    assert more.usage.prompt_tokens > alone.usage.prompt_tokens + 100


def openai_tools() -> list[Any]:
    return [openai.pydantic_function_tool(Colour, name="paint")]


def test_parse_gives_the_model_s_own_class(ai: openai.OpenAI, gateway: Gateway) -> None:
    done = ai.chat.completions.parse(**ask(response_format=Colour))
    assert isinstance(done.choices[0].message.parsed, Colour)
    assert done.choices[0].finish_reason == "stop"

    async def parse() -> Any:
        async with (
            openai.AsyncOpenAI(
                base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0
            ) as client,
            client.chat.completions.stream(**ask(response_format=Colour)) as stream,
        ):
            async for _ in stream:
                pass
            return (await stream.get_final_completion()).choices[0].message.parsed

    assert asyncio.run(parse()) == done.choices[0].message.parsed


def test_async_streams_call_too(gateway: Gateway) -> None:
    async def main() -> tuple[list[str], str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0
        ) as client:
            asked = ask(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=True)
            names, arguments, reason = [], "", None
            async for chunk in await client.chat.completions.create(**asked):
                for call in chunk.choices[0].delta.tool_calls or []:
                    assert call.function is not None
                    names += [call.function.name] if call.function.name else []
                    arguments += call.function.arguments or ""
                reason = chunk.choices[0].finish_reason or reason
            jsonschema.validate(json.loads(arguments), SCHEMAS[names[0]])
            return names, reason

    names, reason = asyncio.run(main())
    assert (len(names), reason) == (1, "tool_calls")


def test_an_answer_in_json_or_a_call(ai: openai.OpenAI) -> None:
    asked = ask(response_format=Colour, tools=openai_tools(), temperature=1, seed=3, n=6)
    for choice in ai.chat.completions.parse(**asked).choices:
        if choice.message.tool_calls:
            assert choice.finish_reason == "tool_calls"
            assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Colour)
        else:
            assert isinstance(choice.message.parsed, Colour)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"json": COLOURS}, r'\{\s*"colour".*\}'),
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "x"{2,4}'}, "x{2,4}"),
    ],
)
def test_structured_outputs_are_vllm_s(ai: openai.OpenAI, outputs: dict[str, Any], pattern: str) -> None:
    extra = {"structured_outputs": outputs}
    chat = ai.chat.completions.create(**ask(), extra_body=extra).choices[0]
    text = ai.completions.create(
        model="bytes", prompt="So", temperature=0, max_tokens=300, extra_body=extra
    ).choices[0]
    for found, reason in ((chat.message.content, chat.finish_reason), (text.text, text.finish_reason)):
        assert reason == "stop"
        pydantic.TypeAdapter(pydantic.constr(pattern=f"^(?s:{pattern})$")).validate_python(found)
    json_object = ai.chat.completions.create(**ask(response_format={"type": "json_object"}, max_tokens=8))
    assert (json_object.choices[0].message.content or "").startswith("{")


def tool(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": formatted({"type": "nonsense"})}, "response_format"),
        ({"response_format": formatted({"enum": ["x" * 70_000]})}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"colour": "red"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": formatted({})}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "tools": TOOLS}, "structured_outputs"),
        ({"tools": tool(parameters={"type": "array"})}, "tools"),
        ({"tools": tool(parameters={"properties": {"a": {"type": "nonsense"}}})}, "tools"),
        ({"tools": TOOLS, "response_format": formatted({"type": "nonsense"})}, None),
        ({"tools": tool(parameters={"properties": {"a": {"maximum": math.inf}}})}, "tools"),
        ({"tools": tool(parameters={"properties": {"\ud800": {}}})}, "prompt"),
        ({"structured_outputs": {"regex": "\ud800"}}, None),
        ({"structured_outputs": {"json": "3"}, "tools": TOOLS}, "structured_outputs.json"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "prompt"),
        ({"tools": [*tool(), *tool()]}, "tools"),
        ({"tools": tool(name="a b")}, "tools.0.function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": tool(), "functions": [{"name": "f"}]}, "functions"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_what_cannot_be_held_to_is_refused(
    http: httpx.Client, options: dict[str, Any], param: str | None, streams: bool
) -> None:
    headers = {"content-type": "application/json"}  # httpx itself would not send all of this
    content = json.dumps({**ask(stream=streams), **options})
    answer = http.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    again = http.post("/v1/chat/completions", json=ask(max_tokens=1))
    assert again.status_code == 200


def test_a_model_whose_tokens_grammars_cannot_read_is_told_so(http: httpx.Client) -> None:
    body = ask(model="tiny", max_tokens=5, response_format={"type": "json_object"})
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_model"
