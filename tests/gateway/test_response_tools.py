"""Tools and formats of /v1/responses. The model knows nothing, so all form is the gateway's and the
grammar's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from .conftest import Gateway
from .test_tools import COLOURS, SCHEMAS, TOOLS, Colour

FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
ASK: dict[str, Any] = {"model": "bytes", "input": "Well?", "temperature": 0, "max_output_tokens": 2600}


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def calls(response: Any) -> list[Any]:
    found = [item for item in response.output if item.type == "function_call"]
    for call in found:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return found


def test_required_calls_are_items(ai: openai.OpenAI) -> None:
    made = ai.responses.create(**ASK, tools=FLAT, tool_choice="required")
    assert made.status == "completed"
    found = calls(made)
    assert len(found) == len(made.output) >= 1
    assert all(call.call_id.startswith("call_") and call.id.startswith("fc_") for call in found)
    assert all(call.status == "completed" for call in found)
    assert ai.responses.retrieve(made.id).output == made.output
    assert made.tool_choice == "required"
    assert [tool.name for tool in made.tools] == ["paint", "order"]  # type: ignore[union-attr]


def test_a_named_tool_is_called_once(ai: openai.OpenAI) -> None:
    named = {"type": "function", "name": "paint"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        made = ai.responses.create(**ASK, tools=FLAT, tool_choice=choice, parallel_tool_calls=False)
        assert [call.name for call in calls(made)] == ["paint"]
        assert made.parallel_tool_calls is False


def test_a_stream_tells_of_calls(ai: openai.OpenAI) -> None:
    asked = {**ASK, "tools": FLAT, "tool_choice": "required"}
    whole = calls(ai.responses.create(**asked))
    events = list(ai.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [(one.name, one.arguments) for one in whole]
    for event in done:
        pieces = [
            delta.delta
            for delta in events
            if delta.type == "response.function_call_arguments.delta" and delta.item_id == event.item_id
        ]
        assert "".join(pieces) == event.arguments
    last = events[-1]
    assert last.type == "response.completed"
    assert len(calls(last.response)) == len(whole)
    with ai.responses.stream(**asked) as stream:  # the SDK's helper
        for _ in stream:
            pass
        assert [call.arguments for call in calls(stream.get_final_response())] == [
            call.arguments for call in whole
        ]


def test_results_go_back(ai: openai.OpenAI) -> None:
    first = ai.responses.create(**ASK, tools=FLAT, tool_choice="required")
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"} for call in calls(first)
    ]
    plain = {**ASK, "max_output_tokens": 8, "tools": FLAT, "tool_choice": "none"}
    goes_on = ai.responses.create(**{**plain, "input": results}, previous_response_id=first.id)
    whole = ai.responses.create(
        **{**plain, "input": [{"role": "user", "content": "Well?"}, *first.output, *results]}
    )
    assert goes_on.output_text == whole.output_text
    assert goes_on.usage is not None
    assert whole.usage is not None
    assert goes_on.usage.input_tokens == whole.usage.input_tokens
    items = ai.responses.input_items.list(goes_on.id).data
    assert [item.type for item in items] == ["function_call_output"] * len(results)
    with pytest.raises(openai.BadRequestError, match="No function call found"):
        ai.responses.create(**{**plain, "input": results})


def test_answers_are_parsed_into_models(ai: openai.OpenAI) -> None:
    made = ai.responses.parse(**ASK, text_format=Colour)
    assert isinstance(made.output_parsed, Colour)
    assert made.status == "completed"
    assert made.text is not None
    assert made.text.format is not None
    assert made.text.format.type == "json_schema"
    plain = ai.responses.create(**ASK, text={"format": {"type": "json_object"}})
    if plain.status == "completed":
        assert isinstance(json.loads(plain.output_text), dict)


def test_what_the_client_adds_comes_back(ai: openai.OpenAI) -> None:
    """Its helpers parse arguments and answers into the items themselves."""
    tools = [{"type": "function", "name": "paint", "strict": True, "parameters": COLOURS}]
    asked = {**ASK, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    called = ai.responses.parse(**asked)
    (call,) = calls(called)
    assert call.parsed_arguments is not None
    parsed = ai.responses.parse(**ASK, text_format=Colour)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    question = {"role": "user", "content": "Well?"}
    said: list[Any] = [question, *called.output, result, *parsed.output, question]
    short = {**ASK, "max_output_tokens": 4}
    again = ai.responses.create(**{**short, "input": said})
    bare = [item if isinstance(item, dict) else item.to_dict() for item in said]
    for item in bare:
        item.pop("parsed_arguments", None)
        for part in item["content"] if isinstance(item.get("content"), list) else ():
            part.pop("parsed", None)
    plain = ai.responses.create(**{**short, "input": bare})
    assert again.output_text == plain.output_text
    kept = ai.responses.input_items.list(again.id).data
    assert not any("parsed" in json.dumps(item.to_dict()) for item in kept)


def test_a_call_that_is_cut_off_is_incomplete(ai: openai.OpenAI) -> None:
    made = ai.responses.create(**{**ASK, "max_output_tokens": 60}, tools=FLAT, tool_choice="required")
    assert made.status == "incomplete"
    assert [item.status for item in made.output] == ["incomplete"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "web_search"}]},
        {"tools": [{**FLAT[0], "defer_loading": True}]},
        {
            "tools": [
                {"type": "function", "name": "x", "strict": True, "parameters": {"type": "object", "not": {}}}
            ]
        },
        {"tools": FLAT, "tool_choice": {"type": "function", "name": "nobody"}},
        {"tool_choice": "required"},
        {"text": {"format": {"type": "json_schema", "schema": {}}}},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}},
    ],
)
def test_what_cannot_be_held_to_is_refused(http: httpx.Client, body: dict[str, Any]) -> None:
    answer = http.post("/v1/responses", json={**ASK, **body})
    assert answer.status_code == 400, answer.text
