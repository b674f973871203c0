"""LLM: a model of the daemon as a Python object, with Hugging Face's words.

    from llmasos import LLM
    llm = LLM.from_pretrained("smollm2")
    print(llm.generate("The capital of France is", max_new_tokens=8))

`generate`, `stream` and `chat` have the async twins `agenerate`, `astream` and `achat` on the same object.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Literal, Unpack, overload

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .chat import call_format, encode_chat
from .client import Client
from .completion import Answer, Completion
from .daemon import ensure_daemon
from .flow import Do, Flow, Run, adrive, drive, reap
from .generation import Model, Options, Plan, check_names, plan
from .models import ensure_model
from .process import Process
from .text_reader import Prompt, Prompts, TextReader, listed
from .text_stream import TextStream
from .tokenizer import Tokenizer
from .tools import CallReader, Toolbox
from .training import TrainingRun, bar_for, follow, make_recipe, send_dataset, start


class ChatOptions(Options, total=False):
    """Options of `chat`."""

    tools: Sequence[Any] | None
    tool_choice: Any


class LLM(TextReader):
    """A model in the model filesystem, used through one client. Make one with `from_pretrained`.

    `device`, `dtype`, `sched_class` and `nice` hold for everything it generates.
    """

    _owns_client = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str = "",
        dtype: str = "",
        sched_class: str = "interactive",
        nice: int = 0,
        address: str | None = None,
        label: str = "",
        client: Client | None = None,
        progress: bool | None = None,
    ) -> LLM:
        """Finds a model and readies it: starts the user's daemon and pulls the model if need be.

        `name_or_path` is a name ("smollm2"), a Hugging Face repository ("owner/name"), a local folder or a
        .gguf file. `device` ("cpu", "cuda:0") empty: the kernel chooses. `dtype` of the weights
        ("float32", "bfloat16", "int8", "int4", "float8" on CUDA) empty: what suits how they are stored.
        `label` makes this a sub-tenant of its own; `client` uses an open connection instead.
        Raises DaemonUnreachable, NoSuchModel, PullFailed, RefusedFile, UnsupportedModel.
        """
        try:
            chosen_class = t.SchedClass(sched_class)
        except ValueError:
            known = ", ".join(t.SchedClass)
            raise errors.InvalidArgument(
                f"no scheduling class {sched_class!r}", hint=f"one of {known}", field="sched_class"
            ) from None
        used = client or ensure_daemon(address, label=label)
        try:
            model = ensure_model(used, name_or_path, progress=progress)
            llm = cls(
                used,
                model,
                Tokenizer.load(used, model),
                context_length=_context_length(used, model),
                device=device,
                dtype=dtype,
                sched_class=chosen_class,
                nice=nice,
            )
        except BaseException:
            if client is None:
                used.close()
            raise
        llm._owns_client = client is None
        return llm

    # num_return_sequences=1 is answered like none at all.
    @overload
    def generate(
        self, prompt: str = "", *, num_return_sequences: None = None, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: str = "", *, num_return_sequences: int, **options: Unpack[Options]
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Prompts, *, num_return_sequences: None = None, **options: Unpack[Options]
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Prompts, *, num_return_sequences: int, **options: Unpack[Options]
    ) -> list[list[Completion]]: ...
    def generate(
        self,
        prompt: str | Prompts = "",
        *,
        num_return_sequences: int | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """Continues a prompt, or several at once. Options as in Hugging Face `generate`, see Options.

        Returns a str (a Completion) for one prompt; a list for a list of prompts or with
        num_return_sequences above 1; a list of lists with both. The text begins with the prompt unless
        return_full_text=False. Raises TypeError for an unknown option, InvalidArgument, ContextOverflow.
        """
        check_names(options, "generate")
        return drive(self.client, self._generation(prompt, num_return_sequences, options))

    async def agenerate(
        self,
        prompt: str | Prompts = "",
        *,
        num_return_sequences: int | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """`generate` for asyncio; cancelling the task cancels the generation."""
        check_names(options, "agenerate")
        return await adrive(self._async(), self._generation(prompt, num_return_sequences, options))

    def stream(self, prompt: str = "", **options: Unpack[Options]) -> TextStream:
        """Continues a prompt piece by piece."""
        check_names(options, "stream")
        return self._stream(self._start(prompt), options)

    def astream(self, prompt: str = "", **options: Unpack[Options]) -> AsyncIterator[str]:
        """`stream` for asyncio: an async generator of pieces; closing it cancels the generation."""
        check_names(options, "astream")
        return self._astream(self._start(prompt), options)

    @overload
    def chat(
        self, messages: Prompt, *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Prompt, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> TextStream: ...
    def chat(
        self,
        messages: Prompt,
        *,
        stream: bool = False,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        **options: Unpack[Options],
    ) -> Completion | TextStream:
        """Answers a conversation: [{"role": "user", "content": "…"}, …], or what the user says.

        `tools` are functions that the model may ask to be called, as OpenAI's API has them, `tool_choice` is
        "auto", "none", "required" or names one. The completion's `tool_calls` are what it wants; append its
        `message` and the results, [{"role": "tool", "tool_call_id": "…", "content": "…"}], and chat again.

        Raises UnsupportedModel when the model has no chat template, InvalidArgument.
        """
        check_names(options, "chat")
        tokens, options, reader = self._conversation(messages, tools, tool_choice, options)
        pieces = self._stream(tokens, options, reader)
        if stream:
            return pieces
        with pieces:
            for _ in pieces:
                pass
        return pieces.completion

    async def achat(
        self,
        messages: Prompt,
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        **options: Unpack[Options],
    ) -> Completion:
        """`chat` for asyncio."""
        check_names(options, "achat")
        tokens, options, reader = self._conversation(messages, tools, tool_choice, options)
        call, answer = self._one_shot(tokens, self.plan(options, len(tokens)), options, reader=reader)
        return await adrive(self._async(), _complete(call, answer))

    def process(self, prompt: str | None = None, *, label: str = "", detached: bool = False) -> Process:
        """Spawns a process, an empty context or one that has taken `prompt` in.

        It ends with this LLM's session unless `detached`.
        """
        process = Process(self, self.client.call(self._spawn(label=label, detached=detached)).pid)
        try:
            if prompt is not None:
                process.append(prompt)
        except BaseException:
            process.close()
            raise
        return process

    def restore(self, name: str, *, device: str = "", detached: bool = False) -> Process:
        """The process that was saved as /sessions/NAME, as it was then. An answer that was under way goes on
        with `resume()`. Raises NoSuchFile, Corrupt, InvalidArgument (it is of another model)."""
        model = self.client.call(table.Stat(f"/sessions/{name}")).details.get("model", "")
        if model and model not in (self.model, f"{self.model}:latest"):
            raise errors.InvalidArgument(
                f"snapshot {name} is of {model}, not of {self.model}", field="source"
            )
        reply = self.client.call(table.Restore(name, device, detached))
        unfinished = None if reply.max_tokens is None else (reply.sampling, reply.max_tokens)
        return Process(self, reply.pid, unfinished)

    def fork(self, prompt: str, n: int = 2) -> list[Process]:
        """`n` processes that share one prompt, which is computed and kept in memory once."""
        first = self.process(prompt)
        try:
            return [first, *first.fork(n - 1)] if n > 1 else [first]
        except BaseException:
            first.close()
            raise

    def train(
        self,
        dataset: str | os.PathLike[str],
        name: str = "",
        *,
        sched_class: str = "batch",
        nice: int = 0,
        detached: bool = False,
        progress: bool | None = None,
        **recipe: Any,
    ) -> TrainingRun:
        """Starts training this model and returns its run, which goes on beside whatever else is asked.

        `dataset` is a local file (JSON lines, CSV, parquet, text), which is sent, or the name of a data set
        that the daemon has. `name` is what the adapter, or the model, will be called (without one: as the
        data set). `recipe` are training.OPTIONS: method ("lora", "full", "pretrain"), learning_rate,
        num_train_epochs, r, lora_alpha, … Raises InvalidArgument, NoSuchFile, AlreadyExists.
        """
        chosen = make_recipe(recipe)
        source = os.path.expanduser(dataset)
        bar = bar_for(source, progress)
        if os.path.exists(source):
            with bar or contextlib.nullcontext():
                source = send_dataset(self.client, source, show=bar.sent if bar else None)
        return start(
            self.client,
            self.model,
            source,
            name or os.path.splitext(source)[0],
            chosen,
            sched_class=sched_class,
            nice=nice,
            device=self.device,
            detached=detached,
        )

    def fine_tune(
        self,
        dataset: str | os.PathLike[str],
        name: str = "",
        *,
        sched_class: str = "batch",
        nice: int = 0,
        progress: bool | None = None,
        **recipe: Any,
    ) -> LLM:
        """Trains this model, shows how that goes, and returns what it has become, ready to generate; this one
        stays as it is. Arguments as of `train`. Raises what the run failed of."""
        run = self.train(dataset, name, sched_class=sched_class, nice=nice, progress=progress, **recipe)
        made = follow(run, bar_for(run.model, progress)).model
        return LLM(
            self.client,
            made,
            self.tokenizer,
            context_length=_context_length(self.client, made),
            device=self.device,
            dtype=self.dtype,
            sched_class=self.sched_class,
            nice=self.nice,
        )

    def plan(self, options: Options, prompt_tokens: int, results: int = 1) -> Plan:
        """What options mean for this model and a context of `prompt_tokens`."""
        model = Model(self.context_length, self.tokenizer.eos_ids, self.tokenizer.generation)
        return plan(options, model, prompt_tokens=prompt_tokens, results=results)

    def close(self) -> None:
        """Ends the session, and with it this LLM's processes. The daemon goes on."""
        if self._owns_client:
            self.client.close()

    def _conversation(
        self, messages: Prompt, tools: Sequence[Any] | None, choice: Any, options: Options
    ) -> tuple[list[int], Options, CallReader | None]:
        """The prompt, the options, and who reads calls of tools out of the answer."""
        toolbox = Toolbox.from_openai(tools, choice)
        told = toolbox.tools if toolbox is not None else ()
        tokens = encode_chat(self.tokenizer, messages, model=self.model, tools=told, most=self.context_length)
        if toolbox is None:
            return tokens, options, None
        form = call_format(self.tokenizer.template)
        return tokens, toolbox.applied(options, form), toolbox.reader(form)

    def _stream(self, tokens: list[int], options: Options, reader: CallReader | None = None) -> TextStream:
        call, answer = self._one_shot(tokens, self.plan(options, len(tokens)), options, reader=reader)
        return TextStream(self.client.stream(call), answer)

    async def _astream(self, tokens: list[int], options: Options) -> AsyncIterator[str]:
        call, answer = self._one_shot(tokens, self.plan(options, len(tokens)), options)
        async with self._async().stream(call) as stream:
            async for event in stream:
                if piece := answer.feed(event):
                    yield piece
                if answer.stopped:
                    stream.cancel()
        for sequence in stream.reply.sequences[:1]:
            answer.feed(t.InferEvent(tokens=sequence.tokens))
        if last := answer.flush():
            yield last

    def _generation(
        self, prompt: str | Prompts, wanted: int | None, options: Options
    ) -> Flow[Completion | list[Completion] | list[list[Completion]]]:
        results = 1 if wanted is None else wanted
        made = yield from self._completions(listed(prompt), results, options)
        found = made if results > 1 else [one for (one,) in made]
        return found[0] if isinstance(prompt, str) else found

    def _completions(
        self, prompts: Sequence[str], results: int, options: Options
    ) -> Flow[list[list[Completion]]]:
        """Every prompt a one-shot infer, or, for several samples of one, forks of one process."""
        inputs = [self._start(prompt) for prompt in prompts]
        plans = [self.plan(options, len(tokens), results) for tokens in inputs]
        full = options.get("return_full_text") is not False
        if results > 1 and all(plan.beams is None for plan in plans):
            return (yield from self._samples(inputs, plans, full))
        pairs = [
            self._one_shot(tokens, plan, options, full) for tokens, plan in zip(inputs, plans, strict=True)
        ]
        calls, answers = [call for call, _ in pairs], [answer for _, answer in pairs]
        replies = yield Run(calls, answers)
        return [
            self._beam_results(tokens, plan, reply, full) if plan.beams else [answer.completion(reply)]
            for tokens, plan, reply, answer in zip(inputs, plans, replies, answers, strict=True)
        ]

    def _samples(
        self, inputs: Sequence[list[int]], plans: Sequence[Plan], full: bool
    ) -> Flow[list[list[Completion]]]:
        """Spawns a process a prompt, takes all but the prompt's last token in, forks it once a sample."""
        pids: list[int] = []
        try:
            forks: list[list[int]] = []
            for _ in inputs:
                pids.append((yield Do(self._spawn())).pid)
            parents = list(pids)
            heads = [(pid, tokens[:-1]) for pid, tokens in zip(parents, inputs, strict=True) if tokens[:-1]]
            yield Run(
                [table.Infer(pid, tokens=t.pack_tokens(head), max_tokens=0) for pid, head in heads],
                [Answer(self.tokenizer, ()) for _ in heads],
            )
            for pid, plan in zip(parents, plans, strict=True):
                forks.append((yield Do(table.Fork(pid, plan.samples))).pids)
                pids += forks[-1]
            calls, answers = [], []
            for tokens, plan, children in zip(inputs, plans, forks, strict=True):
                for index, pid in enumerate(children):
                    calls.append(
                        table.Infer(
                            pid,
                            tokens=t.pack_tokens(tokens[-1:]),
                            max_tokens=plan.max_tokens,
                            deadline_ms=plan.deadline_ms,
                            sampling=plan.seeded(index),
                            exit=True,
                        )
                    )
                    answers.append(self._answer(tokens, plan, full))
            replies = yield Run(calls, answers)
        finally:
            yield from reap(pids)
        done = iter([answer.completion(reply) for answer, reply in zip(answers, replies, strict=True)])
        return [[next(done) for _ in children] for children in forks]

    def _beam_results(
        self, tokens: list[int], plan: Plan, reply: table.InferReply, full: bool
    ) -> list[Completion]:
        if not reply.sequences:  # its end came before its first step, or from outside
            wanted = plan.beams.num_return_sequences if plan.beams else 1
            return [self._answer(tokens, plan, full).completion(reply) for _ in range(wanted)]
        completions = []
        for sequence in reply.sequences:
            answer = self._answer(tokens, plan, full)
            answer.feed(t.InferEvent(tokens=sequence.tokens))
            answer.flush()
            completions.append(answer.completion(reply, finish=sequence.finish, score=sequence.score))
        return completions

    def _one_shot(
        self,
        tokens: list[int],
        plan: Plan,
        options: Options,
        full: bool | None = None,
        reader: CallReader | None = None,
    ) -> tuple[table.Infer, Answer]:
        call = table.Infer(
            tokens=t.pack_tokens(tokens),
            max_tokens=plan.max_tokens,
            sampling=plan.sampling,
            beams=plan.beams,
            deadline_ms=plan.deadline_ms,
            **self._place,
        )
        full = bool(options.get("return_full_text")) if full is None else full
        return call, self._answer(tokens, plan, full, reader)

    def _answer(self, tokens: list[int], plan: Plan, full: bool, reader: CallReader | None = None) -> Answer:
        prefix = self.tokenizer.decode(tokens) if full else ""
        return Answer(self.tokenizer, tokens, plan.stop, prefix, reader)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = [
            f"context {self.context_length}",
            f"vocabulary {self.tokenizer.vocab_size}",
            "chat" if self.tokenizer.template else "no chat template",
            f"{self.sched_class} nice {self.nice}",
            *([f"on {self.device}"] if self.device else []),
        ]
        return f"<LLM {self.model} ({', '.join(facts)}) at {self.client.address}>"


def _complete(call: table.Infer, answer: Answer) -> Flow[Completion]:
    (reply,) = yield Run([call], [answer])
    return answer.completion(reply)


def _context_length(client: Client, model: str) -> int:
    """Tokens a context of the model can hold. Raises UnsupportedModel when the model does not say."""
    length = client.call(table.Stat(f"/models/{model}")).details.get("context_length")
    if not isinstance(length, int) or length <= 0:
        raise errors.UnsupportedModel(f"{model} does not say how long its context is", hint="pull it again")
    return length


__all__ = ["LLM", "Completion", "Process", "TextStream"]
