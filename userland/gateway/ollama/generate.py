"""/api/generate: a text that goes on, or one thing that the user says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from ...chat import encode_chat
from ...completion import Completion
from ...llm import LLM
from ...tokenizer import Part
from ..answers import Asked
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import aside, attend, json
from ..options import Token
from ..system import checked
from .shared import Asking, Clock, answer, ended, line, lines, load, now, steps

router = APIRouter(prefix="/api/generate", tags=["ollama"])


class GenerateRequest(Asking):
    NOT_DONE = {
        **Asking.NOT_DONE,
        "height": (),
        "images": ([],),
        "steps": (),
        "suffix": ("",),
        "template": ("",),
        "width": (),
    }

    prompt: str = ""
    system: str = ""
    raw: bool = Field(
        False, description="The prompt is taken as it is, with the control tokens that it spells."
    )
    context: list[Token] = Field([], max_length=1 << 20, description="As the answer before had it.")

    def tokens(self, llm: LLM) -> list[int]:
        tokenizer, most = llm.tokenizer, llm.context_length
        if self.raw:
            found = tokenizer.encode_parts([Part(self.prompt, True)], most)
            start = tokenizer.encode("")
            prompt = found if found[: len(start)] == start else [*start, *found]
        elif tokenizer.template or self.system:
            system = [{"role": "system", "content": self.system}] if self.system else []
            said = [*system, {"role": "user", "content": self.prompt}]
            prompt = encode_chat(tokenizer, said, model=llm.model, most=most)
        else:
            prompt = tokenizer.encode(self.prompt, start=not self.context, most=most)
        return [*checked(tokenizer.vocab_size, self.context, "context"), *prompt]


@router.post("", summary="Continue a text", responses=documented())
async def create(
    request: Request, body: GenerateRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    """As JSON lines unless `stream` is false. Without a prompt the model is only loaded."""
    clock = Clock()
    llm = await caller.llm(body.model_name(body.model))
    if not body.prompt and not body.context:
        return json({**await attend(request, load(caller, llm, body, clock)), "response": ""})
    tokens = await aside(lambda: body.tokens(llm))
    asked = await answer(caller, llm, tokens, body)
    clock.asked()
    answering = _Answering(asked, clock, body, tokens)
    if body.stream:
        return await lines(answering.lines()).begun()
    return json(await attend(request, answering.whole()))


class _Answering:
    def __init__(self, asked: Asked, clock: Clock, body: GenerateRequest, tokens: list[int]) -> None:
        self._asked, self._clock, self._body, self._tokens = asked, clock, body, tokens

    async def lines(self) -> AsyncIterator[bytes]:
        async for step in steps(self._asked, self._clock, self._body):
            scores = {} if step.scores is None else {"logprobs": step.scores}
            words = "".join(piece for piece in step.pieces if isinstance(piece, str))
            if words or scores:
                yield line({**self._head(), "response": words, "done": False, **scores})
            if step.done is not None:
                yield line({**self._head(), "response": "", **self._end(step.done)})

    async def whole(self) -> dict[str, Any]:
        scores: list[dict[str, Any]] = []
        async for step in steps(self._asked, self._clock, self._body):
            scores += step.scores or []
            done = step.done
        assert done is not None
        told = {"logprobs": scores} if self._body.logprobs else {}
        return {**self._head(), "response": done.text, **self._end(done), **told}

    def _head(self) -> dict[str, Any]:
        return {"model": self._body.model, "created_at": now()}

    def _end(self, done: Completion) -> dict[str, Any]:
        context = {} if self._body.raw else {"context": [*self._tokens, *done.tokens]}
        return {**ended(self._asked, done), **context, **self._clock.told(done)}
