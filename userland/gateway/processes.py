"""/v1/processes: what `llsh ps`, `spawn`, `kill`, `stop`, `cont` and `nice` do, over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from .callers import Caller, authenticated
from .errors_doc import documented
from .http import json
from .options import Body

router = APIRouter(prefix="/v1/processes", tags=["processes"])

Pid = Annotated[int, Path(ge=1, le=2**53, description="A process that the caller may see.")]
Nice = Annotated[int, Field(ge=-20, le=19, description="The lower, the earlier.")]


@router.get("", summary="The processes", responses=documented())
async def listed(
    caller: Annotated[Caller, Depends(authenticated)],
    after: Annotated[int, Query(ge=0, le=2**53, description="Those with pids above.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1024)] = 1024,
) -> Response:
    """Those of the caller and of whom it may command, by pid."""
    found = await caller.aio.call(table.Ps(after, limit))
    return json({"object": "list", "data": found.processes, "has_more": found.more})


class Spawn(Body):
    model: str = Field(min_length=1, max_length=256)
    sched_class: t.SchedClass = t.SchedClass.INTERACTIVE
    nice: Nice = 0
    label: str = Field("", max_length=64, description="What `ps` calls it.")


@router.post("", status_code=201, summary="Start a process", responses=documented())
async def spawned(body: Spawn, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """An empty context of a model, with which chat and completions go on (`pid`), until it is ended."""
    llm = await caller.llm(body.model)
    spawn = table.SpawnModel(llm.model, body.sched_class, body.nice, label=body.label, detached=True)
    made = await caller.aio.call(spawn)
    return json(await caller.aio.call(table.StatProcess(made.pid)), 201)


@router.get("/{pid}", summary="One process", responses=documented())
async def one(pid: Pid, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    return json(await caller.aio.call(table.StatProcess(pid)))


class Priority(Body):
    nice: Nice | None = None
    sched_class: t.SchedClass | None = None


@router.patch("/{pid}", summary="Change class or nice value", responses=documented())
async def placed(pid: Pid, body: Priority, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """Class realtime and nice values below 0 need the right `priority`."""
    return json(await caller.aio.call(table.SetPriority(pid, body.nice, body.sched_class)))


class Sent(Body):
    signal: t.Signal


@router.post("/{pid}/signal", summary="Send a signal", responses=documented())
async def signalled(pid: Pid, body: Sent, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """TERM and KILL end the process, STOP suspends it between two tokens, CONT lets it go on."""
    await caller.aio.call(table.Kill(pid, body.signal))
    return json({"pid": pid, "signal": body.signal})


@router.delete("/{pid}", summary="End a process", responses=documented())
async def ended(pid: Pid, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """One that has ended already is taken from the list; the answer then says how it ended."""
    row = await caller.aio.call(table.StatProcess(pid))
    if row.state is not t.State.ZOMBIE:
        await caller.aio.call(table.Kill(pid, t.Signal.KILL))
        return json({"pid": pid, "deleted": True})
    return json({"pid": pid, "deleted": True, "exit": await caller.aio.call(table.Wait(pid, 0))})
