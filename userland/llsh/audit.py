"""Commands about the audit log: `llsh audit show` and `llsh audit verify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from llmasos.syscalls import chain

from . import argument
from .argument import Json, examples
from .shell import Shell, shell_of

app = typer.Typer()
group = argument.group("Show or verify the log of who did what.", "llsh audit show", "llsh audit verify")
app.add_typer(group, name="audit")

Log = Annotated[Path | None, typer.Argument(help="A copy of the log, instead of the daemon's.")]


@group.command(epilog=examples("llsh audit show", "llsh audit show --json | jq .event"))
def show(context: typer.Context, log: Log = None, json: Json = False) -> None:
    """Show the records: time, event, who, and facts."""
    shell = shell_of(context)
    for line in _lines(shell, log):
        record, _ = chain.unseal(line)
        if json:
            shell.terminal.document(record)
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time))
        facts = " ".join(f"{name}={value!r}" for name, value in record.facts.items())
        shell.terminal.line(f"{when}  {record.event:<16} {record.subject}  {facts}".rstrip())


@group.command(epilog=examples("llsh audit verify", "llsh audit verify copy.log"))
def verify(context: typer.Context, log: Log = None, json: Json = False) -> None:
    """Prove that no record was changed, removed or added.

    Note the head that it prints somewhere else: only that tells later whether the end was cut off.
    """
    shell = shell_of(context)
    count, head = chain.verify(_lines(shell, log))
    shell.emit({"records": count, "head": head}, json, f"{count} records, the chain is whole, head {head}")


def _lines(shell: Shell, log: Path | None) -> list[bytes]:
    data = log.read_bytes() if log else shell.client().read_audit()
    return data.splitlines()
