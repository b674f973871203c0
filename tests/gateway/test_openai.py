"""Chat and completions through OpenAI's own client, and what it cannot show over plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pydantic
import pytest
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.gateway.openai.completions import CompletionRequest

from .conftest import Gateway, soon

HELLO = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def test_a_chat_streams_what_it_answers_at_once(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, temperature=0)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 0
    chunks = list(
        ai.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_are_those_of_their_seeds(ai: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 1.0}
    both = ai.chat.completions.create(**asked, n=2, seed=7)
    single = [ai.chat.completions.create(**asked, seed=seed) for seed in (7, 8)]
    assert [c.message.content for c in both.choices] == [s.choices[0].message.content for s in single]
    assert both.usage is not None
    assert both.usage.prompt_tokens == single[0].usage.prompt_tokens  # the prompt is charged once
    assert both.usage.completion_tokens == 8


def test_logprobs_of_answers_and_prompts(ai: openai.OpenAI) -> None:
    chat = ai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    scores = chat.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert len(scores.content) == 3
    assert all(len(score.top_logprobs) == 2 for score in scores.content)
    assert scores.content[0].logprob == scores.content[0].top_logprobs[0].logprob
    echoed = ai.completions.create(
        model="tiny", prompt="w5 w6 w7", max_tokens=2, temperature=0, echo=True, logprobs=1
    )
    told = echoed.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.tokens[:3] == [" w5", " w6", " w7"]  # as they are behind another word
    assert told.text_offset == [0, 2, 5, 8, len(echoed.choices[0].text.rpartition(" ")[0])]
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert len(told.tokens) == 5
    scored = ai.completions.create(
        model="tiny", prompt="w5 w6 w7", max_tokens=0, temperature=0, echo=True, logprobs=1
    )
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == told.token_logprobs[:3]


def test_parts_of_characters_are_scored_with_their_own_bytes(ai: openai.OpenAI) -> None:
    asked = {"model": "bytes", "max_tokens": 40, "temperature": 0}
    whole = ai.chat.completions.create(**asked, messages=HELLO, logprobs=True, top_logprobs=1).choices[0]
    assert whole.logprobs is not None
    scores = whole.logprobs.content or []
    assert [score.bytes for score in scores] == [score.top_logprobs[0].bytes for score in scores]
    data = bytes(byte for score in scores for byte in score.bytes or [])
    assert len(data) == 40  # a byte each
    assert data.decode(errors="replace") == whole.message.content

    echoed = ai.completions.create(**{**asked, "max_tokens": 0}, prompt="é😀a", echo=True, logprobs=1)
    told = echoed.choices[0].logprobs
    assert told is not None
    assert told.tokens == [r"bytes:\xc3", r"bytes:\xa9", *[rf"bytes:\x{b:02x}" for b in "😀".encode()], "a"]
    assert told.text_offset == [0, 0, 1, 1, 1, 1, 2]
    answer = ai.completions.create(**asked, prompt="é", logprobs=1).choices[0]
    streamed = list(ai.completions.create(**asked, prompt="é", logprobs=1, stream=True))
    pieces = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert answer.logprobs is not None
    assert [at for piece in pieces for at in piece.text_offset or []] == answer.logprobs.text_offset
    assert [one for piece in pieces for one in piece.tokens or []] == answer.logprobs.tokens


def test_prompts_are_texts_or_tokens_one_or_several(ai: openai.OpenAI) -> None:
    asked = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    texts = ai.completions.create(prompt=["w1 w2", "w3"], **asked)
    tokens = ai.completions.create(prompt=[[1, 2], [3]], **asked)
    alone = ai.completions.create(prompt=[1, 2], **asked)
    assert [c.text for c in texts.choices] == [c.text for c in tokens.choices]
    assert alone.choices[0].text == texts.choices[0].text
    assert [c.index for c in texts.choices] == [0, 1]


def test_stop_strings_end_an_answer(ai: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    text = ai.chat.completions.create(**asked).choices[0].message.content or ""
    word = text.split()[3]
    stopped = ai.chat.completions.create(**asked, stop=[word])
    assert stopped.choices[0].message.content == text.partition(word)[0]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"colour": "red"}, "colour", None),
        ({"temperature": 3}, "temperature", None),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded"),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"service_tier": "gold"}, "service_tier", None),
        ({"n": 0}, "n", None),
        ({"stop": 5}, "stop", None),
        ({"stop": ["a", ""]}, "stop.1", None),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", None),
        ({"messages": [{"role": "user", "colour": 1}]}, "messages.0.colour", None),
        ({"messages": [{"content": "w1"}]}, "messages.0.role", None),
        ({"response_format": {"type": "text", "colour": 1}}, "response_format.colour", None),
    ],
)
def test_what_is_not_done_is_named(http: httpx.Client, body: dict, param: str, code: str | None) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/responses", "input"),
        ("/v1/messages", "messages"),
        ("/api/chat", "messages"),
        ("/api/generate", "prompt"),
    ],
)
def test_a_text_that_is_far_too_long_is_refused_at_once(http: httpx.Client, path: str, field: str) -> None:
    text = "a" * 400_000
    body = {"model": "bytes", field: [{"role": "user", "content": text}] if field == "messages" else text}
    answer = http.post(path, json={**body, **({"max_tokens": 1} if path == "/v1/messages" else {})})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "the prompt has at least" in (error if isinstance(error, str) else error["message"])
    if path.startswith("/v1/") and path != "/v1/messages":
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)


def test_a_text_that_no_vector_takes_is_told_what_helps_here(http: httpx.Client) -> None:
    refused = http.post("/v1/embeddings", json={"model": "encoder", "input": "w " * 99})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"].endswith("(cut it in pieces)")
    assert error["param"] == "input"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            "/v1/responses",
            {"input": "w1", "tools": [{"type": "web_search"}]},
            "tools.0.type: Input should be",
        ),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "tools": [{"type": "mcp", "url": "x"}]},
            "tools.0.type: Input should be",
        ),
        (
            "/v1/responses",
            {"input": [{"type": "reasoning", "summary": []}]},
            "input.0.type: 'reasoning' is none of 'message', 'function_call', 'function_call_output'",
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content.0.type: 'image' is none of 'text', 'tool_use', 'tool_result'",
        ),
    ],
)
def test_a_kind_that_is_not_done_is_told_by_its_name(
    http: httpx.Client, path: str, body: dict, said: str
) -> None:
    answer = http.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(said)
    assert "param" not in error or error["message"].startswith(f"{error['param']}: ")


def test_what_is_wrong_has_the_name_that_the_client_gave_it(http: httpx.Client) -> None:
    block = {"type": "text", "text": "w1"}

    def told(path: str, **body: object) -> str:
        answer = http.post(path, json={"model": "tiny", **body})
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    def said(*blocks: object) -> dict[str, object]:
        return {"max_tokens": 1, "messages": [{"role": "user", "content": blocks}]}

    assert told("/v1/messages", **said({**block, "text": 1})).startswith("messages.0.content.0.text: ")
    assert told("/v1/messages", **said(block, {**block, "x": 1})).endswith(": messages.0.content.1.x")
    assert told("/v1/completions", prompt="w1", stop=["a"] * 17).startswith(
        "stop: List should have at most 16"
    )
    assert told("/v1/rerank", documents=["w1"]).startswith("query: ")
    assert told("/v1/rerank", documents=["w1"], query=[]).startswith("query: ")
    refused = http.post("/v1/completions", json={"model": "tiny", "prompt": [9999]}).json()["error"]
    assert refused["param"] == "prompt"
    assert "/tokenize" in refused["message"]
    unknown = http.get("/v1/chat/completions")
    assert unknown.status_code == 405
    assert "GET /v1/chat/completions" in unknown.json()["error"]["message"]
    limited = http.get("/v1/processes", params={"limit": 0}).json()["error"]
    assert limited["param"] == "limit"


def test_a_body_of_many_errors_costs_one(http: httpx.Client) -> None:
    """Each takes a kilobyte and more of memory."""
    bad = (
        {"prompt": [-1] * 9999},
        {"prompt": [[-1] * 9999]},
        {"prompt": "a", **{f"x{n}": 1 for n in range(9999)}},
    )
    for body in bad:
        with pytest.raises(pydantic.ValidationError) as found:
            CompletionRequest.model_validate({"model": "tiny", **body})
        assert found.value.error_count() < 8
        assert http.post("/v1/completions", json={"model": "tiny", **body}).status_code == 400


def test_a_body_that_is_no_json_is_told_where(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    nothing = http.post("/v1/chat/completions", headers=headers).json()["error"]["message"]
    assert nothing.startswith("the body is not a JSON object")
    answer = http.post("/v1/chat/completions", content=b'{"model": }', headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "the body is not valid JSON: Expecting value, at character 10"
    assert error["param"] is None


def test_options_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1, "store": False, "logit_bias": {}}
    body |= {"verbosity": "medium", "prompt_cache_retention": "in_memory"}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_what_clients_tell_of_themselves_changes_nothing(ai: openai.OpenAI) -> None:
    """OpenAI's successors of `user`, which its other clients send unasked."""
    told = {"prompt_cache_key": "conversation-1", "safety_identifier": "alice"}
    ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, **told)
    include = ["reasoning.encrypted_content"]
    made = ai.responses.create(model="tiny", input="w1", max_output_tokens=1, include=include, **told)
    assert made.output
    assert (made.prompt_cache_key, made.safety_identifier) == tuple(told.values())


def test_errors_have_the_class_that_clients_know(ai: openai.OpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ai.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        ai.chat.completions.create(model="plain", messages=HELLO)
    stranger = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert "tiny" in {model.id for model in ai.models.list()}
    assert ai.models.retrieve("tiny").id == "tiny"


def test_who_hangs_up_frees_his_process(gateway: Gateway, kernel: Client) -> None:
    def running() -> int:
        return len([row for row in kernel.ps() if row.owner == "bob"])

    body = {"model": "slow", "messages": HELLO, "stream": True, "temperature": 0}
    with gateway.http("bob") as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert running() == 1
    soon(lambda: running() == 0)
    with gateway.http("bob") as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json={**body, "stream": False}, timeout=0.5)
    soon(lambda: running() == 0)


def test_a_process_holds_a_conversation(http: httpx.Client, kernel: Client) -> None:
    def ask(**extra: object) -> dict:
        body = {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0, **extra}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    messages = list(HELLO)
    first = ask(pid="new")
    pid = first["pid"]
    messages += [first["choices"][0]["message"] | {"refusal": None}, {"role": "user", "content": "w3"}]
    messages[1].pop("refusal")
    plain, second = ask(), ask(pid=pid)
    assert second["choices"][0]["message"] == plain["choices"][0]["message"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    copy = ask(fork_of=pid)
    assert copy["pid"] != pid
    assert copy["choices"][0]["message"] == plain["choices"][0]["message"]
    assert {row.pid for row in kernel.ps() if row.owner == "alice"} == {pid, copy["pid"]}
    for each in (pid, copy["pid"]):
        kernel.kill(each)


def test_tiers_and_priorities_are_classes(http: httpx.Client, kernel: Client) -> None:
    for extra, sched_class, nice in (
        ({"service_tier": "flex"}, t.SchedClass.BATCH, 0),
        ({"priority": "idle"}, t.SchedClass.IDLE, 0),
        ({"priority": 5}, t.SchedClass.INTERACTIVE, 5),
    ):
        body = {"model": "slow", "messages": HELLO, "stream": True, "temperature": 0, **extra}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            (row,) = [row for row in kernel.ps() if row.owner == "alice"]
            assert (row.sched_class, row.nice) == (sched_class, nice)
        soon(lambda: not [row for row in kernel.ps() if row.owner == "alice"])
    refused = http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "priority": "realtime"}
    )
    assert refused.status_code == 403


def test_a_deadline_is_no_length(http: httpx.Client) -> None:
    body = {"model": "slow", "messages": HELLO, "deadline_ms": 300, "temperature": 0}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "deadline"
    assert choice["message"]["content"]


def test_an_error_on_the_way_is_an_event(http: httpx.Client, kernel: Client) -> None:
    body = {"model": "slow", "messages": HELLO, "stream": True, "temperature": 0}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        (row,) = [row for row in kernel.ps() if row.owner == "alice"]
        kernel.kill(row.pid)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "killed"
