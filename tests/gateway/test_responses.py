"""/v1/responses through OpenAI's client: kept, continued, streamed, made in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.gateway import store as stores
from llmasos.userland.gateway.openai import responses
from llmasos.userland.gateway.patience import patiently
from llmasos.userland.gateway.store import Kept, Store

from .conftest import Gateway, serve, soon

SHORT: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 5}
LONG: dict[str, Any] = {"model": "slow", "temperature": 0, "max_output_tokens": 160}


@pytest.fixture
def ai(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0) as client:
        yield client


def rows(kernel: Client, owner: str = "alice") -> list[t.ProcessInfo]:
    return [row for row in kernel.ps() if row.owner == owner]


def test_an_answer_is_that_of_a_chat(ai: openai.OpenAI) -> None:
    made = ai.responses.create(
        **SHORT, input="w1 w2", instructions="w9", metadata={"of": "me"}, user="somebody"
    )
    chat = ai.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}],
        max_tokens=5,
        temperature=0,
    )
    assert made.output_text == chat.choices[0].message.content
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert made.usage is not None
    assert chat.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (chat.usage.prompt_tokens, 5)
    assert made.usage.output_tokens_details.reasoning_tokens == 0
    assert made.usage.input_tokens_details.cached_tokens <= made.usage.input_tokens
    assert made.metadata == {"of": "me"}
    word = made.output_text.split()[2]
    stopped = ai.responses.create(**SHORT, input="w1 w2", instructions="w9", extra_body={"stop": word})
    assert stopped.status == "completed"
    assert stopped.incomplete_details is None


def test_inputs_are_texts_or_items(ai: openai.OpenAI) -> None:
    plain = ai.responses.create(**SHORT, input="w1 w2")
    for item in (
        {"role": "user", "content": "w1 w2"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "w1 w2"}]},
    ):
        assert ai.responses.create(**SHORT, input=[item]).output_text == plain.output_text
    items = ai.responses.input_items.list(plain.id).data
    assert [item.content[0].text for item in items] == ["w1 w2"]  # type: ignore[union-attr]


def test_a_conversation_goes_on(ai: openai.OpenAI) -> None:
    first = ai.responses.create(**SHORT, input="w1 w2", instructions="w9")
    second = ai.responses.create(**SHORT, input="w3", previous_response_id=first.id)
    third = ai.responses.create(**SHORT, input="w4", previous_response_id=second.id)
    said: list[Any] = [{"role": "user", "content": "w1 w2"}, *first.output]
    said += [{"role": "user", "content": "w3"}, *second.output, {"role": "user", "content": "w4"}]
    whole = ai.responses.create(**SHORT, input=said)
    assert third.output_text == whole.output_text
    assert third.previous_response_id == second.id
    assert third.usage is not None
    assert whole.usage is not None
    assert third.usage.input_tokens == whole.usage.input_tokens
    ai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="Previous response"):
        ai.responses.create(**SHORT, input="w4", previous_response_id=second.id)


def test_conversations_are_bounded(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ai.responses.create(**SHORT, input="w1")
    second = ai.responses.create(**SHORT, input="w1", previous_response_id=first.id)
    for bound, value in (("MOST_TURNS", 1), ("MOST_HISTORY", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(responses, bound, value)
            with pytest.raises(openai.BadRequestError, match="follow each other"):
                ai.responses.create(**SHORT, input="w1", previous_response_id=second.id)
    whole = ai.responses.create(**SHORT, input="w1", previous_response_id=second.id)
    assert whole.usage is not None


def test_items_are_referred_to(ai: openai.OpenAI, gateway: Gateway) -> None:
    """As the AI SDK does from the second turn on."""
    asking: dict[str, Any] = {"model": "bytes", "temperature": 0, "max_output_tokens": 200}
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    asked = {"type": "message", "role": "user", "content": "w1"}
    said = ai.responses.create(**asking, input=[asked]).output[0]
    calling = ai.responses.create(**asking, input=[asked], tools=[tool], tool_choice="required")
    called = calling.output[0]
    assert called.type == "function_call"
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "w2"}
    later = {"type": "message", "role": "user", "content": "w3"}
    whole = ai.responses.create(**asking, input=[asked, said, called, result, later])
    references = [{"type": "item_reference", "id": item.id} for item in (said, called)]
    referred = ai.responses.create(**asking, input=[asked, *references, result, later])
    assert referred.output_text == whole.output_text
    assert referred.usage is not None
    assert whole.usage is not None
    assert referred.usage.input_tokens == whole.usage.input_tokens
    kept = ai.responses.input_items.list(referred.id, order="asc").data
    assert [item.type for item in kept] == [
        "message",
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    bob = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["bob"], max_retries=0)
    unkept = ai.responses.create(**asking, input=[asked], store=False).output[0]
    unknown = said.id[:-1] + "f"
    for client, id_ in ((bob, said.id), (ai, unkept.id), (ai, unknown), (ai, "msg_1")):
        with pytest.raises(openai.NotFoundError, match="Item with id"):
            client.responses.create(**asking, input=[asked, {"type": "item_reference", "id": id_}])


def test_responses_are_kept_unless_not_wanted(ai: openai.OpenAI, gateway: Gateway) -> None:
    made = ai.responses.create(**SHORT, input="w1")
    assert ai.responses.retrieve(made.id).output_text == made.output_text
    passing = ai.responses.create(**SHORT, input="w1", store=False)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(passing.id)
    with gateway.http("bob") as bob:
        path = f"/v1/responses/{made.id}"
        for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert bob.request(method, path + rest).status_code == 404
        body = {**SHORT, "input": "w1", "previous_response_id": made.id}
        assert bob.post("/v1/responses", json=body).status_code == 404
    ai.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(made.id)


def test_a_stream_tells_each_step(ai: openai.OpenAI) -> None:
    whole = ai.responses.create(**SHORT, input="w1 w2")
    events = list(ai.responses.create(**SHORT, input="w1 w2", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.total_tokens == whole.usage.total_tokens
    assert ai.responses.retrieve(last.response.id).output_text == text
    with ai.responses.stream(**SHORT, input="w1 w2") as stream:  # the SDK's helper puts it together
        told = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(told) == text


def test_logprobs_come_when_they_are_asked_for(ai: openai.OpenAI) -> None:
    made = ai.responses.create(**SHORT, input="w1", top_logprobs=2, include=["message.output_text.logprobs"])
    part = made.output[0].content[0]  # type: ignore[union-attr]
    assert len(part.logprobs) == 5  # type: ignore[union-attr,arg-type]
    assert all(len(score.top_logprobs) == 2 for score in part.logprobs)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"colour": "red"}, "colour"),
        ({"max_output_tokens": 5000}, "input"),
        ({"background": True, "store": False}, "store"),
        ({"input": []}, "input"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        (
            {
                "model": "bytes",
                "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}},
            },
            "text.format",
        ),
    ],
)
def test_what_is_not_done_is_named(http: httpx.Client, body: dict, param: str) -> None:
    answer = http.post("/v1/responses", json={"model": "tiny", "input": "w1", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_nobody_knows_what_kind_of_item_that_is(http: httpx.Client) -> None:
    for item in (
        {"type": "reasoning", "summary": []},
        {"type": []},
        5,
    ):
        answer = http.post("/v1/responses", json={"model": "tiny", "input": [item]})
        assert answer.status_code == 400, answer.text


def test_a_background_response_needs_nobody(ai: openai.OpenAI) -> None:
    body = {**LONG, "max_output_tokens": 10}
    made = ai.responses.create(**body, input="w1", background=True)
    assert made.status == "queued"
    soon(lambda: ai.responses.retrieve(made.id).status == "incomplete", 30)
    done = ai.responses.retrieve(made.id)
    assert done.usage is not None
    assert done.usage.output_tokens == 10
    again = ai.responses.create(**body, input="w1")
    assert done.output_text == again.output_text
    assert ai.responses.cancel(made.id).status == "incomplete"  # too late
    with pytest.raises(openai.BadRequestError, match="Only background"):
        ai.responses.cancel(again.id)


def test_what_has_not_ended_has_nothing_behind_it(ai: openai.OpenAI) -> None:
    made = ai.responses.create(**LONG, input="w1", background=True)
    soon(lambda: ai.responses.retrieve(made.id).status == "in_progress")
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        ai.responses.create(**SHORT, input="w1", previous_response_id=made.id)
    ai.responses.cancel(made.id)


def test_a_background_response_is_cancelled_or_deleted(ai: openai.OpenAI, kernel: Client) -> None:
    made = ai.responses.create(**LONG, input="w1", background=True)
    soon(lambda: len(rows(kernel)) == 1)
    assert ai.responses.cancel(made.id).status == "cancelled"
    soon(lambda: not rows(kernel))
    assert ai.responses.retrieve(made.id).status == "cancelled"
    made = ai.responses.create(**LONG, input="w1", background=True)
    soon(lambda: len(rows(kernel)) == 1)
    ai.responses.delete(made.id)
    soon(lambda: not rows(kernel))


def test_events_of_a_background_response_are_heard_again(ai: openai.OpenAI) -> None:
    body = {**LONG, "max_output_tokens": 20}
    stream = ai.responses.create(**body, input="w1", background=True, stream=True)
    seen = [next(stream) for _ in range(6)]
    stream.close()  # it goes on
    id = seen[0].response.id  # type: ignore[union-attr]
    rest = list(ai.responses.retrieve(id, stream=True, starting_after=seen[-1].sequence_number))
    assert [event.sequence_number for event in seen + rest] == list(range(len(seen) + len(rest)))
    assert rest[-1].type == "response.incomplete"
    again = list(ai.responses.retrieve(id, stream=True))
    assert again[-1] == rest[-1]
    kept = ai.responses.create(**SHORT, input="w1")
    with pytest.raises(openai.BadRequestError, match="without stream"):
        ai.responses.retrieve(kept.id, stream=True)


def test_what_fails_in_the_background_says_why(ai: openai.OpenAI, kernel: Client) -> None:
    made = ai.responses.create(**LONG, input="w1", background=True)
    soon(lambda: len(rows(kernel)) == 1)
    kernel.kill(rows(kernel)[0].pid)
    soon(lambda: ai.responses.retrieve(made.id).status == "incomplete")
    assert ai.responses.retrieve(made.id).to_dict()["incomplete_details"] == {"reason": "killed"}


def test_background_responses_are_bounded(ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MOST_BACKGROUND", 1)
    made = ai.responses.create(**LONG, input="w1", background=True)
    with pytest.raises(openai.RateLimitError):
        ai.responses.create(**LONG, input="w1", background=True)
    ai.responses.cancel(made.id)


def test_who_hangs_up_gets_nothing_kept(ai: openai.OpenAI, kernel: Client) -> None:
    stream = ai.responses.create(**LONG, input="w1", stream=True)
    id = next(stream).response.id  # type: ignore[union-attr]
    stream.close()
    soon(lambda: not rows(kernel))
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(id)


def test_another_gateway_goes_on_with_it(home: object, kernel: Client) -> None:
    """The first is stopped while it works; the second makes the answer."""

    def client(gateway: Gateway) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)

    first = serve({})
    with client(next(first)) as ai:
        made = ai.responses.create(**LONG, input="w1", background=True)
        soon(lambda: ai.responses.retrieve(made.id).status == "in_progress")
    assert next(first, None) is None
    second = serve({})
    with client(next(second)) as ai:
        assert ai.responses.retrieve(made.id).status in ("queued", "in_progress")
        soon(lambda: ai.responses.retrieve(made.id).status == "incomplete", 60)
        done = ai.responses.retrieve(made.id)
        assert done.usage is not None
        assert done.usage.output_tokens == LONG["max_output_tokens"]
    assert next(second, None) is None


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0

    async def attempt() -> str:
        nonlocal tried
        tried += 1
        if tried < 3:
            raise errors.DeviceUnavailable("not yet")
        return "done"

    async def refused() -> None:
        raise errors.InvalidArgument("never")

    monkeypatch.setattr("llmasos.userland.gateway.patience.FIRST_S", 0.001)
    assert asyncio.run(patiently(attempt, time.time() + 60)) == "done"
    tried = 0
    with pytest.raises(errors.DeviceUnavailable):
        asyncio.run(patiently(attempt, time.time()))
    with pytest.raises(errors.InvalidArgument):
        asyncio.run(patiently(refused, time.time() + 60))


def test_the_oldest_responses_make_room(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MOST_RESPONSES", 10)

    async def story() -> None:
        store = Store(tmp_path)
        await store.add(Kept("a", "response", "running", {}, {}, held=True))
        for number in range(20):
            await store.add(Kept("a", "response", f"r{number}", {}, {}))
        await store.add(Kept("b", "response", "other", {}, {}))
        found, _ = await store.page("a", "response", after=None, limit=100)
        assert [kept.id for kept in found][:2] == ["r19", "r18"]
        assert len(found) <= 11
        assert found[-1].id == "running"
        monkeypatch.setattr(stores, "MOST_RESPONSE_BYTES", 100)
        await store.add(Kept("a", "response", "big", {"text": "x" * 80}, {}))
        found, _ = await store.page("a", "response", after=None, limit=100)
        assert [kept.id for kept in found] == ["big", "running"]
        store.close()

    asyncio.run(story())


def test_everything_is_there_for_asyncio_too(gateway: Gateway) -> None:
    async def story() -> None:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"]) as ai:
            made = await ai.responses.create(**SHORT, input="w1")
            again = await ai.responses.retrieve(made.id)
            assert again.output_text == made.output_text
            stream = await ai.responses.create(**SHORT, input="w1", stream=True)
            kinds = [event.type async for event in stream]
            assert kinds[-1] == "response.incomplete"

    asyncio.run(story())
