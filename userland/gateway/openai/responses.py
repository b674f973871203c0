"""/v1/responses: answers that are kept, go on from each other, and may be made while nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from ...chat import encode_chat
from ..answers import Asked, ask
from ..callers import Caller, Callers
from ..errors_doc import documented
from ..http import EventStream, aside, attend, json, new_id
from ..options import Body
from ..patience import patiently
from ..problems import too_long_in
from ..store import Kept, Store
from ..works import Works
from .constraints import FlatlyConstrained
from .files import CallerOf, StoreOf, listing
from .items import Item, ReferenceItem, as_messages, response_of, shown
from .shared import Metadata, Sampling
from .telling import ENDED, Event, fail, tell

router = APIRouter(prefix="/v1/responses", tags=["openai"])

KEPT_S = 30 * 24 * 3600
MOST_TURNS = 1000
MOST_HISTORY = 32 << 20
"""Responses that follow each other, and bytes of them."""

MOST_BACKGROUND = 64
"""Of one tenant, at a time."""

PATIENCE_S = 24 * 3600
"""So long a background response waits for the kernel, or for its owner's quota."""

LOG_S = 300.0
"""So long the events of a background response can be heard after its end."""

LOGPROBS = "message.output_text.logprobs"


class StreamOptions(Body):
    NOT_DONE = {"include_obfuscation": (False,)}


class ResponseRequest(Sampling, FlatlyConstrained):
    NOT_DONE = {
        "access_programs": (),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning": ({}, {"effort": "none"}),
        "truncation": ("disabled",),
    }

    input: str | Annotated[list[Item], Field(max_length=4096)] = Field(
        description="A text, or items: messages, function calls and what came of them."
    )
    instructions: str | None = Field(None, description="A system message. It does not carry over.")
    previous_response_id: str | None = Field(None, max_length=128)
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, description="Of reasoning there is none, so it adds nothing."
    )
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: Metadata | None = None
    store: bool = True
    background: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def refers(self) -> bool:
        """Whether there is more in the input than came with the request."""
        return any(isinstance(item, ReferenceItem) for item in self.input)

    @property
    def scored(self) -> bool:
        return LOGPROBS in (self.include or ()) or self.top_logprobs is not None


async def prepare(
    caller: Caller, store: Store, body: ResponseRequest
) -> tuple[Asked, dict[str, Any], list[dict[str, Any]]]:
    """What is to be generated, the response that it is to fill, and the input as it is kept. Raises what is
    wrong with the request."""
    llm = await caller.llm(body.model_name(body.model))
    items = await _items(caller, store, shown(body.input))
    told = await _history(caller, store, body.previous_response_id)
    messages = as_messages([*told, *items])
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    if not messages:
        raise errors.InvalidArgument("the input is empty", field="input")
    toolbox = body.toolbox()
    tools = toolbox.tools if toolbox is not None else ()
    most = llm.context_length
    scores = (body.top_logprobs or 0) if body.scored else None
    shape = body.format
    with too_long_in("input"):
        tokens = await aside(
            lambda: encode_chat(llm.tokenizer, messages, model=llm.model, tools=tools, most=most),
            more=bool(told) or body.refers,
        )
        longest = body.max_output_tokens or max(most - len(tokens), 0)
        formed = shape["type"] != "text"
        options = body.options(llm, longest, scores, shape if formed else None)
        fields = [*(["tools"] if tools else []), *(["text.format"] if formed else [])]
        asked = await ask(caller, llm, [tokens], options, body, toolbox=toolbox, shape=body.shape(*fields))
    response: dict[str, Any] = {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": body.service_tier or "auto",
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": shape},
        "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        **({"pid": asked.pid} if asked.pid is not None else {}),
    }
    return asked, response, items


async def _items(caller: Caller, store: Store, shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items, with what they refer to in place of references."""
    found: list[dict[str, Any]] = []
    last, outputs, size = "", {}, 0
    for item in shown:
        if item["type"] == "item_reference":
            response = response_of(item["id"])
            if response is not None and response != last:  # most come in order
                with contextlib.suppress(errors.NotFound):
                    kept = await store.get(caller.tenant, "response", response)
                    last, outputs = response, {one["id"]: one for one in kept.body["output"]}
            if item["id"] not in outputs:
                raise errors.NotFound(
                    f"Item with id '{item['id']}' not found.",
                    hint="its response was not stored, was deleted, or has expired: send the item itself",
                    field="input",
                )
            item = outputs[item["id"]]
            size += len(msgspec.json.encode(item))
            if size > MOST_HISTORY:
                raise errors.InvalidArgument(
                    f"what the items refer to is longer than {MOST_HISTORY} bytes", field="input"
                )
        found.append(item)
    return found


async def _history(caller: Caller, store: Store, last: str | None) -> list[dict[str, Any]]:
    """The items of the response `last` and of those before it."""
    turns: list[list[dict[str, Any]]] = []
    size = 0
    while last is not None:
        if len(turns) == MOST_TURNS or size > MOST_HISTORY:
            raise errors.InvalidArgument(
                f"more than {MOST_TURNS} responses, or {MOST_HISTORY} bytes, follow each other",
                field="previous_response_id",
            )
        try:
            kept = await store.get(caller.tenant, "response", last)
        except errors.NotFound:
            raise errors.NotFound(
                f"Previous response with id '{last}' not found.",
                hint="it was not stored, was deleted, or has expired",
                field="previous_response_id",
            ) from None
        if kept.body["status"] not in ENDED:
            raise errors.InvalidArgument(f"{last} has not ended yet", field="previous_response_id")
        turns.append([*kept.inner["input"], *kept.body["output"]])
        size += len(msgspec.json.encode(turns[-1]))
        last = kept.body["previous_response_id"]
    return [item for turn in reversed(turns) for item in turn]


@router.post("", summary="Answer, and keep the answer", responses=documented())
async def create(request: Request, body: ResponseRequest, caller: CallerOf, store: StoreOf) -> Response:
    caller.needs(t.Capability.INFER)
    if body.background:
        return await _begin(request.app, body, caller, store)
    asked, response, items = await prepare(caller, store, body)
    events = tell(asked, response, body.scored, lambda: _keep(store, caller, body, response, items))
    if body.stream:
        return await EventStream(_encoded(events), _failed).begun()
    return json(await attend(request, _last(events)))


async def answer(caller: Caller, store: Store, body: ResponseRequest) -> dict[str, Any]:
    """The whole response. Raises what is wrong."""
    asked, response, items = await prepare(caller, store, body)
    return await _last(
        tell(asked, response, body.scored, lambda: _keep(store, caller, body, response, items))
    )


async def _last(events: AsyncIterator[Event]) -> dict[str, Any]:
    async for event in events:
        last = event
    return dict(last["response"])


async def _keep(
    store: Store, caller: Caller, body: ResponseRequest, response: dict[str, Any], items: list[dict[str, Any]]
) -> None:
    if body.store:
        await store.add(_kept(caller, response, {"input": items}))


def _kept(caller: Caller, response: dict[str, Any], inner: dict[str, Any], *, held: bool = False) -> Kept:
    expires = response["created_at"] + KEPT_S
    return Kept(caller.tenant, "response", response["id"], response, inner, expires, held)


async def _encoded(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    async for event in events:
        yield encoded(event)


def encoded(event: Event) -> bytes:
    return f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"


def _failed(problem: errors.LLMasOSError) -> bytes:
    """Before the response began, and after the answer's status went out."""
    told: dict[str, Any] = {}
    fail(told, problem)
    return encoded({"type": "error", "sequence_number": 0, **told["error"]})


class Log:
    """The events of a background response, for whoever comes to hear them."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._ended = False
        self._fresh = asyncio.Event()

    def add(self, event: bytes) -> None:
        self._events.append(event)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        self._fresh.set()
        self._fresh = asyncio.Event()

    async def after(self, number: int) -> AsyncIterator[bytes]:
        """The events behind that with this sequence number, until the last one."""
        place = number + 1
        while True:
            while place < len(self._events):
                yield self._events[place]
                place += 1
            if self._ended:
                return
            await self._fresh.wait()


def _crowd(tenant: str) -> str:
    return f"background responses of {tenant}"


class Background:
    """The background responses of this gateway, by id."""

    def __init__(self, callers: Callers, store: Store, works: Works) -> None:
        self._callers, self._store, self._works = callers, store, works
        self.logs: dict[str, Log] = {}

    def begin(self, kept: Kept, asked: Asked | None = None) -> None:
        self.logs[kept.id] = Log()
        self._works.start(kept.id, self._run(kept, asked), crowd=_crowd(kept.tenant))

    async def _run(self, kept: Kept, asked: Asked | None) -> None:
        """`asked` is what `prepare` made of the request; who goes on with another's begins anew."""
        log, response = self.logs[kept.id], kept.body
        try:
            await patiently(lambda: self._attempt(kept, asked, log), time.time() + PATIENCE_S)
        except errors.LLMasOSError as problem:
            fail(response, problem)
            await self._save(kept)
            log.add(encoded({"type": "response.failed", "sequence_number": 0, "response": response}))
        finally:
            log.end()
            asyncio.get_running_loop().call_later(LOG_S, self.logs.pop, kept.id, None)

    async def _attempt(self, kept: Kept, asked: Asked | None, log: Log) -> None:
        body = ResponseRequest.model_validate(kept.inner["request"])
        if asked is None:
            caller = await self._callers.again(kept.inner["login"])
            asked, _, _ = await prepare(caller, self._store, body)
        async for event in tell(asked, kept.body, body.scored, lambda: self._save(kept)):
            if event["type"] == "response.created":
                with contextlib.suppress(errors.StorageFailed):
                    await self._store.change(kept, _begun)
            log.add(encoded(event))

    async def _save(self, kept: Kept) -> None:
        def end(there: Kept) -> None:
            if there.body["status"] not in ENDED:
                there.body = kept.body
            there.held = False
            there.inner.pop("request", None)

        with contextlib.suppress(errors.NotFound):  # it was deleted meanwhile
            await patiently(lambda: self._store.change(kept, end), time.time() + PATIENCE_S)


def _begun(kept: Kept) -> None:
    if kept.body["status"] == "queued":
        kept.body["status"] = "in_progress"


async def _begin(app: FastAPI, body: ResponseRequest, caller: Caller, store: Store) -> Response:
    if not body.store:
        raise errors.InvalidArgument("a background response is stored", field="store")
    background: Background = app.state.background
    app.state.works.check(_crowd(caller.tenant), MOST_BACKGROUND)
    asked, response, items = await prepare(caller, store, body)
    request = body.model_dump(mode="json", exclude_unset=True)
    kept = _kept(caller, response, {"input": items, "request": request, "login": caller.login}, held=True)
    await store.add(kept)
    now = json(response)
    background.begin(kept, asked)
    if body.stream:
        return await EventStream(background.logs[kept.id].after(-1), _failed).begun()
    return now


async def resume(app: FastAPI) -> None:
    """Goes on with what a gateway that is gone has left."""
    for kept in await app.state.store.orphans("response"):
        kept.body["output"] = []
        app.state.background.begin(kept)


@router.get("/{response_id}", summary="One response", responses=documented())
async def one(
    request: Request,
    response_id: str,
    caller: CallerOf,
    store: StoreOf,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
) -> Response:
    """With `stream` the events of a background response, also those that were told already, until five
    minutes after its end."""
    kept = await store.get(caller.tenant, "response", response_id)
    if not stream:
        if starting_after is not None:
            raise errors.InvalidArgument("starting_after needs stream", field="starting_after")
        return json(kept.body)
    log = request.app.state.background.logs.get(response_id)
    if log is None:
        raise errors.InvalidArgument(
            "there are no events of this response: it was not made in the background, or ended long ago",
            hint="retrieve it without stream",
            field="stream",
        )
    return await EventStream(log.after(-1 if starting_after is None else starting_after), _failed).begun()


@router.post("/{response_id}/cancel", summary="Cancel a background response", responses=documented())
async def cancelled(request: Request, response_id: str, caller: CallerOf, store: StoreOf) -> Response:
    caller.needs(t.Capability.INFER)
    kept = await store.get(caller.tenant, "response", response_id)
    if not kept.body["background"]:
        raise errors.InvalidArgument(
            "Only background responses can be cancelled.",
            hint="hanging up ends the others",
            field="background",
        )

    def cancel(there: Kept) -> None:
        if there.body["status"] not in ENDED:
            there.body["status"] = "cancelled"
        there.held = False
        there.inner.pop("request", None)

    kept = await store.change(kept, cancel)
    await request.app.state.works.stop(response_id)
    return json(kept.body)


@router.delete("/{response_id}", summary="Delete a response", responses=documented())
async def deleted(request: Request, response_id: str, caller: CallerOf, store: StoreOf) -> Response:
    """One that is being made is cancelled."""
    caller.needs(t.Capability.INFER)
    await store.delete(caller.tenant, "response", response_id)
    await request.app.state.works.stop(response_id)
    return json({"id": response_id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items", summary="What was asked", responses=documented())
async def input_items(
    response_id: str,
    caller: CallerOf,
    store: StoreOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """Of this request; those of the ones before it are theirs."""
    items = (await store.get(caller.tenant, "response", response_id)).inner["input"]
    if order == "desc":
        items = items[::-1]
    if after is not None:
        place = next((place for place, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise errors.NotFound(f"No item found with id '{after[:128]}'.", field="after")
        items = items[place + 1 :]
    return json(listing(items[:limit], len(items) > limit))
