"""TextReader: what a model makes of texts without writing any: their likelihoods, answers to typed questions
about them, their vectors. LLM (llm.py) is one that also writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .aio import AsyncClient
from .chat import Message, render
from .client import Client, Stream
from .decisions import ABOUT, Docket, Option, Question, decided, docket
from .encoding import Texts, encoded, framed
from .flow import Flow, adrive, drive
from .scoring import Decision, Trial, check_choices, check_length, check_temperature, judged, scored, trial
from .tokenizer import Part, Tokenizer

if TYPE_CHECKING:
    from .encoding import Floats

R = TypeVar("R")

Prompts = list[str] | tuple[str, ...]
Prompt = str | Sequence[Message]
Questions = Sequence[Question] | Question
Labels = Sequence[str] | Mapping[str, str]


class Weighing(TypedDict, total=False):
    """Options of `decide`."""

    calibrate: bool
    temperature: float


class Classifying(Weighing, total=False):
    """Options of `classify`."""

    instructions: str


class TextReader:
    """A model in the model filesystem, used through one client. `device`, `dtype`, `sched_class` and `nice`
    hold for everything that it is asked."""

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

    def logprobs(self, text: str) -> list[tuple[str, float]]:
        """The tokens of `text`, each with its natural-log probability after those before it (NaN for the
        first, which has none)."""
        tokens = self._start(text)
        sampling = t.Sampling(prompt_logprobs=True)
        call = table.Infer(tokens=t.pack_tokens(tokens), max_tokens=0, sampling=sampling, **self._place)
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
        prompt: Prompt,
        choices: Sequence[str],
        *,
        against: Sequence[Prompt] = (),
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
        prompt: Prompt,
        choices: Sequence[str],
        *,
        against: Sequence[Prompt] = (),
        per_token: bool = False,
        temperature: float = 1.0,
    ) -> Decision:
        """`score` for asyncio; cancelling the task ends it in the kernel."""
        trials = await asyncio.to_thread(self._trials, prompt, choices, against)
        return await adrive(self._async(), self._scoring(choices, trials, per_token, temperature))

    @overload
    def decide(self, text: str, questions: Questions, **options: Unpack[Weighing]) -> list[Decision]: ...
    @overload
    def decide(
        self, text: Prompts, questions: Questions, **options: Unpack[Weighing]
    ) -> list[list[Decision]]: ...
    def decide(
        self, text: str | Prompts, questions: Questions, *, calibrate: bool = True, temperature: float = 1.0
    ) -> list[Decision] | list[list[Decision]]:
        """Typed questions about a text, answered by the likelihoods of their options, without generating; of
        a list of texts a list. `calibrate`: against what they are for a text that says nothing. `temperature`
        as in `score`. Raises ContextOverflow, InvalidArgument."""
        made = self.decide_all(text, questions, calibrate=calibrate, temperature=temperature)
        return _one_or_all(made, text)

    @overload
    async def adecide(
        self, text: str, questions: Questions, **options: Unpack[Weighing]
    ) -> list[Decision]: ...
    @overload
    async def adecide(
        self, text: Prompts, questions: Questions, **options: Unpack[Weighing]
    ) -> list[list[Decision]]: ...
    async def adecide(
        self, text: str | Prompts, questions: Questions, *, calibrate: bool = True, temperature: float = 1.0
    ) -> list[Decision] | list[list[Decision]]:
        """`decide` for asyncio; cancelling the task cancels it."""
        made = await self.adecide_all(text, questions, calibrate=calibrate, temperature=temperature)
        return _one_or_all(made, text)

    def decide_all(
        self, texts: Sequence[str], questions: Questions, *, calibrate: bool = True, temperature: float = 1.0
    ) -> list[list[Decision]]:
        """`decide` for many texts at once, [text][question]."""
        asked = self._docket(texts, questions, calibrate)
        return drive(self.client, decided(self._spawn(label="decide"), asked, temperature=temperature))

    async def adecide_all(
        self, texts: Sequence[str], questions: Questions, *, calibrate: bool = True, temperature: float = 1.0
    ) -> list[list[Decision]]:
        """`decide_all` for asyncio."""
        asked = await asyncio.to_thread(self._docket, texts, questions, calibrate)
        flow = decided(self._spawn(label="decide"), asked, temperature=temperature)
        return await adrive(self._async(), flow)

    @overload
    def classify(self, text: str, labels: Labels, **options: Unpack[Classifying]) -> Decision: ...
    @overload
    def classify(self, text: Prompts, labels: Labels, **options: Unpack[Classifying]) -> list[Decision]: ...
    def classify(
        self,
        text: str | Prompts,
        labels: Labels,
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
        return _one_or_all([one for (one,) in made], text)

    @overload
    async def aclassify(self, text: str, labels: Labels, **options: Unpack[Classifying]) -> Decision: ...
    @overload
    async def aclassify(
        self, text: Prompts, labels: Labels, **options: Unpack[Classifying]
    ) -> list[Decision]: ...
    async def aclassify(
        self,
        text: str | Prompts,
        labels: Labels,
        *,
        instructions: str = ABOUT,
        calibrate: bool = True,
        temperature: float = 1.0,
    ) -> Decision | list[Decision]:
        """`classify` for asyncio."""
        question = _labelled(instructions, labels)
        made = await self.adecide_all(text, question, calibrate=calibrate, temperature=temperature)
        return _one_or_all([one for (one,) in made], text)

    def embed(self, texts: str | Sequence[str], *, truncate: bool = False) -> Floats:
        """Vectors [n, dimensions] of texts, float32, pooled and normalised as the model's own files say; of
        one text its vector. A text that is too long is an error, or cut at its end with `truncate`. Raises
        ContextOverflow, UnsupportedModel (the model embeds nothing)."""
        return drive(self.client, self._embedding(texts, truncate))

    async def aembed(self, texts: str | Sequence[str], *, truncate: bool = False) -> Floats:
        """`embed` for asyncio; cancelling the task cancels the call."""
        return await adrive(self._async(), self._embedding(texts, truncate))

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

    def _embedding(self, texts: str | Sequence[str], truncate: bool) -> Flow[Floats]:
        rows = yield from self._encoding(listed(texts), t.Encodes.EMBED, truncate)
        return rows[0] if isinstance(texts, str) else rows

    def _encoding(self, texts: Texts, encodes: t.Encodes, truncate: bool) -> Flow[Floats]:
        call = table.Encode(encodes=encodes, label=encodes, **self._place)
        return encoded(call, framed(self.tokenizer, texts, self.context_length, truncate))

    def _trials(self, prompt: Prompt, choices: Sequence[str], against: Sequence[Prompt]) -> list[Trial]:
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

    def _docket(self, texts: Sequence[str], questions: Questions, calibrate: bool) -> Docket:
        self.tokenizer.check_generates(self.model)
        asked = [questions] if isinstance(questions, Question) else questions
        return docket(self.tokenizer, self.context_length, listed(texts), asked, calibrate)

    def _behind(self, prompt: Prompt) -> Callable[[str], list[int]]:
        """Makes ids of the prompt with a text behind it, tokenised as one."""
        if isinstance(prompt, str):
            return lambda text: self._start(prompt + text)
        parts = render(self.tokenizer, prompt, model=self.model)
        return lambda text: self.tokenizer.encode_parts([*parts, Part(text, False)], self.context_length)

    def _start(self, prompt: str) -> list[int]:
        """Ids of a prompt that begins a context; an empty one is BOS alone."""
        if tokens := self.tokenizer.encode(prompt, most=self.context_length):
            return tokens
        if self.tokenizer.bos_id is None:
            raise errors.InvalidArgument(f"{self.model} has no BOS token to begin with", field="prompt")
        return [self.tokenizer.bos_id]

    def _spawn(self, *, label: str = "", detached: bool = False) -> table.SpawnModel:
        return table.SpawnModel(label=label, detached=detached, **self._place)

    @property
    def _place(self) -> dict[str, Any]:
        """Fields of a call: of which model, where, and how it stands among others."""
        return {
            "model": self.model,
            "sched_class": self.sched_class,
            "nice": self.nice,
            "device": self.device,
            "dtype": self.dtype,
        }

    def _async(self) -> AsyncClient:
        return AsyncClient(connection=self.client.connection)


def listed(texts: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list. Raises InvalidArgument for what is no text."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise errors.InvalidArgument(
            f"a text is a str, or several are a list, not {type(texts).__name__}", field="prompt"
        )
    found = list(texts)
    if wrong := next((type(one).__name__ for one in found if not isinstance(one, str)), ""):
        raise errors.InvalidArgument(f"a text is a str, also in a list, not {wrong}", field="prompt")
    return found


def _labelled(instructions: str, labels: Labels) -> Question:
    meanings = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, "")
    if isinstance(labels, str) or len(meanings) < len(labels):
        raise errors.InvalidArgument("labels are a list, none of them twice", field="labels")
    return Question(instructions, tuple(Option(name, meaning) for name, meaning in meanings.items()))


def _one_or_all(made: list[R], text: str | Prompts) -> R | list[R]:
    return made[0] if isinstance(text, str) else made
