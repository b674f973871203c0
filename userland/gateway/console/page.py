"""/console: the page and its files, as they are in the package. They hold nothing of anybody, so no key is
asked for; what the page shows it asks for with its reader's key."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

router = APIRouter(include_in_schema=False)

PAGE = "console.html"

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


@dataclass(frozen=True, slots=True)
class _File:
    media_type: str
    plain: bytes
    packed: bytes
    etag: str


def _files() -> dict[str, _File]:
    found = {}
    for file in resources.files(__package__).joinpath("static").iterdir():
        media_type = _TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None:
            data = file.read_bytes()
            etag = f'W/"{hashlib.sha256(data).hexdigest()[:16]}"'  # weak: packed or not, it is the same
            found[file.name] = _File(media_type, data, gzip.compress(data, mtime=0), etag)
    return found


FILES = _files()


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


def _answer(request: Request, name: str) -> Response:
    file = FILES.get(name)
    if file is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            file.packed, headers={**headers, "content-encoding": "gzip"}, media_type=file.media_type
        )
    return Response(file.plain, headers=headers, media_type=file.media_type)
