"""/v1/fine_tuning/jobs: training runs of the kernel, as jobs that are told of and outlive the gateway.

    validating_files → queued → running ⇄ paused → succeeded | failed | cancelled

A job's training file becomes a data set of its owner for as long as it runs. The run's process is labelled
with the job's id: a gateway that goes on with a job finds it, whatever was written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request
from llmasos.syscalls import errors, table, training
from llmasos.syscalls import types as t
from pydantic import Field
from starlette.responses import Response

from .. import problems
from ..callers import Caller, Callers
from ..errors_doc import documented
from ..http import json, new_id
from ..options import Body
from ..patience import patiently
from ..store import Kept, Store
from ..works import Works
from .files import CallerOf, Limit, StoreOf, listing, new_file, opened, page, write
from .models import short
from .shared import Metadata

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["openai"])

EPOCHS = 3
"""Where the caller leaves them to us."""

MOST_JOBS = 64
"""Of one tenant, under way."""

MOST_STEPS_TOLD = 2000
"""Of a longer run every second, third … step is told."""

PATIENCE_S = 7 * 24 * 3600
"""So long a job waits for the kernel, or its owner's quota."""

SIGNAL_S = 10
"""And a signal, for which somebody waits."""

CHUNK = 1 << 20
MOST_ROW = 16 << 20
"""Bytes of a row; the kernel refuses longer ones."""

ENDED = ("succeeded", "failed", "cancelled")

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class Hyperparameters(Body):
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] | None = None
    """Examples a step. auto: examples share rows, a row a step."""
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] | None = None


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    NOT_DONE = {"dpo": (), "reinforcement": ()}

    type: Literal["supervised"]
    supervised: Supervised | None = None


class JobRequest(Body):
    NOT_DONE = {"integrations": ([],)}

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(max_length=128, description="JSONL; what rows may be says docs/training.md.")
    validation_file: str | None = Field(None, max_length=128)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, lt=2**31)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="As those of method.supervised.")
    metadata: Metadata | None = None

    def chosen(self) -> Hyperparameters:
        method = self.method.supervised if self.method else None
        if method and method.hyperparameters and self.hyperparameters:
            raise errors.InvalidArgument("hyperparameters are given twice", field="hyperparameters")
        return (method.hyperparameters if method else None) or self.hyperparameters or Hyperparameters()


def _recipe(chosen: Hyperparameters, seed: int) -> training.Recipe:
    """LoRA; a batch of so many examples has them in rows of their own. Raises InvalidArgument."""
    plain = training.Recipe(seed=seed, num_train_epochs=EPOCHS)
    if isinstance(chosen.n_epochs, int):
        plain = msgspec.structs.replace(plain, num_train_epochs=chosen.n_epochs)
    if isinstance(chosen.batch_size, int):
        rows = max(n for n in (1, 2, 3, 4) if chosen.batch_size % n == 0)
        plain = msgspec.structs.replace(
            plain,
            packing=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=chosen.batch_size // rows,
        )
    if isinstance(chosen.learning_rate_multiplier, (int, float)):
        rate = min(10.0, plain.rate * chosen.learning_rate_multiplier)
        plain = msgspec.structs.replace(plain, learning_rate=rate)
    return plain


@router.post("", summary="Train a model", responses=documented())
async def create(request: Request, body: JobRequest, caller: CallerOf, store: StoreOf) -> Response:
    """Makes an adapter (LoRA) of the model, `fine_tuned_model`, which is served at once. Needs the right
    `train`."""
    caller.needs(t.Capability.TRAIN)
    request.app.state.works.check(_crowd(caller.tenant), MOST_JOBS)
    chosen = body.chosen()
    seed = 42 if body.seed is None else body.seed
    recipe = _recipe(chosen, seed)
    llm = await caller.llm(body.model)
    for field in ("training_file", "validation_file"):
        if (id := getattr(body, field)) is None:
            continue
        file = await store.get(caller.tenant, "file", id)
        if file.body["purpose"] != "fine-tune":
            raise errors.InvalidArgument("the file's purpose is not fine-tune", field=field)
    id = new_id("ftjob-")
    told = {
        "n_epochs": int(recipe.num_train_epochs),
        "batch_size": chosen.batch_size or "auto",
        "learning_rate_multiplier": recipe.rate / training.Recipe().rate,
    }
    now = int(time.time())
    job = {
        "id": id,
        "object": "fine_tuning.job",
        "created_at": now,
        "finished_at": None,
        "estimated_finish": None,
        "model": body.model,
        "fine_tuned_model": None,
        "organization_id": caller.tenant,
        "status": "validating_files",
        "error": None,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "result_files": [],
        "trained_tokens": None,
        "hyperparameters": told,
        "method": {"type": "supervised", "supervised": {"hyperparameters": told}},
        "seed": seed,
        "integrations": [],
        "metadata": body.metadata,
        "pid": None,
    }
    suffix = _NOT_IN_NAMES.sub("-", body.suffix or "ft").strip("-._") or "ft"
    inner = {
        "login": caller.login,
        "model": llm.model,
        "target": f"{suffix}-{id[-8:]}",
        "recipe": msgspec.to_builtins(recipe),
        "events": 0,  # told, so far
        "step": 0,
        "eval_step": 0,
    }
    kept = Kept(caller.tenant, "job", id, job, inner, held=True)
    await store.add(kept)
    request.app.state.jobs.begin(kept)
    return json(job)


@router.get("", summary="The jobs", responses=documented())
async def listed(caller: CallerOf, store: StoreOf, after: str | None = None, limit: Limit = 20) -> Response:
    return json(await page(store, caller, "job", after, limit))


@router.get("/{job_id}", summary="One job", responses=documented())
async def one(job_id: str, caller: CallerOf, store: StoreOf) -> Response:
    return json((await store.get(caller.tenant, "job", job_id)).body)


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=documented())
async def cancelled(job_id: str, caller: CallerOf, store: StoreOf) -> Response:
    return await _command(
        job_id, caller, store, ("validating_files", "queued", "running", "paused"), "cancelled"
    )


@router.post("/{job_id}/pause", summary="Suspend a job", responses=documented())
async def paused(job_id: str, caller: CallerOf, store: StoreOf) -> Response:
    """It computes nothing; after half a minute it gives up its memory, too."""
    return await _command(job_id, caller, store, ("queued", "running"), "paused")


@router.post("/{job_id}/resume", summary="Let a job go on", responses=documented())
async def resumed(job_id: str, caller: CallerOf, store: StoreOf) -> Response:
    return await _command(job_id, caller, store, ("paused",), "running")


SIGNALS = {"cancelled": t.Signal.TERM, "paused": t.Signal.STOP, "running": t.Signal.CONT}
WORDS = {"cancelled": "The job was cancelled", "paused": "The job is paused", "running": "The job goes on"}


async def _command(job_id: str, caller: Caller, store: Store, when: tuple[str, ...], status: str) -> Response:
    """Gives a job that is in one of the statuses `when` another one, and its run the signal for it. A run
    that has not begun yet sees it when it does."""
    caller.needs(t.Capability.TRAIN)
    caller.needs(t.Capability.PROCESS)  # the kernel asks for it, but the job would be told of by then

    def change(now: Kept) -> None:
        if now.body["status"] not in when:
            raise errors.Conflict(f"the job is {now.body['status']}")
        now.body["status"] = status
        if status == "cancelled":
            now.body["finished_at"] = int(time.time())

    kept = await tell(store, await store.get(caller.tenant, "job", job_id), change, WORDS[status])
    if kept.body["pid"] is not None:
        kill = table.Kill(kept.body["pid"], SIGNALS[status])
        with contextlib.suppress(errors.NoSuchProcess, errors.ProcessEnded):
            await patiently(lambda: caller.aio.call(kill), time.time() + SIGNAL_S)
    return json(kept.body)


@router.get("/{job_id}/events", summary="What a job told", responses=documented())
async def events(
    job_id: str,
    caller: CallerOf,
    store: StoreOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Response:
    """The newest first."""
    await store.get(caller.tenant, "job", job_id)
    place = -1
    if after is not None:
        number = after.rpartition("-")[2]
        place = int(number) if number.isdecimal() and len(number) < 10 else -1
        known = await store.lines(job_id, after=place - 1, limit=1)
        if not known or known[0][1]["id"] != after:
            raise errors.NotFound(f"No event found with id '{after[:128]}'.", field="after")
    found = await store.lines(job_id, after=place, limit=limit + 1, newest_first=True)
    return json(listing([event for _, event in found[:limit]], len(found) > limit))


@router.get("/{job_id}/checkpoints", summary="Models that a job made", responses=documented())
async def checkpoints(job_id: str, caller: CallerOf, store: StoreOf) -> Response:
    """That at its end; those on the way are the kernel's own."""
    job = await store.get(caller.tenant, "job", job_id)
    found = [job.inner["checkpoint"]] if "checkpoint" in job.inner else []
    return json(listing(found, False))


async def tell(
    store: Store,
    kept: Kept,
    change: Callable[[Kept], None],
    message: str,
    data: dict[str, Any] | None = None,
    *,
    level: str = "info",
    bear: Iterable[Kept] = (),
) -> Kept:
    """Changes a job and tells of it, in one step."""

    def both(now: Kept) -> list[tuple[int, Any]]:
        change(now)
        number = now.inner["events"]
        now.inner["events"] += 1
        event = {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{kept.id.removeprefix('ftjob-')}-{number}",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "metrics" if data else "message",
            "data": data or {},
        }
        return [(number, event)]

    return await store.change(kept, both, bear=bear)


async def resume(app: FastAPI) -> None:
    """Goes on with what a gateway that is gone has left."""
    for kept in await app.state.store.orphans("job"):
        app.state.jobs.begin(kept)


def _crowd(tenant: str) -> str:
    return f"jobs of {tenant}"


class Jobs:
    """The jobs that this gateway follows."""

    def __init__(self, callers: Callers, store: Store, works: Works) -> None:
        self._callers, self._store, self._works = callers, store, works

    def begin(self, kept: Kept) -> None:
        self._works.start(kept.id, self._run(kept), crowd=_crowd(kept.tenant))

    async def _run(self, kept: Kept) -> None:
        """From wherever it is to its end."""
        until = time.time() + PATIENCE_S
        try:
            kept = await patiently(lambda: self._store.get(kept.tenant, "job", kept.id), until)
            caller = await patiently(lambda: self._callers.again(kept.inner["login"]), until)
            pid = await patiently(lambda: self._begun(caller, kept), until)
            if pid is not None:
                kept = await patiently(lambda: self._queued(caller, kept, pid), until)
                problem = await patiently(lambda: self._follow(caller, kept, pid), until)
                if problem is not None:
                    await patiently(lambda: self._failed(kept, problem), until)
                end = await patiently(lambda: _ended(caller, kept, pid), until)
                if problem is None:
                    await patiently(lambda: self._finish(caller, kept, end), until)
        except errors.LLMasOSError as found:
            wrong = found
            await patiently(lambda: self._failed(kept, wrong), until)
        with contextlib.suppress(errors.LLMasOSError):
            caller = await self._callers.again(kept.inner["login"])
            await caller.aio.call(table.Unlink(f"/datasets/{_dataset(kept)}"))
        await patiently(lambda: self._store.change(kept, _let_go), until)

    async def _begun(self, caller: Caller, kept: Kept) -> int | None:
        """The process of the run, which is started if need be; None: it was cancelled before."""
        if kept.body["pid"] is not None:
            return int(kept.body["pid"])
        if (pid := await _pid_of(caller, kept.id)) is not None:
            return pid
        recipe = msgspec.convert(kept.inner["recipe"], training.Recipe)
        size, rows = 0, 0
        for field in ("training_file", "validation_file"):
            if kept.body[field] is not None:
                file = await self._store.get(kept.tenant, "file", kept.body[field])
                with await asyncio.to_thread(opened, self._store, file) as source:
                    size = await _send(caller, _dataset(kept), source, size)
                    rows = await asyncio.to_thread(_rows, source)
        await _write(caller, _dataset(kept), size, b"", last=True)
        if kept.body["validation_file"] is not None:
            recipe = msgspec.structs.replace(recipe, validation_rows=rows)
        if (await self._store.get(kept.tenant, "job", kept.id)).body["status"] == "cancelled":
            return None
        train = table.Train(
            kept.inner["model"], _dataset(kept), kept.inner["target"], recipe, label=kept.id, detached=True
        )
        return (await caller.aio.call(train)).pid

    async def _queued(self, caller: Caller, kept: Kept, pid: int) -> Kept:
        if kept.body["pid"] == pid:
            return kept

        def queue(now: Kept) -> None:
            now.body["pid"] = pid
            if now.body["status"] == "validating_files":
                now.body["status"] = "queued"

        kept = await tell(self._store, kept, queue, "Files are sent, the job is queued")
        if kept.body["status"] == "cancelled":  # meanwhile
            await caller.aio.call(table.Kill(pid))
        return kept

    async def _follow(self, caller: Caller, kept: Kept, pid: int) -> errors.LLMasOSError | None:
        """Notes what the run tells, until it ends. Returns what it failed of. What was noted already the
        kernel tells anew, and it is passed over."""
        inner = (await self._store.get(kept.tenant, "job", kept.id)).inner
        step, eval_step = inner["step"], inner["eval_step"]
        stream = caller.aio.stream(table.Follow(pid))
        try:
            async with stream:
                async for event in stream:
                    if event.phase == "train" and event.step > step:
                        step = event.step
                        if step % math.ceil(event.steps / MOST_STEPS_TOLD) == 0 or step == event.steps:
                            await self._note(kept, event)
                    elif event.phase == "eval" and event.step > eval_step:
                        eval_step = event.step
                        await self._note(kept, event)
        except errors.NoSuchProcess:
            return None  # somebody waited for it; what it made is there, or is not
        except errors.LLMasOSError as problem:
            if (await caller.aio.call(table.StatProcess(pid))).state is not t.State.ZOMBIE:
                raise
            return problem
        return None

    async def _note(self, kept: Kept, event: training.TrainEvent) -> None:
        measured = event.phase == "eval"

        def note(now: Kept) -> None:
            if now.body["status"] == "queued":
                now.body["status"] = "running"
            if measured:
                now.inner |= {"eval_step": event.step, "eval_loss": event.eval_loss}
            else:
                now.inner |= {"step": event.step, "loss": event.loss, "tokens": event.tokens}
                now.body["estimated_finish"] = int(time.time() + event.eta_s)

        loss = event.eval_loss if measured else event.loss
        data = {
            "step": event.step,
            "total_steps": event.steps,
            "epoch": event.epoch,
            "valid_loss" if measured else "train_loss": loss,
            **({} if measured else {"learning_rate": event.learning_rate}),
        }
        what = f"{'validation' if measured else 'training'} loss={math.nan if loss is None else loss:.4f}"
        await tell(self._store, kept, note, f"Step {event.step}/{event.steps}: {what}", data)

    async def _finish(self, caller: Caller, kept: Kept, end: table.WaitReply) -> None:
        made = end.trained
        kept = await self._store.get(kept.tenant, "job", kept.id)
        if kept.body["status"] == "succeeded":
            return  # the gateway that said so ended there
        if kept.body["status"] == "cancelled" or made is None:
            if made is not None:  # too late to stop it
                await caller.aio.call(table.Unlink(f"/models/{made.model}"))

            def cancel(now: Kept) -> None:
                now.body |= {"status": "cancelled", "estimated_finish": None}
                now.body["finished_at"] = now.body["finished_at"] or int(time.time())

            await tell(self._store, kept, cancel, f"The run has ended: {end.reason}")
            return
        name = short(made.model)
        results = new_file(kept.tenant, "fine-tune-results", "step_metrics.csv")
        await write(self._store, results, self._table(kept))
        checkpoint = {
            "object": "fine_tuning.job.checkpoint",
            "id": f"ftckpt-{kept.id.removeprefix('ftjob-')}",
            "created_at": int(time.time()),
            "fine_tuned_model_checkpoint": name,
            "fine_tuning_job_id": kept.id,
            "metrics": {"step": made.steps, "train_loss": made.loss, "valid_loss": made.eval_loss},
            "step_number": made.steps,
        }

        def succeed(now: Kept) -> None:
            now.inner["checkpoint"] = checkpoint
            now.body |= {
                "status": "succeeded",
                "finished_at": int(time.time()),
                "estimated_finish": None,
                "fine_tuned_model": name,
                "trained_tokens": made.tokens,
                "result_files": [results.id],
            }

        await tell(self._store, kept, succeed, f"The model {name} is ready", bear=[results])

    async def _table(self, kept: Kept) -> AsyncIterator[bytes]:
        """The metrics, as OpenAI's result files have them."""
        yield b"step,train_loss,valid_loss\n"
        last = -1
        while found := await self._store.lines(kept.id, after=last, limit=500):
            last = found[-1][0]
            for _, event in found:
                if event["type"] == "metrics":
                    data = event["data"]
                    losses = (data.get("train_loss"), data.get("valid_loss"))
                    cells = ["" if loss is None else f"{loss:.6g}" for loss in losses]
                    yield f"{data['step']},{','.join(cells)}\n".encode()

    async def _failed(self, kept: Kept, error: errors.LLMasOSError) -> None:
        problem = problems.problem_of(error)
        field = "training_file" if isinstance(error, errors.InvalidArgument) else None

        def fail(now: Kept) -> None:
            if now.body["status"] not in ENDED:
                told = {"code": problem.code or problem.type, "message": problem.message, "param": field}
                now.body |= {"status": "failed", "finished_at": int(time.time()), "error": told}

        await tell(self._store, kept, fail, problem.message, level="error")


def _let_go(kept: Kept) -> None:
    kept.held = False


def _dataset(kept: Kept) -> str:
    return f"{kept.id}.jsonl"


async def _send(caller: Caller, name: str, source: BinaryIO, size: int) -> int:
    """Adds a file to a data set of `size` bytes, and ends its last line. Returns how many it has then."""
    part = b"\n"
    while more := await asyncio.to_thread(source.read, CHUNK):
        part = more
        await _write(caller, name, size, part)
        size += len(part)
    if not part.endswith(b"\n"):
        await _write(caller, name, size, b"\n")
        size += 1
    return size


async def _write(caller: Caller, name: str, size: int, part: bytes, last: bool = False) -> None:
    try:
        await caller.aio.call(table.Write(f"/datasets/{name}", size, part, last))
    except errors.InvalidArgument as problem:
        if size and problem.details.get("size") == 0:
            raise errors.ConnectionLost(
                "the kernel was started again, and knows nothing unfinished"
            ) from None
        raise


def _rows(source: BinaryIO) -> int:
    source.seek(0)
    count = 0
    while line := source.readline(MOST_ROW):
        count += not line.isspace()
    return count


async def _pid_of(caller: Caller, label: str) -> int | None:
    after, more = 0, True
    while more:
        found = await caller.aio.call(table.Ps(after))
        for row in found.processes:
            after = row.pid
            if row.name == label:
                return row.pid
        more = found.more
    return None


async def _ended(caller: Caller, kept: Kept, pid: int) -> table.WaitReply:
    """How the run ended; its process is gone then. Of one that was gone before tells what it left."""
    try:
        return await caller.aio.call(table.Wait(pid))
    except errors.NoSuchProcess:
        model = f"{kept.inner['model']}+{kept.inner['target']}"
        try:
            there = await caller.aio.call(table.Stat(f"/models/{model}"))
        except errors.NotFound:
            return table.WaitReply(pid, 1, "somebody ended it", 0)
        told = kept.inner
        made = training.TrainResult(
            model,
            there.digest,
            training.Method.LORA,
            told["step"],
            0.0,
            told.get("tokens", 0),
            0.0,
            told.get("loss"),
            told.get("eval_loss"),
            0,
        )
        return table.WaitReply(pid, 0, "it is done", 0, made)
