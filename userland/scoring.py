"""How likely choices are behind a prompt, without generating anything.

The prompt is computed once and forked for each choice (forks share its memory); each fork takes in the tokens
of its choice, all in the same steps, and what comes back are their log probabilities. Prompt and choice are
tokenised as one text. Where that merges the prompt's end with a choice, the scores of all choices begin at
the same earlier place, so that they are of the same text.

Long choices are less likely, and some words are likelier than others wherever they stand. `weighed` makes
probabilities of scores: softmax, after subtracting what the choices score behind prompts that say nothing of
the matter (contextual calibration, Zhao et al. 2021, arXiv:2102.09690; with a bare premise as such a prompt
it is PMI_DC, Holtzman et al. 2021, arXiv:2104.08315).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .flow import Do, Flow, Run, reap

MOST_CHOICES = 256
"""Of one prompt: as many as one fork makes."""

WAVE = 256
"""So many choices, of all prompts together, are scored at once."""

_SCORING = t.Sampling(prompt_logprobs=True)


@dataclass(frozen=True, slots=True)
class Trial:
    """Token ids: the `head` is computed once, each of the `tails` is scored behind it."""

    head: list[int]
    tails: list[list[int]]


@dataclass(slots=True)
class Scored:
    """The log probabilities of every tail's tokens, [trial][tail][token], and the tokens that were sent for
    each trial; what all have in common counts for the first. `cached` of them had been computed before."""

    logprobs: list[list[list[float]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """Options in the order in which they were given, each with its probability, together 1; `logprobs` are
    their natural log-likelihoods, the sums over their `tokens`. `prompt_tokens` were sent for them in all, of
    which `cached_tokens` had been computed before; what several decisions share counts for the first."""

    options: tuple[str, ...]
    probabilities: tuple[float, ...]
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def label(self) -> str:
        """The most probable option, the first among equals."""
        return self.options[self.probabilities.index(max(self.probabilities))]

    @property
    def confidence(self) -> float:
        """How far the likeliest of n options is above 1/n, from 0 (all are alike) to 1 (it is certain), as
        transformers' decision pipeline has it."""
        even = 1 / len(self.options)
        return 1.0 if even == 1 else max(0.0, (max(self.probabilities) - even) / (1 - even))

    @property
    def level(self) -> float:
        """Of options that are levels, lowest first: the expected one, counted from 0."""
        return sum(level * share for level, share in enumerate(self.probabilities))

    @property
    def level_confidence(self) -> float:
        """`confidence` of levels: how near to the likeliest one the others are, against all being alike."""
        count, best = len(self.options), self.probabilities.index(max(self.probabilities))
        distance = sum(share * abs(level - best) for level, share in enumerate(self.probabilities))
        even = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
        return 1.0 if count == 1 else max(0.0, 1 - distance / even)

    def __str__(self) -> str:
        return self.label


def check_choices(choices: Sequence[str]) -> None:
    """Raises InvalidArgument."""
    listed = isinstance(choices, Collection) and all(isinstance(one, str) for one in choices)
    if not listed or isinstance(choices, str) or not 1 <= len(choices) <= MOST_CHOICES:
        raise errors.InvalidArgument(f"choices are 1 to {MOST_CHOICES} strings, in a list", field="choices")
    if not all(choices) or len(set(choices)) < len(choices):
        raise errors.InvalidArgument("no choice may be empty, or there twice", field="choices")


def trial(
    prompt: Sequence[int], wholes: Sequence[Sequence[int]], most: int, head: Sequence[int] = ()
) -> Trial:
    """Of a prompt and the same with each choice behind it, all of it behind `head`; the model's context holds
    `most`. Raises ContextOverflow, InvalidArgument."""
    at = min(_shared(prompt, whole) for whole in wholes)
    if at + len(head) == 0:
        raise errors.InvalidArgument(
            "no token of the prompt is left to score behind",
            hint="prompt and choices are one text: a space between them keeps the prompt's tokens",
            field="prompt",
        )
    if any(len(whole) == at for whole in wholes):
        raise errors.InvalidArgument("a choice has no tokens of its own", field="choices")
    check_length(len(head) + max(map(len, wholes)), most)
    return Trial([*head, *prompt[:at]], [list(whole[at:]) for whole in wholes])


def check_temperature(temperature: float) -> None:
    """Raises InvalidArgument."""
    if not 0 < temperature < math.inf:
        raise errors.InvalidArgument(
            f"a temperature is above 0, not {temperature}", hint="1 changes nothing", field="temperature"
        )


def check_length(tokens: int, most: int) -> None:
    """Raises ContextOverflow: nothing is ever cut off."""
    if tokens > most:
        raise errors.ContextOverflow(
            f"prompt and choice have {tokens} tokens, the model's context is {most}",
            hint="shorten the text",
            field="prompt",
        )


def scored(spawn: table.SpawnModel, trials: Sequence[Trial]) -> Flow[Scored]:
    """What all trials' heads have in common is computed once, and what one alone has once for its tails."""
    found = Scored()
    if not trials:
        return found
    common = len(_common([one.head for one in trials]))
    found.tokens = [len(one.head) - common + sum(map(len, one.tails)) for one in trials]
    found.tokens[0] += common
    pids: list[int] = []
    try:
        root = (yield Do(spawn)).pid
        pids.append(root)
        yield from _take(found, [(root, trials[0].head[:common])])
        for wave in _waves(trials):
            children: list[int] = []
            try:
                yield from _wave(root, common, wave, children, found)
            finally:
                yield from reap(children)
    finally:
        yield from reap(pids)
    return found


def _wave(root: int, common: int, wave: Sequence[Trial], children: list[int], found: Scored) -> Flow[None]:
    """Scores some trials in forks of `root`, which are added to `children`."""
    children += (yield Do(table.Fork(root, len(wave)))).pids
    parents = list(children)
    yield from _take(found, [(pid, one.head[common:]) for pid, one in zip(parents, wave, strict=True)])
    jobs: list[tuple[int, list[int]]] = []
    for pid, one in zip(parents, wave, strict=True):
        forks: list[int] = []
        if len(one.tails) > 1:
            forks = (yield Do(table.Fork(pid, len(one.tails) - 1))).pids
            children += forks
        jobs += zip([pid, *forks], one.tails, strict=True)
    scores = iter((yield from _take(found, jobs, _SCORING)))
    found.logprobs += [list(itertools.islice(scores, len(one.tails))) for one in wave]


def _take(
    found: Scored, jobs: Sequence[tuple[int, list[int]]], sampling: t.Sampling = t.Sampling()
) -> Flow[list[list[float]]]:
    """Gives processes tokens, all at once, and returns the tokens' scores if `sampling` asks for them."""
    jobs = [job for job in jobs if job[1]]
    calls = [
        table.Infer(pid, tokens=t.pack_tokens(tokens), max_tokens=0, sampling=sampling)
        for pid, tokens in jobs
    ]
    readers = [_Scores() for _ in jobs]
    replies = (yield Run(calls, readers)) if calls else []
    for (pid, tokens), reader, reply in zip(jobs, readers, replies, strict=True):
        found.cached += reply.cached_tokens
        if len(reader.logprobs) != (len(tokens) if sampling.prompt_logprobs else 0):
            raise errors.ProcessEnded(f"process {pid} was ended while it scored", pid=pid)
    return [reader.logprobs for reader in readers]


class _Scores:
    """Collects what a stream tells of its input."""

    stopped = False

    def __init__(self) -> None:
        self.logprobs: list[float] = []

    def feed(self, event: t.InferEvent) -> None:
        self.logprobs += [chosen.logprob for chosen in event.prompt_logprobs]

    def flush(self, finish: t.Finish) -> None:
        pass


def judged(
    options: Sequence[str],
    logprobs: Sequence[Sequence[float]],
    against: Sequence[Sequence[Sequence[float]]] = (),
    *,
    per_token: bool = False,
    temperature: float = 1.0,
    tokens: int = 0,
    cached: int = 0,
) -> Decision:
    """Options with what their trial brought, `weighed`."""
    shares = weighed(logprobs, against, per_token=per_token, temperature=temperature)
    return Decision(
        tuple(options), tuple(shares), tuple(map(sum, logprobs)), tuple(map(len, logprobs)), tokens, cached
    )


def weighed(
    logprobs: Sequence[Sequence[float]],
    against: Sequence[Sequence[Sequence[float]]] = (),
    *,
    per_token: bool = False,
    temperature: float = 1.0,
) -> list[float]:
    """Probabilities of choices from their tokens' log probabilities, [choice][token]. `against` are those
    behind prompts that say nothing, [prompt][choice][token]; `per_token` takes means instead of sums."""

    def total(tokens: Sequence[float]) -> float:
        return sum(tokens) / (len(tokens) if per_token else 1)

    totals = list(map(total, logprobs))
    if against:
        priors = [softmax(list(map(total, one))) for one in against]
        # The floor is far below what matters: no choice may be impossible before the matter is looked at.
        base = [sum(column) / len(priors) for column in zip(*priors, strict=True)]
        totals = [value - math.log(max(prior, 1e-30)) for value, prior in zip(totals, base, strict=True)]
    return softmax([value / temperature for value in totals])


def softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def _waves(trials: Sequence[Trial]) -> Iterator[Sequence[Trial]]:
    first = 0
    while first < len(trials):
        end, tails = first, 0
        while end < len(trials) and (end == first or tails + len(trials[end].tails) <= WAVE):
            tails += len(trials[end].tails)
            end += 1
        yield trials[first:end]
        first = end


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common(lists: Sequence[list[int]]) -> list[int]:
    """The common beginning of all: that of the least and the greatest."""
    low, high = min(lists), max(lists)
    return low[: _shared(low, high)]
