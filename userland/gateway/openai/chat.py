"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from pydantic import Field
from starlette.responses import Response

from ...chat import encode_chat
from ...completion import Completion
from ...tools import Arguments, Begun, Piece
from ..answers import Asked, ask
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import aside, attend, json, new_id
from ..problems import too_long_in
from .constraints import Constrained
from .messages import Message, as_messages
from .shared import DONE, REASONS, Sampled, chat_score, event, stream, usage

router = APIRouter(prefix="/v1/chat/completions", tags=["openai"])


class ChatRequest(Sampled, Constrained):
    NOT_DONE = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning_effort": ("none",),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="As max_completion_tokens, which wins.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


@router.post("", summary="Answer a conversation", responses=documented())
async def create(
    request: Request, body: ChatRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    asked, head = await prepare(caller, body)
    if body.stream:
        return await stream(_chunks(asked, head, body)).begun()
    return json(await attend(request, whole(asked, head)))


async def prepare(caller: Caller, body: ChatRequest) -> tuple[Asked, dict[str, Any]]:
    """What is to be generated, and the head of the answer. Raises what is wrong with the request."""
    llm = await caller.llm(body.model_name(body.model))
    toolbox = body.toolbox()
    tools = toolbox.tools if toolbox is not None else ()
    messages = as_messages(body.messages)
    most = llm.context_length
    with too_long_in("messages"):
        tokens = await aside(
            lambda: encode_chat(llm.tokenizer, messages, model=llm.model, tools=tools, most=most)
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise errors.InvalidArgument("top_logprobs needs logprobs: true", field="top_logprobs")
    scores = (body.top_logprobs or 0) if body.logprobs else None
    room = llm.context_length - len(tokens)
    longest = body.max_completion_tokens or body.max_tokens or max(room, 0)
    shape = body.response_format.model_dump(by_alias=True) if body.response_format else None
    options = body.options(llm, longest, scores, shape)
    with too_long_in("messages"):
        fields = [*(["tools"] if tools else []), *(["response_format"] if shape else [])]
        asked = await ask(
            caller, llm, [tokens], options, body, n=body.n, toolbox=toolbox, shape=body.shape(*fields)
        )
    head = {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": None,
        **({"service_tier": body.service_tier} if body.service_tier else {}),
        **({"pid": asked.pid} if asked.pid is not None else {}),
    }
    return asked, head


async def whole(asked: Asked, head: dict[str, Any]) -> dict[str, Any]:
    """The answer, once it has ended."""
    done = await asked.whole()
    choices = [_choice(index, completion) for index, completion in enumerate(done)]
    return {**head, "choices": choices, "usage": usage(asked.usage)}


def _choice(index: int, done: Completion) -> dict[str, Any]:
    scores = (
        None
        if done.logprobs is None
        else {"content": [chat_score(s) for s in done.logprobs], "refusal": None}
    )
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": (done.text or None) if done.tool_calls else done.text,
            "refusal": None,
            **({"tool_calls": [call.shown() for call in done.tool_calls]} if done.tool_calls else {}),
        },
        "logprobs": scores,
        "finish_reason": _reason(done),
    }


def _reason(done: Completion) -> str:
    return "tool_calls" if done.called else REASONS[done.finish]


def _shown(piece: Piece) -> dict[str, Any]:
    """A piece of an answer as the change of a message."""
    match piece:
        case Begun(index, id_, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case str():
            return {"content": piece}
    return {}


async def _chunks(asked: Asked, head: dict[str, Any], body: ChatRequest) -> AsyncIterator[bytes]:
    wants = body.stream_options or None
    with_usage = bool(wants and wants.include_usage)

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, scores: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        made = {**head, "choices": [choice]}
        if with_usage:
            made["usage"] = None
        return event(made)

    begun: set[int] = set()
    told = [0] * len(asked.parts)
    async for delta in asked.deltas():
        index = delta.index
        if index not in begun:
            begun.add(index)
            # Of an answer that is calls and nothing else, the content stays null.
            yield chunk(index, {"role": "assistant", "content": None if body.tools else "", "refusal": None})
        scores = None
        if body.logprobs and len(delta.answer.tokens) > told[index]:
            fresh = delta.answer.scores(told[index])
            told[index] = len(delta.answer.tokens)
            scores = {"content": [chat_score(score) for score in fresh], "refusal": None}
        changes = [change for piece in delta.pieces if (change := _shown(piece))]
        for change in changes or ([{}] if scores else []):
            yield chunk(index, change, scores=scores)
            scores = None
        if delta.done is not None:
            yield chunk(index, {}, _reason(delta.done))
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(asked.usage)})
    yield DONE
