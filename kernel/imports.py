"""Running imports (`pull`): who watches which, one importer process a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls.types import FileInfo, PullEvent

from .programs import Program, Programs
from .sessions import Request, Sessions

IMPORTER = "llmasos.kernel.modelfs.importer"


@dataclass(slots=True)
class Watcher:
    """A caller of `pull`. Progress it has no credit for is dropped: only the newest matters."""

    request: Request
    credits: int
    seq: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """An importer at work, for whom."""

    model: str
    source: str
    owner: str
    program: Program | None = None
    watchers: list[Watcher] = field(default_factory=list)


class Imports:
    """The importers at work. `home` is theirs; `imported` is told of a model whose importer has ended, and
    returns its entry or raises what is wrong with it."""

    def __init__(
        self,
        sessions: Sessions,
        programs: Programs,
        home: str,
        imported: Callable[[str, errors.LLMasOSError | None], FileInfo],
    ) -> None:
        self._sessions = sessions
        self._programs = programs
        self._home = home
        self._imported = imported
        self._jobs: list[Job] = []

    def watch(self, model: str, source: str, owner: str, request: Request, credits_: int, limit: int) -> None:
        """Joins the running import of the same model for the same `owner` ("": for all), or starts one.
        Raises QueueFull over `limit`."""
        wanted = (model, source, owner)
        job = next((j for j in self._jobs if (j.model, j.source, j.owner) == wanted and j.watchers), None)
        if job is None:
            if len(self._jobs) >= limit:
                raise errors.QueueFull(
                    f"{len(self._jobs)} imports are running", hint="try again when one has ended"
                )
            arguments = [IMPORTER, "--home", self._home, "--model", model]
            if source:
                arguments += ["--source", source]
            if owner:
                arguments += ["--owner", owner]
            job = self._start(Job(model, source, owner), arguments)
        watcher = Watcher(request, credits_)
        job.watchers.append(watcher)
        self._sessions.on_cancel(request, lambda: self._leave(job, watcher))
        self._sessions.on_credit(request, lambda n: _credit(watcher, n))

    def _start(self, job: Job, arguments: list[str]) -> Job:
        job.program = self._programs.start(
            arguments, lambda line: self._progress(job, line), lambda outcome: self._ended(job, outcome)
        )
        self._jobs.append(job)
        return job

    def _progress(self, job: Job, line: dict[str, Any]) -> None:
        fields = {name: line[name] for name in PullEvent.__struct_fields__ if name in line}
        with suppress(msgspec.ValidationError):
            event = msgspec.convert(fields, PullEvent)
            for watcher in job.watchers:
                if watcher.credits > 0:
                    watcher.credits -= 1
                    self._sessions.item(watcher.request, watcher.seq, event)
                    watcher.seq += 1

    def _ended(self, job: Job, outcome: dict[str, Any] | errors.LLMasOSError) -> None:
        self._jobs.remove(job)
        if isinstance(outcome, errors.DeviceFault):
            outcome = errors.PullFailed("the importer died", hint="see the daemon's log; pull again to go on")
        problem = outcome if isinstance(outcome, errors.LLMasOSError) else None
        try:
            info = self._imported(job.model, problem)
        except errors.LLMasOSError as refusal:
            for watcher in job.watchers:
                self._sessions.fail(watcher.request, refusal)
            return
        for watcher in job.watchers:
            self._sessions.reply(watcher.request, info)

    def _leave(self, job: Job, watcher: Watcher) -> None:
        """A watcher cancelled; an import nobody watches is stopped (what it fetched is kept for a retry)."""
        if watcher in job.watchers:
            job.watchers.remove(watcher)
            self._sessions.fail(watcher.request, errors.PullFailed("cancelled", hint="pull again to go on"))
        if not job.watchers and job.program is not None:
            self._programs.stop(job.program)


def _credit(watcher: Watcher, n: int) -> None:
    watcher.credits += n
