"""The interactive shell: a prompt, the same commands, jobs that report when they end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .editor import Editor, command_words
from .job import Runner
from .line import BadLine, parse
from .script import run_commands
from .shell import Shell

if TYPE_CHECKING:
    from typer.core import TyperCommand

BANNER = """\
LLMasOS: language models as processes.
Try `run smollm2 "Hello"`, `ps` or `help`; Ctrl-D leaves."""

LEAVE = {"exit", "quit", "logout"}


def interact(shell: Shell, runner: Runner, tree: dict[str, TyperCommand]) -> int:
    """Reads and runs lines until Ctrl-D or `exit`; returns 0, as leaving is no failure."""
    shell.terminal.line(BANNER)
    editor = Editor("llsh", command_words(tree))
    while True:
        try:
            _report(shell)
            text = editor.read("llsh> ")
            if text.strip() in LEAVE:
                return 0
            _obey(text, shell, runner)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0


def _obey(text: str, shell: Shell, runner: Runner) -> None:
    try:
        run_commands(parse(text), shell, runner)
    except BadLine as problem:
        shell.terminal.fail(str(problem), "quote text that holds quotes, ; or &")


def _report(shell: Shell) -> None:
    for job in shell.jobs.ended():
        shell.terminal.say(f"[{job.number}] {job.state}  {job.command}   (fg %{job.number} shows it)")
