"""Lines of commands without a person: `llsh -c LINE` and `llsh < FILE`."""

from __future__ import annotations

from .job import Runner
from .line import BadLine, Command, End, parse
from .shell import Shell

USAGE = 2
INTERRUPTED = 130


def run_text(text: str, shell: Shell, runner: Runner) -> int:
    """Runs all lines of `text`; returns the last command's exit code. Jobs are waited for at the end.

    An interrupt ends everything.
    """
    try:
        commands = parse(text)
    except BadLine as problem:
        shell.terminal.fail(str(problem), "quote text that holds quotes, ; or &")
        return USAGE
    code = run_commands(commands, shell, runner)
    if code != INTERRUPTED:
        for job in shell.jobs:
            job.follow(shell.terminal)
            shell.jobs.forget(job)
    return code


def run_commands(commands: list[Command], shell: Shell, runner: Runner) -> int:
    """Runs `commands` in order; after && only if the one before succeeded."""
    code = 0
    skip = False
    for command in commands:
        if not skip:
            if command.end is End.BACKGROUND:
                job = shell.jobs.start(command.words, shell, runner)
                shell.terminal.say(f"[{job.number}] {job.command}")
                code = 0
            else:
                code = runner(command.words, shell)
            if code == INTERRUPTED:
                break
        skip = command.end is End.AND and (skip or code != 0)
    return code
