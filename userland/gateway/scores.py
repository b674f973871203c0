"""How well texts fit together: /v1/score and /v1/rerank, as vLLM, Jina and Cohere have them.

With a model of vectors the score is their cosine, with a cross-encoder its own (through a sigmoid), with a
model that generates text the probability that it answers yes.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from ..decisions import yes_or_no
from ..llm import LLM
from .callers import Caller, authenticated
from .decisions import decide, used
from .errors_doc import documented
from .http import MOST_BODY, attend, json, new_id
from .options import Body, Placed
from .vectors import framed_texts, vectors

router = APIRouter(tags=["scores"])

MOST_DOCUMENTS = 2048
RELEVANT = yes_or_no("Does the document answer the query?")

Text = Annotated[str, Field(min_length=1, max_length=1 << 20)]


class Document(Body):
    text: Text


class RerankRequest(Placed):
    NOT_DONE = {"pid": (), "fork_of": ()}

    model: str = Field(min_length=1, max_length=256)
    query: Text
    documents: list[Text | Document] = Field(min_length=1, max_length=MOST_DOCUMENTS)
    top_n: int | None = Field(None, ge=1, lt=2**31, description="So many of the best; all.")
    return_documents: bool = True


class ScoreRequest(Placed):
    NOT_DONE = {"pid": (), "fork_of": ()}

    model: str = Field(min_length=1, max_length=256)
    text_1: Text | list[Text] = Field(description="One text, or as many as text_2.")
    text_2: Text | list[Text]


@router.post("/v1/rerank", summary="Documents by how well they fit a query", responses=documented())
@router.post("/v2/rerank", summary="The same", responses=documented())
@router.post("/rerank", summary="The same", responses=documented())
async def rerank(
    request: Request, body: RerankRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    scores, tokens = await attend(request, _scores(caller, body, [(body.query, text) for text in texts]))
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json({"id": new_id("rerank-"), "model": body.model, "results": results, "usage": usage})


@router.post("/v1/score", summary="How well texts fit together", responses=documented())
@router.post("/score", summary="The same", responses=documented())
async def score(
    request: Request, body: ScoreRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    first = [body.text_1] * len(second) if isinstance(body.text_1, str) else body.text_1
    if len(first) != len(second) or not 0 < len(second) <= MOST_DOCUMENTS:
        raise errors.InvalidArgument(
            f"one text, or as many as text_2, which are 1 to {MOST_DOCUMENTS}", field="text_1"
        )
    scores, tokens = await attend(request, _scores(caller, body, list(zip(first, second, strict=True))))
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return json(
        {
            "id": new_id("score-"),
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _scores(
    caller: Caller, body: RerankRequest | ScoreRequest, pairs: list[tuple[str, str]]
) -> tuple[list[float], int]:
    if sum(len(first) + len(second) for first, second in pairs) > MOST_BODY:
        raise errors.InvalidArgument(
            f"all pairs have more than {MOST_BODY} characters", hint="send several requests"
        )
    llm = await caller.llm(body.model_name(body.model))
    for way in (_by_vectors, _by_classes, *([] if llm.tokenizer.encodes else [_by_words])):
        try:
            return await way(caller, llm, body, pairs)
        except errors.UnsupportedModel as problem:
            refusal = problem
    raise refusal


async def _by_vectors(
    caller: Caller, llm: LLM, body: Placed, pairs: list[tuple[str, str]]
) -> tuple[list[float], int]:
    import numpy as np

    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    made, tokens = await vectors(caller, llm, await framed_texts(llm, texts), body)
    rows = np.concatenate(made)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = dict(zip(texts, rows / np.where(lengths > 0, lengths, 1), strict=True))
    return [float(unit[first] @ unit[second]) for first, second in pairs], tokens


async def _by_classes(
    caller: Caller, llm: LLM, body: Placed, pairs: list[tuple[str, str]]
) -> tuple[list[float], int]:
    import numpy as np

    made, tokens = await vectors(caller, llm, await framed_texts(llm, pairs), body, t.Encodes.CLASSIFY)
    logits = np.concatenate(made)
    if logits.shape[1] != 1:
        raise errors.UnsupportedModel(
            f"{llm.model} tells {logits.shape[1]} classes apart, which are no score",
            hint="use a cross-encoder with one, or a model of vectors",
        )
    return (1 / (1 + np.exp(-logits[:, 0]))).tolist(), tokens


async def _by_words(
    caller: Caller, llm: LLM, body: Placed, pairs: list[tuple[str, str]]
) -> tuple[list[float], int]:
    texts = [f"{document}\nQuery: {query}" for query, document in pairs]
    made = [one for (one,) in await decide(caller, body, texts, [RELEVANT])]
    return [one.probabilities[0] for one in made], used(made)[0]
