"""/api/embed and the older /api/embeddings: texts as vectors."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from pydantic import Field
from starlette.responses import Response

from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import attend, json
from ..options import Placed
from ..vectors import framed_texts, shortened, vectors
from .shared import Clock, KeepAlive, RunOptions

router = APIRouter(prefix="/api", tags=["ollama"])

MOST_TEXTS = 4096


class Embedding(Placed):
    model: str = Field(min_length=1, max_length=256)
    options: RunOptions | None = Field(None, description="None of them changes a vector.")
    keep_alive: KeepAlive = None


class EmbedRequest(Embedding):
    input: str | list[str] = Field(description=f"A text, or up to {MOST_TEXTS}.")
    truncate: bool = Field(False, description="Whether a text that is too long is cut, or refused.")
    dimensions: int | None = Field(None, ge=1, lt=2**31, description="The first ones, normalised again.")


class EmbeddingsRequest(Embedding):
    prompt: str


@router.post("/embed", summary="Texts as vectors", responses=documented())
async def embed(
    request: Request, body: EmbedRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    clock = Clock()
    texts = [body.input] if isinstance(body.input, str) else body.input
    if len(texts) > MOST_TEXTS:
        raise errors.InvalidArgument(f"more than {MOST_TEXTS} texts", field="input")
    made, tokens = await attend(request, _embed(caller, body, texts, clock, truncate=body.truncate))
    if body.dimensions is not None:
        made = [shortened(part, body.dimensions) for part in made]
    return json(
        {
            "model": body.model,
            "embeddings": [row for part in made for row in part.tolist()],
            "prompt_eval_count": tokens,
            **clock.told(),
        }
    )


@router.post("/embeddings", summary="A text as a vector", responses=documented())
async def embeddings(
    request: Request, body: EmbeddingsRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    made, _ = await attend(request, _embed(caller, body, [body.prompt], Clock(), truncate=None))
    return json({"embedding": made[0][0].tolist()})


async def _embed(
    caller: Caller, body: Embedding, texts: list[str], clock: Clock, *, truncate: bool | None
) -> tuple[list[Any], int]:
    llm = await caller.llm(body.model_name(body.model))
    cut = await framed_texts(llm, texts, truncate=truncate)
    clock.asked()
    return await vectors(caller, llm, cut, body)
