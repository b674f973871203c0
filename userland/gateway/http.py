"""What every route shares of HTTP: request ids, bounds, streams that notice a hang-up, and error answers."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from llmasos.syscalls import errors
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import problems
from .record import Record, begin, current, log, trace, tracer

MOST_BODY = 8 << 20
"""Bytes of a request's body. Uploads of files have a bound of their own."""

PATIENCE_S = 1.0
"""So long a stream waits for its first event, or an error with a status of its own, before it begins."""

KEEP_ALIVE_S = 15.0
"""A stream in which nothing happens says so this often, so that nothing on the way closes it."""

LONG = 16 << 10
"""Bytes of a body that is worth a thread of its own: its text takes some 20 ms to become tokens."""

LATE_S = 0.1
WARY_S = 60.0
"""When a short text has taken LATE_S of the processor's time on the event loop, nothing is worked on there
for so long: some model's template or tokenizer is not what it should be."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_LOCAL_HOST = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]|testserver)(:\d+)?\Z")

R = TypeVar("R")


def json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


async def aside(work: Callable[[], R], *, more: bool = False) -> R:
    """What comes of the texts of this request. Those of long ones, or if there are `more` than it brought,
    are worked on beside the event loop, for other callers are waiting."""
    global _wary_until
    request = current()
    if more or request is None or request.received > LONG or time.monotonic() < _wary_until:
        return await asyncio.to_thread(work)
    begun = time.thread_time()
    try:
        return work()
    finally:
        if time.thread_time() - begun > LATE_S:
            _wary_until = time.monotonic() + WARY_S


_wary_until = 0.0


class HungUp(Exception):
    """The client is gone: nobody hears an answer."""


async def attend(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of `work`, which is cancelled when the client hangs up first (HungUp)."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return await working
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends the `parts` of a stream as they come. `fail` makes the part that tells of an error on the way;
    `idle` is sent when nothing happens. Hanging up closes `parts`."""

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        fail: Callable[[errors.LLMasOSError], bytes],
        *,
        idle: bytes = b": waiting\n\n",
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._parts, self._fail, self._idle = parts, fail, idle
        self.background = None
        self.status_code = 200
        self.media_type = media_type
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        self._first: asyncio.Task[bytes] | None = None
        self._sent = False

    async def begun(self) -> EventStream:
        """This, once its first part is there or PATIENCE_S have passed. Raises what comes before that: it
        still can have a status of its own."""
        self._first = asyncio.ensure_future(anext(self._parts))
        try:
            await asyncio.wait((self._first,), timeout=PATIENCE_S)
            if self._first.done() and (problem := self._first.exception()) is not None:
                raise problem
        except BaseException:
            await self._close()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        tasks = [
            asyncio.ensure_future(work) for work in (self._send(send), _hang_up(receive), self._beat(send))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    async def _send(self, send: Send) -> None:
        try:
            if self._first is not None:
                await self._part(send, await self._first)
            async for part in self._parts:
                await self._part(send, part)
        except StopAsyncIteration:
            pass  # there was no first part
        except errors.LLMasOSError as problem:
            await self._part(send, self._fail(problem))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _part(self, send: Send, part: bytes) -> None:
        self._sent = True
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _beat(self, send: Send) -> None:
        """Nothing on the way must take a stream for dead that just waits."""
        while self._idle:
            self._sent = False
            await asyncio.sleep(KEEP_ALIVE_S)
            if not self._sent:
                await self._part(send, self._idle)
        await asyncio.Event().wait()

    async def _close(self) -> None:
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        if (close := getattr(self._parts, "aclose", None)) is not None:
            await close()


class Frame:
    """Outermost: gives every request an id and every answer its headers, refuses bodies that are too long and
    what browsers send on behalf of other sites, and tells of every request when it is over."""

    def __init__(self, app: ASGIApp, *, local: bool) -> None:
        self._app, self._local, self._tracer = app, local, tracer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        wanted = headers.get("x-request-id", "")
        request_id = wanted if _REQUEST_ID.match(wanted) else new_id("req_")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        told = Record(request_id, scope["method"], scope["path"], headers)
        begin(told)
        anthropic = problems.speaks_anthropic(scope["path"], headers)

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
                spent = f"{1000 * (time.perf_counter() - told.begun):.0f}"
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),
                    (b"openai-processing-ms", spent.encode()),
                ]
                if (caller := state.get("caller")) is not None:
                    message["headers"] += caller.limits.headers(anthropic)
            elif not message.get("more_body"):
                told.whole = True
            await send(message)

        metrics = scope["app"].state.metrics
        metrics.open.inc()
        try:
            if problem := self._refusal(headers, scope["path"]):
                body = problems.body(problem, scope["path"], request_id, anthropic=anthropic)
                await json(body, problem.status)(scope, receive, framed)
                return
            if _is_curl(scope["path"], headers):
                kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope["headers"] = [*kept, (b"content-type", b"application/json")]
            limit = scope["app"].state.body_limit(scope["path"])
            await self._app(scope, _bounded(receive, limit, told), framed)
        finally:
            metrics.open.dec()
            told.route = getattr(scope.get("route"), "path", "other")
            if (caller := state.get("caller")) is not None:
                told.tenant = caller.tenant
            metrics.observe(told)
            log(told)
            if self._tracer is not None:
                trace(self._tracer, told)

    def _refusal(self, headers: Mapping[str, str], path: str) -> problems.Problem | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local and host and not _LOCAL_HOST.match(host):
            # A page whose name was rebound to this machine would speak with its visitor's rights.
            return _bad(403, f"the host {host!r} is not this machine", "permission_error")
        if self._local and origin and origin.partition("://")[2] != host:
            return _bad(403, f"pages of {origin!r} may not use this server", "permission_error")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return _bad(400, "content-length is not a number")
        return None


def _is_curl(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a body of Ollama's API, whose own examples leave the content type to curl, is JSON anyway.
    A page of another site could send such a body without asking first. Its browser says so: every POST that
    crosses sites has an Origin, whatever the page does about it, and what is no browser holds nobody's rights
    but its own."""
    sent = headers.get("content-type", "").partition(";")[0].strip().lower()
    by_browser = "origin" in headers or "sec-fetch-site" in headers
    return path.startswith("/api/") and not by_browser and sent in ("", "application/x-www-form-urlencoded")


def _bad(status: int, message: str, type_: str = "invalid_request_error") -> problems.Problem:
    return problems.Problem(status, type_, None, message)


class TooLong(HTTPException):
    """The body is longer than its bound."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the request's body is longer than {limit} bytes")


def _bounded(receive: Receive, limit: int, told: Record) -> Receive:
    async def bounded() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            told.received += len(message.get("body", b""))
            if told.received > limit:
                raise TooLong(limit)
        return message

    return bounded


def refuse(request: Request, problem: problems.Problem) -> Response:
    """The error in the shape of the API that was called."""
    request.state.problem = problem
    path = request.url.path
    anthropic = problems.speaks_anthropic(path, request.headers)
    body = problems.body(problem, path, request.state.request_id, anthropic=anthropic)
    return json(body, problem.status, problem.headers)


def invalid_problem(wrong: Sequence[Mapping[str, Any]], sent: Any) -> problems.Problem:
    """What HTTP says of what pydantic found wrong with a request whose body is `sent`: the first thing. Where
    the members of a union all say something of it, that of the one which looked deepest."""
    first = wrong[0]
    if first["type"] == "json_invalid":
        at = "".join(f", at character {place}" for place in first["loc"][1:])
        return _bad(400, f"the body is not valid JSON: {first['ctx']['error']}{at}")
    for other in wrong:
        if other["type"] == "literal_error" and other["loc"] == (*first["loc"][:-1], "type"):
            first = other  # it is something else, so what it lacks says nothing
    place = _place(first, sent)
    for other in wrong:
        deeper = _place(other, sent)
        if deeper[: len(place)] == place and (len(deeper) > len(place) or _of_another_type(first, other)):
            first, place = other, deeper
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"] == ("body",) and first["type"] in ("model_attributes_type", "dict_type", "missing"):
        message = "the body is not a JSON object sent with content-type: application/json"
    elif first["type"] == "union_tag_invalid":
        place = [*place, "type"]
        message = f"{'.'.join(place)}: {first['ctx']['tag']!r} is none of {first['ctx']['expected_tags']}"
    elif first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {'.'.join(place)}"
    elif place:
        message = f"{'.'.join(place)}: {message}"
    code = "unsupported_parameter" if first["type"] == "unsupported" else None
    param = str((first.get("ctx") or {}).get("param") or ".".join(place)) or None
    return problems.Problem(400, "invalid_request_error", code, message, param)


def _of_another_type(error: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `error` only says that the value is none of its member of a union, and `other` more."""
    return error["type"].endswith("_type") and not other["type"].endswith("_type")


def _place(error: Mapping[str, Any], sent: Any) -> list[str]:
    """Where in the body it is, or which parameter, without the members of unions: pydantic names them."""
    source, *parts = error["loc"]
    if source != "body":
        return [str(part) for part in parts]
    found: list[str] = []
    value, last = sent, len(parts) - 1
    for at, part in enumerate(parts):
        inside = _has(value, part)
        if inside and at < last and _has(value, parts[at + 1]) and not _has(value[part], parts[at + 1]):
            continue  # a member with the name of a field
        if inside:
            value = value[part]
        elif found and not (at == last and error["type"] == "missing"):
            continue
        found.append(str(part))
    return found


def _has(value: Any, part: str | int) -> bool:
    return part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))


def handle_errors(app: FastAPI) -> None:
    """Makes answers of what routes raise."""

    def on(kind: type[Exception]) -> Callable[[Callable[[Request, Any], Awaitable[Response]]], None]:
        return lambda handler: app.add_exception_handler(kind, handler)

    @on(errors.LLMasOSError)
    async def kernel(request: Request, error: errors.LLMasOSError) -> Response:
        return refuse(request, problems.problem_of(error))

    @on(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(request, invalid_problem(error.errors(), error.body))

    @on(UnicodeEncodeError)
    async def no_unicode(request: Request, error: UnicodeEncodeError) -> Response:
        """JSON can spell half a surrogate pair, which is no text."""
        return refuse(request, _bad(400, "a text is not valid Unicode"))

    @on(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        message, asked = str(error.detail), f"{request.method} {request.url.path}"
        if error.status_code == 404:
            message = f"Unknown request URL: {asked}"
        elif error.status_code == 405:
            message = f"{message}: {asked} (/docs shows what there is)"
        answer = refuse(request, _bad(error.status_code, message))
        answer.headers.update(error.headers or {})
        return answer

    @on(HungUp)
    async def hung_up(request: Request, error: HungUp) -> Response:
        return refuse(request, _bad(499, "the client hung up"))
