"""Arguments and options that several commands share: their help, their checks, how they are completed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from . import completion
from .shell import Shell, shell_of

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Class = Annotated[
    t.SchedClass | None,
    typer.Option("--class", help="Scheduling class, strongest first.", show_default=False),
]
Nice = Annotated[
    int, typer.Option("--nice", min=-20, max=19, help="Share within the class: -20 gets most, 19 least.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name (smollm2), a Hugging Face repository (owner/name), a folder or a .gguf file.",
        autocompletion=completion.models,
    ),
]
Installed = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model of `llsh list`.", autocompletion=completion.models)
]
Pid = Annotated[
    str, typer.Argument(metavar="PID", help="A pid of `llsh ps`.", autocompletion=completion.pids)
]
Pids = Annotated[
    list[str],
    typer.Argument(metavar="PID", help="Pids of `llsh ps`, or %N for a job.", autocompletion=completion.pids),
]


def examples(*lines: str) -> str:
    """The end of a command's help: what to type, one line an example."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def group(purpose: str, *lines: str) -> typer.Typer:
    """A command that is a group of others: alone it teaches them on stderr, and is wrong usage."""

    def teach(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            shell_of(context).terminal.say(context.get_help())
            raise typer.Exit(2)

    return typer.Typer(help=purpose, epilog=examples(*lines), invoke_without_command=True, callback=teach)


def text_of(path: Path) -> str:
    """A file that the user named. Raises OSError, InvalidArgument."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise errors.InvalidArgument(f"{path} is not text in UTF-8") from None


def pid(shell: Shell, word: str) -> int:
    """The process a user means: a pid, or %N, the N-th job of this shell. Raises BadParameter."""
    if word.startswith("%"):
        return shell.jobs.pid(word)
    if not word.isdecimal() or int(word) < 1:
        raise typer.BadParameter(f"{word!r} is no pid; see `llsh ps`")
    return int(word)


def model_path(name: str) -> str:
    """Where the model filesystem shows a model: /models/NAME:TAG."""
    return f"/models/{full_name(name)}"


def full_name(name: str) -> str:
    """`name:tag`, or `name:tag+adapter`; the tag is `latest` unless given."""
    from ..models import full_name as full

    return full(name.removeprefix("/models/"))
