"""/v1/files: what tenants bring for batches and training, and what comes of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Query, Request
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import json, new_id
from ..store import Kept, Store, stored

router = APIRouter(prefix="/v1/files", tags=["openai"])

MOST_FILE = 512 << 20
MOST_UPLOAD = MOST_FILE + (64 << 10)
"""Bytes of an upload's body, which has a head."""

MOST_UPLOADS = 8
"""Of one tenant, at a time: each is in the temporary folder until it has come whole."""

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
BATCH_S = 30 * 24 * 3600
"""So long a file of a batch is kept, unless its owner says otherwise."""

CHUNK = 256 << 10

WRITERS = (t.Capability.INFER, t.Capability.TRAIN)
"""Whoever may submit the work that files are for."""

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": BATCH_S},
                    },
                }
            }
        },
    }
}

StoreOf = Annotated[Store, Depends(stored)]
CallerOf = Annotated[Caller, Depends(authenticated)]
Limit = Annotated[int, Query(ge=1, le=10_000)]


@router.post("", summary="Upload a file", responses=documented(), openapi_extra=_FORM)
async def uploaded(request: Request, caller: CallerOf, store: StoreOf) -> Response:
    caller.needs(*WRITERS)
    await store.has_room(caller.tenant, min(MOST_UPLOAD, int(request.headers.get("content-length") or 0)))
    with request.app.state.works.within(f"uploads of {caller.tenant}", MOST_UPLOADS):
        file = await _take_in(request, caller, store)
    if not file.size:
        store.path(file.id).unlink(missing_ok=True)
        raise errors.InvalidArgument("the file is empty", field="file")
    try:
        await store.add(file)
    except BaseException:
        store.path(file.id).unlink(missing_ok=True)
        raise
    return json(file.body)


async def _take_in(request: Request, caller: Caller, store: Store) -> Kept:
    async with request.form(max_files=1, max_fields=16, max_part_size=64 << 10) as form:
        sent = form.get("file")
        if not isinstance(sent, UploadFile):
            raise errors.InvalidArgument("multipart/form-data with a file is expected", field="file")
        purpose = form.get("purpose")
        if purpose not in PURPOSES:
            raise errors.InvalidArgument(f"one of {', '.join(PURPOSES)} is expected", field="purpose")
        for field in form:
            if field not in _FORM["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]:  # type: ignore[index]
                raise errors.InvalidArgument(f"there is no field {field[:64]!r}", field=field[:64])
        seconds = _seconds(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
        if seconds is None and purpose == "batch":
            seconds = BATCH_S
        file = new_file(caller.tenant, str(purpose), (sent.filename or "file")[:255], seconds)
        await write(store, file, chunks(sent.file))
        return file


def _seconds(anchor: Any, seconds: Any) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at" or not isinstance(seconds, str) or not seconds.isdecimal():
        raise errors.InvalidArgument("anchor created_at and seconds are expected", field="expires_after")
    if not 3600 <= int(seconds[:9]) <= BATCH_S:
        raise errors.InvalidArgument(f"between 3600 and {BATCH_S} seconds", field="expires_after")
    return int(seconds)


def new_file(tenant: str, purpose: str, name: str, seconds: int | None = None) -> Kept:
    """A file that `write` is to fill. It expires after `seconds`."""
    now = int(time.time())
    expires = None if seconds is None else now + seconds
    id = new_id("file-")
    body = {
        "id": id,
        "object": "file",
        "bytes": 0,
        "created_at": now,
        "expires_at": expires,
        "filename": name,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }
    return Kept(tenant, "file", id, body, {}, expires)


async def write(store: Store, file: Kept, parts: AsyncIterator[bytes]) -> None:
    """Makes the file's bytes of `parts`, durably. Nobody sees it before it is added to the store. Raises
    StorageFailed."""
    path = store.path(file.id)
    try:
        with await asyncio.to_thread(path.open, "xb") as target:
            async for part in parts:
                await asyncio.to_thread(target.write, part)
            await asyncio.to_thread(target.flush)
            await asyncio.to_thread(os.fsync, target.fileno())
            await asyncio.to_thread(_sync_folder, path.parent)
            file.size = file.body["bytes"] = target.tell()
    except BaseException as problem:
        path.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise errors.StorageFailed(
                f"the file could not be kept: {problem.strerror}", hint="make room"
            ) from None
        raise


def _sync_folder(folder: Path) -> None:
    """The file's name survives a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def chunks(source: BinaryIO) -> AsyncIterator[bytes]:
    while part := await asyncio.to_thread(source.read, CHUNK):
        yield part


@router.get("", summary="The files", responses=documented())
async def listed(
    caller: CallerOf,
    store: StoreOf,
    after: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Response:
    matches = {"purpose": purpose} if purpose else {}
    return json(
        await page(store, caller, "file", after, limit, newest_first=order == "desc", matches=matches)
    )


async def page(
    store: Store,
    caller: Caller,
    kind: str,
    after: str | None,
    limit: int,
    *,
    newest_first: bool = True,
    matches: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A list as OpenAI's clients page through it: objects of the caller whose bodies have what `matches`."""
    found, more = await store.page(
        caller.tenant, kind, after=after, limit=limit, newest_first=newest_first, matches=matches or {}
    )
    return listing([kept.body for kept in found], more)


def listing(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }


@router.get("/{file_id}", summary="One file", responses=documented())
async def one(file_id: str, caller: CallerOf, store: StoreOf) -> Response:
    return json((await store.get(caller.tenant, "file", file_id)).body)


@router.get("/{file_id}/content", summary="What a file holds", responses=documented())
async def content(file_id: str, caller: CallerOf, store: StoreOf) -> Response:
    file = await store.get(caller.tenant, "file", file_id)
    source = await asyncio.to_thread(opened, store, file)

    async def parts() -> AsyncIterator[bytes]:
        with source:
            async for part in chunks(source):
                yield part

    headers = {"content-length": str(file.body["bytes"])}
    return StreamingResponse(parts(), headers=headers, media_type="application/octet-stream")


def opened(store: Store, file: Kept) -> BinaryIO:
    """Blocks. Raises NotFound when it was deleted meanwhile."""
    try:
        return store.path(file.id).open("rb")
    except OSError:
        raise errors.NotFound(f"No file found with id '{file.id}'.", hint="it was deleted") from None


@router.delete("/{file_id}", summary="Delete a file", responses=documented())
async def deleted(file_id: str, caller: CallerOf, store: StoreOf) -> Response:
    caller.needs(*WRITERS)
    await store.delete(caller.tenant, "file", file_id)
    return json({"id": file_id, "object": "file", "deleted": True})
