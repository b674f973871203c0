"""Running imports (`pull`): who watches which, one importer process a model. No I/O: starting and killing
importers are effects that the I/O shell carries out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmasos.syscalls import errors
from llmasos.syscalls.types import FileInfo, PullEvent

from .sessions import Request, Sessions


@dataclass(slots=True)
class Watcher:
    """A caller of `pull`. Progress it has no credit for is dropped: only the newest matters."""

    request: Request
    credits: int
    seq: int = 0


@dataclass(slots=True)
class Job:
    """An importer at work."""

    id: int
    model: str
    source: str
    watchers: list[Watcher] = field(default_factory=list)


class Imports:
    """Jobs by id. `to_start` and `to_stop` are for the I/O shell to take."""

    def __init__(self, sessions: Sessions, limit: int) -> None:
        self._sessions = sessions
        self._limit = limit
        self._jobs: dict[int, Job] = {}
        self._next = 1
        self.to_start: list[Job] = []
        self.to_stop: list[int] = []

    def model(self, job: int) -> str:
        return self._jobs[job].model

    def watch(self, model: str, source: str, request: Request, credits_: int) -> None:
        """Joins the running import of the same model, or asks for one. Raises QueueFull."""
        job = next(
            (j for j in self._jobs.values() if (j.model, j.source) == (model, source) and j.watchers), None
        )
        if job is None:
            if len(self._jobs) >= self._limit:
                raise errors.QueueFull(
                    f"{len(self._jobs)} imports are running", hint="try again when one has ended"
                )
            job = Job(self._next, model, source)
            self._next += 1
            self._jobs[job.id] = job
            self.to_start.append(job)
        watcher = Watcher(request, credits_)
        job.watchers.append(watcher)
        self._sessions.on_cancel(request, lambda: self._leave(job, watcher))
        self._sessions.on_credit(request, lambda n: _credit(watcher, n))

    def progress(self, job: int, event: PullEvent) -> None:
        for watcher in self._jobs[job].watchers:
            if watcher.credits > 0:
                watcher.credits -= 1
                self._sessions.item(watcher.request, watcher.seq, event)
                watcher.seq += 1

    def ended(self, job: int, info: FileInfo | None, error: errors.LLMasOSError | None) -> None:
        for watcher in self._jobs.pop(job).watchers:
            if info is not None:
                self._sessions.reply(watcher.request, info)
            else:
                self._sessions.fail(watcher.request, error or errors.PullFailed("the importer died"))

    def _leave(self, job: Job, watcher: Watcher) -> None:
        """A watcher cancelled; an import nobody watches is stopped (what it fetched is kept for a retry)."""
        if watcher in job.watchers:
            job.watchers.remove(watcher)
            self._sessions.fail(watcher.request, errors.PullFailed("cancelled", hint="pull again to go on"))
        if not job.watchers:
            self.to_stop.append(job.id)


def _credit(watcher: Watcher, n: int) -> None:
    watcher.credits += n
