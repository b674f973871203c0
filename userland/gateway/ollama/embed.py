"""/api/embed and the older /api/embeddings: texts as vectors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from ...encoding import calls, framed, rows
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import attend, json
from ..options import Placed
from ..record import current
from .shared import Clock, KeepAlive, RunOptions

if TYPE_CHECKING:
    from ...encoding import Floats

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
    work = _vectors(caller, body, texts, clock, truncate=body.truncate)
    vectors, tokens = await attend(request, work)
    if body.dimensions is not None:
        vectors = [_shortened(part, body.dimensions) for part in vectors]
    return json(
        {
            "model": body.model,
            "embeddings": [row for part in vectors for row in part.tolist()],
            "prompt_eval_count": tokens,
            **clock.told(),
        }
    )


@router.post("/embeddings", summary="A text as a vector", responses=documented())
async def embeddings(
    request: Request, body: EmbeddingsRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    vectors, _ = await attend(request, _vectors(caller, body, [body.prompt], Clock(), truncate=False))
    return json({"embedding": vectors[0][0].tolist()})


async def _vectors(
    caller: Caller, body: Embedding, texts: list[str], clock: Clock, *, truncate: bool
) -> tuple[list[Floats], int]:
    """Rows [n, dimensions] of all texts, in parts, and how many tokens they had."""
    llm = await caller.llm(body.model_name(body.model))
    sched_class, nice = body.place()
    cut = await asyncio.to_thread(framed, llm.tokenizer, texts, llm.context_length, truncate)
    clock.asked()
    call = table.Encode(
        llm.model, t.Encodes.EMBED, sched_class=sched_class, nice=nice, deadline_ms=body.deadline_ms
    )
    replies = [await caller.aio.call(one) for one in calls(call, cut)]
    tokens = sum(reply.tokens for reply in replies)
    if (record := current()) is not None:
        record.used(llm.model, tokens, 0, 0, "stop")
    return [rows(reply) for reply in replies], tokens


def _shortened(vectors: Floats, dimensions: int) -> Any:
    import numpy as np

    if dimensions > vectors.shape[1]:
        raise errors.InvalidArgument(
            f"the model's vectors have {vectors.shape[1]} dimensions", field="dimensions"
        )
    kept = vectors[:, :dimensions]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    return kept / np.where(lengths > 0, lengths, 1)
