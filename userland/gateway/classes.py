"""/v1/classify: which class each text is of, as vLLM has it: by a classifier's own head, or zero-shot by the
likelihoods of `labels`."""

from __future__ import annotations

import asyncio
import json as jsonlib
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from ..decisions import ABOUT, MOST_OPTIONS, Option, Question
from ..llm import LLM
from ..scoring import softmax
from .callers import Caller, authenticated
from .decisions import Deciding, Name, Text, decide, used
from .errors_doc import documented
from .http import attend, json, new_id
from .vectors import framed_texts, vectors

router = APIRouter(tags=["scores"])

MOST_TEXTS = 2048

Rows = tuple[list[str], list[Sequence[float]], int]
"""Names of the classes, their probabilities for each text, tokens that it took."""


class ClassifyRequest(Deciding):
    input: Text | list[Text] = Field(description=f"A text, or up to {MOST_TEXTS}.")
    labels: list[Name] | None = Field(
        None,
        min_length=2,
        max_length=MOST_OPTIONS,
        description="For a model that generates text: what it may be. A classifier has its own.",
    )
    instructions: Text = Field(ABOUT, description="With labels: the question that they answer.")


@router.post("/v1/classify", summary="Which class texts are of", responses=documented())
@router.post("/classify", summary="The same", responses=documented())
async def classify(
    request: Request, body: ClassifyRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not 0 < len(texts) <= MOST_TEXTS:
        raise errors.InvalidArgument(f"1 to {MOST_TEXTS} texts", field="input")
    way = _by_likelihood if body.labels is not None else _by_head
    names, rows, tokens = await attend(request, way(caller, body, texts))
    data = [
        {"index": index, "label": names[row.index(max(row))], "probs": list(row), "num_classes": len(row)}
        for index, row in enumerate(rows)
    ]
    return json(
        {
            "id": new_id("classify-"),
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
    )


async def _by_likelihood(caller: Caller, body: ClassifyRequest, texts: list[str]) -> Rows:
    names = body.labels or []
    question = Question(body.instructions, tuple(Option(name) for name in names))
    made = [one for (one,) in await decide(caller, body, texts, [question])]
    return names, [one.probabilities for one in made], used(made)[0]


async def _by_head(caller: Caller, body: ClassifyRequest, texts: list[str]) -> Rows:
    llm = await caller.llm(body.model_name(body.model))
    try:
        made, tokens = await vectors(caller, llm, await framed_texts(llm, texts), body, t.Encodes.CLASSIFY)
    except errors.UnsupportedModel as problem:
        if llm.tokenizer.encodes is None:  # it generates text
            raise errors.UnsupportedModel(problem.message, hint="give it `labels`", field="labels") from None
        raise
    logits = [[value / body.temperature for value in row] for part in made for row in part.tolist()]
    names = await asyncio.to_thread(_names, llm, len(logits[0]))
    if len(names) == 1:  # a cross-encoder: one class, or not
        return names, [[softmax([row[0], 0.0])[0]] for row in logits], tokens
    return names, [softmax(row) for row in logits], tokens


def _names(llm: LLM, count: int) -> list[str]:
    """What the model's configuration calls its classes."""
    config: Any = jsonlib.loads(llm.client.read_file(f"/models/{llm.model}/config.json"))
    named = config.get("id2label") if isinstance(config, dict) else None
    named = named if isinstance(named, dict) else {}
    return [str(named.get(str(index), f"LABEL_{index}")) for index in range(count)]
