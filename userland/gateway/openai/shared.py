"""What chat completions and completions share: options of sampling, usage, reasons, streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from pydantic import Field

from ...completion import TokenScore
from ...generation import Options
from ...llm import LLM
from ...structured import grammar_of
from ...tokenizer import Shown
from .. import problems
from ..answers import Usage, sampling_options
from ..http import EventStream
from ..options import Body, Hinted, Placed

DONE = b"data: [DONE]\n\n"

# `deadline` and `killed` are no words of OpenAI's: to call them length or stop would be a lie.
REASONS = {
    t.Finish.STOP: "stop",
    t.Finish.LENGTH: "length",
    t.Finish.CANCELLED: "cancelled",
    t.Finish.KILLED: "killed",
    t.Finish.DEADLINE: "deadline",
}

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class StreamOptions(Body):
    NOT_DONE = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class Sampling(Placed, Hinted):
    """How tokens are chosen. `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and `structured_outputs`
    are extensions, as in vLLM."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    structured_outputs: dict[str, Any] | None = Field(
        None, description="As in vLLM: one of json (a schema), json_object, regex, choice, grammar (Lark)."
    )

    def shape(self, *fields: str) -> str | None:
        """The field that the answer's grammar is made of, of `fields` and its own; None if it is not one."""
        given = [*fields, *(["structured_outputs"] if self.structured_outputs else [])]
        return given[0] if len(given) == 1 else None

    def options(
        self,
        llm: LLM,
        max_tokens: int | None,
        logprobs: int | None,
        response_format: Mapping[str, Any] | None = None,
    ) -> Options:
        """Raises InvalidArgument."""
        return sampling_options(
            llm,
            structured_outputs=grammar_of(response_format, self.structured_outputs),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            min_new_tokens=self.min_tokens,
            seed=None if self.seed is None else self.seed % 2**63,
            stop=self.stop,
            max_new_tokens=max_tokens,
            logprobs=logprobs,
        )


class Sampled(Sampling):
    """One or several answers of that, whole or as a stream."""

    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.generated,
        "total_tokens": used.prompt + used.generated,
        "prompt_tokens_details": {"cached_tokens": used.cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def event(body: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def stream(parts: AsyncIterator[bytes]) -> EventStream:
    return EventStream(parts, _failed)


def _failed(problem: errors.LLMasOSError) -> bytes:
    return event(problems.body(problems.problem_of(problem), "/v1/", ""))


def chat_score(score: TokenScore) -> dict[str, Any]:
    """An entry of a chat completion's logprobs."""
    top = [_scored(text, logprob) for text, logprob in score.top]
    return {**_scored(score.text, score.logprob), "top_logprobs": top}


def _scored(text: Shown, logprob: float) -> dict[str, Any]:
    return {"token": str(text), "logprob": logprob, "bytes": list(text.data)}
