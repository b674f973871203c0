"""`embed`: texts as vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
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

BATCH = 32
"""Texts that are worked on at once: what they come to is printed before the next ones are."""

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
    table = Table([Column("DIMENSIONS", right=True), Column("VECTOR", least=20), Column("TEXT", least=12)])

    def made(texts: list[str]) -> Iterator[tuple[dict[str, object], tuple[str, ...]]]:
        for one, vector in zip(texts, llm.embed(texts, truncate=truncate).tolist(), strict=True):
            more = " …" if len(vector) > SHOWN else ""
            shown = " ".join(f"{x:+.4f}" for x in vector[:SHOWN]) + more
            yield {"text": one, "embedding": vector}, (str(len(vector)), shown, one)

    tell(shell, text, made, table, json)


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


def tell(
    shell: Shell,
    texts: list[str] | None,
    made: Callable[[list[str]], Iterable[tuple[dict[str, object], tuple[str, ...]]]],
    table: Table,
    json: bool,
) -> None:
    """Tells what is `made` of the texts of the command line, or the lines of stdin, each as a document and as
    a row of `table`. Documents come as they are made, the table at the end, also where that is an interrupt;
    meanwhile a person sees how far it is."""
    terminal = shell.terminal
    lines = iter(texts) if texts else (line.rstrip("\r\n") for line in shell.stdin)
    documents = json or not terminal.is_tty
    done = 0
    with terminal.spinner("reading", beside=not (documents and terminal.is_tty)) as spinner:
        try:
            while batch := list(itertools.islice(lines, BATCH)):
                for document, row in made(batch):
                    if documents:
                        terminal.document(document)
                    else:
                        table.add(*row)
                done += len(batch)
                spinner.say(f"{done} texts")
        finally:
            spinner.stop()
            if table.rows:
                terminal.table(table)
