"""/v1/embeddings: texts as vectors."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors
from pydantic import Field
from starlette.responses import Response

from ...llm import LLM
from ...tokenizer import Framed
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import attend, json
from ..options import Placed, Token
from ..problems import too_long_in
from ..system import checked
from ..vectors import framed_texts, shortened, vectors

router = APIRouter(prefix="/v1/embeddings", tags=["openai"])

MOST_INPUTS = 2048


class EmbeddingRequest(Placed):
    NOT_DONE = {"pid": (), "fork_of": ()}

    model: str = Field(min_length=1, max_length=256)
    input: str | list[str] | list[Token] | list[list[Token]] = Field(
        description=f"A text, tokens (as they are, without special ones), or up to {MOST_INPUTS} of either."
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, lt=2**31, description="The first ones, normalised again.")
    user: str | None = Field(None, max_length=512)


@router.post("", summary="Texts as vectors", responses=documented())
async def create(
    request: Request, body: EmbeddingRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    return json(await attend(request, embedding(caller, body)))


async def embedding(caller: Caller, body: EmbeddingRequest) -> dict[str, Any]:
    """The whole answer. Raises InvalidArgument, ContextOverflow, UnsupportedModel."""
    llm = await caller.llm(body.model_name(body.model))
    made, tokens = await vectors(caller, llm, await _inputs(llm, body.input), body)
    if body.dimensions is not None:
        made = [shortened(part, body.dimensions) for part in made]
    rows = [row for part in made for row in part]
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": row.tolist()
            if body.encoding_format == "float"
            else base64.b64encode(row.astype("<f4").tobytes()).decode(),
        }
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


async def _inputs(llm: LLM, given: Any) -> list[Framed]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= MOST_INPUTS:
        raise errors.InvalidArgument(f"1 to {MOST_INPUTS} inputs", field="input")
    if isinstance(given[0], str):
        with too_long_in("input"):
            return await framed_texts(llm, given)
    for index, tokens in enumerate(given):
        checked(llm.tokenizer.vocab_size, tokens, "input")
        if not tokens:
            raise errors.InvalidArgument(f"input {index} is empty", field="input")
        if len(tokens) > llm.context_length:
            raise errors.ContextOverflow(
                f"input {index} has {len(tokens)} tokens, the model's context is {llm.context_length}",
                field="input",
            )
    return [Framed(tokens) for tokens in given]
