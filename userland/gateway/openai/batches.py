"""/v1/batches: files of requests that are done when there is room, each once, whatever ends on the way.

    validating → in_progress → finalizing → completed | expired | cancelled; or failed

Answers are lines of the batch's object in the store until its files are made of them. A gateway that goes on
with a batch does the lines that have none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Request
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from msgspec import Meta, Struct
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from .. import problems
from ..callers import Caller, Callers
from ..errors_doc import documented
from ..http import MOST_BODY, invalid_problem, json, new_id
from ..options import Body
from ..patience import NOT_NOW, patiently
from ..store import Kept, Store
from ..works import Works
from . import chat, completions, embeddings, responses
from .files import BATCH_S, CallerOf, Limit, StoreOf, new_file, opened, page, write
from .shared import Metadata

router = APIRouter(prefix="/v1/batches", tags=["openai"])
log = logging.getLogger("llmasos.gateway")

WINDOW_S = 24 * 3600
PATIENCE_S = 7 * 24 * 3600
"""So long a batch waits for its disk."""

KEPT_S = 90 * 24 * 3600
MOST_LINES = 50_000
MOST_ERRORS = 100
"""That are told of a file; validation ends then."""

MOST_BATCHES = 256
"""Of one tenant, under way."""

MOST_AT_ONCE = 16
"""Lines of one tenant that are done at a time."""

FRESH = ("validating", "in_progress")
ENDED = ("completed", "failed", "expired", "cancelled")

Answer = Callable[[Caller, Store, Any], Awaitable[dict[str, Any]]]


async def _chat(caller: Caller, store: Store, body: chat.ChatRequest) -> dict[str, Any]:
    return await chat.whole(*await chat.prepare(caller, body))


async def _completion(caller: Caller, store: Store, body: completions.CompletionRequest) -> dict[str, Any]:
    return await completions.whole(*await completions.prepare(caller, body), body)


async def _embedding(caller: Caller, store: Store, body: embeddings.EmbeddingRequest) -> dict[str, Any]:
    return await embeddings.embedding(caller, body)


ENDPOINTS: dict[str, tuple[type[BaseModel], Answer]] = {
    "/v1/chat/completions": (chat.ChatRequest, _chat),
    "/v1/completions": (completions.CompletionRequest, _completion),
    "/v1/embeddings": (embeddings.EmbeddingRequest, _embedding),
    "/v1/responses": (responses.ResponseRequest, responses.answer),
}
"""What lines may ask for: the body that it takes, and who answers."""


class Line(Struct, forbid_unknown_fields=True):
    """A request in a batch's file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


class OutputExpiry(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=BATCH_S)


class BatchRequest(Body):
    input_file_id: str = Field(max_length=128)
    endpoint: str = Field(description=f"One of {', '.join(ENDPOINTS)}.")
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None


@router.post("", summary="Start a batch", responses=documented())
async def create(request: Request, body: BatchRequest, caller: CallerOf, store: StoreOf) -> Response:
    """Its lines run in class batch, as the caller. Needs the right `infer`."""
    caller.needs(t.Capability.INFER)
    if body.endpoint not in ENDPOINTS:
        raise errors.InvalidArgument(
            f"no batches of {body.endpoint[:128]!r}", hint=f"one of {', '.join(ENDPOINTS)}", field="endpoint"
        )
    request.app.state.works.check(_crowd(caller.tenant), MOST_BATCHES)
    file = await store.get(caller.tenant, "file", body.input_file_id)
    if file.body["purpose"] != "batch":
        raise errors.InvalidArgument("the file's purpose is not batch", field="input_file_id")
    now = int(time.time())
    batch = {
        "id": new_id("batch_"),
        "object": "batch",
        "endpoint": body.endpoint,
        "model": None,
        "errors": None,
        "input_file_id": file.id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + WINDOW_S,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": body.metadata,
    }
    seconds = body.output_expires_after.seconds if body.output_expires_after else None
    inner = {"login": caller.login, "output_s": seconds}
    kept = Kept(
        caller.tenant, "batch", str(batch["id"]), batch, inner, now + KEPT_S, True, file.body["bytes"]
    )
    await asyncio.to_thread(_take, store, file, kept)
    try:
        await store.add(kept)
    except BaseException:
        store.path(kept.id).unlink(missing_ok=True)
        raise
    request.app.state.batches.begin(kept)
    return json(batch)


def _take(store: Store, file: Kept, batch: Kept) -> None:
    """The batch needs its requests also when their file is deleted."""
    try:
        os.link(store.path(file.id), store.path(batch.id))
        os.utime(store.path(batch.id))  # old files of which no row knows are swept away
    except FileNotFoundError:
        raise errors.NotFound(f"No file found with id '{file.id}'.", hint="it was deleted") from None


@router.get("", summary="The batches", responses=documented())
async def listed(caller: CallerOf, store: StoreOf, after: str | None = None, limit: Limit = 20) -> Response:
    return json(await page(store, caller, "batch", after, limit))


@router.get("/{batch_id}", summary="One batch", responses=documented())
async def one(batch_id: str, caller: CallerOf, store: StoreOf) -> Response:
    return json((await store.get(caller.tenant, "batch", batch_id)).body)


@router.post("/{batch_id}/cancel", summary="Cancel a batch", responses=documented())
async def cancelled(request: Request, batch_id: str, caller: CallerOf, store: StoreOf) -> Response:
    """What was done stays, in its files."""
    caller.needs(t.Capability.INFER)
    changed = False

    def cancel(kept: Kept) -> None:
        nonlocal changed
        if changed := kept.body["status"] in FRESH:
            kept.body |= {"status": "cancelling", "cancelling_at": int(time.time())}
        elif kept.body["status"] not in ("cancelling", "cancelled"):
            raise errors.Conflict(f"the batch is {kept.body['status']} already")

    kept = await store.change(await store.get(caller.tenant, "batch", batch_id), cancel)
    works: Works = request.app.state.works
    if changed and batch_id in works:
        await works.stop(batch_id)
        request.app.state.batches.begin(kept)  # another gateway that works on it sees it with the next line
    return json(kept.body)


async def resume(app: FastAPI) -> None:
    """Goes on with what a gateway that is gone has left."""
    for kept in await app.state.store.orphans("batch"):
        app.state.batches.begin(kept)


def _crowd(tenant: str) -> str:
    return f"batches of {tenant}"


class Batches:
    """The batches that this gateway works on."""

    def __init__(self, callers: Callers, store: Store, works: Works) -> None:
        self._callers, self._store, self._works = callers, store, works
        self._turns: dict[str, asyncio.Semaphore] = {}

    def begin(self, kept: Kept) -> None:
        self._works.start(kept.id, self._run(kept), crowd=_crowd(kept.tenant))

    async def _run(self, kept: Kept) -> None:
        """From wherever it is to its end."""
        until = float(kept.body["expires_at"])
        patience = time.time() + PATIENCE_S
        try:
            kept = await patiently(lambda: self._store.get(kept.tenant, "batch", kept.id), patience)
            with await asyncio.to_thread(opened, self._store, kept) as source:
                if kept.body["status"] == "validating":
                    kept = await patiently(lambda: self._validate(kept, source), patience)
                wrong = None
                if kept.body["status"] == "in_progress":
                    try:
                        async with asyncio.timeout(max(0.0, until - time.time())):
                            await self._do(kept, source, until)
                    except (TimeoutError, *NOT_NOW):
                        pass  # it was not done in time
                    except errors.LLMasOSError as problem:
                        wrong = problem
                if kept.body["status"] not in ENDED:
                    await patiently(lambda: self._finish(kept, source, wrong), patience)
        except errors.LLMasOSError as problem:
            unread = problem
            await patiently(lambda: self._fail(kept, [_told(unread)]), patience)

    async def _validate(self, kept: Kept, source: BinaryIO) -> Kept:
        count, models, found = await asyncio.to_thread(_look_through, source, kept.body["endpoint"])
        if found:
            return await self._fail(kept, found)

        def begin(now: Kept) -> None:
            now.body["request_counts"]["total"] = count
            now.body["model"] = models.pop() if len(models) == 1 else None
            if now.body["status"] == "validating":
                now.body |= {"status": "in_progress", "in_progress_at": int(time.time())}

        return await self._store.change(kept, begin)

    async def _fail(self, kept: Kept, found: list[dict[str, Any]]) -> Kept:
        def fail(now: Kept) -> None:
            now.held = False
            now.body |= {
                "status": "failed",
                "failed_at": int(time.time()),
                "errors": {"object": "list", "data": found},
            }

        return await self._store.change(kept, fail, without_lines=True)

    async def _do(self, kept: Kept, source: BinaryIO, until: float) -> None:
        """All lines that have no answer yet, or those before somebody cancels it."""
        caller = await patiently(lambda: self._callers.again(kept.inner["login"]), until)
        done = await patiently(lambda: self._store.line_numbers(kept.id), until)
        turn = self._turns.setdefault(kept.tenant, asyncio.Semaphore(MOST_AT_ONCE))
        now = kept

        async def one(number: int, line: Line) -> None:
            nonlocal now
            answer = await self._answer(caller, line, until)
            what = "completed" if answer["response"]["status_code"] == 200 else "failed"

            def count(there: Kept) -> list[tuple[int, Any]]:
                there.body["request_counts"][what] += 1
                return [(number, answer)]

            now = await patiently(lambda: self._store.change(kept, count), until)

        try:
            async with asyncio.TaskGroup() as group:
                async for number, line in _others(source, done):
                    await turn.acquire()
                    if now.body["status"] != "in_progress":
                        turn.release()
                        break
                    group.create_task(one(number, line)).add_done_callback(lambda _: turn.release())
        except ExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _answer(self, caller: Caller, line: Line, until: float) -> dict[str, Any]:
        kind, answer = ENDPOINTS[line.url]
        status, request_id = 200, new_id("req_")
        try:
            body = kind.model_validate(line.body)
            if getattr(body, "stream", False) or getattr(body, "background", False):
                raise errors.InvalidArgument("a line of a batch is answered as a whole", field="stream")
            if getattr(body, "priority", 0) is None and getattr(body, "service_tier", 0) is None:
                body.service_tier = "batch"  # type: ignore[attr-defined]
            told = await patiently(lambda: answer(caller, self._store, body), until)
        except (ValidationError, errors.LLMasOSError) as problem:
            wrong = (
                invalid_problem(
                    [{**one, "loc": ("body", *one["loc"])} for one in problem.errors()], line.body
                )
                if isinstance(problem, ValidationError)
                else problems.problem_of(problem)
            )
            status, told = wrong.status, problems.body(wrong, line.url, request_id)
        except Exception:
            log.exception("a line of a batch failed")
            wrong = problems.Problem(500, "server_error", "internal_error", "a fault of the gateway")
            status, told = wrong.status, problems.body(wrong, line.url, request_id)
        return {
            "id": new_id("batch_req_"),
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": told},
            "error": None,
        }

    async def _finish(self, kept: Kept, source: BinaryIO, wrong: errors.LLMasOSError | None) -> None:
        """Makes the files of what was done. The other lines of a batch that expired are errors, those of one
        that was cancelled, or for which something is `wrong`, are not told."""
        status = "completed"

        def finalize(now: Kept) -> None:
            nonlocal status
            counts = now.body["request_counts"]
            if now.body["cancelling_at"]:
                status = "cancelled"
            elif wrong is not None:
                status = "failed"
            else:
                now.body |= {"status": "finalizing", "finalizing_at": int(time.time())}
                if counts["completed"] + counts["failed"] < counts["total"]:
                    status = "expired"

        kept = await self._store.change(kept, finalize)
        spent = _Usage()
        seconds = kept.inner["output_s"] or BATCH_S
        made = []
        for good in (True, False):
            name = f"{kept.id}_{'output' if good else 'error'}.jsonl"
            file = new_file(kept.tenant, "batch_output", name, seconds)
            await write(self._store, file, self._written(kept, source, good, status == "expired", spent))
            if file.size:
                made.append(file)
                kept.body["output_file_id" if good else "error_file_id"] = file.id
            else:
                self._store.path(file.id).unlink(missing_ok=True)

        def end(now: Kept) -> None:
            now.held = False
            now.body |= {
                "status": status,
                f"{status}_at": int(time.time()),
                "output_file_id": kept.body["output_file_id"],
                "error_file_id": kept.body["error_file_id"],
                "usage": spent.told(),
            }
            if wrong is not None:
                now.body["errors"] = {"object": "list", "data": [_told(wrong)]}
            counts = now.body["request_counts"]
            if status == "expired":
                counts["failed"] = counts["total"] - counts["completed"]

        await self._store.change(kept, end, bear=made, without_lines=True)

    async def _written(
        self, kept: Kept, source: BinaryIO, good: bool, expired: bool, spent: _Usage
    ) -> AsyncIterator[bytes]:
        """Lines of the file of answers (`good`), or of that of errors."""
        last, done = -1, set[int]()
        while found := await self._store.lines(kept.id, after=last, limit=16):
            last = found[-1][0]
            for number, answer in found:
                done.add(number)
                if (answer["response"]["status_code"] == 200) is good:
                    if good:
                        spent.add(answer["response"]["body"].get("usage") or {})
                    yield msgspec.json.encode(answer) + b"\n"
        if expired and not good:
            async for _, line in _others(source, done):
                told = {
                    "id": new_id("batch_req_"),
                    "custom_id": line.custom_id,
                    "response": None,
                    "error": {"code": "batch_expired", "message": "It could not be done in its time."},
                }
                yield msgspec.json.encode(told) + b"\n"


async def _others(source: BinaryIO, done: set[int]) -> AsyncIterator[tuple[int, Line]]:
    """The requests of a file that was looked through, with their places, but for those that are `done`."""
    source.seek(0)
    number = 0
    while raw := await asyncio.to_thread(source.readline):
        if number not in done and raw.strip():
            yield number, msgspec.json.decode(raw, type=Line)
        number += 1


def _wrong(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}


def _told(error: errors.LLMasOSError) -> dict[str, Any]:
    problem = problems.problem_of(error)
    return _wrong(problem.code or problem.type, problem.message, param=problem.param)


def _look_through(source: BinaryIO, endpoint: str) -> tuple[int, set[str], list[dict[str, Any]]]:
    """How many lines a batch's file has, of which models, and what is wrong with it."""
    count, models, seen = 0, set[str](), set[str]()
    found: list[dict[str, Any]] = []

    def wrong(*what: Any) -> None:
        found.append(_wrong(*what))

    number = 0
    while raw := source.readline(MOST_BODY + 1):
        number += 1
        if not raw.strip():
            continue
        count += 1
        if count > MOST_LINES:
            wrong("too_many_tasks", f"more than {MOST_LINES} lines", number)
        elif len(raw) > MOST_BODY:
            wrong("line_too_long", f"a line is longer than {MOST_BODY} bytes", number)
            break  # what follows is the rest of it
        else:
            try:
                line = msgspec.json.decode(raw, type=Line)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
                wrong("invalid_json_line", f"This line is not a request: {problem}", number)
            else:
                if line.url != endpoint:
                    wrong("mismatched_url", f"the batch's endpoint is {endpoint}", number, "url")
                if line.custom_id in seen:
                    wrong("duplicate_custom_id", "an earlier line has this custom_id", number, "custom_id")
                seen.add(line.custom_id)
                if len(models) < 2:
                    models.add(str(line.body.get("model"))[:256])
        if count > MOST_LINES or len(found) >= MOST_ERRORS:
            break
    if not count:
        wrong("empty_file", "the file has no requests")
    return count, models, found


class _Usage:
    """The tokens of all answers: chat and completions call them otherwise than responses."""

    def __init__(self) -> None:
        self._input = self._cached = self._output = 0

    def add(self, usage: dict[str, Any]) -> None:
        self._input += usage.get("input_tokens", usage.get("prompt_tokens", 0))
        self._output += usage.get("output_tokens", usage.get("completion_tokens", 0))
        details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
        self._cached += details.get("cached_tokens", 0)

    def told(self) -> dict[str, Any]:
        return {
            "input_tokens": self._input,
            "input_tokens_details": {"cached_tokens": self._cached},
            "output_tokens": self._output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._input + self._output,
        }
