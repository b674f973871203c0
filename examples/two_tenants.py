"""Two tenants' agents on one daemon at the same time, each with tools of its own.

    python examples/two_tenants.py [MODEL]

Each agent is a process; to choose a tool it forks one child a candidate, the children score it and exit,
the parent waits. `llsh ps` in another terminal shows them.
"""

from __future__ import annotations

import ast
import operator
import sys
import threading
from collections.abc import Callable

from llmasos import LLM
from llmasos.userland.agents import Agent, Example, Step, Tool, tool

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}


@tool(example=Example("How much is 12 times 7?", ("12 * 7",), "84", "The result is 84."))
def calculator(expression: str) -> float:
    """Works out sums, products and other arithmetic."""
    return _value(ast.parse(expression.strip(), mode="eval").body)


def _value(node: ast.AST) -> float:
    """Walks the syntax tree: numbers and arithmetic, nothing else is ever run."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left, kind, right) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(left), _value(right))
        case ast.UnaryOp(kind, operand) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(operand))
    raise ValueError("only numbers and + - * / %")


@tool(example=Example("How many letters are in the word tree?", ("tree",), "4", "It has 4 letters."))
def count_letters(word: str) -> int:
    """Counts the letters of a word."""
    return sum(letter.isalpha() for letter in word)


CAPITALS = {"france": "Paris", "japan": "Tokyo", "kenya": "Nairobi", "peru": "Lima", "norway": "Oslo"}


@tool(example=Example("What is the capital of Japan?", ("Japan",), "Tokyo", "It is Tokyo."))
def capital_of(country: str) -> str:
    """Looks up the capital city of a country."""
    return CAPITALS.get(country.strip().strip(".?").lower(), "not in the list")


@tool(example=Example("What is the word stone backwards?", ("stone",), "enots", "It is enots."))
def backwards(word: str) -> str:
    """Writes a word backwards."""
    return word.strip()[::-1]


TENANTS: dict[str, tuple[list[Tool], list[str]]] = {
    "alice": (
        [calculator, count_letters],
        ["How much is 17 times 23?", "How many letters are in the word kernel?"],
    ),
    "bob": (
        [capital_of, backwards],
        ["What is the capital of Norway?", "What is the word daemon backwards?"],
    ),
}


def work(name: str, model: str, say: Callable[[str], None], failures: list[str]) -> None:
    """One tenant: its own session, its own processes, its own questions."""
    tools, questions = TENANTS[name]
    try:
        with LLM.from_pretrained(model, label=name) as llm:
            say(f"{name}: connected as {llm.client.hello.subject}")
            with Agent(llm, tools, on_step=lambda step: say(f"{name}:   {_shown(step)}")) as agent:
                for question in questions:
                    say(f"{name}: {question}")
                    say(f"{name}:   says: {agent.run(question)}")
    except Exception as problem:
        failures.append(f"{name}: {problem}")


def _shown(step: Step) -> str:
    candidates = ", ".join(
        f"{name} {score:+.1f} (pid {step.children[name]})" for name, score in step.scores.items()
    )
    used = f"{step.action}({', '.join(step.arguments)}) = {step.result}" if step.result else step.action
    return f"chose {used} from {candidates}"


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    LLM.from_pretrained(model).close()  # one pull for both
    lock = threading.Lock()
    failures: list[str] = []

    def say(text: str) -> None:
        with lock:
            print(text, flush=True)

    threads = [threading.Thread(target=work, args=(name, model, say, failures)) for name in TENANTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
