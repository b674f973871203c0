"""The command about quotas: `llsh quota` shows the tree, and sets the limits of an owner."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from llmasos.syscalls import errors, table
from llmasos.syscalls.bounds import refused
from llmasos.syscalls.types import Quota, QuotaInfo

from . import guide, quantity
from .argument import Json, examples
from .shell import shell_of
from .table import Column, Table

app = typer.Typer()


@app.command(
    epilog=examples("llsh quota", "llsh quota alice weight=3 tokens_out=60000", "llsh quota alice none")
)
def quota(
    context: typer.Context,
    path: Annotated[str | None, typer.Argument(help="Whose limits to set: alice, alice/agent.")] = None,
    limits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...",
            help=f"Of {', '.join(Quota.__struct_fields__)}. NAME= takes a limit away, none takes all away.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what owners use and may use, or set limits of one, which outlive restarts."""
    shell = shell_of(context)
    reply = shell.client().call(table.Quotas())
    if limits and path is not None:
        own = next((node.limit for node in reply.quotas if node.path == path), None)
        reply = shell.client().call(table.SetQuota(path, _changed(own, limits)))
    rows = [node for node in reply.quotas if path is None or f"{node.path}/".startswith(f"{path}/")]
    if json:
        shell.terminal.document(rows)
        return
    columns = ("WEIGHT", "BLOCKS", "PROCESSES", "QUEUE", "IN LEFT", "OUT LEFT", "DISK")
    shown = Table([Column("OWNER"), *(Column(name, right=True) for name in columns)])
    for node in rows:
        shown.add(node.path, *_cells(node))
    shell.terminal.table(shown)


def _changed(quota: Quota | None, words: list[str]) -> Quota | None:
    """The limits after `words`. Raises InvalidArgument."""
    if words == ["none"]:
        return None
    values = msgspec.structs.asdict(quota or Quota())
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise errors.InvalidArgument(
                f"{word}: expected a limit as NAME=VALUE", hint="see `llsh quota -h`"
            )
        if name not in Quota.__struct_fields__:
            near = guide.did_you_mean(name, Quota.__struct_fields__)
            known = f"one of {', '.join(Quota.__struct_fields__)}"
            raise errors.InvalidArgument(f"no limit {name!r}", hint=near or known)
        if value:
            values[name] = value
        else:
            values.pop(name, None)
    try:
        changed = msgspec.convert(values, Quota, strict=False)
    except msgspec.ValidationError as problem:
        raise errors.InvalidArgument(" ".join(refused(problem, Quota))) from None
    return changed if changed != Quota() else None


def _cells(node: QuotaInfo) -> list[str]:
    limit = node.limit or Quota()

    def of(used: int, most: int | None) -> str:
        return str(used) if most is None else f"{used}/{most}"

    blocks = f"{limit.kv_min}≤{node.blocks}" if limit.kv_min else str(node.blocks)
    disk = quantity.size(node.disk_bytes)
    return [
        f"{limit.weight:g}",
        blocks if limit.kv_max is None else f"{blocks}/{limit.kv_max}",
        of(node.processes, limit.processes),
        of(node.queue, limit.queue),
        "-" if node.tokens_in is None else of(node.tokens_in, limit.tokens_in),
        "-" if node.tokens_out is None else of(node.tokens_out, limit.tokens_out),
        disk if limit.disk_bytes is None else f"{disk}/{quantity.size(limit.disk_bytes)}",
    ]
