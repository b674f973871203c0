"""`top`: devices and processes, drawn again every second."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from . import quantity
from .argument import Json, examples
from .processes import rows
from .shell import shell_of
from .terminal import Terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..client import Client

app = typer.Typer()

# The busiest first: what runs, what could run; everything else after.
_RANK = {t.State.RUNNING: 0, t.State.READY: 1, t.State.NEW: 2}


class Snapshot:
    """What one screen shows. Never holds a connection: it is what was true a moment ago."""

    def __init__(self, client: Client) -> None:
        alive = [process for process in client.ps() if process.state is not t.State.ZOMBIE]
        self.processes = sorted(alive, key=lambda p: (_RANK.get(p.state, 3), -p.tokens_per_s, p.pid))
        self.devices = client.call(table.Lsdev()).devices

    def header(self) -> list[str]:
        """Three or more lines: the clock and totals, then a line a device and model."""
        running = sum(process.state is t.State.RUNNING for process in self.processes)
        speed = sum(process.tokens_per_s for process in self.processes)
        lines = [
            f"llmasos {time.strftime('%H:%M:%S')}   {quantity.number(len(self.processes), 'process')},"
            f" {running} running"
            f"   {speed:.1f} tokens/s"
        ]
        for device in self.devices:
            memory = f"{quantity.size(device.memory_free)} of {quantity.size(device.memory_total)} free"
            lines.append(f"{device.name}  {device.state}  step {device.step_ms:.1f} ms  {memory}")
            for pool in device.pools:
                used = pool.blocks_total - pool.blocks_free
                share = 100 * used / pool.blocks_total if pool.blocks_total else 0.0
                lines.append(
                    f"  {pool.model.removesuffix(':latest')} {pool.dtype}"
                    f"  KV {used}/{pool.blocks_total} blocks ({share:.0f} %)"
                    f"  {quantity.number(pool.processes, 'process')}"
                )
        return lines

    def screen(self, terminal: Terminal) -> RenderableType:
        """The whole screen, cut to the terminal's height."""
        from rich.console import Group
        from rich.text import Text

        width, height = terminal.out_console.size
        lines = self.header()
        table_ = rows(self.processes[: max(1, height - len(lines) - 4)])
        head = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(*head, Text(), table_.fitted(width), Text("q leaves", style="dim"))


@app.command(epilog=examples("llsh top", "llsh top | head -3", "llsh top --json"))
def top(
    context: typer.Context,
    interval: Annotated[float, typer.Option("-d", "--delay", min=0.1, help="Seconds between screens.")] = 1.0,
    json: Json = False,
) -> None:
    """Watch devices and processes; q leaves.

    Without a terminal it prints one screen.
    """
    shell = shell_of(context)
    client = shell.client()
    snapshot = Snapshot(client)
    if json:
        shell.terminal.document({"devices": snapshot.devices, "processes": snapshot.processes})
    elif not shell.terminal.is_tty:
        shell.terminal.write("\n".join(snapshot.header()) + "\n\n")
        shell.terminal.table(rows(snapshot.processes))
    else:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the usual way out
            _watch(shell.terminal, client, snapshot, interval)


def _watch(terminal: Terminal, client: Client, snapshot: Snapshot, interval: float) -> None:
    from rich.live import Live

    with _keys(), Live(console=terminal.out_console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(snapshot.screen(terminal), refresh=True)
            if _leaves(interval):
                return
            snapshot = Snapshot(client)


def _leaves(patience_s: float) -> bool:
    """Whether q or Ctrl-C was pressed within `patience_s`."""
    if not sys.stdin.isatty():
        time.sleep(patience_s)
        return False
    until = time.monotonic() + patience_s
    while (left := until - time.monotonic()) > 0:
        if (
            select.select([sys.stdin], [], [], left)[0]
            and os.read(sys.stdin.fileno(), 64)[:1] in b"qQ\x03\x04"
        ):
            return True
    return False


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Single key presses instead of lines, as they were afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
