"""Typed decisions: which of the given options a model would answer, read from likelihoods, without writing.

A question's options are scored as answers to one prompt, whose KV all of them share: the context is computed
once and forked, and each fork takes in one option. From the options' log-likelihoods those are subtracted
that the same options have when nothing is known (contextual calibration: Zhao et al., 2021, "Calibrate Before
Use"; for options of several tokens that is the PMI of Holtzman et al., 2021, "Surface Form Competition"), so
an option is not likely just because its words are. The softmax of what is left are the probabilities.

No I/O: a flow for the sync and the async client alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .completion import Answer
from .flow import Do, Flow, Run

if TYPE_CHECKING:
    from .llm import LLM

NOTHING = "N/A"
"""The text of which nothing is known."""

AT_ONCE = 64
"""Options that are scored at a time: each is a process."""

MOST_OPTIONS = 255

_SCORING = t.Sampling(prompt_logprobs=True)


@dataclass(frozen=True, slots=True)
class Option:
    """`description` tells the model what it means."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a text, and the answers that are possible."""

    instructions: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        names = [option.name for option in self.options]
        if not 2 <= len(names) <= MOST_OPTIONS or len(set(names)) != len(names) or not all(names):
            raise errors.InvalidArgument(
                f"a question has 2 to {MOST_OPTIONS} options with different names", field="options"
            )


@dataclass(frozen=True, slots=True)
class Decision:
    """`probabilities` of the options in their order; they sum to 1. `logprobs` are the options' natural
    log-likelihoods as answers, before calibration. `prompt_tokens` were read, `cached_tokens` of them were
    known."""

    options: tuple[str, ...]
    probabilities: tuple[float, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def label(self) -> str:
        """The most probable option, the first among equals."""
        return self.options[self.probabilities.index(max(self.probabilities))]

    @property
    def confidence(self) -> float:
        """1 when one option has all the probability, 0 when all are alike: 1 - entropy / log(options)."""
        entropy = -sum(p * math.log(p) for p in self.probabilities if p > 0)
        return max(0.0, 1 - entropy / math.log(len(self.options)))

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-likelihoods of continuations of one prompt."""

    logprobs: list[float]
    tokens: int
    cached: int


def scored(llm: LLM, variants: Sequence[Sequence[int]], prompt: Sequence[int] | None = None) -> Flow[Scored]:
    """The sums of the natural log-probabilities of what `variants` (token ids) do not have in common with
    each other, or with a `prompt`, each behind what they have. Raises InvalidArgument where nothing is left
    of one, or they have nothing in common; ContextOverflow."""
    same = _common(variants if prompt is None else [prompt, *variants])
    if same == 0 or any(len(variant) == same for variant in variants):
        raise errors.InvalidArgument("an option must add something to the prompt", field="choices")
    if max(map(len, variants)) > llm.context_length:
        raise errors.ContextOverflow(
            f"prompt and option have up to {max(map(len, variants))} tokens, the model's context "
            f"{llm.context_length}"
        )
    base: int = (yield Do(llm._spawn(label="decide"))).pid
    pids = [base]
    try:
        # The last common token is taken in with the options: its logits score their first tokens.
        head = list(variants[0][: same - 1])
        cached = 0
        if head:
            reply = yield Do(_take_in(base, head))
            cached = reply.cached_tokens
        sums: list[float] = []
        for first in range(0, len(variants), AT_ONCE):
            part = variants[first : first + AT_ONCE]
            last = first + len(part) == len(variants)
            forks = [] if last and len(part) == 1 else (yield Do(table.Fork(base, len(part) - last))).pids
            used = [*forks, base] if last else forks
            pids += forks
            tails = [variant[same - 1 :] for variant in part]
            answers = [Answer(llm.tokenizer, variant) for variant in part]
            calls = [
                table.Infer(pid, tokens=t.pack_tokens(tail), max_tokens=0, sampling=_SCORING)
                for pid, tail in zip(used, tails, strict=True)
            ]
            yield Run(calls, answers)
            for answer, tail in zip(answers, tails, strict=True):
                found = [chosen.logprob for chosen in answer.prompt_chosen[-(len(tail) - 1) :]]
                sums.append(sum(found))
            for pid in forks:
                yield Do(table.Kill(pid))
                pids.remove(pid)
                yield Do(table.Wait(pid))
    finally:
        for pid in pids:
            yield Do(table.Kill(pid))
            yield Do(table.Wait(pid))
    tokens = same + sum(len(variant) - same for variant in variants)
    return Scored(sums, tokens, cached)


def decided(
    llm: LLM, text: str, questions: Sequence[Question], *, calibrate: bool = True
) -> Flow[list[Decision]]:
    """The answers to `questions` about `text`, one after the other."""
    found = []
    for question in questions:
        real = yield from scored(llm, _variants(llm, text, question))
        logprobs, tokens, cached = real.logprobs, real.tokens, real.cached
        if calibrate:
            blank = yield from scored(llm, _variants(llm, NOTHING, question))
            logprobs = [one - without for one, without in zip(logprobs, blank.logprobs, strict=True)]
            tokens, cached = tokens + blank.tokens, cached + blank.cached
        names = tuple(option.name for option in question.options)
        found.append(Decision(names, tuple(softmax(logprobs)), tuple(real.logprobs), tokens, cached))
    return found


def softmax(values: Sequence[float]) -> list[float]:
    most = max(values)
    weights = [math.exp(value - most) for value in values]
    return [weight / sum(weights) for weight in weights]


def _variants(llm: LLM, text: str, question: Question) -> list[list[int]]:
    """The prompt with each option as its answer. The text comes first, so that questions share it.

    Options without descriptions are not listed, and no chat template is used: small models answer better so
    (tests/bench/decisions.py).
    """
    told = [f"{option.name}: {option.description}" for option in question.options if option.description]
    options = "Possible answers:\n" + "\n".join(told) + "\n" if told else ""
    asked = f"Text: {text}\nQuestion: {question.instructions}\n{options}Answer:"
    return [llm.tokenizer.encode(f"{asked} {option.name}") for option in question.options]


def _take_in(pid: int, tokens: Sequence[int]) -> table.Infer:
    return table.Infer(pid, tokens=t.pack_tokens(tokens), max_tokens=0)


def _common(variants: Sequence[Sequence[Any]]) -> int:
    """Length of the beginning that all have."""
    length = 0
    for column in zip(*variants, strict=False):
        if any(one != column[0] for one in column):
            break
        length += 1
    return length
