"""Background jobs of one shell: what `run … &` starts.

A job is a thread that runs a command with its own connection; what it prints stays on a tape until
somebody looks. States: RUNNING, then DONE (exit code 0) or FAILED.
"""

from __future__ import annotations

import enum
import io
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
import typer
from llmasos.syscalls import errors

from .terminal import Terminal

if TYPE_CHECKING:
    from .shell import Shell

Runner = Callable[[list[str], "Shell"], int]
"""Runs the words of a command in a shell and returns its exit code."""

POLL_S = 0.05


class JobState(enum.StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class JobInfo(msgspec.Struct, frozen=True):
    """A row of `jobs`; `pid` 0: no process yet, or no process at all."""

    job: int
    pid: int
    state: JobState
    exit_code: int | None
    age_s: float
    command: str


class Tape(io.StringIO):
    """What a job has printed, stdout and stderr in order; read while it is being written."""

    def isatty(self) -> bool:
        return False


class Job:
    """One command in the background. `pid` is set by the command once it has a process."""

    def __init__(self, number: int, words: list[str], shell: Shell, runner: Runner) -> None:
        self.number = number
        self.command = shlex.join(words)
        self.exit_code: int | None = None
        self.announced = False
        self.tape = Tape()
        self._shell = shell.twin(Terminal(self.tape, self.tape), io.StringIO())
        self._began = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(words, runner), name=f"llsh-job-{number}", daemon=True
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._shell.pid

    @property
    def state(self) -> JobState:
        if self.exit_code is None:
            return JobState.RUNNING
        return JobState.FAILED if self.exit_code else JobState.DONE

    def info(self) -> JobInfo:
        age = time.monotonic() - self._began
        return JobInfo(self.number, self.pid, self.state, self.exit_code, age, self.command)

    def follow(self, terminal: Terminal | None, timeout_s: float | None = None) -> int:
        """Copies the tape to `terminal` until the job ends; returns its exit code. Raises TimedOut."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        shown = 0
        while True:
            ended = not self._thread.is_alive()
            text = self.tape.getvalue()
            if terminal is not None and len(text) > shown:
                terminal.write(text[shown:])
                shown = len(text)
            if ended:
                return self.exit_code or 0
            if until is not None and time.monotonic() >= until:
                raise errors.TimedOut(f"job %{self.number} still runs", hint=f"`fg %{self.number}` shows it")
            self._thread.join(POLL_S)

    def _run(self, words: list[str], runner: Runner) -> None:
        code = 1
        try:
            code = runner(words, self._shell)
        finally:
            self.exit_code = code
            self._shell.close()


class Jobs:
    """The jobs of a shell, numbered from 1."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def start(self, words: list[str], shell: Shell, runner: Runner) -> Job:
        number = max(self._jobs, default=0) + 1
        job = self._jobs[number] = Job(number, words, shell, runner)
        return job

    def get(self, word: str) -> Job:
        """The job named `%N`, or N, or the latest for "". Raises BadParameter."""
        number = word.removeprefix("%")
        if not number and self._jobs:
            return self._jobs[max(self._jobs)]
        if not number.isdecimal() or int(number) not in self._jobs:
            raise typer.BadParameter(f"no job {word}" if word else "no jobs; `run … &` starts one")
        return self._jobs[int(number)]

    def pid(self, word: str) -> int:
        """The process of job `%N`. Raises BadParameter."""
        if not (pid := self.get(word).pid):
            raise typer.BadParameter(f"job {word} has no process yet")
        return pid

    def forget(self, job: Job) -> None:
        self._jobs.pop(job.number, None)

    def ended(self) -> list[Job]:
        """Jobs that ended since the last call."""
        fresh = [job for job in self if job.state is not JobState.RUNNING and not job.announced]
        for job in fresh:
            job.announced = True
        return fresh
