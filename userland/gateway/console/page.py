"""/console, /docs: the pages and their files, as they are in the packages. They hold nothing of anybody, so
no key is asked for; what a page shows it asks for with its reader's key."""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
from collections.abc import Container
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from llmasos.syscalls import errors
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

router = APIRouter(include_in_schema=False)

PAGE, ROUTES = "console.html", "docs.html"

SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
"""Of the package fastapi-offline. FastAPI's own page has them from a server in the internet: its script would
run with the reader's rights here, and without the internet there is nothing to see."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
    "x-content-type-options": "nosniff",
}


# Swagger UI sets styles in its elements and has pictures in its style sheet.
_ROUTES_HEADERS = {
    **_HEADERS,
    "content-security-policy": f"{_HEADERS['content-security-policy']}; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'",
}


@dataclass(frozen=True, slots=True)
class _File:
    media_type: str
    plain: bytes
    packed: bytes
    etag: str


def _files(folder: Traversable, names: Container[str] | None = None) -> dict[str, _File]:
    found = {}
    for file in folder.iterdir():
        media_type = _TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None and (names is None or file.name in names):
            data = file.read_bytes()
            etag = f'W/"{hashlib.sha256(data).hexdigest()[:16]}"'  # weak: packed or not, it is the same
            found[file.name] = _File(media_type, data, gzip.compress(data, mtime=0), etag)
    return found


FILES = _files(resources.files(__package__).joinpath("static"))


@functools.cache
def swagger() -> dict[str, _File]:
    """Read when it is first asked for: it is 1.7 MB. Nothing without the package."""
    try:
        return _files(resources.files("fastapi_offline").joinpath("static"), SWAGGER)
    except ModuleNotFoundError:
        return {}


@router.api_route("/", methods=["GET", "HEAD"])
async def root(request: Request) -> Response:
    """Browsers come to the console; Ollama's clients look here whether it runs."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("console")
    return Response("Ollama is running", media_type="text/plain")


@router.get("/console")
async def page(request: Request) -> Response:
    return _answer(request, PAGE)


@router.get("/console/{name}")
async def file(request: Request, name: str) -> Response:
    return _answer(request, name)


@router.get("/docs")
async def routes(request: Request) -> Response:
    if not await asyncio.to_thread(swagger):
        raise errors.NotFound("/docs needs fastapi-offline", hint="pip install 'llmasos[gateway]'")
    return _answer(request, ROUTES)


def _answer(request: Request, name: str) -> Response:
    file = FILES.get(name) or (swagger().get(name) if name in SWAGGER else None)
    if file is None:
        raise HTTPException(404)
    headers = {**(_ROUTES_HEADERS if name == ROUTES else _HEADERS), "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            file.packed, headers={**headers, "content-encoding": "gzip"}, media_type=file.media_type
        )
    return Response(file.plain, headers=headers, media_type=file.media_type)
