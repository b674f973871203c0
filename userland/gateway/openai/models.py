"""/v1/models: what the caller may use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from starlette.responses import Response

from ..anthropic import models as anthropic
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import json
from ..problems import speaks_anthropic

router = APIRouter(prefix="/v1/models", tags=["openai"])


@router.get("", summary="The models", responses=documented())
async def listed(request: Request, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """With the header `anthropic-version` in Anthropic's shape, with its `limit`, `after_id`, `before_id`."""
    entries = (await caller.aio.call(table.Ls("/models"))).entries
    if speaks_anthropic(request.url.path, request.headers):
        models = [anthropic.shown(name_of(entry), entry) for entry in entries]
        return json(anthropic.page(models, request.query_params))
    return json({"object": "list", "data": [_shown(entry) for entry in entries]})


@router.get("/{model:path}", summary="One model", responses=documented())
async def one(request: Request, model: str, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    llm = await caller.llm(model)
    entry = await caller.aio.call(table.Stat(f"/models/{llm.model}"))
    if speaks_anthropic(request.url.path, request.headers):
        return json(anthropic.shown(name_of(entry), entry))
    return json(_shown(entry))


@router.delete("/{model:path}", summary="Remove a model", responses=documented())
async def removed(model: str, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """What training made for the caller."""
    caller.needs(t.Capability.TRAIN)
    llm = await caller.llm(model)
    await caller.aio.call(table.Unlink(f"/models/{llm.model}"))
    return json({"id": model, "object": "model", "deleted": True})


def short(name: str) -> str:
    """A model's name without the tag that goes without saying."""
    return name.replace(":latest", "")


def name_of(entry: t.FileInfo) -> str:
    return short(entry.path.removeprefix("/models/"))


def _shown(entry: t.FileInfo) -> dict[str, Any]:
    return {
        "id": name_of(entry),
        "object": "model",
        "created": int(entry.modified),
        "owned_by": str(entry.details.get("owner") or "llmasos"),
        "max_model_len": entry.details.get("context_length"),
    }
