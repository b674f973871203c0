"""What generate and chat share: options, durations, streams of JSON lines."""

from __future__ import annotations

import datetime
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from pydantic import Field, model_validator

from ...completion import Completion
from ...generation import Options
from ...llm import LLM
from ...tools import Piece, Toolbox
from .. import problems
from ..answers import Asked, ask, sampling_options
from ..callers import Caller
from ..http import EventStream
from ..openai.shared import chat_score
from ..options import Body, Placed

Stop = Annotated[str, Field(min_length=1, max_length=256)]
KeepAlive = Annotated[
    float | str | None,
    Field(
        description="Changes nothing: a model stays as long as there is memory for it, the kernel decides."
    ),
]


class RunOptions(Body):
    """`options` of a request. What the kernel decides (threads, layers on the GPU, batches) is refused."""

    NOT_DONE = {
        "embedding_only": (False,),
        "f16_kv": (True,),
        "logits_all": (False,),
        "low_vram": (False,),
        "main_gpu": (),
        "mirostat": (0,),
        "mirostat_eta": (),
        "mirostat_tau": (),
        "num_batch": (),
        "num_gpu": (-1,),
        "num_thread": (0,),
        "numa": (False,),
        "penalize_newline": (True,),
        "tfs_z": (1,),
        "typical_p": (1,),
        "use_mlock": (False,),
        "use_mmap": (True,),
        "vocab_only": (False,),
    }

    num_ctx: int | None = Field(None, ge=1, lt=2**31, description="Of prompt and answer together.")
    num_keep: int | None = Field(None, description="Of a context that is cut, which never happens here.")
    num_predict: int | None = Field(None, ge=-2, lt=2**31, description="Below 1: to the context's end.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="-1: drawn.")
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: off.")
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=100, description="Counts the whole context.")
    repeat_last_n: int | None = Field(None, description="-1: what repeat_penalty counts anyway.")
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    stop: list[Stop] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _no_window(self) -> RunOptions:
        penalised = self.repeat_penalty not in (None, 1)
        if penalised and self.repeat_last_n not in (None, -1):
            raise ValueError("repeat_last_n is not supported here, repeat_penalty counts the whole context")
        return self


class Asking(Placed):
    """What generate and chat are asked."""

    NOT_DONE = {"shift": (False,), "think": (False,), "truncate": (False,)}

    model: str = Field(min_length=1, max_length=256)
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description="Or a JSON schema.")
    options: RunOptions | None = None
    keep_alive: KeepAlive = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def given(self) -> RunOptions:
        return self.options or RunOptions.model_validate({})

    def room(self, llm: LLM, tokens: list[int]) -> int:
        """Tokens that an answer can have. Raises ContextOverflow: nothing is cut away."""
        length = min(self.given().num_ctx or llm.context_length, llm.context_length)
        if len(tokens) >= length:
            raise errors.ContextOverflow(
                f"the prompt has {len(tokens)} tokens, the context {length}",
                hint="shorten the prompt, or raise options.num_ctx up to the model's context",
                field="prompt",
            )
        return length - len(tokens)

    def sampling(self, llm: LLM, tokens: list[int]) -> Options:
        """Raises ContextOverflow, InvalidArgument."""
        given = self.given()
        room = self.room(llm, tokens)
        longest = given.num_predict or 0
        return sampling_options(
            llm,
            temperature=given.temperature,
            top_k=None if given.top_k is None else max(0, given.top_k),
            top_p=given.top_p,
            min_p=given.min_p,
            repetition_penalty=given.repeat_penalty,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            seed=None if given.seed in (None, -1) else (given.seed or 0) % 2**63,
            stop=given.stop,
            max_new_tokens=min(longest, room) if longest > 0 else room,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            structured_outputs=None if (schema := self.answer_schema()) is None else {"json": schema},
        )

    def answer_schema(self) -> dict[str, Any] | None:
        """What `format` asks for."""
        if isinstance(self.format, dict):
            return self.format
        return {"type": "object"} if self.format else None


class Clock:
    """Durations of a request in nanoseconds. `prompt_eval` ends with the first token and holds the wait
    for one's turn, `eval` is the rest."""

    def __init__(self) -> None:
        self._begun = time.perf_counter_ns()
        self._asked = self._first = self._begun

    def asked(self) -> None:
        """The model is there and the kernel is asked."""
        self._asked = self._first = time.perf_counter_ns()

    def first(self) -> None:
        """The first token has come."""
        self._first = time.perf_counter_ns()

    def told(self, done: Completion | None = None) -> dict[str, Any]:
        now = time.perf_counter_ns()
        told = {"total_duration": now - self._begun, "load_duration": self._asked - self._begun}
        if done is not None:
            told |= {
                "prompt_eval_count": done.prompt_tokens,
                "prompt_eval_duration": self._first - self._asked,
                "eval_count": len(done.tokens),
                "eval_duration": now - self._first,
            }
        return told


def now() -> str:
    return rfc3339(time.time())


def rfc3339(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


def line(body: Any) -> bytes:
    return msgspec.json.encode(body) + b"\n"


def lines(parts: AsyncIterator[bytes]) -> EventStream:
    """A stream of JSON lines; there is no line that says nothing."""
    return EventStream(parts, _failed, idle=b"", media_type="application/x-ndjson")


def _failed(problem: errors.LLMasOSError) -> bytes:
    return line(problems.body(problems.problem_of(problem), "/api/", ""))


async def load(caller: Caller, llm: LLM, body: Asking, clock: Clock) -> dict[str, Any]:
    """What an empty request asks for: that the model is resident, or need not be any longer. Raises NeverFits
    and the like."""
    told = {"model": body.model, "created_at": now(), "done": True}
    if body.keep_alive in (0, "0", "0s", "0m"):  # the kernel takes it out when its memory is needed
        return {**told, "done_reason": "unload", **clock.told()}
    sched_class, nice = body.place()
    token = t.pack_tokens([0])  # taken in by a process that ends with that
    await caller.aio.call(
        table.Infer(model=llm.model, tokens=token, max_tokens=0, sched_class=sched_class, nice=nice)
    )
    clock.asked()
    return {**told, "done_reason": "load", **clock.told()}


async def answer(
    caller: Caller, llm: LLM, tokens: list[int], body: Asking, toolbox: Toolbox | None = None
) -> Asked:
    if body.top_logprobs is not None and not body.logprobs:
        raise errors.InvalidArgument("top_logprobs needs logprobs: true", field="top_logprobs")
    return await ask(caller, llm, [tokens], body.sampling(llm, tokens), body, toolbox=toolbox)


class Step(msgspec.Struct):
    """What came: words and calls, the `scores` of its tokens if they were asked for, and at the end all."""

    pieces: list[Piece]
    scores: list[dict[str, Any]] | None
    done: Completion | None


async def steps(asked: Asked, clock: Clock, body: Asking) -> AsyncIterator[Step]:
    """An answer as it comes."""
    told = 0
    async for delta in asked.deltas():
        tokens = delta.answer.tokens
        if tokens and not told:
            clock.first()
        scores = None
        if body.logprobs and len(tokens) > told:
            scores = [chat_score(score) for score in delta.answer.scores(told)]
        told = len(tokens)
        yield Step(delta.pieces, scores, delta.done)


def ended(asked: Asked, done: Completion) -> dict[str, Any]:
    """The kernel's reasons hold Ollama's; `deadline` and `killed` are none of them, and no stop or length."""
    pid = {} if asked.pid is None else {"pid": asked.pid}
    return {"done": True, "done_reason": str(done.finish), **pid}
