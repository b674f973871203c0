"""`embed`: texts as vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from llmasos.syscalls import types as t

from .argument import Class, Json, Model, Nice, examples
from .models import installed
from .shell import Shell, shell_of
from .table import Column, Table

if TYPE_CHECKING:
    from ..llm import LLM

app = typer.Typer()

BATCH = 256
"""Lines of stdin that are read before what they come to is printed."""

SHOWN = 6
"""Numbers of a vector that a person is shown."""

# As many answers as lines: what is made of a file can be pasted beside it.
Texts = Annotated[
    list[str] | None,
    typer.Argument(metavar="TEXT", help="A text each; without one, a line of stdin each, empty ones too."),
]


@app.command(
    epilog=examples(
        'llsh embed all-minilm "Hello, world"',
        "llsh embed all-minilm < sentences.txt > vectors.jsonl",
        "llsh embed all-minilm cats dogs trains",
        "llsh embed all-minilm --json cats | jq .embedding[0]",
    )
)
def embed(
    context: typer.Context,
    model: Model,
    text: Texts = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut what is too long, instead of an error.")
    ] = False,
    nice: Nice = 0,
    sched_class: Class = None,
    json: Json = False,
) -> None:
    """Turn texts into vectors.

    Starts the daemon and pulls the model if need be. In a pipe, or with --json, each text is one line of
    JSON: {"text": …, "embedding": […]}. On a terminal the beginning of each vector is shown.
    """
    shell = shell_of(context)
    llm = reader(shell, model, text, sched_class, nice)
    told = json or not shell.terminal.is_tty
    table = Table([Column("DIMENSIONS", right=True), Column("VECTOR", least=20), Column("TEXT", least=12)])
    for texts in batches(shell, text):
        for one, vector in zip(texts, llm.embed(texts, truncate=truncate).tolist(), strict=True):
            if told:
                shell.terminal.document({"text": one, "embedding": vector})
            else:
                more = " …" if len(vector) > SHOWN else ""
                table.add(str(len(vector)), " ".join(f"{x:+.4f}" for x in vector[:SHOWN]) + more, one)
    if not told:
        shell.terminal.table(table)


def reader(
    shell: Shell, model: str, texts: list[str] | None, sched_class: t.SchedClass | None, nice: int
) -> LLM:
    """The model, for texts of the command line or of stdin."""
    from ..llm import LLM

    if not texts and shell.stdin.isatty():
        raise typer.BadParameter("no text: give one, or pipe lines in")
    client = shell.started()
    return LLM.from_pretrained(
        installed(shell, client, model),
        client=client,
        sched_class=sched_class or t.SchedClass.INTERACTIVE,
        nice=nice,
    )


def batches(shell: Shell, texts: list[str] | None) -> Iterator[list[str]]:
    """Texts of the command line, or the lines of stdin."""
    lines = iter(texts) if texts else (line.rstrip("\r\n") for line in shell.stdin)
    while batch := list(itertools.islice(lines, BATCH)):
        yield batch
