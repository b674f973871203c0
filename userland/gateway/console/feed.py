"""/v1/console/events: the machine as the caller may see it, as JSON merge patches (RFC 7396), one a second.

The first event is the whole state, each later one what has changed of it since: entries and fields that are
null are gone. An idle machine costs a line with the time.

    time        seconds since the epoch
    caller      tenant, rights
    version     the gateway's
    processes   by pid: the row of `ps`, with `born` in place of its age; `trains` if it does
    more        there are more processes than are shown
    devices     by name
    pools       by device/model: KV memory, as in /v1/system
    quotas      by path
    models      by name; `encodes` if it generates no text
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from starlette.responses import Response

from ...models import encodes
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..openai.models import short
from ..openai.shared import event, stream
from ..picture import Picture

router = APIRouter(tags=["console"])

PERIOD_S = 1.0
MODELS_EVERY = 5
"""The models are looked at every so many periods: they change seldom."""

_STEADY = ("name", "driver", "state", "description", "memory_total", "memory_free", "restarts", "step_ms")
"""What is told of a device: what changes with every look, and says little, is left out."""

_DETAILS = ("architecture", "parameters", "quantization", "context_length")


@router.get("/v1/console/events", summary="The machine, live", responses=documented())
async def events(request: Request, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """A stream of JSON merge patches (RFC 7396), one a second: first the whole state, then what changed."""
    return await stream(_patches(request, caller)).begun()


async def _patches(request: Request, caller: Caller) -> AsyncIterator[bytes]:
    watch = Watch(caller)
    before: dict[str, Any] = {}
    while not request.app.state.ending():  # a stream without an end would keep the server from its own
        after = await watch.look()
        yield event(patch(before, after))
        before = after
        await asyncio.sleep(PERIOD_S)
        await authenticated(request)  # the key may have been revoked


class Watch:
    """Looks at the machine again and again for one caller."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._born: dict[int, float] = {}
        self._trains: dict[int, bool] = {}
        self._models: dict[str, Any] = {}
        self._encodes: dict[str, t.Encodes | None] = {}  # by the model's digest
        self._looks = 0

    async def look(self) -> dict[str, Any]:
        """The state now. Raises what the kernel answers."""
        picture, now = await Picture.of(self._caller), time.time()
        if self._looks % MODELS_EVERY == 0:
            entries = (await self._caller.aio.call(table.Ls("/models"))).entries
            await asyncio.to_thread(self._look_into, entries)
            self._models = {short(one.path.removeprefix("/models/")): self._model(one) for one in entries}
        self._looks += 1
        pids = {process.pid for process in picture.processes}
        self._born = {pid: born for pid, born in self._born.items() if pid in pids}
        self._trains = {pid: trains for pid, trains in self._trains.items() if pid in pids}
        return {
            "time": round(now, 1),
            "caller": {"tenant": self._caller.tenant, "rights": sorted(self._caller.rights)},
            "version": version("llmasos"),
            "processes": {str(one.pid): await self._row(one, now) for one in picture.processes},
            "more": picture.more,
            "devices": {
                one.name: {field: getattr(one, field) for field in _STEADY} for one in picture.devices
            },
            "pools": {f"{pool['device']}/{pool['model']}": pool for pool in picture.pools()},
            "quotas": {one.path: _without_none(msgspec.to_builtins(one)) for one in picture.quotas},
            "models": self._models,
        }

    async def _row(self, process: t.ProcessInfo, now: float) -> dict[str, Any]:
        row: dict[str, Any] = msgspec.to_builtins(process)
        row["born"] = self._born.setdefault(process.pid, round(now - row.pop("age_s"), 1))
        row["trains"] = await self._is_run(process)
        return row

    async def _is_run(self, process: t.ProcessInfo) -> bool:
        """Whether it trains; asked once of each that has no KV memory, which training has not."""
        if process.blocks:
            return False
        if (known := self._trains.get(process.pid)) is None:
            try:
                files = (await self._caller.aio.call(table.Ls(f"/proc/{process.pid}"))).entries
            except errors.NotFound:
                return False  # it has ended meanwhile
            known = self._trains[process.pid] = any(file.path.endswith("/metrics") for file in files)
        return known

    def _look_into(self, entries: list[t.FileInfo]) -> None:
        """What models are for, whose configuration was not read yet."""
        known, self._encodes = self._encodes, {}
        for one in entries:
            if one.digest not in known:
                with contextlib.suppress(errors.LLMasOSError, ValueError):  # it is damaged, or gone
                    known[one.digest] = encodes(self._caller.client, one.path.removeprefix("/models/"))
            self._encodes[one.digest] = known.get(one.digest)

    def _model(self, entry: t.FileInfo) -> dict[str, Any]:
        told = {name: entry.details[name] for name in _DETAILS if name in entry.details}
        if made_for := self._encodes[entry.digest]:
            told["encodes"] = made_for
        return {"size": entry.size, "modified": int(entry.modified), **told}


def _without_none(value: Any) -> Any:
    """A merge patch cannot say that something is null."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return value


def patch(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The merge patch that makes `after` of `before`, neither of which has a null."""
    found: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if changed := patch(old, value):
                found[key] = changed
        elif old != value or type(old) is not type(value):
            found[key] = value
    return found
