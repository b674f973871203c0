"""Typed questions answered with probabilities: OpenAI's /v1/decisions, and /v1/systemone as other servers
have it. See userland/decisions.py for how."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from ..decisions import MOST_OPTIONS, Decision, Option, Question
from . import record
from .callers import Caller, authenticated
from .errors_doc import documented
from .http import attend, json
from .options import Body

router = APIRouter(tags=["decisions"])

MOST_QUESTIONS = 400
MOST_TEXT = 1 << 20

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]

TRUE, FALSE = "true", "false"


class Part(Body):
    """A text, or JSON; pictures are refused."""

    type: Literal["input_text", "output_text", "input_json", "text", "json"]
    text: Text | None = None
    json_: Any = Field(None, alias="json")

    def words(self) -> str:
        return self.text if self.text is not None else jsonlib.dumps(self.json_, ensure_ascii=False)


class InputMessage(Body):
    NOT_DONE = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


def _words(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.words() for part in content)


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


class DecisionRequest(Body):
    NOT_DONE = {"prompt_cache_key": (), "prompt_cache_options": (), "safety_identifier": ()}

    model: str = Field(min_length=1, max_length=256)
    input: Text | list[InputMessage] = Field(description="What is asked about.")
    questions: list[Asked] = Field(min_length=1, max_length=MOST_QUESTIONS)


@router.post("/v1/decisions", summary="Typed questions, answered with probabilities", responses=documented())
async def decisions(
    request: Request, body: DecisionRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    text = body.input
    if not isinstance(text, str):
        text = "\n".join(f"{message.role}: {_words(message.content)}" for message in text)
    made = await attend(
        request, _decided(caller, body.model, text, [_question(one) for one in body.questions])
    )
    answers = [_answer(asked, found) for asked, found in zip(body.questions, made, strict=True)]
    tokens, cached = sum(one.prompt_tokens for one in made), sum(one.cached_tokens for one in made)
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }
    return json({"model": body.model, "answers": answers, "usage": usage})


async def _decided(caller: Caller, model: str, text: str, questions: list[Question]) -> list[Decision]:
    llm = await caller.llm(model)
    made = await llm.adecide(text, questions)
    if (request := record.current()) is not None:
        tokens, cached = sum(one.prompt_tokens for one in made), sum(one.cached_tokens for one in made)
        request.used(llm.model, tokens, cached, 0, "stop")
    return made


def _question(asked: Predicate | Choice | Score) -> Question:
    match asked:
        case Predicate():
            options = [Option(TRUE), Option(FALSE)]
        case Choice():
            options = [Option(_shown(one.value), one.description or "") for one in asked.choices]
        case Score():
            options = [Option(level.label, level.description or "") for level in asked.levels]
    return Question(_words(asked.instructions), tuple(options))


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
                "score": _expected(chances),
                "confidence": found.confidence,
                "probabilities": [
                    {"label": level.label, "value": index, "probability": p}
                    for index, (level, p) in enumerate(zip(asked.levels, chances, strict=True))
                ],
            }


def _expected(chances: tuple[float, ...]) -> float:
    return sum(index * p for index, p in enumerate(chances))


class NamedQuestion(Body):
    """`criteria`: of a noul what true and false mean, of a choice the options with their meanings (or a
    list), of a score the levels, lowest first."""

    type: Literal["noul", "choice", "score"]
    instructions: Any = Field(description="A text, or JSON.")
    criteria: dict[Name, Any] | list[Any] | None = None


class SystemOneRequest(Body):
    model: str = Field(min_length=1, max_length=256)
    state: Any = Field(description="What is asked about: a text, or JSON.")
    questions: dict[Name, NamedQuestion] = Field(min_length=1, max_length=MOST_QUESTIONS)


@router.post("/v1/systemone", summary="The same in System One's words", responses=documented())
async def systemone(
    request: Request, body: SystemOneRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    questions = [_named(name, asked) for name, asked in body.questions.items()]
    made = await attend(request, _decided(caller, body.model, _text(body.state), questions))
    answers = {
        name: _named_answer(asked, found)
        for (name, asked), found in zip(body.questions.items(), made, strict=True)
    }
    tokens = sum(one.prompt_tokens for one in made)
    usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
    return json({"model": body.model, "answers": answers, "usage": usage})


def _text(content: Any) -> str:
    return content if isinstance(content, str) else jsonlib.dumps(content, ensure_ascii=False)


def _named(name: str, asked: NamedQuestion) -> Question:
    criteria, place = asked.criteria, f"questions.{name}.criteria"
    match asked.type:
        case "noul":
            meaning = criteria if isinstance(criteria, dict) else {}
            if meaning.keys() - {TRUE, FALSE}:
                raise errors.InvalidArgument("a noul says what true and false mean", field=place)
            options = [Option(one, _text(meaning.get(one) or "")) for one in (TRUE, FALSE)]
        case "choice":
            if isinstance(criteria, list):
                criteria = dict.fromkeys(map(_text, criteria))
            options = [Option(key, _text(value or "")) for key, value in (criteria or {}).items()]
        case "score":
            if not isinstance(criteria, list):
                raise errors.InvalidArgument("a score has a list of levels", field=place)
            options = [Option(_text(level)) for level in criteria]
    if not all(len(option.name) <= 4096 for option in options):
        raise errors.InvalidArgument("an option is longer than 4096 characters", field=place)
    return Question(_text(asked.instructions), tuple(options))


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
        "score": _expected(chances),
        "legend": {str(index): level for index, level in enumerate(found.options)},
        "probabilities": {str(index): p for index, p in enumerate(chances)},
        "confidence": found.confidence,
    }
