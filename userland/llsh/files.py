"""Commands about the model filesystem: ls, cat, df."""

from __future__ import annotations

from typing import Annotated

import typer
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from . import completion, quantity
from .argument import Json, examples
from .models import listing
from .shell import shell_of
from .table import Column, Table

app = typer.Typer()


@app.command(epilog=examples("llsh ls", "llsh ls /models/smollm2:latest", "llsh ls /proc"))
def ls(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="/, /models, /models/NAME:TAG, /sessions, /datasets or /proc.",
            autocompletion=completion.paths,
        ),
    ] = "/",
    json: Json = False,
) -> None:
    """Look into the model filesystem.

    `llsh list` shows the models alone, with what matters about them.
    """
    shell = shell_of(context)
    entries = shell.client().ls(_absolute(path))
    if json:
        shell.terminal.document(entries)
    else:
        shell.terminal.table(listing(entries))


@app.command(epilog=examples("llsh cat /models/smollm2:latest/config.json"))
def cat(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A file that `llsh ls` shows.", autocompletion=completion.paths),
    ],
    json: Json = False,
) -> None:
    """Print a file of the model filesystem.

    Bytes go to a pipe as they are; with --json the text comes in a document.
    """
    shell = shell_of(context)
    client = shell.client()
    path = _absolute(path)
    if json:
        text = client.read_file(path).decode("utf-8", "replace")
        shell.terminal.document({"path": path, "text": text})
        return
    place, size = 0, 1
    while place < size:
        reply = client.call(table.Read(path, place))
        if not reply.data:
            break
        place, size = place + len(reply.data), reply.size
        shell.terminal.data(reply.data)


@app.command(epilog=examples("llsh df", "llsh df --json"))
def df(context: typer.Context, json: Json = False) -> None:
    """Show how much room there is: the disk of the models, and the KV blocks of the devices."""
    shell = shell_of(context)
    reply = shell.client().call(table.Df())
    if json:
        shell.terminal.document(reply)
        return
    disk = Table(
        [
            Column("HOME", least=12),
            Column("MODELS", right=True),
            Column("BLOBS", right=True, drop=1),
            Column("SESSIONS", right=True, drop=1),
            Column("DISK FREE", right=True),
            Column("DISK", right=True, drop=2),
        ]
    )
    disk.add(
        reply.home,
        quantity.size(reply.models_bytes),
        str(reply.blobs),
        quantity.size(reply.sessions_bytes),
        quantity.size(reply.disk_free),
        quantity.size(reply.disk_total),
    )
    shell.terminal.table(disk)
    if reply.pools:
        shell.terminal.line()
        shell.terminal.table(pools(reply.pools))


def pools(entries: list[t.PoolInfo]) -> Table:
    """Models resident on devices and the room for contexts beside them."""
    table_ = Table(
        [
            Column("MODEL", least=12),
            Column("DTYPE", drop=3),
            Column("WEIGHTS", right=True, drop=2),
            Column("KV", right=True, drop=4),
            Column("BLOCKS FREE", right=True),
            Column("TOKENS FREE", right=True, drop=1),
            Column("PROCESSES", right=True, drop=5),
            Column("KV IN", drop=6),
            Column("ENGINE", drop=7, least=16),
        ]
    )
    for pool in entries:
        table_.add(
            pool.model.removesuffix(":latest"),
            pool.dtype,
            quantity.size(pool.weights_bytes),
            "-" if pool.encodes else quantity.size(pool.blocks_total * pool.block_bytes),
            "-" if pool.encodes else f"{pool.blocks_free}/{pool.blocks_total}",
            "-" if pool.encodes else str(pool.blocks_free * t.BLOCK_TOKENS),
            str(pool.processes),
            pool.kv_dtype or "-",
            pool.engine,
        )
    return table_


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"
