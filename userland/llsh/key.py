"""Commands about keys: for daemons on tcp `llsh key new`, `show`, `trust`, and for the administrator `list`,
`authorize`, `revoke`; for the gateway `llsh key api new`, `list`, `revoke`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from llmasos.syscalls import table
from llmasos.syscalls.types import TENANT_RIGHTS, Capability, KeyInfo

from . import argument
from .argument import Json, examples, text_of
from .shell import Shell, shell_of
from .table import Column, Table

app = typer.Typer()
group = argument.group(
    "Keys for daemons on other machines, and for the gateway.",
    "llsh key new",
    "llsh key authorize KEY --as alice",
    "llsh key trust tcp://gpu1:5570 KEY",
    "llsh key api new ci --as alice",
)
app.add_typer(group, name="key")
api = argument.group(
    "API keys of the gateway (`llsh serve`).",
    "llsh key api new ci --as alice",
    "llsh key api list",
    "llsh key api revoke ci",
)
group.add_typer(api, name="api")

Tenant = Annotated[str, typer.Option("--as", metavar="TENANT", help="Whose processes its own will be.")]
GRANTED = [right for right in Capability if right not in (Capability.CONNECT, Capability.ADMIN)]
"""What a key may be given: to connect is everybody's who has one, to administer nobody's."""


def _right(text: str) -> Capability:
    if text not in GRANTED:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(GRANTED)}")
    return Capability(text)


Rights = Annotated[
    list[Capability] | None,
    typer.Option(
        "--right",
        metavar="RIGHT",
        parser=_right,
        autocompletion=lambda: [str(right) for right in GRANTED],
        help=f"Another right besides {', '.join(TENANT_RIGHTS)}: "
        f"{', '.join(right for right in GRANTED if right not in TENANT_RIGHTS)}. Can be repeated.",
    ),
]
Only = Annotated[bool, typer.Option("--only", help="No rights but those of --right.")]


def _rights(right: list[Capability] | None, only: bool) -> tuple[Capability, ...]:
    if only and not right:
        raise typer.BadParameter("--only needs a --right")
    return tuple(dict.fromkeys([*(() if only else TENANT_RIGHTS), *(right or ())]))


@group.command(epilog=examples("llsh key new"))
def new(context: typer.Context, json: Json = False) -> None:
    """Make your key pair, once, and print its public half."""
    from .. import keys

    pair = keys.make_pair()
    shell_of(context).emit({"public": pair.public}, json, pair.public)


@group.command(epilog=examples("llsh key show"))
def show(context: typer.Context, json: Json = False) -> None:
    """Print the public half of your key pair: what an administrator authorizes."""
    from .. import keys

    public = keys.own_pair().public
    shell_of(context).emit({"public": public}, json, public)


@group.command(epilog=examples("llsh key trust tcp://gpu1:5570 KEY"))
def trust(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="Where the daemon listens.")],
    key: Annotated[str, typer.Argument(help="Its public key: `llsh key list` there prints it.")],
    json: Json = False,
) -> None:
    """Take a key for that of a daemon, from now on."""
    from .. import keys

    keys.trust(address, key)
    shell_of(context).emit({"address": address, "key": key}, json, f"{address} is known by {key}")


@group.command("list", epilog=examples("llsh key list"))
def list_(context: typer.Context, json: Json = False) -> None:
    """Show the daemon's public key and the keys that may come in."""
    shell = shell_of(context)
    _print(shell, shell.client().call(table.Keys()), json)


@group.command(
    epilog=examples(
        "llsh key authorize KEY --as alice", "llsh key authorize FILE --as bob --only --right see"
    )
)
def authorize(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="A public key, or a file that holds one.")],
    tenant: Tenant,
    right: Rights = None,
    only: Only = False,
    json: Json = False,
) -> None:
    """Let a key in over tcp."""
    shell = shell_of(context)
    public = text_of(Path(key)).strip() if len(key) != 64 and Path(key).is_file() else key
    entry = KeyInfo(tenant, public, _rights(right, only))
    _print(shell, shell.client().call(table.AuthorizeKey(entry)), json)


@group.command(epilog=examples("llsh key revoke alice", "llsh key revoke KEY"))
def revoke(
    context: typer.Context,
    who: Annotated[str, typer.Argument(help="A public key, or a tenant for all of its keys.")],
    json: Json = False,
) -> None:
    """Shut a key out, and end its sessions."""
    shell = shell_of(context)
    _print(shell, shell.client().call(table.RevokeKey(who)), json)


def _print(shell: Shell, reply: table.KeysReply, json: bool) -> None:
    if json:
        shell.terminal.document(reply)
        return
    shell.terminal.line(f"daemon  {reply.server or 'does not listen on tcp (setting `listen`)'}")
    rows = Table([Column("TENANT"), Column("RIGHTS"), Column("KEY")])
    for entry in reply.keys:
        rows.add(entry.tenant, ",".join(entry.rights), entry.public)
    if reply.keys:
        shell.terminal.table(rows)


@api.command(
    "new", epilog=examples("llsh key api new ci --as alice", "llsh key api new lab --as bob --right train")
)
def api_new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What you call it.")],
    tenant: Tenant,
    right: Rights = None,
    only: Only = False,
    json: Json = False,
) -> None:
    """Make an API key and print it, once: only its hash is kept."""
    from ..gateway import access

    key = access.ApiKeys(access.folder()).make(name, tenant, _rights(right, only))
    shell_of(context).emit({"name": name, "tenant": tenant, "key": key}, json, key)


@api.command("list", epilog=examples("llsh key api list"))
def api_list(context: typer.Context, json: Json = False) -> None:
    """Show the API keys that may come in."""
    from ..gateway import access

    terminal = shell_of(context).terminal
    keys = access.ApiKeys(access.folder()).all()
    if json:
        terminal.document(
            [{"name": k.name, "tenant": k.tenant, "rights": k.rights, "created": k.created} for k in keys]
        )
        return
    rows = Table([Column("NAME"), Column("TENANT"), Column("RIGHTS")])
    for key in keys:
        rows.add(key.name, key.tenant, ",".join(key.rights))
    terminal.table(rows)


@api.command("revoke", epilog=examples("llsh key api revoke ci"))
def api_revoke(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As `llsh key api list` shows it.")],
    json: Json = False,
) -> None:
    """Shut an API key out, within a second."""
    from ..gateway import access

    access.ApiKeys(access.folder()).revoke(name)
    shell_of(context).emit({"revoked": name}, json, f"{name} is shut out")
