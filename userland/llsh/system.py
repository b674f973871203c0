"""Commands about the machine: lsdev, dmesg, whoami, shutdown."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer
from llmasos.syscalls import errors, table

from . import quantity
from .argument import Json, examples
from .files import pools
from .shell import shell_of
from .table import Column, Table

app = typer.Typer()

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
            str(device.restarts),
            str(device.worker_pid),
            device.description,
        )
    shell.terminal.table(table_)
    if resident := [pool for device in devices for pool in device.pools]:
        shell.terminal.line()
        shell.terminal.table(pools(resident))


@app.command(epilog=examples("llsh dmesg", "llsh dmesg -w", "llsh dmesg --json | jq .text"))
def dmesg(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("-w", "--follow", help="Go on with new lines until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the kernel's log: seconds since boot, level, what happened."""
    shell = shell_of(context)
    with shell.client().stream(table.Dmesg(follow=follow)) as lines:
        for line in lines:
            if json:
                shell.terminal.document(line)
            else:
                shell.terminal.line(f"[{line.time:12.6f}] {line.level}: {line.text}")


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
