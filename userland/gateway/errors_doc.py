"""The statuses that routes document."""

from __future__ import annotations

from typing import Any

_WHAT = {
    400: "The request cannot be done; it names what is wrong.",
    401: "No API key, or one that is not known.",
    403: "The key lacks the right.",
    404: "No such model, process, file or object; or no source delivers it.",
    408: "The request's own deadline has passed.",
    409: "Something of that kind is there already, is busy, or was ended.",
    413: "The body is too long.",
    429: "The caller's quota or queue is full; see retry-after.",
    500: "A fault of the server.",
    503: "The kernel or a device is not there at the moment; see retry-after.",
}


def documented() -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route."""
    shape = {"application/json": {"schema": {"type": "object"}}}
    return {status: {"description": what, "content": shape} for status, what in _WHAT.items()}
