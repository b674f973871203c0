"""Commands that save, bring back and move processes: snapshot, restore, migrate."""

from __future__ import annotations

from typing import Annotated

import typer
from llmasos.syscalls import errors, table

from . import completion, quantity
from .argument import Json, Pid, examples, pid
from .shell import Shell, shell_of

app = typer.Typer()

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A name in /sessions; see `llsh ls /sessions`.",
        autocompletion=completion.snapshots,
    ),
]


@app.command(
    epilog=examples(
        "llsh snapshot 12 before-lunch",
        "llsh ls /sessions",
        "llsh restore before-lunch",
        "llsh rm /sessions/before-lunch",
    )
)
def snapshot(context: typer.Context, process: Pid, name: Name, json: Json = False) -> None:
    """Save a process on the disk.

    Its context, the memory that was computed for it, and where an answer that it is giving stands. It goes on
    meanwhile. A snapshot survives a reboot, takes up disk until `llsh rm /sessions/NAME`, and is only yours.
    A snapshot of the same name is replaced.
    """
    shell = shell_of(context)
    info = shell.client().call(table.Snapshot(pid(shell, process), name))
    told = f"{info.details.get('tokens', 0)} tokens"
    if "steps" in info.details:
        told = f"step {info.details.get('step')} of {info.details['steps']}"
    shell.emit(info, json, f"{info.path}: {told}, {quantity.size(info.size)}")


@app.command(
    epilog=examples(
        "llsh restore before-lunch",
        "llsh restore before-lunch --resume",
        "llsh restore before-lunch --device cuda:0",
    )
)
def restore(
    context: typer.Context,
    name: Name,
    device: Annotated[str, typer.Option("--device", help="Where to; without it the kernel chooses.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Print the rest of the answer that was under way.")
    ] = False,
    json: Json = False,
) -> None:
    """Bring a saved process back and print its pid.

    It is as it was, on the same device or on another one. What was computed for it is kept if the device can
    use it; otherwise it is computed anew, with the same text, and a note says why. It stays until `llsh
    kill`.
    """
    shell = shell_of(context)
    if resume:
        return _resume(shell, name, device, json)
    reply = shell.started().call(table.Restore(name, device, detached=True))
    shell.emit(reply, json, str(reply.pid))
    _note(shell, reply.recomputed)
    if reply.max_tokens:
        shell.terminal.say(
            f"(an answer was under way, at most {reply.max_tokens} tokens are left: "
            f"`llsh restore {name} --resume` prints them)"
        )
    return None


@app.command(epilog=examples("llsh migrate 12 cuda:0", "llsh lsdev"))
def migrate(
    context: typer.Context,
    process: Pid,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="A device of `llsh lsdev`.")],
    json: Json = False,
) -> None:
    """Move a process to another device while it runs.

    Whoever reads its answer notices nothing. What was computed for it is taken along if the device can use
    it; otherwise it is computed anew, with the same text, and a note says why.
    """
    shell = shell_of(context)
    reply = shell.client().call(table.Migrate(pid(shell, process), device))
    shell.emit(reply, json, f"{reply.pid}: on {reply.device}, {reply.kept} tokens taken along")
    _note(shell, reply.recomputed)


def _resume(shell: Shell, name: str, device: str, json: bool) -> None:
    from ..llm import LLM
    from .answer import Answer

    client = shell.started()
    model = str(client.call(table.Stat(f"/sessions/{name}")).details.get("model", ""))
    if not model:
        raise errors.Corrupt(f"snapshot {name} is damaged", hint=f"remove it: llsh rm /sessions/{name}")
    llm = LLM.from_pretrained(model, client=client)
    process = llm.restore(name, device=device, detached=True)
    try:
        pieces = process.resume()
    except errors.InvalidArgument:
        process.close()  # an error leaves nothing behind
        raise errors.InvalidArgument(
            f"in {name} no answer was under way", hint=f"`llsh restore {name}` brings its process back"
        ) from None
    answer = Answer(shell.terminal, show=not json)
    try:
        with pieces:
            reply = answer.stream(pieces, "thinking")
    finally:
        if not json:
            shell.terminal.say(f"(process {process.pid} stays until `llsh kill {process.pid}`)")
    if json:
        shell.terminal.document(answer.info(model, reply))


def _note(shell: Shell, why: str) -> None:
    if why:
        shell.terminal.say(f"(it is computed anew: {why})")
