"""/v1/completions: texts that go on."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from pydantic import Field
from starlette.responses import Response

from ...completion import Completion, TokenScore
from ...llm import LLM
from ...tokenizer import Detokenizer, Shown
from ..answers import Asked, ask
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import aside, attend, json, new_id
from ..options import Token
from ..problems import too_long_in
from ..system import checked
from .shared import DONE, REASONS, Sampled, event, stream, usage

router = APIRouter(prefix="/v1/completions", tags=["openai"])

DEFAULT_TOKENS = 16


class CompletionRequest(Sampled):
    NOT_DONE = {"best_of": (1,), "logit_bias": ({},), "suffix": ("",)}

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(
        description="A text, tokens, or several of either."
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description=f"Default {DEFAULT_TOKENS}.")
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)


@router.post("", summary="Continue texts", responses=documented())
async def create(
    request: Request, body: CompletionRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    asked, head, llm, echoes = await prepare(caller, body)
    if body.stream:
        return await stream(_chunks(asked, head, body, llm, echoes)).begun()
    return json(await attend(request, whole(asked, head, llm, echoes, body)))


async def prepare(caller: Caller, body: CompletionRequest) -> tuple[Asked, dict[str, Any], LLM, list[str]]:
    """What is to be generated, the head of the answer, by which model, behind which texts. Raises what is
    wrong with the request."""
    llm = await caller.llm(body.model_name(body.model))
    with too_long_in("prompt"):
        prompts = await aside(lambda: _prompts(llm, body.prompt))
    longest = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if longest == 0 and not body.echo:
        raise errors.InvalidArgument("max_tokens 0 needs echo", field="max_tokens")
    scored = body.echo and body.logprobs is not None
    if scored and body.stream:
        raise errors.InvalidArgument("echo with logprobs does not stream", field="stream")
    with too_long_in("prompt"):
        asked = await ask(
            caller,
            llm,
            prompts,
            body.options(llm, longest, body.logprobs),
            body,
            n=body.n,
            prompt_scores=scored,
            no_tokens=longest == 0,
            shape=body.shape(),
        )
    head = {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": None,
        **({"service_tier": body.service_tier} if body.service_tier else {}),
        **({"pid": asked.pid} if asked.pid is not None else {}),
    }
    echoes = [llm.tokenizer.decode(prompt) if body.echo else "" for prompt in prompts]
    return asked, head, llm, echoes


async def whole(
    asked: Asked, head: dict[str, Any], llm: LLM, echoes: list[str], body: CompletionRequest
) -> dict[str, Any]:
    """The answer, once it has ended."""
    done = await asked.whole()
    choices = [
        _choice(index, asked, completion, body, llm, echoes[index // body.n])
        for index, completion in enumerate(done)
    ]
    return {**head, "choices": choices, "usage": usage(asked.usage)}


def _prompts(llm: LLM, given: Any) -> list[list[int]]:
    if isinstance(given, str):
        given = [given]
    if not given:
        raise errors.InvalidArgument("the prompt is empty", field="prompt")
    if isinstance(given[0], int):
        return [checked(llm.tokenizer.vocab_size, given, "prompt")]
    if isinstance(given[0], str):
        return [llm.tokenizer.encode(text, most=llm.context_length) for text in given]
    return [checked(llm.tokenizer.vocab_size, tokens, "prompt") for tokens in given]


def _choice(
    index: int, asked: Asked, done: Completion, body: CompletionRequest, llm: LLM, echo: str
) -> dict[str, Any]:
    scores = None
    if body.logprobs is not None:
        told, answer = done.logprobs or [], asked.parts[index].answer
        if body.echo:
            told = [*answer.prompt_scores(), *told]
        scores = _scores(told, _Places(llm, () if body.echo else answer.context))
    return {
        "index": index,
        "text": echo + done.text,
        "logprobs": scores,
        "finish_reason": REASONS[done.finish],
    }


class _Places:
    """Where in a text its tokens begin, in characters; parts of one are at its place. `context` are the
    tokens before it, of which `at` characters are shown."""

    def __init__(self, llm: LLM, context: Sequence[int], at: int = 0) -> None:
        self._text, self._at = Detokenizer(llm.tokenizer, context), at

    def of(self, id_: int) -> int:
        """Of the next token."""
        place = self._at
        self._at += len(self._text.feed([id_]))
        return place


def _scores(told: list[TokenScore], places: _Places) -> dict[str, Any]:
    return {
        "tokens": [_name(score.text) for score in told],
        # The first token of all follows nothing, so it has none.
        "token_logprobs": [None if math.isnan(score.logprob) else score.logprob for score in told],
        "top_logprobs": [
            None if math.isnan(score.logprob) else {_name(text): value for text, value in score.top}
            for score in told
        ],
        "text_offset": [places.of(score.id) for score in told],
    }


def _name(token: Shown) -> str:
    """Parts of characters are spelled as OpenAI's server does, for there is no field for bytes here."""
    if not token.data or token.encode() == token.data:
        return str(token)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


async def _chunks(
    asked: Asked, head: dict[str, Any], body: CompletionRequest, llm: LLM, echoes: list[str]
) -> AsyncIterator[bytes]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def chunk(index: int, text: str, finish: str | None = None, scores: Any = None) -> bytes:
        made = {
            **head,
            "choices": [{"index": index, "text": text, "logprobs": scores, "finish_reason": finish}],
        }
        if with_usage:
            made["usage"] = None
        return event(made)

    for index in range(len(asked.parts)):
        if body.echo:
            yield chunk(index, echoes[index // body.n])
    told = [0] * len(asked.parts)
    places = [
        _Places(llm, part.answer.context, len(echoes[index // body.n]))
        for index, part in enumerate(asked.parts)
    ]
    async for delta in asked.deltas():
        index = delta.index
        scores = None
        if body.logprobs is not None and len(delta.answer.tokens) > told[index]:
            fresh = delta.answer.scores(told[index])
            told[index] = len(delta.answer.tokens)
            scores = _scores(fresh, places[index])
        if delta.text or scores:
            yield chunk(index, delta.text, scores=scores)
        if delta.done is not None:
            yield chunk(index, "", REASONS[delta.done.finish])
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(asked.usage)})
    yield DONE
