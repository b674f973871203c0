"""/api/chat."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from ...chat import encode_chat
from ...completion import Completion
from ...tools import Arguments, Begun, Ended, Toolbox
from ..answers import Asked
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import aside, attend, json
from ..options import Body
from .shared import Asking, Clock, Step, answer, ended, line, lines, load, now, steps

router = APIRouter(prefix="/api/chat", tags=["ollama"])


class Function(Body):
    name: str = Field(min_length=1, max_length=128)
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = None


class ToolCall(Body):
    id: str | None = Field(None, max_length=128)
    type: Literal["function"] = "function"
    function: Function


class Message(Body):
    """Pictures and thoughts are refused."""

    NOT_DONE = {"images": ([],), "thinking": ("",)}

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_name: str | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=128)

    def shown(self) -> dict[str, Any]:
        """As templates take it."""
        made: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls and self.role == "assistant":
            made["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_name:
            made["name"] = self.tool_name
        if self.tool_call_id:
            made["tool_call_id"] = self.tool_call_id
        return made


class ChatRequest(Asking):
    messages: list[Message] = Field([], max_length=4096)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128, description="As OpenAI's.")


@router.post("", summary="Answer a conversation", responses=documented())
async def create(
    request: Request, body: ChatRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    """As JSON lines unless `stream` is false. Without messages the model is only loaded."""
    clock = Clock()
    llm = await caller.llm(body.model_name(body.model))
    if not body.messages:
        loaded = await attend(request, load(caller, llm, body, clock))
        return json({**loaded, "message": {"role": "assistant", "content": ""}})
    toolbox = Toolbox.from_openai(body.tools)
    messages, tools = [message.shown() for message in body.messages], toolbox.tools if toolbox else ()
    tokens = await aside(
        lambda: encode_chat(
            llm.tokenizer,
            messages,
            model=llm.model,
            tools=tools,
            continue_final_message=True,
            most=llm.context_length,
        )
    )
    asked = await answer(caller, llm, tokens, body, toolbox)
    clock.asked()
    answering = _Answering(asked, clock, body)
    if body.stream:
        return await lines(answering.lines()).begun()
    return json(await attend(request, answering.whole()))


class _Answering:
    """One answer, whole or as lines."""

    def __init__(self, asked: Asked, clock: Clock, body: ChatRequest) -> None:
        self._asked, self._clock, self._body = asked, clock, body

    async def lines(self) -> AsyncIterator[bytes]:
        async for message, step in self._messages():
            scores = {} if step.scores is None else {"logprobs": step.scores}
            if message or scores:
                yield line({**self._head(message), "done": False, **scores})
            if step.done is not None:
                yield line({**self._head({}), **self._end(step.done)})

    async def whole(self) -> dict[str, Any]:
        words, calls, scores = "", [], []
        async for message, step in self._messages():
            words += message.get("content", "")
            calls += message.get("tool_calls", [])
            scores += step.scores or []
            done = step.done
        assert done is not None
        message = {"content": words, **({"tool_calls": calls} if calls else {})}
        told = {"logprobs": scores} if self._body.logprobs else {}
        return {**self._head(message), **self._end(done), **told}

    async def _messages(self) -> AsyncIterator[tuple[dict[str, Any], Step]]:
        """What each step adds to the message. A call comes whole; one that is cut off does not come."""
        begun: list[Begun] = []
        arguments: list[str] = []
        async for step in steps(self._asked, self._clock, self._body):
            words, calls = "", []
            for piece in step.pieces:
                match piece:
                    case str():
                        words += piece
                    case Begun():
                        begun.append(piece)
                        arguments.append("")
                    case Arguments():
                        arguments[piece.index] += piece.text
                    case Ended():
                        calls.append(_shown(begun[piece.index], arguments[piece.index]))
            message: dict[str, Any] = {"content": words} if words else {}
            if calls:
                message["tool_calls"] = calls
            yield message, step

    def _head(self, message: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": self._body.model,
            "created_at": now(),
            "message": {"role": "assistant", "content": "", **message},
        }

    def _end(self, done: Completion) -> dict[str, Any]:
        return {**ended(self._asked, done), **self._clock.told(done)}


def _shown(call: Begun, arguments: str) -> dict[str, Any]:
    """Ollama's arguments are an object, not its text."""
    function = {"index": call.index, "name": call.name, "arguments": msgspec.Raw(arguments.encode())}
    return {"id": call.id, "function": function}
