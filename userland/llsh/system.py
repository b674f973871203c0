"""Commands about the machine: lsdev, dmesg, flight, whoami, shutdown."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import msgspec
import typer
from llmasos.syscalls import errors, table

from . import quantity
from .argument import Json, examples
from .files import pools
from .shell import shell_of
from .table import Column, Table

app = typer.Typer()

LEVELS = ("debug", "info", "warn", "err")

# How long the daemon may take to end after its drain.
PATIENCE_S = 10.0


@app.command(epilog=examples("llsh lsdev", "llsh lsdev --json"))
def lsdev(context: typer.Context, json: Json = False) -> None:
    """Show the devices, what they are and which models lie on them."""
    shell = shell_of(context)
    devices = shell.client().call(table.Lsdev()).devices
    if json:
        shell.terminal.document(devices)
        return
    table_ = Table(
        [
            Column("DEVICE"),
            Column("DRIVER", drop=4),
            Column("STATE"),
            Column("MEMORY FREE", right=True, drop=1),
            Column("STEP", right=True, drop=3),
            Column("LAST STEP", right=True, drop=4),
            Column("RESTARTS", right=True, drop=5),
            Column("WORKER", right=True, drop=6),
            Column("DESCRIPTION", drop=2, least=16),
        ]
    )
    for device in devices:
        table_.add(
            device.name,
            device.driver,
            device.state,
            f"{quantity.size(device.memory_free)}/{quantity.size(device.memory_total)}",
            f"{device.step_ms:.1f} ms",
            "-" if device.idle_s is None else f"{quantity.age(device.idle_s)} ago",
            str(device.restarts),
            str(device.worker_pid),
            device.description,
        )
    shell.terminal.table(table_)
    if resident := [pool for device in devices for pool in device.pools]:
        shell.terminal.line()
        shell.terminal.table(pools(resident))


@app.command(
    epilog=examples(
        "llsh dmesg", "llsh dmesg -w", "llsh dmesg -T -l warn,err", "llsh dmesg --json | jq .text"
    )
)
def dmesg(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("-w", "--follow", help="Go on with new lines until Ctrl-C.")
    ] = False,
    follow_new: Annotated[
        bool, typer.Option("-W", "--follow-new", help="Only new lines, until Ctrl-C.")
    ] = False,
    ctime: Annotated[
        bool, typer.Option("-T", "--ctime", help="Date and time instead of seconds since boot.")
    ] = False,
    level: Annotated[
        str, typer.Option("-l", "--level", help="Only these levels, with commas: debug, info, warn, err.")
    ] = "",
    json: Json = False,
) -> None:
    """Show the kernel's log: seconds since boot, level, what happened."""
    shell = shell_of(context)
    wanted = _levels(level)
    client = shell.client()
    boot = time.time() - float(client.read_file("/proc/uptime")) if ctime else 0.0
    after = 0
    if follow_new:
        with client.stream(table.Dmesg()) as lines:
            after = max((line.seq for line in lines), default=0)
    with client.stream(table.Dmesg(after, follow or follow_new)) as lines:
        for line in lines:
            if wanted and line.level not in wanted:
                continue
            if json:
                shell.terminal.document(line)
                continue
            stamp = f"{line.time:12.6f}"
            if ctime:
                stamp = time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(boot + line.time))
            shell.terminal.line(f"[{stamp}] {line.level}: {line.text}")


def _levels(text: str) -> set[str]:
    """The levels of a list with commas. Raises BadParameter."""
    names = {name for name in text.split(",") if name}
    if unknown := names - set(LEVELS):
        raise typer.BadParameter(f"no level {unknown.pop()!r}: one of {', '.join(LEVELS)}")
    return names


@app.command(epilog=examples("llsh flight", "llsh flight --json > decisions.jsonl"))
def flight(context: typer.Context, json: Json = False) -> None:
    """Show the scheduler's last decisions, newest last.

    For the administrator. A line is a step that was sent to a device: how many could run, rows that generate
    and prompt tokens in it, its expected and its real time, how it ended, which pids it served and who lost
    its memory to whom. More of them are kept on disk when a driver dies (state/flight in the home folder).
    """
    shell = shell_of(context)
    data = shell.client().read_file("/proc/flight")
    if json:
        shell.terminal.data(data)
        return
    table_ = Table(
        [
            Column("TIME", right=True),
            Column("DEVICE", drop=3),
            Column("TICKET", right=True, drop=6),
            Column("QUEUE", right=True, drop=2),
            Column("ROWS", right=True),
            Column("PROMPT", right=True),
            Column("ROUNDS", right=True, drop=5),
            Column("EXPECTED", right=True, drop=1),
            Column("TOOK", right=True),
            Column("END"),
            Column("PIDS", drop=4, least=8),
            Column("PUSHED OUT", drop=7, least=8),
        ]
    )
    for step in map(msgspec.json.decode, data.splitlines()):
        table_.add(
            f"{step['time']:.3f}",
            step["device"],
            str(step["ticket"]),
            str(step["queue"]),
            str(step["rows"]),
            str(step["tokens"]),
            str(step["rounds"]),
            _ms(step["expected"] and step["expected"] * step["rounds"]),
            _ms(step["seconds"]),
            step["outcome"],
            " ".join(str(work[0]) for work in step["work"]),
            " ".join(f"{push['victim']} for {push['claimant']}" for push in step["pushed"]),
        )
    shell.terminal.table(table_)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


@app.command(epilog=examples("llsh whoami"))
def whoami(context: typer.Context, json: Json = False) -> None:
    """Show who the kernel takes you for."""
    shell = shell_of(context)
    reply = shell.client().call(table.Whoami())
    admin = " (admin)" if reply.admin else ""
    shell.emit(reply, json, f"{reply.subject}{admin}")


@app.command(epilog=examples("llsh shutdown", "llsh shutdown --drain 60"))
def shutdown(
    context: typer.Context,
    drain: Annotated[
        float, typer.Option("--drain", min=0, max=3600, help="Seconds that running answers get to end.")
    ] = 5.0,
    json: Json = False,
) -> None:
    """Stop the daemon.

    New work is refused at once; answers that are under way get a few seconds.
    """
    from ..daemon import is_listening

    shell = shell_of(context)
    client = shell.client()
    where = client.address
    until = time.monotonic() + drain + PATIENCE_S
    with shell.terminal.spinner("stopping llmasosd"):
        with contextlib.suppress(errors.ConnectionLost):  # it may be gone before its answer is
            client.call(table.Shutdown(drain))
        shell.close()
        while where.startswith("ipc://") and is_listening(where):
            if time.monotonic() > until:
                raise errors.TimedOut("llmasosd still answers", hint="`llsh dmesg` tells what it does")
            time.sleep(0.02)
    shell.emit({"stopped": True}, json, "llmasosd has stopped")
