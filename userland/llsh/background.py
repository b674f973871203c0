"""Commands about what runs in the background: jobs, fg, wait."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer
from llmasos.syscalls import errors

from . import quantity
from .argument import Json, examples, pid
from .job import Job, JobState
from .shell import Shell, shell_of
from .table import Column, Table

app = typer.Typer()


@app.command(epilog=examples("run smollm2 Tell me a story &", "jobs", "fg %1", "kill %1"))
def jobs(context: typer.Context, json: Json = False) -> None:
    """Show what this shell runs in the background.

    A command that ends with & becomes a job. Jobs belong to the interactive shell (or the line of -c)
    they were typed into.
    """
    shell = shell_of(context)
    entries = [job.info() for job in shell.jobs]
    if json:
        shell.terminal.document(entries)
        return
    table = Table(
        [
            Column("JOB", right=True),
            Column("PID", right=True, drop=2),
            Column("STATE"),
            Column("AGE", right=True, drop=1),
            Column("COMMAND", least=12),
        ]
    )
    for job in entries:
        table.add(
            f"%{job.job}", str(job.pid) if job.pid else "-", job.state, quantity.age(job.age_s), job.command
        )
    shell.terminal.table(table)


@app.command(epilog=examples("fg", "fg %2"))
def fg(
    context: typer.Context,
    job: Annotated[str, typer.Argument(metavar="%JOB", help="Without one: the latest.")] = "",
) -> None:
    """Show what a job has printed and follow it to its end; Ctrl-C ends it."""
    shell = shell_of(context)
    _finish(shell, shell.jobs.get(job))


@app.command(epilog=examples("llsh wait 12", "llsh wait 12 --timeout 60", "llsh -c 'run smollm2 Hi & wait'"))
def wait(
    context: typer.Context,
    pids: Annotated[
        list[str] | None, typer.Argument(metavar="PID|%JOB", help="Without any: all jobs of this shell.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds to wait at most.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Wait until processes or jobs have ended.

    A process that was waited for is gone from `ps -a`. Fails when one did not end well.
    """
    shell = shell_of(context)
    ends: list[Any] = []
    for word in pids or [f"%{job.number}" for job in shell.jobs]:
        if word.startswith("%"):
            job = shell.jobs.get(word)
            job.follow(None if json else shell.terminal, timeout)
            shell.jobs.forget(job)
            ends.append(job.info())
            continue
        end = shell.client().wait(pid(shell, word), timeout)
        ends.append(end)
        if not json:
            shell.terminal.line(f"{end.pid}: {end.reason}, {end.generated_tokens} tokens generated")
    if json:
        shell.terminal.document(ends)
    if any(end.exit_code for end in ends):
        raise typer.Exit(1)


def _finish(shell: Shell, job: Job) -> None:
    """Brings a job to the front; an interrupt goes to its process."""
    shell.terminal.say(f"[{job.number}] {job.command}")
    try:
        code = job.follow(shell.terminal)
    except KeyboardInterrupt:
        if job.pid and job.state is JobState.RUNNING:
            with contextlib.suppress(errors.LLMasOSError):
                shell.client().kill(job.pid)
        raise
    finally:
        job.announced = True
    shell.jobs.forget(job)
    if code:
        raise typer.Exit(code)
