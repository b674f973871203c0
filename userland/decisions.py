"""Typed decisions: questions about a text, whose possible answers each get a probability. Nothing is written.

How a question is put was chosen by measuring on small labelled sets with a small model (docs/decisions.md has
the figures, tests/bench/decisions.py the sets): plain text behind three answered examples, which works for
base models and chat models alike; options are not listed, only those described that have a description. What
counts is the likelihood of an option's words, against what it is when the text says nothing (scoring.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmasos.syscalls import errors, table

from .flow import Flow
from .scoring import Decision, Trial, check_temperature, judged, scored, trial
from .tokenizer import Tokenizer

EXAMPLES = (
    "Text: Our garden is full of roses.\nQuestion: What is it about?\nAnswer: plants\n\n"
    "Text: The museum costs five euros.\nQuestion: Does it name a price?\nAnswer: yes\n\n"
    "Text: We went home early.\nQuestion: How urgent is it?\nAnswer: low\n\n"
)

ANSWER = "Answer:"

NOTHING = "N/A"
"""A text that says nothing of any matter."""

ABOUT = "What is it about?"
"""What `classify` asks unless told otherwise."""

MOST_OPTIONS = 255


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
        names = self.names
        if not 2 <= len(names) <= MOST_OPTIONS or len(set(names)) != len(names) or not all(names):
            raise errors.InvalidArgument(
                f"a question has 2 to {MOST_OPTIONS} options with different names", field="options"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(option.name for option in self.options)

    def asked(self, text: str) -> str:
        """What ANSWER and an option follow. The text comes first, so that questions about it share it."""
        told = "".join(f"{one.name}: {one.description}\n" for one in self.options if one.description)
        return f"{EXAMPLES}Text: {text}\nQuestion: {self.instructions}\n{told}"


def yes_or_no(instructions: str, yes: str = "", no: str = "") -> Question:
    """A question or a statement that is right (the first option) or not."""
    return Question(instructions, (Option("yes", yes), Option("no", no)))


@dataclass(frozen=True, slots=True)
class Docket:
    """Questions ready to be answered: `trials` of all questions about one text after the other; the first
    text is NOTHING if `calibrated`."""

    questions: Sequence[Question]
    trials: list[Trial]
    calibrated: bool


def docket(
    tokenizer: Tokenizer, most: int, texts: Sequence[str], questions: Sequence[Question], calibrate: bool
) -> Docket:
    """All questions about all texts, for a model whose context holds `most`. Takes as long as it takes to
    tokenise them. Raises ContextOverflow, InvalidArgument."""
    if not questions or not all(isinstance(question, Question) for question in questions):
        raise errors.InvalidArgument("questions are a Question, or a list of some", field="questions")
    prompt = tokenizer.encode(ANSWER, start=False)
    wholes = [
        [tokenizer.encode(f"{ANSWER} {name}", start=False) for name in question.names]
        for question in questions
    ]
    trials = []
    for text in [NOTHING] * calibrate + list(texts):
        for question, options in zip(questions, wholes, strict=True):
            head = tokenizer.encode(question.asked(text), most=most)
            trials.append(trial(prompt, options, most, head))
    return Docket(questions, trials, calibrate)


def decided(
    spawn: table.SpawnModel, asked: Docket, *, temperature: float = 1.0
) -> Flow[list[list[Decision]]]:
    """The answers to all questions about all texts, [text][question]. Raises InvalidArgument."""
    check_temperature(temperature)
    trials, questions, count = asked.trials, asked.questions, len(asked.questions)
    first = count if asked.calibrated else 0  # trial of the first text
    # What trials have in common is computed once: a text with several questions is scored by itself.
    size = len(trials) if count == 1 else count
    logprobs: list[list[list[float]]] = []
    tokens: list[int] = []
    cached: list[int] = []
    for start in range(0, len(trials), size or 1):
        found = yield from scored(spawn, trials[start : start + size])
        logprobs += found.logprobs
        tokens += found.tokens
        cached += [found.cached, *[0] * (len(found.tokens) - 1)]
    if len(trials) > first:
        for place in range(first):  # what calibrates counts for the first text
            tokens[first + place] += tokens[place]
            cached[first + place] += cached[place]
    return [
        [
            judged(
                question.names,
                logprobs[row + place],
                [logprobs[place]] if first else (),
                temperature=temperature,
                tokens=tokens[row + place],
                cached=cached[row + place],
            )
            for place, question in enumerate(questions)
        ]
        for row in range(first, len(trials), count or 1)
    ]
