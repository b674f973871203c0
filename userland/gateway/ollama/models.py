"""The models: which there are, which are loaded, what one is; bringing in, second names, removing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version as installed_version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from pydantic import Field, model_validator
from starlette.responses import Response

from ...models import full_name, remote
from ...tokenizer import Tokenizer
from ..callers import Caller, authenticated
from ..errors_doc import documented
from ..http import attend, json
from ..options import Body
from .shared import line, lines, rfc3339

router = APIRouter(prefix="/api", tags=["ollama"])

NEVER = "9999-12-31T23:59:59Z"
SUCCESS = {"status": "success"}


class Named(Body):
    """`name` is what older clients call `model`."""

    model: str = Field(min_length=1, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _older(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" in values and "model" not in values:
            values = {**values, "model": values["name"]}
            del values["name"]
        return values


@router.get("/version", summary="The server's version")
async def version() -> dict[str, str]:
    return {"version": installed_version("llmasos")}


@router.get("/tags", summary="The models", responses=documented())
async def tags(caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    entries = (await caller.aio.call(table.Ls("/models"))).entries
    named = await asyncio.gather(*(_named(caller, entry) for entry in entries))
    times = [{"modified_at": rfc3339(entry.modified)} for entry in entries]
    return json({"models": [{**one, **at} for one, at in zip(named, times, strict=True)]})


@router.get("/ps", summary="The models that are loaded", responses=documented())
async def ps(caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """`size` is that of weights and KV memory on all devices, `size_vram` on GPUs."""
    entries = {_name(entry): entry for entry in (await caller.aio.call(table.Ls("/models"))).entries}
    sizes: dict[str, list[int]] = {}
    for device in (await caller.aio.call(table.Lsdev())).devices:
        on_gpu = device.name.startswith("cuda")
        for pool in device.pools:
            size = pool.weights_bytes + pool.block_bytes * pool.blocks_total
            known = sizes.setdefault(full_name(pool.model), [0, 0])
            known[0] += size
            known[1] += size if on_gpu else 0
    return json(
        {
            "models": [
                {
                    **await _named(caller, entries[name]),
                    "size": size,
                    "size_vram": on_gpus,
                    "expires_at": NEVER,
                    "context_length": entries[name].details.get("context_length"),
                }
                for name, (size, on_gpus) in sizes.items()
                if name in entries
            ]
        }
    )


class ShowRequest(Named):
    NOT_DONE = {"system": ("",), "template": ("",), "options": ({},)}

    verbose: bool = False


@router.post("/show", summary="One model", responses=documented())
async def show(body: ShowRequest, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    llm = await caller.llm(body.model)
    entry = await caller.aio.call(table.Stat(f"/models/{llm.model}"))
    details = entry.details
    architecture = str(details.get("architecture", ""))
    generation = llm.tokenizer.generation
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["repetition_penalty"] = "repeat_penalty"
    parameters = [f"{shown} {generation[name]}" for name, shown in names.items() if name in generation]
    template = llm.tokenizer.template
    return json(
        {
            "modelfile": "\n".join([f"FROM {llm.model}", *(f"PARAMETER {line}" for line in parameters)]),
            "parameters": "\n".join(parameters),
            "template": template,
            "license": str(details.get("license", "")),
            "modified_at": rfc3339(entry.modified),
            "details": await _details(caller, entry),
            "model_info": {
                "general.architecture": architecture,
                "general.parameter_count": details.get("parameters"),
                f"{architecture}.context_length": llm.context_length,
            },
            "capabilities": _capabilities(llm.tokenizer),
        }
    )


def _capabilities(tokenizer: Tokenizer) -> list[str]:
    """In Ollama's words; none of what only classifies."""
    if tokenizer.encodes is None:
        return ["completion", *(["tools"] if tokenizer.template else [])]
    return ["embedding"] if tokenizer.encodes is t.Encodes.EMBED else []


class PullRequest(Named):
    NOT_DONE = {"insecure": (False,), "password": ("",), "username": ("",)}

    source: str = Field("", max_length=1024, description="An extension, as in /v1/models/pull.")
    stream: bool = True


@router.post("/pull", summary="Bring a model in", responses=documented())
async def pull(
    request: Request, body: PullRequest, caller: Annotated[Caller, Depends(authenticated)]
) -> Response:
    """As JSON lines unless `stream` is false. A model that is there stays as it is: replacing it is an
    administrator's act. Hanging up stops a pull; the next one goes on where it was. Needs the right
    `models`."""
    wanted = remote(body.model)
    call = table.Pull(wanted.name, body.source or wanted.source)
    there = not body.source and await _is_there(caller, wanted.path)
    if not body.stream:
        if not there:
            await attend(request, caller.aio.call(call))
        return json(SUCCESS)

    async def parts() -> AsyncIterator[bytes]:
        if there:
            yield line({"status": "already there"})
            yield line(SUCCESS)
            return
        async with caller.aio.stream(call) as progress:
            async for step in progress:
                size = {"total": step.total, "completed": step.done} if step.total else {}
                yield line({"status": f"{step.phase} {step.file}".rstrip(), **size})
        _ = progress.reply  # raises what it failed of
        yield line(SUCCESS)

    return await lines(parts()).begun()


async def _is_there(caller: Caller, path: str) -> bool:
    try:
        await caller.aio.call(table.Stat(path))
    except errors.NotFound:
        return False
    return True


class CreateRequest(Named):
    """A second name for a model. What else Ollama writes into a model cannot be kept: send it with each
    request."""

    NOT_DONE = {
        "adapters": ({},),
        "draft": (),
        "files": ({},),
        "info": ({},),
        "license": ("", []),
        "messages": ([],),
        "modelfile": ("",),
        "parameters": ({},),
        "parser": ("",),
        "path": ("",),
        "quantize": ("",),
        "remote_host": ("",),
        "renderer": ("",),
        "requires": ("",),
        "system": ("",),
        "template": ("",),
    }

    from_: str = Field(alias="from", min_length=1, max_length=256)
    stream: bool = True


@router.post("/create", summary="Make a model of another", responses=documented())
async def create(body: CreateRequest, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """Needs the right `models`. An adapter is trained (/v1/fine_tuning/jobs) or pulled."""
    await _link(caller, body.from_, body.model)
    return Response(line(SUCCESS), media_type="application/x-ndjson" if body.stream else "application/json")


class CopyRequest(Body):
    source: str = Field(min_length=1, max_length=256)
    destination: str = Field(min_length=1, max_length=256)


@router.post("/copy", summary="Give a model a second name", responses=documented())
async def copy(body: CopyRequest, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """Needs the right `models`; replacing a name is an administrator's act. Nothing is copied."""
    await _link(caller, body.source, body.destination)
    return Response()


@router.delete("/delete", summary="Remove a model", responses=documented())
async def delete(body: Named, caller: Annotated[Caller, Depends(authenticated)]) -> Response:
    """What training made for the caller, with the right `train`; what everybody has is an administrator's."""
    await caller.aio.call(table.Unlink(f"/models/{full_name(body.model)}"))
    return Response()


async def _link(caller: Caller, source: str, target: str) -> None:
    await caller.aio.call(table.Link(full_name(source), full_name(target)))


def _name(entry: t.FileInfo) -> str:
    return entry.path.removeprefix("/models/")


async def _named(caller: Caller, entry: t.FileInfo) -> dict[str, Any]:
    name = _name(entry)
    return {
        "name": name,
        "model": name,
        "size": entry.size,
        "digest": entry.digest.removeprefix("sha256:"),
        "details": await _details(caller, entry),
    }


async def _details(caller: Caller, entry: t.FileInfo) -> dict[str, Any]:
    details = entry.details
    try:  # the source need not say it: a folder, a wheel, a file at some revision
        files = (await caller.aio.call(table.Ls(entry.path))).entries
    except errors.LLMasOSError:
        files = []  # damaged, or removed meanwhile
    gguf = any(file.path.endswith(".gguf") for file in files)
    family = str(details.get("architecture", ""))
    return {
        "parent_model": str(details.get("base", "")),
        "format": "gguf" if gguf else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": _in_short(details.get("parameters", 0)),
        "quantization_level": str(details.get("quantization", "")),
    }


def _in_short(count: Any) -> str:
    """As Ollama writes numbers of parameters: 134.52M, 7.6B."""
    if not isinstance(count, int) or count <= 0:
        return ""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f}".rstrip("0").rstrip(".") + unit
    return str(count)
