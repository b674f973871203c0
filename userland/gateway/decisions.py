"""Typed questions answered with probabilities: OpenAI's /v1/decisions, and /v1/systemone as other servers
have it. See userland/decisions.py for how."""

from __future__ import annotations

import asyncio
import json as jsonlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from pydantic import Discriminator, Field, Tag, model_validator
from starlette.responses import Response

from ..decisions import MOST_OPTIONS, Option, Question, yes_or_no
from ..llm import LLM
from ..scoring import Decision
from . import record
from .callers import Caller, authenticated
from .errors_doc import documented
from .http import MOST_BODY, attend, json
from .ollama.shared import KeepAlive
from .openai.items import Id, Status
from .options import Body, Hinted, Placed

router = APIRouter(tags=["decisions"])

MOST_QUESTIONS = 400
MOST_TEXT = 1 << 20
MOST_ANSWERS = 16384
"""Options of one request, of all questions about all texts: each is a process for a moment."""

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]

TRUE, FALSE = "true", "false"


class Part(Body):
    """A text, or JSON as `data`; pictures are refused."""

    NOT_DONE = {"prompt_cache_breakpoint": ()}

    type: Literal["input_text", "output_text", "input_json", "refusal", "text"]
    text: Text | None = None
    refusal: Text | None = None
    data: Any = None

    @model_validator(mode="after")
    def _whole(self) -> Part:
        wanted = {"input_json": "data", "refusal": "refusal"}.get(self.type, "text")
        if {name for name in ("text", "refusal", "data") if getattr(self, name) is not None} != {wanted}:
            raise ValueError(f"a part of type {self.type} has {wanted} and nothing else")
        return self

    def words(self) -> str:
        return (
            told(self.data) if self.text is None and self.refusal is None else self.text or self.refusal or ""
        )


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    phase: Literal["commentary", "final_answer"] | None = None

    def line(self) -> str:
        return f"{self.role}: {words(self.content)}"


class InputCall(Body):
    """A call of a tool."""

    type: Literal["function_call", "custom_tool_call"]
    call_id: Id
    name: Name
    arguments: Text | None = None
    input: Text | None = None
    namespace: Name | None = None
    id: Id | None = None
    status: Status | None = None

    def line(self) -> str:
        return f"call of {self.name}: {self.arguments or self.input or ''}"


class InputOutput(Body):
    """What came of it."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Id
    output: Text | list[Part]
    id: Id | None = None
    status: Status | None = None

    def line(self) -> str:
        return f"result: {words(self.output)}"


def _kind(item: Any) -> Any:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    kinds = {"function_call": "call", "custom_tool_call": "call"}
    kinds |= {"function_call_output": "output", "custom_tool_call_output": "output"}
    return kinds.get(kind, kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("call")]
    | Annotated[InputOutput, Tag("output")],
    Discriminator(_kind),
]


def words(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.words() for part in content)


def told(content: Any) -> str:
    """A text, or JSON as text."""
    return content if isinstance(content, str) else jsonlib.dumps(content, ensure_ascii=False)


class Predicate(Body):
    type: Literal["predicate"]
    instructions: Text | list[Part]
    name: Name | None = None


class ChoiceOption(Body):
    value: bool | Name
    description: str | None = Field(None, max_length=4096)


class Choice(Body):
    type: Literal["choice"]
    instructions: Text | list[Part]
    choices: list[ChoiceOption] = Field(min_length=2, max_length=MOST_OPTIONS)
    name: Name | None = None


class Level(Body):
    label: Name
    description: str | None = Field(None, max_length=4096)


class Score(Body):
    type: Literal["score"]
    instructions: Text | list[Part]
    levels: list[Level] = Field(min_length=2, max_length=MOST_OPTIONS)
    name: Name | None = None


Asked = Annotated[
    Annotated[Predicate, Tag("predicate")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Score, Tag("score")],
    Discriminator("type"),
]


class Deciding(Placed):
    """What requests for decisions share. `temperature` is an extension."""

    NOT_DONE = {"pid": (), "fork_of": ()}

    model: str = Field(min_length=1, max_length=256)
    temperature: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Below 1 answers are surer, above less so: fit it to labelled texts.",
    )


class DecisionRequest(Deciding, Hinted):
    NOT_DONE = {
        **Deciding.NOT_DONE,
        "prompt_cache_options": (),
    }

    input: Text | Annotated[list[Item], Field(min_length=1)] = Field(description="What is asked about.")
    questions: list[Asked] = Field(min_length=1, max_length=MOST_QUESTIONS)


@router.post("/v1/decisions", summary="Typed questions, answered with probabilities", responses=documented())
async def decisions(
    request: Request, body: DecisionRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    text = body.input if isinstance(body.input, str) else "\n".join(item.line() for item in body.input)
    questions = [_question(one) for one in body.questions]
    (made,) = await attend(request, decide(caller, body, [text], questions))
    answers = [_answer(asked, found) for asked, found in zip(body.questions, made, strict=True)]
    tokens, cached = used(made)
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }
    return json({"model": body.model, "answers": answers, "usage": usage})


async def decide(
    caller: Caller, body: Placed, texts: list[str], questions: list[Question]
) -> list[list[Decision]]:
    """Answers placed as `body`, a request for a model, says, [text][question]. Raises TimedOut after its
    deadline, ContextOverflow, InvalidArgument, UnsupportedModel."""
    name: str = getattr(body, "model")  # noqa: B009
    if sum(len(question.options) for question in questions) * len(texts) > MOST_ANSWERS:
        raise errors.InvalidArgument(
            f"more than {MOST_ANSWERS} options in one request, of all questions about all texts"
        )
    characters = sum(map(len, texts)) * len(questions)
    characters += sum(len(question.instructions) for question in questions) * len(texts)
    if characters > MOST_BODY:
        raise errors.InvalidArgument(
            f"more than {MOST_BODY} characters, of all texts once a question", hint="send several requests"
        )
    found = await caller.llm(body.model_name(name))
    sched_class, nice = body.place()
    llm = LLM(
        found.client,
        found.model,
        found.tokenizer,
        context_length=found.context_length,
        sched_class=sched_class,
        nice=nice,
    )
    try:
        async with asyncio.timeout(body.deadline_ms and body.deadline_ms / 1000):
            made = await llm.adecide_all(texts, questions, temperature=getattr(body, "temperature", 1.0))
    except TimeoutError:
        raise errors.TimedOut(f"not decided in {body.deadline_ms} ms", field="deadline_ms") from None
    if (request := record.current()) is not None:
        tokens, cached = used([one for row in made for one in row])
        request.used(llm.model, tokens, cached, 0, "stop")
    return made


def used(made: Sequence[Decision]) -> tuple[int, int]:
    """Tokens that were sent, and how many of them were known."""
    return sum(one.prompt_tokens for one in made), sum(one.cached_tokens for one in made)


def _question(asked: Predicate | Choice | Score) -> Question:
    match asked:
        case Predicate():
            return yes_or_no(words(asked.instructions))
        case Choice():
            options = [Option(_shown(one.value), one.description or "") for one in asked.choices]
        case Score():
            options = [Option(level.label, level.description or "") for level in asked.levels]
    return Question(words(asked.instructions), tuple(options))


def _shown(value: bool | str) -> str:
    return value if isinstance(value, str) else TRUE if value else FALSE


def _answer(asked: Predicate | Choice | Score, found: Decision) -> dict[str, Any]:
    chances = found.probabilities
    match asked:
        case Predicate():
            return {"type": "predicate", "name": asked.name, "probability": chances[0]}
        case Choice():
            values = [one.value for one in asked.choices]
            return {
                "type": "choice",
                "name": asked.name,
                "choice": values[chances.index(max(chances))],
                "confidence": found.confidence,
                "probabilities": [
                    {"value": value, "probability": p} for value, p in zip(values, chances, strict=True)
                ],
            }
        case Score():
            return {
                "type": "score",
                "name": asked.name,
                "score": found.level,
                "confidence": found.level_confidence,
                "probabilities": [
                    {"label": level.label, "value": index, "probability": p}
                    for index, (level, p) in enumerate(zip(asked.levels, chances, strict=True))
                ],
            }


class NamedQuestion(Body):
    """`criteria`: of a noul what true and false mean, of a choice the options with their meanings (or a
    list), of a score the levels, lowest first."""

    type: Literal["noul", "choice", "score"]
    instructions: Any = Field(description="A text, or JSON.")
    criteria: dict[Name, Any] | list[Any] | None = None


class SystemOneRequest(Deciding):
    NOT_DONE = {**Deciding.NOT_DONE, "assets": ({},)}

    state: Any = Field(description="What is asked about: a text, or JSON.")
    questions: dict[Name, NamedQuestion] = Field(min_length=1, max_length=MOST_QUESTIONS)
    keep_alive: KeepAlive = None


@router.post("/v1/systemone", summary="The same in System One's words", responses=documented())
async def systemone(
    request: Request, body: SystemOneRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    questions = [_named(name, asked) for name, asked in body.questions.items()]
    (made,) = await attend(request, decide(caller, body, [told(body.state)], questions))
    answers = {
        name: _named_answer(asked, found)
        for (name, asked), found in zip(body.questions.items(), made, strict=True)
    }
    return json(
        {
            "model": body.model,
            "answers": answers,
            "usage": {"input_tokens": used(made)[0], "output_tokens": 0},
        }
    )


def _named(name: str, asked: NamedQuestion) -> Question:
    criteria, place = asked.criteria, f"questions.{name}.criteria"
    match asked.type:
        case "noul":
            meaning = criteria if isinstance(criteria, dict) else {}
            if meaning.keys() - {TRUE, FALSE}:
                raise errors.InvalidArgument("a noul says what true and false mean", field=place)
            return yes_or_no(
                told(asked.instructions), *(told(meaning.get(one) or "") for one in (TRUE, FALSE))
            )
        case "choice":
            if isinstance(criteria, list):
                criteria = dict.fromkeys(map(told, criteria))
            options = [Option(key, told(value or "")) for key, value in (criteria or {}).items()]
        case "score":
            if not isinstance(criteria, list):
                raise errors.InvalidArgument("a score has a list of levels", field=place)
            options = [Option(told(level)) for level in criteria]
    if not all(len(option.name) <= 4096 for option in options):
        raise errors.InvalidArgument("an option is longer than 4096 characters", field=place)
    return Question(told(asked.instructions), tuple(options))


def _named_answer(asked: NamedQuestion, found: Decision) -> dict[str, Any]:
    chances = found.probabilities
    match asked.type:
        case "noul":
            return {"type": "noul", "noul": chances[0]}
        case "choice":
            return {
                "type": "choice",
                "choice": found.label,
                "probabilities": dict(zip(found.options, chances, strict=True)),
                "confidence": found.confidence,
            }
    return {
        "type": "score",
        "score": found.level,
        "legend": {str(index): level for index, level in enumerate(found.options)},
        "probabilities": {str(index): p for index, p in enumerate(chances)},
        "confidence": found.level_confidence,
    }
