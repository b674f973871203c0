"""Agents: a model that uses Python tools in a loop, built on spawn, fork and wait.

Small models write tool calls badly but choose well between few: so the agent's process is forked once a
candidate action, each child scores its candidate's words in the context and exits, the parent waits for
all of them, and the likeliest is taken. (A candidate's score is measured against its score for a question
without content, so a word that is likely anyway does not always win: contextual calibration, Zhao et al.
2021, arXiv 2102.09690.)
Then only the tool's arguments and the final answer are generated.

    @tool(example=("What is 6 times 7?", "6*7"))
    def calculator(expression: str) -> float:
        "Works out arithmetic."
        ...

    print(Agent(llm, [calculator]).run("What is 17 * 23?"))
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .llm import LLM
from .process import Process

ANSWER = "answer"
_CONVERTERS: dict[type, Callable[[str], Any]] = {str: str, int: int, float: float}


@dataclass(frozen=True, slots=True)
class Example:
    """How a tool is used: shown to the model. `arguments` in the order of the tool's parameters."""

    question: str
    arguments: tuple[str, ...]
    result: str
    answer: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A Python function that an agent may call. Its parameters are str, int or float."""

    name: str
    description: str
    parameters: dict[str, type]
    function: Callable[..., object]
    example: Example

    def call(self, arguments: Sequence[str]) -> str:
        """The result as text; a failure is a result too, for the model to read."""
        try:
            converted = [
                _CONVERTERS[kind](text)
                for kind, text in zip(self.parameters.values(), arguments, strict=True)
            ]
            return str(self.function(*converted))
        except Exception as problem:  # a tool's fault must not end the agent
            return f"error: {problem}"


def tool(*, example: Example) -> Callable[[Callable[..., object]], Tool]:
    """Makes a Tool of a function with typed parameters and a docstring. Raises TypeError on others."""

    def register(function: Callable[..., object]) -> Tool:
        hints = typing.get_type_hints(function)
        parameters = {}
        for name in inspect.signature(function).parameters:
            if (kind := hints.get(name)) not in _CONVERTERS:
                raise TypeError(f"tool {function.__name__}: parameter {name} must be str, int or float")
            parameters[name] = kind
        if not (description := inspect.getdoc(function)):
            raise TypeError(f"tool {function.__name__} needs a docstring: the model reads it")
        if len(example.arguments) != len(parameters):
            raise TypeError(f"tool {function.__name__}: the example needs {len(parameters)} arguments")
        return Tool(function.__name__, description.splitlines()[0], parameters, function, example)

    return register


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the loop: what was chosen, with every candidate's score and the child that scored it."""

    action: str
    arguments: tuple[str, ...]
    result: str
    scores: dict[str, float]
    children: dict[str, int]


class Agent:
    """Answers questions with tools. Holds one process with its instructions; each question forks it.

    `on_step` is called after every turn. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        llm: LLM,
        tools: Sequence[Tool],
        *,
        system: str = "Questions are answered with the help of tools.",
        max_steps: int = 3,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        if not all(isinstance(one, Tool) for one in tools):
            raise errors.InvalidArgument("a tool is a function with @tool(example=…) above it", field="tools")
        names = [one.name for one in tools]
        if not tools or len({*names, ANSWER}) != len(names) + 1:
            raise errors.InvalidArgument(
                "tools must have different names, none of them 'answer'", field="tools"
            )
        self._llm = llm
        self._tools = {one.name: one for one in tools}
        self._max_steps = max_steps
        self._on_step = on_step
        self._base = llm.process(_instructions(system, tools))
        try:
            self._prior = self._blank_scores()
        except BaseException:
            self.close()
            raise

    def run(self, question: str) -> str:
        """The answer to a question, after at most `max_steps` uses of tools."""
        (process,) = self._base.fork(1)
        with process:
            process.append(f"Question: {_line(question)}\n")
            used: set[str] = set()
            for _ in range(self._max_steps):
                step = self._step(process, used)
                self._on_step(step)
                if step.action == ANSWER:
                    break
                used.add(step.action)
            process.append("Answer:")
            return str(process.generate(stop="\n", max_new_tokens=64)).strip()

    def close(self) -> None:
        """Ends the agent's process."""
        self._base.close()

    def _step(self, process: Process, used: set[str]) -> Step:
        candidates = [name for name in (*self._tools, ANSWER) if name not in used]
        scores, children = self._score(process, candidates)
        if not used:  # afterwards the candidates stand after a result, which the prior knows nothing of
            scores = {name: score - self._prior[name] for name, score in scores.items()}
        action = max(scores, key=scores.__getitem__)
        if action == ANSWER:
            return Step(action, (), "", scores, children)
        chosen = self._tools[action]
        process.append(f"Action: {action}\n")
        arguments = tuple(self._argument(process, name) for name in chosen.parameters)
        result = _line(chosen.call(arguments))
        process.append(f"Result: {result}\n")
        return Step(action, arguments, result, scores, children)

    def _argument(self, process: Process, name: str) -> str:
        process.append(f"{name}:")
        value = process.generate(stop="\n", max_new_tokens=48).text.strip()
        held = process.tokens
        line_end = self._llm.tokenizer.decode(held[-1:])
        if not line_end.endswith("\n"):
            process.append("\n")
        return value

    def _score(self, process: Process, candidates: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
        """Forks a child a candidate, which scores it and exits; waits for all of them.

        A score is the sum of the log probabilities of "Action: candidate" in the process's context.
        """
        children = process.fork(len(candidates))
        tokens = [self._llm.tokenizer.encode(f"Action: {name}\n", start=False) for name in candidates]
        calls = [
            table.Infer(
                child.pid,
                tokens=t.pack_tokens(ids),
                max_tokens=0,
                sampling=t.Sampling(prompt_logprobs=True),
                exit=True,
            )
            for child, ids in zip(children, tokens, strict=True)
        ]
        sums = [0.0] * len(candidates)
        try:
            for index, event in self._llm.client.gather(calls):
                sums[index] += sum(chosen.logprob for chosen in event.prompt_logprobs)
        except BaseException:
            for child in children:
                child.close()
            raise
        for child in children:
            child.wait()
        pids = {name: child.pid for name, child in zip(candidates, children, strict=True)}
        return dict(zip(candidates, sums, strict=True)), pids

    def _blank_scores(self) -> dict[str, float]:
        (process,) = self._base.fork(1)
        with process:
            process.append("Question: N/A\n")
            return self._score(process, [*self._tools, ANSWER])[0]

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _instructions(system: str, tools: Sequence[Tool]) -> str:
    """The tools and one worked example of each."""
    lines = [system, "", "Tools:", *(f"- {one.name}: {one.description}" for one in tools), ""]
    for one in tools:
        lines += [f"Question: {one.example.question}", f"Action: {one.name}"]
        lines += [
            f"{name}: {value}" for name, value in zip(one.parameters, one.example.arguments, strict=True)
        ]
        lines += [f"Result: {one.example.result}", f"Action: {ANSWER}", f"Answer: {one.example.answer}", ""]
    return "\n".join([*lines, ""])


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
