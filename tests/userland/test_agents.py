"""The agent's loop: choosing by forks, typed tools, cleaning up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llmasos.syscalls import errors, table
from llmasos.userland.agents import Agent, Example, Step, Tool, tool
from llmasos.userland.client import Client
from llmasos.userland.llm import LLM


@tool(example=Example("What is 1 and 2?", ("1", "2"), "3", "It is 3."))
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@pytest.fixture
def llm(kernel: Any) -> Iterator[LLM]:
    with Client(kernel.address) as client:
        yield LLM.from_pretrained("tiny", client=client)


def test_a_tool_is_chosen_called_and_answered_from(llm: LLM, kernel: Any) -> None:
    """The pseudo model likes `add` for a real question and `answer` after a result."""
    encode, decode = llm.tokenizer.encode, llm.tokenizer.decode

    def script(tokens: list[int], call: table.Infer) -> list[int]:
        text = decode(tokens)
        said = {"a:": " 20\n", "b:": " 22\n", "Answer:": " It is 42.\nQuestion:"}
        return encode(next(words for end, words in said.items() if text.endswith(end)))

    def score(tokens: list[int]) -> list[float]:
        (context,) = {decode(p.tokens[: -len(tokens)]) for p in kernel.processes.values() if _ends(p, tokens)}
        wanted = "answer" if context.endswith("Result: 42\n") else "add"
        real = not context.endswith("N/A\n")
        return [-1.0 if real and decode(tokens) == f"Action: {wanted}\n" else -9.0] * len(tokens)

    def _ends(process: Any, tokens: list[int]) -> bool:
        return bool(process.tokens[-len(tokens) :] == tokens)

    kernel.script, kernel.score = script, score
    steps: list[Step] = []
    with Agent(llm, [add], on_step=steps.append) as agent:
        assert agent.run("What is 20 and 22?") == "It is 42."
    assert [(step.action, step.arguments, step.result) for step in steps] == [
        ("add", ("20", "22"), "42"),
        ("answer", (), ""),
    ]
    assert set(steps[0].children) == {"add", "answer"}
    assert kernel.names().count("wait") >= 5
    assert kernel.processes == {}


def test_choosing_that_fails_leaves_no_process(
    llm: LLM, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(calls: object) -> None:
        raise errors.DeviceFault("broken")

    monkeypatch.setattr(llm.client, "gather", fails)
    with pytest.raises(errors.DeviceFault):
        Agent(llm, [add])
    assert kernel.processes == {}


def test_a_tools_failure_is_its_result() -> None:
    assert isinstance(add, Tool)
    assert add.call(["1", "two"]).startswith("error: invalid literal")
    assert add.parameters == {"a": int, "b": int}


def test_a_tool_must_be_typed_and_described() -> None:
    example = Example("", ("",), "", "")
    with pytest.raises(TypeError, match="parameter x must be"):
        tool(example=example)(lambda x: x)

    def undescribed(x: str) -> str:
        return x

    with pytest.raises(TypeError, match="docstring"):
        tool(example=example)(undescribed)
    with pytest.raises(TypeError, match="2 arguments"):
        tool(example=example)(add.function)


def test_tools_need_names_of_their_own(llm: LLM) -> None:
    with pytest.raises(errors.InvalidArgument):
        Agent(llm, [add, add])
    with pytest.raises(errors.InvalidArgument, match="@tool"):
        Agent(llm, [len])  # type: ignore[list-item]
    with pytest.raises(errors.InvalidArgument):
        Agent(llm, [])
