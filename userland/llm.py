"""LLM: a model of the daemon as a Python object, with Hugging Face's words.

    from llmasos import LLM
    llm = LLM.from_pretrained("smollm2")
    print(llm.generate("The capital of France is", max_new_tokens=8))

`generate`, `stream` and `chat` have the async twins `agenerate`, `astream` and `achat` on the same object.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .aio import AsyncClient
from .chat import Message, call_format, encode_chat, render
from .client import Client, Stream
from .completion import Answer, Completion
from .daemon import ensure_daemon
from .decisions import ABOUT, Docket, Option, Question, decided, docket
from .encoding import Texts, encoded, framed
from .flow import Do, Flow, Run, adrive, drive, reap
from .generation import Model, Options, Plan, check_names, plan
from .models import ensure_model
from .process import Process
from .scoring import Decision, Trial, check_choices, check_length, check_temperature, judged, scored, trial
from .text_stream import TextStream
from .tokenizer import Part, Tokenizer
from .tools import CallReader, Toolbox
from .training import TrainingRun, bar_for, follow, make_recipe, send_dataset, start

if TYPE_CHECKING:
    from .encoding import Floats

Prompts = list[str] | tuple[str, ...]


class LLM:
    """A model in the model filesystem, used through one client. Make one with `from_pretrained`.

    `device`, `dtype`, `sched_class` and `nice` hold for everything it generates.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        device: str = "",
        dtype: str = "",
        sched_class: t.SchedClass = t.SchedClass.INTERACTIVE,
        nice: int = 0,
    ) -> None:
        self.client = client
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.device = device
        self.dtype = dtype
        self.sched_class = sched_class
        self.nice = nice
        self._owns_client = False

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
        prompts = _listed(prompt)
        n = 1 if num_return_sequences is None else num_return_sequences
        return _shaped(drive(self.client, self._generation(prompts, n, options)), prompt, n)

    async def agenerate(
        self,
        prompt: str | Prompts = "",
        *,
        num_return_sequences: int | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion] | list[list[Completion]]:
        """`generate` for asyncio; cancelling the task cancels the generation."""
        check_names(options, "agenerate")
        prompts = _listed(prompt)
        n = 1 if num_return_sequences is None else num_return_sequences
        return _shaped(await adrive(self._async(), self._generation(prompts, n, options)), prompt, n)

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
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[False] = False,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        **options: Unpack[Options],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        stream: Literal[True],
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        **options: Unpack[Options],
    ) -> TextStream: ...
    def chat(
        self,
        messages: str | Sequence[Message],
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
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        **options: Unpack[Options],
    ) -> Completion:
        """`chat` for asyncio."""
        check_names(options, "achat")
        tokens, options, reader = self._conversation(messages, tools, tool_choice, options)
        call, answer = self._one_shot(tokens, self.plan(options, len(tokens)), options, reader=reader)
        flow = _complete([call], [answer])
        return (await adrive(self._async(), flow))[0]

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

    def logprobs(self, text: str) -> list[tuple[str, float]]:
        """The tokens of `text`, each with its natural-log probability after those before it (NaN for the
        first, which has none)."""
        tokens = self._start(text)
        call = self._infer(tokens, max_tokens=0, sampling=t.Sampling(prompt_logprobs=True))
        return self.scores(tokens, self.client.stream(call))

    def scores(
        self, tokens: Sequence[int], stream: Stream[t.InferEvent, table.InferReply]
    ) -> list[tuple[str, float]]:
        """The prompt_logprobs of a stream, with each token's text."""
        with stream:
            found = [chosen.logprob for event in stream for chosen in event.prompt_logprobs]
        if len(found) != len(tokens):
            raise errors.KernelFault(f"{len(found)} scores for {len(tokens)} tokens")
        return [(self.tokenizer.shown(id_), value) for id_, value in zip(tokens, found, strict=True)]

    def score(
        self,
        prompt: str | Sequence[Message],
        choices: Sequence[str],
        *,
        against: Sequence[str | Sequence[Message]] = (),
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> Decision:
        """How likely each of `choices` is to follow `prompt`, a text or a conversation that the assistant is
        to answer; nothing is generated. Prompt and choice are one text: mind the space between them. The
        probabilities are the likelihoods' shares: of the sums over a choice's tokens, or with `per_token` of
        their means, which does not punish long choices.

        `against` are prompts that say nothing of the matter: what the choices score there is subtracted, so
        that no choice wins because its words are common. A `temperature` that was fitted to labelled examples
        makes them as sure as they are right. Raises ContextOverflow, InvalidArgument.
        """
        trials = self._trials(prompt, choices, against)
        return drive(self.client, self._scoring(choices, trials, per_token, temperature))

    async def ascore(
        self,
        prompt: str | Sequence[Message],
        choices: Sequence[str],
        *,
        against: Sequence[str | Sequence[Message]] = (),
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> Decision:
        """`score` for asyncio; cancelling the task ends it in the kernel."""
        trials = await asyncio.to_thread(self._trials, prompt, choices, against)
        return await adrive(self._async(), self._scoring(choices, trials, per_token, temperature))

    @overload
    def decide(
        self,
        text: str,
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[Decision]: ...
    @overload
    def decide(
        self,
        text: Prompts,
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[list[Decision]]: ...
    def decide(
        self,
        text: str | Prompts,
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[Decision] | list[list[Decision]]:
        """Typed questions about a text, answered by the likelihoods of their options, without generating; of
        a list of texts a list. `calibrate`: against what they are for a text that says nothing. `temperature`
        as in `score`. Raises ContextOverflow, InvalidArgument."""
        made = self.decide_all(text, questions, calibrate=calibrate, temperature=temperature)
        return made[0] if isinstance(text, str) else made

    @overload
    async def adecide(
        self,
        text: str,
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[Decision]: ...
    @overload
    async def adecide(
        self,
        text: Prompts,
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[list[Decision]]: ...
    async def adecide(
        self,
        text: str | Prompts,
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[Decision] | list[list[Decision]]:
        """`decide` for asyncio; cancelling the task cancels it."""
        made = await self.adecide_all(text, questions, calibrate=calibrate, temperature=temperature)
        return made[0] if isinstance(text, str) else made

    def decide_all(
        self,
        texts: Sequence[str],
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[list[Decision]]:
        """`decide` for many texts at once, [text][question]."""
        asked = self._docket(texts, questions, calibrate)
        return drive(self.client, decided(self._spawn(label="decide"), asked, temperature=temperature))

    async def adecide_all(
        self,
        texts: Sequence[str],
        questions: Sequence[Question] | Question,
        *,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[list[Decision]]:
        """`decide_all` for asyncio."""
        asked = await asyncio.to_thread(self._docket, texts, questions, calibrate)
        flow = decided(self._spawn(label="decide"), asked, temperature=temperature)
        return await adrive(self._async(), flow)

    @overload
    def classify(
        self,
        text: str,
        labels: Sequence[str] | Mapping[str, str],
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> Decision: ...
    @overload
    def classify(
        self,
        text: Prompts,
        labels: Sequence[str] | Mapping[str, str],
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[Decision]: ...
    def classify(
        self,
        text: str | Prompts,
        labels: Sequence[str] | Mapping[str, str],
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> Decision | list[Decision]:
        """Which of `labels` fits a text (zero-shot classification): its `label`, and `probabilities` of all;
        of a list of texts a list. `labels` may map them to what they mean; `instructions` is a question that
        they answer.

        llm.classify("What a film!", ["positive", "negative"], instructions="What is the sentiment?").label
        """
        question = _labelled(instructions, labels)
        made = self.decide_all(text, question, calibrate=calibrate, temperature=temperature)
        return made[0][0] if isinstance(text, str) else [one for (one,) in made]

    @overload
    async def aclassify(
        self,
        text: str,
        labels: Sequence[str] | Mapping[str, str],
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> Decision: ...
    @overload
    async def aclassify(
        self,
        text: Prompts,
        labels: Sequence[str] | Mapping[str, str],
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> list[Decision]: ...
    async def aclassify(
        self,
        text: str | Prompts,
        labels: Sequence[str] | Mapping[str, str],
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> Decision | list[Decision]:
        """`classify` for asyncio."""
        question = _labelled(instructions, labels)
        made = await self.adecide_all(text, question, calibrate=calibrate, temperature=temperature)
        return made[0][0] if isinstance(text, str) else [one for (one,) in made]

    def _trials(
        self,
        prompt: str | Sequence[Message],
        choices: Sequence[str],
        against: Sequence[str | Sequence[Message]],
    ) -> list[Trial]:
        check_choices(choices)
        trials = []
        for one in [prompt, *([against] if isinstance(against, str) else against)]:
            behind = self._behind(one)
            start = behind("")
            check_length(len(start), self.context_length)  # before it is encoded once a choice
            trials.append(trial(start, [behind(choice) for choice in choices], self.context_length))
        return trials

    def _scoring(
        self, choices: Sequence[str], trials: list[Trial], per_token: bool, temperature: float
    ) -> Flow[Decision]:
        check_temperature(temperature)
        found = yield from scored(self._spawn(label="score"), trials)
        return judged(
            choices,
            found.logprobs[0],
            found.logprobs[1:],
            per_token=per_token,
            temperature=temperature,
            tokens=sum(found.tokens),
            cached=found.cached,
        )

    def _docket(
        self, texts: Sequence[str], questions: Sequence[Question] | Question, calibrate: bool
    ) -> Docket:
        self.tokenizer.check_generates(self.model)
        asked = [questions] if isinstance(questions, Question) else questions
        return docket(self.tokenizer, self.context_length, _listed(texts), asked, calibrate)

    def _behind(self, prompt: str | Sequence[Message]) -> Callable[[str], list[int]]:
        """Makes ids of the prompt with a text behind it, tokenised as one."""
        if isinstance(prompt, str):
            return lambda text: self._start(prompt + text)
        parts = render(self.tokenizer, prompt, model=self.model)
        return lambda text: self.tokenizer.encode_parts([*parts, Part(text, False)], self.context_length)

    def embed(self, texts: str | Sequence[str], *, truncate: bool = False) -> Floats:
        """Vectors [n, dimensions] of texts, float32, pooled and normalised as the model's own files say; of
        one text its vector. A text that is too long is an error, or cut at its end with `truncate`. Raises
        ContextOverflow, UnsupportedModel (the model embeds nothing)."""
        return _one_or_all(
            drive(self.client, self._encoding(_listed(texts), t.Encodes.EMBED, truncate)), texts
        )

    async def aembed(self, texts: str | Sequence[str], *, truncate: bool = False) -> Floats:
        """`embed` for asyncio; cancelling the task cancels the call."""
        flow = self._encoding(_listed(texts), t.Encodes.EMBED, truncate)
        return _one_or_all(await adrive(self._async(), flow), texts)

    def encode(
        self, texts: Texts, encodes: str | t.Encodes = t.Encodes.CLASSIFY, *, truncate: bool = False
    ) -> Floats:
        """What an encoder makes of texts, or of pairs of them: with "classify" the logits [n, labels] of a
        classifier or a cross-encoder, with "tokens" those [tokens, labels] of all tokens, special ones
        included. Raises as `embed`."""
        return drive(self.client, self._encoding(texts, t.Encodes(encodes), truncate))

    async def aencode(
        self, texts: Texts, encodes: str | t.Encodes = t.Encodes.CLASSIFY, *, truncate: bool = False
    ) -> Floats:
        """`encode` for asyncio."""
        return await adrive(self._async(), self._encoding(texts, t.Encodes(encodes), truncate))

    def _encoding(self, texts: Texts, encodes: t.Encodes, truncate: bool) -> Flow[Floats]:
        call = table.Encode(
            self.model,
            encodes,
            sched_class=self.sched_class,
            nice=self.nice,
            device=self.device,
            dtype=self.dtype,
            label=encodes,
        )
        return encoded(call, framed(self.tokenizer, texts, self.context_length, truncate))

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

    def _start(self, prompt: str) -> list[int]:
        """Ids of a prompt that begins a context; an empty one is BOS alone."""
        if tokens := self.tokenizer.encode(prompt, most=self.context_length):
            return tokens
        if self.tokenizer.bos_id is None:
            raise errors.InvalidArgument(f"{self.model} has no BOS token to begin with", field="prompt")
        return [self.tokenizer.bos_id]

    def _conversation(
        self, messages: str | Sequence[Message], tools: Sequence[Any] | None, choice: Any, options: Options
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

    def _async(self) -> AsyncClient:
        return AsyncClient(connection=self.client.connection)

    def _generation(
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
        call = self._infer(
            tokens,
            max_tokens=plan.max_tokens,
            sampling=plan.sampling,
            beams=plan.beams,
            deadline_ms=plan.deadline_ms,
        )
        full = bool(options.get("return_full_text")) if full is None else full
        return call, self._answer(tokens, plan, full, reader)

    def _answer(self, tokens: list[int], plan: Plan, full: bool, reader: CallReader | None = None) -> Answer:
        prefix = self.tokenizer.decode(tokens) if full else ""
        return Answer(self.tokenizer, tokens, plan.stop, prefix, reader)

    def _infer(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int,
        sampling: t.Sampling,
        beams: t.Beams | None = None,
        deadline_ms: int | None = None,
    ) -> table.Infer:
        return table.Infer(
            model=self.model,
            tokens=t.pack_tokens(tokens),
            max_tokens=max_tokens,
            sampling=sampling,
            beams=beams,
            sched_class=self.sched_class,
            nice=self.nice,
            device=self.device,
            dtype=self.dtype,
            deadline_ms=deadline_ms,
        )

    def _spawn(self, *, label: str = "", detached: bool = False) -> table.SpawnModel:
        return table.SpawnModel(
            self.model,
            sched_class=self.sched_class,
            nice=self.nice,
            device=self.device,
            dtype=self.dtype,
            label=label,
            detached=detached,
        )

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


def _listed(texts: str | Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise errors.InvalidArgument(
            f"a text is a str, or several are a list, not {type(texts).__name__}", field="prompt"
        )
    listed = list(texts)
    if wrong := next((type(one).__name__ for one in listed if not isinstance(one, str)), ""):
        raise errors.InvalidArgument(f"a text is a str, also in a list, not {wrong}", field="prompt")
    return listed


def _labelled(instructions: str, labels: Sequence[str] | Mapping[str, str]) -> Question:
    meanings = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, "")
    if isinstance(labels, str) or len(meanings) < len(labels):
        raise errors.InvalidArgument("labels are a list, none of them twice", field="labels")
    return Question(instructions, tuple(Option(name, meaning) for name, meaning in meanings.items()))


def _one_or_all(rows: Floats, texts: str | Sequence[str]) -> Floats:
    return rows[0] if isinstance(texts, str) else rows


def _shaped(
    results: list[list[Completion]], prompt: str | Prompts, n: int
) -> Completion | list[Completion] | list[list[Completion]]:
    if isinstance(prompt, str):
        return results[0] if n > 1 else results[0][0]
    return results if n > 1 else [one for (one,) in results]


def _complete(calls: list[table.Infer], answers: list[Answer]) -> Flow[list[Completion]]:
    replies = yield Run(calls, answers)
    return [answer.completion(reply) for answer, reply in zip(answers, replies, strict=True)]


def _context_length(client: Client, model: str) -> int:
    """Tokens a context of the model can hold. Raises UnsupportedModel when the model does not say."""
    length = client.call(table.Stat(f"/models/{model}")).details.get("context_length")
    if not isinstance(length, int) or length <= 0:
        raise errors.UnsupportedModel(f"{model} does not say how long its context is", hint="pull it again")
    return length


__all__ = ["LLM", "Completion", "Process", "TextStream"]
