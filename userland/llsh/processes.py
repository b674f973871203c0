"""Commands about processes: ps, kill, stop, cont, nice, fork, spawn."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from typer.core import TyperCommand

from . import quantity
from .argument import Class, Json, Model, Nice, Pid, Pids, examples, pid
from .shell import Shell, shell_of
from .table import Column, Table

app = typer.Typer()

NUMBERS = {"9": t.Signal.KILL, "15": t.Signal.TERM, "18": t.Signal.CONT, "19": t.Signal.STOP}
"""Signal numbers that fingers type, as Linux on x86 and ARM counts them."""

_STATE_STYLE = {
    t.State.RUNNING: "green",
    t.State.READY: "yellow",
    t.State.STOPPED: "red",
    t.State.ZOMBIE: "dim",
}


class _Dashed(TyperCommand):
    """A command with options that POSIX writes without a name: `kill -9`, `nice 12 -5`."""

    pattern = re.compile(r"-(\d+|[A-Z]{3,})")
    option = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named: list[str] = []
        for word in args:
            match = self.pattern.fullmatch(word)
            takes_value = bool(named) and named[-1] in {"-n", "-s", "--nice", "--signal"}
            named.append(f"{self.option}={self.value(match[1])}" if match and not takes_value else word)
        return super().parse_args(ctx, named)

    def value(self, text: str) -> str:
        return text


class KillCommand(_Dashed):
    option = "--signal"


class NiceCommand(_Dashed):
    pattern = re.compile(r"-(\d+)")
    option = "--nice"

    def value(self, text: str) -> str:
        return f"-{text}"


def rows(processes: list[t.ProcessInfo]) -> Table:
    """The table of `ps` and `top`."""
    table_ = Table(
        [
            Column("PID", right=True),
            Column("OWNER", drop=3, least=6),
            Column("MODEL", least=10),
            Column("CLASS", drop=4),
            Column("NICE", right=True, drop=5),
            Column("STATE", least=7, style=lambda state: _STATE_STYLE.get(state.split(":")[0], "")),  # type: ignore[call-overload]
            Column("CONTEXT", right=True, drop=2),
            Column("TOK/S", right=True, drop=1),
            Column("QUEUE", right=True, drop=6),
            Column("AGE", right=True, drop=7),
            Column("NAME", drop=8, least=8),
        ]
    )
    for process in processes:
        waits = f":{process.waiting_for}" if process.waiting_for else ""
        table_.add(
            str(process.pid),
            process.owner,
            process.model.removesuffix(":latest"),
            process.sched_class,
            str(process.nice),
            f"{process.state}{waits}",
            str(process.context),
            quantity.rate(process.tokens_per_s),
            str(process.queue_place) if process.queue_place else "-",
            quantity.age(process.age_s),
            process.name or "-",
        )
    return table_


@app.command(epilog=examples("llsh ps", "llsh ps -a", "llsh ps --json | jq '.[].pid'"))
def ps(
    context: typer.Context,
    all_: Annotated[
        bool, typer.Option("-a", "--all", help="Ended processes that nobody waited for, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the processes.

    A process is a running context of a model: it has an owner, a scheduling class and a nice value, a
    state, so many tokens of context, a speed, and a place in the queue when it waits for the device.
    """
    shell = shell_of(context)
    processes = [p for p in shell.client().ps() if all_ or p.state is not t.State.ZOMBIE]
    if json:
        shell.terminal.document(processes)
    else:
        shell.terminal.table(rows(processes))


@app.command(
    cls=KillCommand,
    epilog=examples("llsh kill 12", "llsh kill -9 12 13", "llsh kill -STOP 12", "llsh kill -s CONT 12"),
)
def kill(
    context: typer.Context,
    pids: Pids,
    signal: Annotated[str, typer.Option("-s", "--signal", help="TERM, KILL, STOP or CONT.")] = "TERM",
    json: Json = False,
) -> None:
    """End processes, or send them another signal.

    TERM and KILL end a process: its stream finishes with "killed". STOP suspends it between two tokens,
    CONT lets it go on where it stopped.
    """
    _signal(shell_of(context), pids, _to_signal(signal), json)


@app.command(epilog=examples("llsh stop 12", "llsh cont 12"))
def stop(context: typer.Context, pids: Pids, json: Json = False) -> None:
    """Suspend processes; `cont` lets them go on."""
    _signal(shell_of(context), pids, t.Signal.STOP, json)


@app.command(epilog=examples("llsh cont 12"))
def cont(context: typer.Context, pids: Pids, json: Json = False) -> None:
    """Let stopped processes go on where they stopped."""
    _signal(shell_of(context), pids, t.Signal.CONT, json)


@app.command(
    cls=NiceCommand,
    epilog=examples("llsh nice 12 10", "llsh nice 12 -5", "llsh nice -n 5 12", "llsh nice 12 --class batch"),
)
def nice(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="PID [N]", help="A pid, and its new nice value.")],
    nice: Annotated[
        int | None, typer.Option("-n", "--nice", help="The nice value.", show_default=False)
    ] = None,
    sched_class: Class = None,
    json: Json = False,
) -> None:
    """Change the priority of a process while it runs.

    The class comes first: realtime, interactive, batch, idle. Within a class and an owner the nice value
    shares out the device: -20 gets most, 19 least.
    """
    shell = shell_of(context)
    number = pid(shell, words[0])
    if len(words) > 2 or (len(words) == 2 and nice is not None):
        raise typer.BadParameter("one pid and one nice value are expected")
    if len(words) == 2:
        nice = _nice_value(words[1])
    if nice is None and sched_class is None:
        raise typer.BadParameter("what to change? give a nice value or --class")
    info = shell.client().call(table.SetPriority(number, nice, sched_class))
    shell.emit(info, json, f"{info.pid}: class {info.sched_class}, nice {info.nice}")


@app.command(epilog=examples("llsh fork 12", "llsh fork 12 -n 8", "llsh chat 13"))
def fork(
    context: typer.Context,
    process: Pid,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=256, help="How many copies.")] = 1,
    json: Json = False,
) -> None:
    """Copy a process and print the pids of the copies.

    A copy has the same context and shares its memory until either goes on. Copies stay until `llsh kill`;
    `llsh run PID` and `llsh chat PID` talk to them.
    """
    shell = shell_of(context)
    reply = shell.client().call(table.Fork(pid(shell, process), count, detached=True))
    shell.emit(reply, json, "\n".join(str(copy) for copy in reply.pids))


@app.command(epilog=examples("llsh spawn smollm2", "llsh spawn smollm2 --class batch --name nightly"))
def spawn(
    context: typer.Context,
    model: Model,
    sched_class: Class = None,
    nice: Nice = 0,
    name: Annotated[str, typer.Option("--name", help="A name for `ps`.")] = "",
    json: Json = False,
) -> None:
    """Start an empty process of a model and print its pid.

    It stays until `llsh kill`. `llsh run PID` and `llsh chat PID` talk to it.
    """
    from .models import installed

    shell = shell_of(context)
    client = shell.started()
    call = table.SpawnModel(
        installed(shell, client, model),
        sched_class=sched_class or t.SchedClass.INTERACTIVE,
        nice=nice,
        label=name,
        detached=True,
    )
    with shell.terminal.spinner(f"loading {model}"):
        reply = client.call(call)
    shell.emit(reply, json, str(reply.pid))


def _nice_value(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is no nice value; -20 to 19 are") from None


def _to_signal(name: str) -> t.Signal:
    from ..client import to_signal

    if name in NUMBERS:
        return NUMBERS[name]
    try:
        return to_signal(name)
    except errors.InvalidArgument as problem:
        raise typer.BadParameter(str(problem)) from None


def _signal(shell: Shell, words: list[str], signal: t.Signal, json: bool) -> None:
    """Sends `signal` to each; one that fails does not save the others, but the command fails."""
    numbers = [pid(shell, word) for word in words]
    client = shell.client()
    sent = []
    failures = 0
    for number in numbers:
        try:
            client.kill(number, signal)
            sent.append({"pid": number, "signal": signal})
        except errors.LLMasOSError as problem:
            failures += 1
            shell.terminal.fail_with(problem)
    if json:
        shell.terminal.document(sent)
    if failures:
        raise typer.Exit(1)
