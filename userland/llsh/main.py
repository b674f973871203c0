"""`llsh`: the entry point, the tree of commands, and how a command ends.

One place makes exit codes of outcomes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody reads on.
Nothing heavier than Typer is imported before a command needs it.
"""

from __future__ import annotations

import errno
import functools
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from llmasos.syscalls import address, bounds, errors
from typer.core import TyperGroup

from . import (
    audit,
    background,
    chat,
    classify,
    embed,
    files,
    guide,
    key,
    models,
    processes,
    quota,
    run,
    serve,
    snapshots,
    stats,
    system,
    top,
    train,
)
from .shell import Shell, shell_of

if TYPE_CHECKING:
    from typer.core import TyperCommand

FAILED, USAGE, INTERRUPTED, UNREAD = 1, 2, 130, 141

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_SHUT = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS}

_OUTER = {"|", ">", ">>", "<", "2>"}
"""Words that mean something in the shell around this one. Here they can be a prompt's."""

_PURPOSE = """\
The shell of LLMasOS: language models as processes.

With a command: does that. Without one: an interactive shell with the same words."""


class Words(TyperGroup):
    """The group of all commands, which shows them by purpose."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        formatter.write("\n" + guide.overview(summaries()) + "\n" + guide.EXAMPLES)


app = typer.Typer(
    cls=Words,
    help=_PURPOSE,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    run,
    chat,
    embed,
    classify,
    processes,
    snapshots,
    top,
    background,
    train,
    models,
    files,
    system,
    stats,
    serve,
    audit,
    key,
    quota,
):
    app.add_typer(group.app)


@app.callback(invoke_without_command=True)
def llsh(
    context: typer.Context,
    line: Annotated[
        str | None,
        typer.Option("-c", "--command", metavar="LINE", help="Run a line: commands with ; && & and #."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Talk to another daemon, as at tcp://HOST:PORT.")
    ] = "",
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    shell = shell_of(context)
    if host:
        shell.address = host
    if context.invoked_subcommand is not None:
        return
    if version:
        from importlib.metadata import version as installed_version

        shell.terminal.line(f"llsh {installed_version('llmasos')}")
        return
    from . import script

    if line is not None:
        raise typer.Exit(script.run_text(line, shell, dispatch))
    if not shell.stdin.isatty():
        raise typer.Exit(script.run_text(shell.stdin.read(), shell, dispatch))
    from .interactive import interact

    raise typer.Exit(interact(shell, dispatch, command_tree()))


@app.command("help", epilog="\b\nExamples:\n  llsh help\n  llsh help run\n  llsh help key api")
def help_(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help="The command to explain.")
    ] = None,
) -> None:
    """Explain llsh or one of its commands."""
    shell = shell_of(context)
    if not words:
        shell.terminal.write(guide.overview(summaries()))
        return
    explained = context.find_root()
    for word in words:
        known = getattr(explained.command, "commands", {})
        if word not in known:
            raise UnknownCommand(" ".join(words))
        explained = known[word].make_context(word, [], parent=explained, resilient_parsing=True)
    shell.terminal.line(explained.get_help())


class UnknownCommand(Exception):
    """A first word that is no command."""


@functools.cache
def _root() -> Any:
    return typer.main.get_command(app)


def command_tree() -> dict[str, TyperCommand]:
    """All commands by name."""
    return dict(_root().commands)


def summaries() -> dict[str, str]:
    """One line a command."""
    return {name: command.get_short_help_str(limit=64) for name, command in command_tree().items()}


def dispatch(words: list[str], shell: Shell) -> int:
    """Runs one command in `shell` and returns its exit code. Every error ends here, as two lines at most."""
    terminal = shell.terminal
    try:
        if words and not words[0].startswith("-") and words[0] not in command_tree():
            raise UnknownCommand(words[0])
        result = _root().main(args=words, prog_name="llsh", standalone_mode=False, obj=shell)
        return result if isinstance(result, int) else 0
    except UnknownCommand as unknown:
        near = guide.did_you_mean(str(unknown), command_tree())
        terminal.fail(f"no command {str(unknown)!r}", near or "`llsh help` lists the commands")
        return USAGE
    except typer.TyperException as problem:
        context = getattr(problem, "ctx", None)
        hint = _usage(context) if context else ""
        if _OUTER.intersection(words):
            hint = "pipes and redirections are the outer shell's: llsh COMMAND … | …"
        terminal.fail(_range(problem) or problem.format_message().removeprefix("Invalid value: "), hint)
        return USAGE
    except errors.LLMasOSError as problem:
        terminal.fail_with(problem)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (typer.Abort, EOFError):
        return FAILED
    except BrokenPipeError:
        raise
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # what Typer makes of it
            raise left.__context__ from None
        raise
    except Exception as problem:
        if isinstance(problem, OSError) and (told := _of_files(problem)):
            terminal.fail(*told)
        else:
            terminal.fail(
                f"{type(problem).__name__}: {problem}", f"this is a bug in llsh; {_record(problem)}"
            )
        return FAILED


def _of_files(problem: OSError) -> tuple[str, str] | None:
    """What a file system refused, in Unix's words, and a hint: no bug. None: it was something else."""
    if problem.filename is not None:
        path, home = Path(str(problem.filename)), address.home_folder()
        ours = home.is_relative_to(path) or path.is_relative_to(home)
        hint = f"LLMasOS keeps its files in {home}; LLMASOS_HOME names another folder" if ours else ""
        return f"{path}: {problem.strerror}", hint if problem.errno in _SHUT else ""
    if problem.errno in _FULL:  # writing knows no name
        return f"cannot write: {problem.strerror}", ""
    return None


def _range(problem: Any) -> str:
    """What an option with a range or a few values must be, in the words of all others: Typer passes on those
    of pydantic. "" for other problems."""
    option = getattr(problem, "param", None)
    if option is None or problem.__cause__ is None:
        return ""
    kind, info = option.type_descriptor.annotation, option.type_descriptor.parameter_info
    right = bounds.wanted(Annotated[kind, msgspec.Meta(ge=info.min, le=info.max)])
    return f"{option.opts[-1]}: must be {right}" if right else ""


def _usage(context: Any) -> str:
    usage = " ".join(context.get_usage().removeprefix("Usage: ").split())
    words = context.command_path.removeprefix("llsh ")
    return f"{usage}; `llsh help {words}` explains" if context.parent else usage


def _record(bug: Exception) -> str:
    """Keeps the traceback out of the way but not out of reach."""
    import traceback

    path = address.home_folder() / "llsh-bug.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(bug)))
    except OSError:
        return "its traceback could not be written"
    return f"its traceback is in {path}"


def main() -> int:
    """Entry point of `llsh`."""
    if sys.stdin is None:  # closed, as by `<&-`
        sys.stdin = Path("/dev/null").open()  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # one byte that is no text must not cost the rest
    shell = Shell()
    try:
        code = dispatch(sys.argv[1:], shell)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = UNREAD  # as of what SIGPIPE ends, which Python ignores
        sys.stdout = Path("/dev/null").open("w")  # noqa: SIM115  the interpreter flushes it at its end
    finally:
        shell.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
