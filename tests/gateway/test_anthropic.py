"""Messages through Anthropic's own client, and what it cannot show over plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import anthropic
import httpx
import jsonschema
import pydantic
import pytest
from llmasos.syscalls import table
from llmasos.userland.client import Client

from .conftest import Gateway, soon

HELLO = [{"role": "user", "content": "w1 w2"}]
CALL = {"type": "tool_use", "id": "t1", "name": "paint", "input": {"colour": "red"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "w3"}
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}},
    "required": ["colour", "dark"],
    "additionalProperties": False,
}
TOOLS = [{"name": "paint", "description": "Paints.", "input_schema": COLOURS}]
GREEDY = {"temperature": 0}
"""The newest client has no argument for it."""


@pytest.fixture
def claude(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def ask(claude: anthropic.Anthropic, **options: object) -> anthropic.types.Message:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "extra_body": GREEDY, **options}
    return claude.messages.create(**asked)  # type: ignore[no-any-return,call-overload]


def test_a_message_is_answered_as_it_streams(claude: anthropic.Anthropic) -> None:
    whole = ask(claude)
    assert (whole.type, whole.role, whole.stop_reason) == ("message", "assistant", "max_tokens")
    (block,) = whole.content
    assert block.type == "text"
    with claude.messages.stream(model="tiny", messages=HELLO, max_tokens=6, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == block.text
    assert last.content[0].text == text
    assert last.stop_reason == "max_tokens"
    assert last.usage.output_tokens == whole.usage.output_tokens == 6
    read = last.usage.cache_read_input_tokens or 0
    assert (
        last.usage.input_tokens + read
        == claude.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
    )


def test_events_come_in_the_order_that_clients_expect(claude: anthropic.Anthropic) -> None:
    events = [event.type for event in ask(claude, stream=True)]
    assert events[:2] == ["message_start", "content_block_start"]
    assert set(events[2:-3]) == {"content_block_delta"}
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_async_clients_are_answered_too(gateway: Gateway) -> None:
    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=gateway.keys["alice"]) as claude:
            asked = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "extra_body": GREEDY}
            whole = await claude.messages.create(**asked)
            async with claude.messages.stream(**asked) as stream:
                return whole.content[0].text, "".join([piece async for piece in stream.text_stream])

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_input_that_was_there_already_is_told_apart(claude: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": " ".join(f"w{n}" for n in range(300, 364))}]
    ask(claude, messages=messages)
    usage = ask(claude, messages=messages).usage
    assert usage.cache_read_input_tokens
    assert usage.cache_read_input_tokens >= 48
    whole = claude.messages.count_tokens(model="tiny", messages=messages).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == whole


def test_blocks_and_turns_make_one_conversation(claude: anthropic.Anthropic) -> None:
    def tokens(messages: list, **options: object) -> int:
        return claude.messages.count_tokens(model="tiny", messages=messages, **options).input_tokens

    cached = {"type": "text", "text": "w2", "cache_control": {"type": "ephemeral"}}
    blocks = [{"role": "user", "content": [{"type": "text", "text": "w1"}, cached]}]
    turns = [{"role": "user", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert tokens(blocks) == tokens(turns) == tokens(HELLO)
    assert tokens(HELLO, system="w9 w8") == tokens(HELLO, system=[{"type": "text", "text": "w9 w8"}])
    assert tokens(HELLO, system="w9 w8") > tokens(HELLO)


def test_the_assistants_last_words_are_gone_on_with(claude: anthropic.Anthropic) -> None:
    whole = ask(claude).content[0].text
    begun = " ".join(whole.split()[:2])
    rest = ask(claude, messages=[*HELLO, {"role": "assistant", "content": begun}], max_tokens=4)
    assert (begun + rest.content[0].text).split() == whole.split()


def test_what_ended_an_answer_is_told(claude: anthropic.Anthropic) -> None:
    text = ask(claude).content[0].text
    word = text.split()[3]
    stopped = ask(claude, stop_sequences=["never", word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == text.partition(word)[0]
    long = [{"role": "user", "content": "w1 " * 500}]
    full = ask(claude, messages=long, max_tokens=5000)
    assert full.stop_reason == "model_context_window_exceeded"
    assert 0 < full.usage.output_tokens < 12
    taken_in = ask(claude, max_tokens=0)
    assert (taken_in.content, taken_in.usage.output_tokens) == ([], 0)
    late = ask(claude, model="slow", max_tokens=400, extra_body={**GREEDY, "deadline_ms": 300})
    assert late.stop_reason == "deadline"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"colour": "red"}, "colour"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "no `tool_use` before it"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "`assistant` messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"output_config": {"effort": "low"}}, "effort"),
        ({"messages": [{"role": "user", "content": "w1 " * 600}]}, "context 512"),
        ({"service_tier": "gold"}, "service tier"),
    ],
)
def test_what_is_not_done_is_named(http: httpx.Client, body: dict, said: str) -> None:
    answer = http.post("/v1/messages", json={"model": "tiny", "messages": HELLO, "max_tokens": 1, **body})
    assert answer.status_code == 400
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert said in told["error"]["message"]
    assert told["request_id"] == answer.headers["request-id"]


def test_options_that_ask_for_nothing_are_taken(claude: anthropic.Anthropic) -> None:
    ask(claude, thinking={"type": "disabled"}, metadata={"user_id": "u1"}, service_tier="standard_only")


def test_errors_have_the_class_that_clients_know(claude: anthropic.Anthropic, gateway: Gateway) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        ask(claude, model="claude-9")
    with pytest.raises(anthropic.BadRequestError, match="no chat template"):
        ask(claude, model="plain")
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        claude.models.retrieve("claude-9")
    stranger = anthropic.Anthropic(base_url=gateway.url, api_key="sk-wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        ask(stranger)


def test_tools_are_called_as_their_schemas_want(claude: anthropic.Anthropic) -> None:
    asked = {"model": "bytes", "max_tokens": 2000, "tools": TOOLS, "tool_choice": {"type": "any"}}
    whole = ask(claude, **asked)
    assert whole.stop_reason == "tool_use"
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert len(calls) == len(whole.content) > 0
    for call in calls:
        assert call.id.startswith("toolu_")
        assert call.name == "paint"
        jsonschema.validate(call.input, COLOURS)
    with claude.messages.stream(messages=HELLO, extra_body=GREEDY, **asked) as stream:
        kinds = {event.type for event in stream}
        last = stream.get_final_message()
    assert "input_json" in kinds
    assert [(block.name, block.input) for block in last.content] == [(c.name, c.input) for c in calls]
    assert last.stop_reason == "tool_use"


def test_one_call_at_a_time_and_none(claude: anthropic.Anthropic) -> None:
    named = {"type": "tool", "name": "paint", "disable_parallel_tool_use": True}
    asked = {"model": "bytes", "max_tokens": 2000, "tools": TOOLS}
    assert len(ask(claude, tool_choice=named, **asked).content) == 1
    cut = ask(claude, tool_choice=named, **{**asked, "max_tokens": 50})
    assert cut.stop_reason == "max_tokens"
    assert [block.input for block in cut.content if block.type == "tool_use"] in ([], [{}])
    spoken = ask(claude, tool_choice={"type": "none"}, **{**asked, "max_tokens": 20})
    assert [block.type for block in spoken.content] == ["text"]


def test_results_go_back(claude: anthropic.Anthropic) -> None:
    def tokens(*more: dict) -> int:
        messages = [*HELLO, *more]
        return claude.messages.count_tokens(model="tiny", messages=messages, tools=TOOLS).input_tokens

    asked = {"role": "assistant", "content": [{"type": "text", "text": "w4"}, CALL]}
    told = {"role": "user", "content": [RESULT, {"type": "text", "text": "w5"}]}
    assert tokens() < tokens(asked) < tokens(asked, told)
    answer = ask(claude, messages=[*HELLO, asked, told], max_tokens=3)
    assert answer.usage.output_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_runs_tools(claude: anthropic.Anthropic, stream: bool) -> None:
    ran = []

    @anthropic.beta_tool
    def paint(dark: bool) -> str:
        """Paints.

        Args:
            dark: How.
        """
        ran.append(dark)
        return "done"

    runner = claude.beta.messages.tool_runner(
        model="bytes",
        max_tokens=400,
        tools=[paint],
        tool_choice={"type": "tool", "name": "paint", "disable_parallel_tool_use": True},
        messages=HELLO,
        max_iterations=2,
        stream=stream,
        extra_body=GREEDY,
    )
    answers = [answer.get_final_message() if stream else answer for answer in runner]
    assert [answer.stop_reason for answer in answers] == ["tool_use", "tool_use"]
    assert ran == [answer.content[0].input["dark"] for answer in answers]
    assert answers[1].usage.cache_read_input_tokens > answers[0].usage.cache_read_input_tokens


def test_output_has_the_shape_that_was_asked_for(claude: anthropic.Anthropic) -> None:
    class Colour(pydantic.BaseModel):
        name: Literal["red", "blue"]
        dark: bool

    parsed = claude.messages.parse(
        model="bytes", messages=HELLO, max_tokens=400, output_format=Colour, extra_body=GREEDY
    )
    assert isinstance(parsed.parsed_output, Colour)
    shape = {"format": {"type": "json_schema", "schema": COLOURS}}
    jsonschema.validate(
        json.loads(ask(claude, model="bytes", max_tokens=400, output_config=shape).content[0].text), COLOURS
    )
    with pytest.raises(anthropic.BadRequestError):
        ask(
            claude,
            model="bytes",
            output_config={"format": {"type": "json_schema", "schema": {"type": "colour"}}},
        )


def test_models_have_anthropics_shape_for_its_clients(claude: anthropic.Anthropic) -> None:
    first = claude.models.list(limit=1)
    assert first.has_more
    every = [model.id for model in claude.models.list(limit=1)]
    assert every == [model.id for model in claude.models.list()]
    assert {"tiny", "slow"} <= set(every)
    before = claude.models.list(before_id=every[2], limit=1)
    assert [model.id for model in before.data] == [every[1]]
    assert claude.models.retrieve("tiny").max_input_tokens == 512
    with pytest.raises(anthropic.BadRequestError, match="limit"):
        claude.models.list(limit=0)


def test_who_hangs_up_frees_his_process(gateway: Gateway, kernel: Client) -> None:
    def running() -> int:
        return len([row for row in kernel.ps() if row.owner == "bob"])

    body = {"model": "slow", "messages": HELLO, "max_tokens": 400, "stream": True, "temperature": 0}
    with gateway.http("bob") as http, http.stream("POST", "/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert running() == 1
    soon(lambda: running() == 0)


def test_a_killed_answer_is_told_so(http: httpx.Client, kernel: Client) -> None:
    body = {"model": "slow", "messages": HELLO, "max_tokens": 400, "stream": True, "temperature": 0}
    with http.stream("POST", "/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        (row,) = [row for row in kernel.ps() if row.owner == "alice"]
        kernel.kill(row.pid)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-2]["delta"]["stop_reason"] == "killed"


def test_a_process_holds_a_conversation(claude: anthropic.Anthropic, kernel: Client) -> None:
    first = ask(claude, extra_body={**GREEDY, "pid": "new"})
    pid = first.to_dict()["pid"]
    messages = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": "w3"}]
    plain = ask(claude, messages=messages)
    second = ask(claude, messages=messages, extra_body={**GREEDY, "pid": pid, "priority": "batch"})
    assert second.content == plain.content
    held = first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    assert (second.usage.cache_read_input_tokens or 0) >= held
    assert second.usage.service_tier == "batch"
    kernel.kill(pid)


def test_a_full_queue_is_a_429_also_of_a_stream(gateway: Gateway, kernel: Client) -> None:
    kernel.call(table.SetQuota("bob", table.t.Quota(queue=1)))
    body = {"model": "slow", "messages": HELLO, "max_tokens": 400, "stream": True, "temperature": 0}
    try:
        with gateway.http("bob") as http, http.stream("POST", "/v1/messages", json=body) as running:
            assert running.status_code == 200
            refused = http.post("/v1/messages", json=body)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
    finally:
        kernel.call(table.SetQuota("bob", None))
