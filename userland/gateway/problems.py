"""Errors as each API shows them: which status, and in which shape.

OpenAI     {"error": {"message", "type", "param", "code"}}
Anthropic  {"type": "error", "error": {"type", "message"}, "request_id"}
Ollama     {"error": "…"}
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .callers import Unauthorized, user_of


class NotSupported(errors.InvalidArgument):
    """An option that is known, and that this server does not do. Never travels over the socket."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What HTTP says of an error: `type` and `code` in OpenAI's words, `param` the field at fault."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


# (error, status, OpenAI's type, OpenAI's code); the first that fits counts.
_TABLE: list[tuple[type[errors.LLMasOSError], int, str, str | None]] = [
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (errors.PermissionDenied, 403, "permission_error", "permission_denied"),
    (errors.NoSuchModel, 404, "invalid_request_error", "model_not_found"),
    (errors.NotFound, 404, "invalid_request_error", "not_found"),
    (errors.Conflict, 409, "invalid_request_error", "conflict"),
    (errors.ContextOverflow, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.NeverFits, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.LimitExceeded, 429, "rate_limit_error", "rate_limit_exceeded"),
    (NotSupported, 400, "invalid_request_error", "unsupported_parameter"),
    (errors.InvalidRequest, 400, "invalid_request_error", None),
    (errors.TimedOut, 408, "invalid_request_error", "timeout"),
    (errors.Unavailable, 503, "server_error", "unavailable"),
    (errors.UnsupportedModel, 400, "invalid_request_error", "unsupported_model"),
    (errors.RefusedFile, 400, "invalid_request_error", "refused_file"),
    (errors.PullFailed, 404, "invalid_request_error", "pull_failed"),
]


def problem_of(error: errors.LLMasOSError) -> Problem:
    """What HTTP says of an error of the kernel."""
    status, type_, code = next(
        (row[1:] for row in _TABLE if isinstance(error, row[0])), (500, "server_error", "internal_error")
    )
    field = error.details.get("field")
    hint = _hint(error)
    seconds = error.details.get("retry_after", 1)
    return Problem(
        status,
        type_,
        code,
        f"{error.message} ({hint})" if hint else error.message,
        field if isinstance(field, str) else None,
        max(1, math.ceil(float(seconds))) if status in (429, 503) else None,
    )


def _hint(error: errors.LLMasOSError) -> str:
    """What to do next. Who lacks a right and asks over HTTP needs another key: what the kernel says of it is
    for who could be another user of its machine."""
    if not isinstance(error, errors.PermissionDenied) or "right" not in error.details:
        return error.hint
    right = error.details["right"]
    if right == t.Capability.ADMIN:
        return "no API key has it: the daemon's own user can, with llsh"
    return f"llsh key api new NAME --as {user_of(str(error.details.get('tenant', 'TENANT')))} --right {right}"


@contextlib.contextmanager
def too_long_in(field: str) -> Iterator[None]:
    """A prompt that does not fit came in this field."""
    try:
        yield
    except errors.ContextOverflow as problem:
        problem.details["field"] = field
        raise


@contextlib.contextmanager
def grammar_of(field: str | None) -> Iterator[None]:
    """A grammar that cannot be used was made of this field; None: of several."""
    try:
        yield
    except errors.InvalidArgument as problem:
        if problem.details.get("field") == "sampling.grammar":
            del problem.details["field"]
            if field is not None:
                problem.details["field"] = field
        raise


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def speaks_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a request is of Anthropic's API; the models have one path with OpenAI's."""
    return path.startswith("/v1/messages") or (
        path.startswith("/v1/models") and "anthropic-version" in headers
    )


def body(problem: Problem, path: str, request_id: str, *, anthropic: bool = False) -> dict[str, Any]:
    """The error in the shape of the API that `path` belongs to."""
    if anthropic:
        kind = _ANTHROPIC.get(problem.status, "api_error")
        error: dict[str, Any] = {"type": kind, "message": problem.message}
        if problem.param == "thread":
            # Its clients then go on without: they send the whole conversation each time.
            error["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        return {"type": "error", "error": error, "request_id": request_id}
    if path.startswith("/api/"):
        return {"error": problem.message}
    return {
        "error": {
            "message": problem.message,
            "type": problem.type,
            "param": problem.param,
            "code": problem.code,
        }
    }
