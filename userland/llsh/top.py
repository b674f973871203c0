"""`top`: the machine live on the screen, and keys that act on processes.

Owns the terminal's mode while it runs and gives it back as it was, whatever ends it. What is shown and what
a key means is `monitor`'s.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .argument import Json, examples
from .monitor import Act, Snapshot, View
from .processes import rows
from .shell import shell_of
from .terminal import Terminal

if TYPE_CHECKING:
    from ..client import Client

app = typer.Typer()

_KEYS = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x03": "ctrl-c",
    "\x04": "ctrl-d",
}
"""What a terminal sends -> the key's name; other signs are their own names."""


@app.command(epilog=examples("llsh top", "llsh top -d 0.5", "llsh top --once", "llsh top --json"))
def top(
    context: typer.Context,
    interval: Annotated[float, typer.Option("-d", "--delay", min=0.1, help="Seconds between screens.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end.")] = False,
    json: Json = False,
) -> None:
    """Watch devices, tenants and processes; ? shows the keys, q leaves.

    The bar under a model is its KV memory, a letter and a colour for each owner. Without a terminal it prints
    one screen.
    """
    shell = shell_of(context)
    client = shell.client()
    snapshot = Snapshot(client)
    if json:
        shell.terminal.document({"devices": snapshot.devices, "processes": snapshot.processes})
    elif once or not shell.terminal.is_tty:
        shell.terminal.write(snapshot.plain() + "\n\n")
        shell.terminal.table(rows(View().sorted(snapshot)))
    else:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the usual way out
            _watch(shell.terminal, client, snapshot, interval)


def _watch(terminal: Terminal, client: Client, snapshot: Snapshot, interval: float) -> None:
    from rich.live import Live

    view, console = View(), terminal.out_console
    due = time.monotonic() + interval
    with (
        _keyboard(),
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        while True:
            live.update(view.screen(snapshot, *console.size), refresh=True)
            fresh = time.monotonic() >= due
            for key in _pressed(max(0.0, due - time.monotonic())):
                act = view.press(key, snapshot)
                if act and act.name == "quit":
                    return
                if act:
                    view.message = _do(client, act)
                    fresh = True
            if fresh or time.monotonic() >= due:
                due = time.monotonic() + interval
                try:
                    snapshot = Snapshot(client)
                except (errors.ConnectionLost, errors.DaemonUnreachable) as gone:
                    view.message = f"{gone.message}; this is what was known before"


def _do(client: Client, act: Act) -> str:
    """Carries an act out; what to tell about it."""
    try:
        if act.name == "nice":
            client.call(table.SetPriority(act.pid, act.value, None))
            return f"process {act.pid}: nice {act.value}"
        signals = {"kill": t.Signal.TERM, "stop": t.Signal.STOP, "cont": t.Signal.CONT}
        client.kill(act.pid, signals[act.name])
    except errors.LLMasOSError as refused:
        return refused.message
    return f"process {act.pid}: {signals[act.name]} sent"


def _pressed(patience_s: float) -> list[str]:
    """The keys pressed within `patience_s`, as soon as there are any."""
    if not sys.stdin.isatty():
        time.sleep(patience_s)
        return []
    if not select.select([sys.stdin], [], [], patience_s)[0]:
        return []
    text = os.read(sys.stdin.fileno(), 64).decode("utf-8", "replace")
    if not text:
        return ["q"]  # the terminal is gone
    keys = []
    while text:
        size = 3 if text[:2] in ("\x1b[", "\x1bO") else 1
        keys.append(_KEYS.get(text[:size], text[:size]))
        text = text[size:]
    return keys


@contextlib.contextmanager
def _keyboard() -> Iterator[None]:
    """Single key presses instead of lines; the terminal is as it was afterwards, also after SIGTERM. Ctrl-Z
    would leave a shell behind on a screen that is not its own."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)),
        signal.SIGTSTP: signal.signal(signal.SIGTSTP, signal.SIG_IGN),
    }
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
