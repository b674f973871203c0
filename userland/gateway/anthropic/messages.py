"""/v1/messages, and how many tokens they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from ...chat import encode_chat
from ...completion import Completion
from ...llm import LLM
from ...structured import json_schema
from ...tools import MOST_TOOLS, Arguments, Begun, Ended, Piece, Toolbox
from .. import problems
from ..answers import Asked, Usage, ask, sampling_options
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import EventStream, aside, attend, json, new_id
from ..options import Body, Placed
from .content import CacheControl, Message, Text, ToolChoice, ToolParam, as_messages, toolbox_of

router = APIRouter(prefix="/v1/messages", tags=["anthropic"])

# `deadline` and `killed` are no words of Anthropic's: to call them anything else would be a lie.
REASONS = {t.Finish.STOP: "end_turn", t.Finish.LENGTH: "max_tokens"}

StopSequence = Annotated[str, Field(min_length=1, max_length=256)]


class Metadata(Body):
    user_id: str | None = Field(None, max_length=512)


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    NOT_DONE = {"effort": (), "task_budget": ()}

    format: OutputFormat | None = None


class Conversation(Placed):
    """What counts as the input of an answer."""

    NOT_DONE = {
        "billing_policy": (),
        "compaction": (),
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "fallback_credit_token": (),
        "fallbacks": ([],),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
        "thread": (),
        "user_profile_id": (),
        "workspace_id": (),
    }

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=4096)
    system: Text | None = None
    cache_control: CacheControl | None = Field(None, description="Equal beginnings are shared anyway.")

    tools: list[ToolParam] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None

    def grammar(self) -> t.Grammar | None:
        form = self.output_config and self.output_config.format
        return json_schema(form.schema_, "output_config.format.schema") if form else None

    def toolbox(self) -> Toolbox | None:
        return toolbox_of(self.tools, self.tool_choice)

    def encode(self, llm: LLM, toolbox: Toolbox | None, most: int | None = None) -> list[int]:
        """A conversation that ends with the assistant's words goes on with them."""
        return encode_chat(
            llm.tokenizer,
            as_messages(self.system, self.messages),
            model=llm.model,
            tools=toolbox.tools if toolbox else (),
            continue_final_message=True,
            most=most,
        )


class MessagesRequest(Conversation):
    max_tokens: int = Field(ge=0, lt=2**31, description="0: only takes the input in, for what comes next.")
    metadata: Metadata | None = None
    stop_sequences: list[StopSequence] | None = Field(None, max_length=64)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    stream: bool = False


@router.post("", summary="Answer a conversation", responses=documented())
async def create(
    request: Request, body: MessagesRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    """An answer that would leave the model's context ends there with stop_reason
    `model_context_window_exceeded`; input that alone does not fit is a 400."""
    llm = await caller.llm(body.model_name(body.model))
    toolbox = body.toolbox()
    tokens = await aside(lambda: body.encode(llm, toolbox, llm.context_length))
    room = llm.context_length - len(tokens)
    longest = min(body.max_tokens, room) if room > 0 else body.max_tokens
    options = sampling_options(
        llm,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        max_new_tokens=longest,
        structured_outputs=body.grammar(),
    )
    asked = await ask(
        caller,
        llm,
        [tokens],
        options,
        body,
        no_tokens=longest == 0,
        toolbox=toolbox,
        call_prefix="toolu_",
    )
    answering = _Answering(asked, body, full=longest < body.max_tokens)
    if body.stream:
        parts, request_id = answering.events(), request.state.request_id
        return await EventStream(parts, lambda problem: _failed(problem, request_id), idle=PING).begun()
    return json(await attend(request, answering.whole()))


class Count(Conversation):
    pass


@router.post("/count_tokens", summary="Tokens of a conversation", responses=documented())
async def count(body: Count, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    llm = await caller.llm(body.model_name(body.model))
    tokens = await aside(lambda: body.encode(llm, body.toolbox()))
    return json({"input_tokens": len(tokens)})


class _Answering:
    """One answer, whole or as events. `full`: its bound is the model's context."""

    def __init__(self, asked: Asked, body: MessagesRequest, *, full: bool) -> None:
        self._asked, self._body, self._full = asked, body, full
        self._head: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": body.model,
        }
        if asked.pid is not None:
            self._head["pid"] = asked.pid

    async def whole(self) -> dict[str, Any]:
        ended: set[int] = set()
        async for delta in self._asked.deltas():
            ended |= {piece.index for piece in delta.pieces if isinstance(piece, Ended)}
            done = delta.done
        assert done is not None
        content: list[dict[str, Any]] = [{"type": "text", "text": done.text}] if done.text else []
        for index, call in enumerate(done.tool_calls):
            # Of a call that was cut off the input is empty; stop_reason tells.
            input_ = msgspec.Raw(call.arguments.encode() if index in ended else b"{}")
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": input_})
        return {
            **self._head,
            "content": content,
            **self._end(done),
            "usage": self._usage(self._asked.usage),
        }

    async def events(self) -> AsyncIterator[bytes]:
        blocks = _Blocks()
        begun = False
        async for delta in self._asked.deltas():
            if not begun:
                begun = True
                prompt = self._asked.parts[0].prompt
                message: dict[str, Any] = {**self._head, "content": [], **NOT_ENDED}
                yield event("message_start", message={**message, "usage": self._usage(Usage(prompt))})
                yield PING
            for piece in delta.pieces:
                for told in blocks.add(piece):
                    yield told
            if delta.done is not None:
                for told in blocks.end():
                    yield told
                usage = self._usage(self._asked.usage)
                yield event("message_delta", delta=self._end(delta.done), usage=usage)
        yield event("message_stop")

    def _end(self, done: Completion) -> dict[str, Any]:
        reason = REASONS.get(done.finish, str(done.finish))
        if done.stop:
            reason = "stop_sequence"
        elif done.called:
            reason = "tool_use"
        elif done.finish is t.Finish.LENGTH and self._full:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": done.stop or None}

    def _usage(self, used: Usage) -> dict[str, Any]:
        """Anthropic's input_tokens are those that were not in a cache."""
        sched_class, _ = self._body.place()
        batch = sched_class in (t.SchedClass.BATCH, t.SchedClass.IDLE)
        return {
            "input_tokens": used.prompt - used.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": used.cached,
            "output_tokens": used.generated,
            "service_tier": "batch" if batch else "standard",
        }


class _Blocks:
    """The events of content blocks: words that follow each other are one, each call is one."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""

    def add(self, piece: Piece) -> Iterator[bytes]:
        match piece:
            case str():
                if self._open != "text":
                    yield from self.end()
                    yield self._begin({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": piece})
            case Begun():
                yield from self.end()
                yield self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
            case Arguments():
                yield self._delta({"type": "input_json_delta", "partial_json": piece.text})
            case Ended():
                yield from self.end()

    def end(self) -> Iterator[bytes]:
        if self._open:
            self._open = ""
            yield event("content_block_stop", index=self._index)

    def _begin(self, block: dict[str, Any]) -> bytes:
        self._index, self._open = self._index + 1, block["type"]
        return event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)


def event(type: str, **fields: Any) -> bytes:
    data = msgspec.json.encode({"type": type, **fields})
    return b"event: " + type.encode() + b"\ndata: " + data + b"\n\n"


PING = event("ping")
NOT_ENDED = {"stop_reason": None, "stop_sequence": None}


def _failed(problem: errors.LLMasOSError, request_id: str) -> bytes:
    body = problems.body(problems.problem_of(problem), "", request_id, anthropic=True)
    return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"
