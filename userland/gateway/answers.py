"""Answers of models as they come, for every API: one prompt, `n` answers, in a process that stays or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from ..aio import AsyncStream
from ..chat import call_format
from ..completion import Answer, Completion
from ..generation import Options
from ..llm import LLM
from ..tools import Piece, Toolbox
from . import problems, record
from .callers import Caller
from .options import Placed

MOST_ANSWERS = 128
"""Answers of one request: prompts times n."""


@dataclass(slots=True)
class Delta:
    """What came of answer `index`: `text` that is certain now, `tokens` of it are new; `pieces` are the same
    text with the calls of tools in between. The last one has `done`."""

    index: int
    text: str
    tokens: int
    answer: Answer
    pieces: list[Piece]
    done: Completion | None = None


@dataclass(slots=True)
class Usage:
    """Tokens, as they are charged. `cached` of the prompt were there already."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def add(self, other: Usage) -> None:
        self.prompt += other.prompt
        self.cached += other.cached
        self.generated += other.generated


@dataclass(slots=True)
class _Part:
    """One answer to come, to `prompt` tokens. `first`: of the answers to them, which are charged once."""

    call: table.Infer
    answer: Answer
    prompt: int
    first: bool


@dataclass(slots=True)
class Asked:
    """What is to be generated, ready to be run. `pid` is the process that stays behind it, `fresh` if it was
    made for this. `shape` is the field that the answers' grammar is made of, if it is one."""

    caller: Caller
    parts: list[_Part] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    pid: int | None = None
    fresh: bool = False
    shape: str | None = None

    async def deltas(self) -> AsyncGenerator[Delta]:
        """What comes, of all answers as it comes. Closing this ends them in the kernel. Raises what the
        kernel answers."""
        if len(self.parts) == 1:
            begun = False
            try:
                async for delta in self._one(0, self.parts[0]):
                    begun = True
                    yield delta
            except errors.LLMasOSError:
                if self.fresh and not begun and self.pid is not None:  # nobody was told of it
                    await _discard(self.caller, self.pid)
                raise
            return
        events: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(maxsize=2 * len(self.parts))

        async def pump(index: int, part: _Part) -> None:
            try:
                async for delta in self._one(index, part):
                    await events.put(delta)
                await events.put(None)
            except errors.LLMasOSError as problem:
                await events.put(problem)

        pumps = [asyncio.create_task(pump(index, part)) for index, part in enumerate(self.parts)]
        try:
            left = len(pumps)
            while left:
                match await events.get():
                    case None:
                        left -= 1
                    case Delta() as delta:
                        yield delta
                    case BaseException() as problem:
                        raise problem
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def whole(self) -> list[Completion]:
        """All answers, once they have ended, in order."""
        found: list[Completion | None] = [None] * len(self.parts)
        async for delta in self.deltas():
            if delta.done is not None:
                found[delta.index] = delta.done
        return [one for one in found if one is not None]

    async def _one(self, index: int, part: _Part) -> AsyncIterator[Delta]:
        answer = part.answer
        stream: AsyncStream[t.InferEvent, table.InferReply] = self.caller.aio.stream(part.call)
        with problems.grammar_of(self.shape):
            async with stream:
                async for event in stream:
                    before = len(answer.tokens)
                    text = answer.feed(event)
                    if answer.stopped:
                        stream.cancel()
                    if text or event.tokens:
                        yield Delta(index, text, len(answer.tokens) - before, answer, answer.pieces)
            reply = stream.reply
        text = answer.flush(reply.finish)
        done = answer.completion(reply)
        done.prompt_tokens = part.prompt
        # What its process held already is not the input that the kernel tells of.
        done.cached_tokens = part.prompt - reply.prompt_tokens + reply.cached_tokens
        used = Usage(part.prompt, done.cached_tokens) if part.first else Usage()
        used.generated = len(answer.tokens)
        self.usage.add(used)
        if (request := record.current()) is not None:
            request.used(part.call.model or "", used.prompt, used.cached, used.generated, str(done.finish))
        yield Delta(index, text, 0, answer, answer.pieces, done)


async def ask(
    caller: Caller,
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    options: Options,
    body: Placed,
    *,
    n: int = 1,
    prompt_scores: bool = False,
    no_tokens: bool = False,
    toolbox: Toolbox | None = None,
    call_prefix: str = "call_",
    shape: str | None = None,
) -> Asked:
    """Plans the answers to `prompts`, `n` to each. `options` are those of `LLM.generate`. `prompt_scores`
    asks for the prompts' log probabilities too; with `no_tokens` that is all. With a
    `toolbox`, of which the prompts tell, answers may be calls, whose ids begin with `call_prefix`. `shape`:
    the field that a grammar is made of. Raises ContextOverflow, InvalidArgument, NoSuchProcess."""
    if len(prompts) * n > MOST_ANSWERS:
        raise errors.InvalidArgument(f"more than {MOST_ANSWERS} answers in one request", field="n")
    if not all(prompts):
        raise errors.InvalidArgument("the prompt is empty", field="prompt")
    sched_class, nice = body.place()
    form = call_format(llm.tokenizer.template)
    if toolbox is not None:
        options = toolbox.applied(options, form)
    asked = Asked(caller, shape=shape)
    plans = [llm.plan(options, len(prompt)) for prompt in prompts]
    for prompt, plan in zip(prompts, plans, strict=True):
        if plan.max_tokens > llm.context_length - len(prompt):
            raise errors.ContextOverflow(
                f"This model's maximum context length is {llm.context_length} tokens. However, you requested "
                f"{len(prompt) + plan.max_tokens} tokens ({len(prompt)} in the prompt, {plan.max_tokens} in "
                "the answer). Please reduce the length of the prompt or of the answer."
            )
    if body.pid is not None or body.fork_of is not None:
        if len(prompts) * n != 1:
            raise errors.InvalidArgument("a process has one prompt and one answer", field="n")
        asked.pid = await _process(caller, llm, body)
        asked.fresh = not isinstance(body.pid, int)
    for prompt, plan in zip(prompts, plans, strict=True):
        for number in range(n):
            sampling = plan.seeded(number)
            if prompt_scores:
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=True)
            call = table.Infer(
                pid=asked.pid,
                model=None if asked.pid is not None else llm.model,
                tokens=t.pack_tokens(prompt),
                whole=asked.pid is not None,
                max_tokens=0 if no_tokens else plan.max_tokens,
                sampling=sampling,
                deadline_ms=body.deadline_ms,
                sched_class=sched_class,
                nice=nice,
            )
            reader = toolbox.reader(form, call_prefix) if toolbox is not None else None
            answer = Answer(llm.tokenizer, prompt, plan.stop, reader=reader)
            asked.parts.append(_Part(call, answer, len(prompt), number == 0))
    return asked


async def _process(caller: Caller, llm: LLM, body: Placed) -> int:
    """The process that a request goes on with."""
    if body.pid is not None and body.fork_of is not None:
        raise errors.InvalidArgument("either pid or fork_of", field="fork_of")
    if body.pid == "new":
        spawned = await caller.aio.call(table.SpawnModel(llm.model, *body.place(), detached=True))
        return spawned.pid
    pid = body.pid if isinstance(body.pid, int) else body.fork_of
    assert pid is not None
    row = await caller.aio.call(table.StatProcess(pid))
    if row.model != llm.model:
        raise errors.InvalidArgument(f"process {pid} is of {row.model}, not of {llm.model}", field="model")
    if body.fork_of is None:
        return pid
    return (await caller.aio.call(table.Fork(pid, detached=True))).pids[0]


async def _discard(caller: Caller, pid: int) -> None:
    """Ends a process that nobody was told of, and takes it off its parent's hands."""
    with suppress(errors.NotFound):  # one without a parent is gone at once
        await caller.aio.call(table.Kill(pid))
        await caller.aio.call(table.Wait(pid))


def sampling_options(llm: LLM, **wanted: Any) -> Options:
    """`generate`'s options of those that OpenAI's APIs share: temperature 0 is greedy, else it draws; what is
    None is the model's own, else 1."""
    generation = llm.tokenizer.generation
    given = {name: value for name, value in wanted.items() if value is not None}
    temperature = given.pop("temperature", generation.get("temperature", 1.0))
    options: dict[str, Any] = {"do_sample": temperature > 0, **given}
    if temperature > 0:
        options["temperature"] = temperature
        options.setdefault("top_k", generation.get("top_k", 0))
        options.setdefault("top_p", generation.get("top_p", 1.0))
    else:
        for name in ("top_k", "top_p", "min_p"):
            options.pop(name, None)
    return cast(Options, options)
