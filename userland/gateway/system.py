"""What is asked of the gateway itself: is it alive, is it ready, which version, tokens of a text."""

from __future__ import annotations

import asyncio
from importlib.metadata import version as installed_version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors, table
from pydantic import Field
from starlette.responses import Response

from ..chat import encode_chat
from ..llm import LLM
from .callers import Caller, authenticated
from .errors_doc import documented
from .http import aside, json
from .openai.messages import Message, as_messages
from .options import Body, Token

router = APIRouter(tags=["system"])

READY_S = 2.0


@router.get("/livez", summary="Is the gateway alive?")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/health", summary="Does the kernel answer?", responses=documented())
@router.get("/readyz", summary="Can requests be served?", responses=documented())
async def readyz(request: Request) -> Response:
    """503 until the kernel answers and a device is up."""
    probe = await request.app.state.callers.probe()
    try:
        async with asyncio.timeout(READY_S):
            devices = (await probe.aio.call(table.Lsdev())).devices
    except TimeoutError:
        raise errors.DeviceUnavailable("the kernel does not answer") from None
    if not any(device.state in ("ready", "busy") for device in devices):
        raise errors.DeviceUnavailable("no device is up yet")
    return json({"status": "ok"})


@router.get("/version", summary="The gateway's version")
async def version() -> dict[str, str]:
    return {"version": installed_version("llmasos")}


class Tokenize(Body):
    model: str = Field(max_length=256)
    prompt: str | None = Field(None, description="A text; or give messages.")
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    def encode(self, llm: LLM) -> list[int]:
        if self.messages is None:
            return llm.tokenizer.encode(self.prompt or "", start=self.add_special_tokens)
        messages = as_messages(self.messages)
        return encode_chat(llm.tokenizer, messages, model=llm.model, answer=self.add_generation_prompt)


@router.post("/tokenize", summary="Tokens of a text or a conversation", responses=documented())
async def tokenize(body: Tokenize, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    llm = await caller.llm(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise errors.InvalidArgument("either prompt or messages", field="prompt")
    tokens = await aside(lambda: body.encode(llm))
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": llm.context_length, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = [llm.tokenizer.shown(token) for token in tokens]
    return json(answer)


class Detokenize(Body):
    model: str = Field(max_length=256)
    tokens: list[Token]


@router.post("/detokenize", summary="Text of tokens", responses=documented())
async def detokenize(body: Detokenize, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    llm = await caller.llm(body.model)
    tokens = checked(llm.tokenizer.vocab_size, body.tokens, "tokens")
    return json({"prompt": await aside(lambda: llm.tokenizer.decode(tokens, special=True))})


def checked(vocab_size: int, tokens: list[int], field: str) -> list[int]:
    """Raises InvalidArgument for a token that the model does not have, in this field."""
    if tokens and max(tokens) >= vocab_size:
        raise errors.InvalidArgument(
            f"token {max(tokens)} is not in the vocabulary of {vocab_size}",
            hint="send texts, or this model's own tokens (/tokenize), not those of another one",
            field=field,
        )
    return tokens
