"""`classify`: which of some labels fits a text, by likelihood, without generating."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from .argument import Class, Json, Model, Nice, examples
from .embed import Texts, reader, tell
from .shell import shell_of
from .table import Column, Table

app = typer.Typer()


@app.command(
    epilog=examples(
        'llsh classify smollm2 --labels positive,negative "What a film!"',
        "llsh classify smollm2 --labels sports,business,science < headlines.txt",
        'llsh classify smollm2 --labels low,high --ask "How urgent is it?" < mail.txt | jq .label',
    )
)
def classify(
    context: typer.Context,
    model: Model,
    text: Texts = None,
    labels: Annotated[str, typer.Option("--labels", metavar="A,B,…", help="What it may be.")] = "",
    ask: Annotated[str, typer.Option("--ask", help="A question about the text.", show_default=False)] = "",
    nice: Nice = 0,
    sched_class: Class = None,
    json: Json = False,
) -> None:
    """Tell which of some labels fits each text, with probabilities.

    Zero-shot: the labels are scored as answers of the model, none is written. In a pipe, or with --json, each
    text is one line of JSON: {"text": …, "label": …, "probabilities": {…}}.
    """
    from ..decisions import ABOUT, Option, Question

    shell = shell_of(context)
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if len(names) < 2:
        raise typer.BadParameter("at least two --labels, separated by commas")
    llm = reader(shell, model, text, sched_class, nice)
    table = Table([Column("LABEL"), Column("PROBABILITY", right=True), Column("TEXT", least=20)])
    question = Question(ask or ABOUT, tuple(Option(name) for name in names))

    def made(texts: list[str]) -> Iterator[tuple[dict[str, object], tuple[str, ...]]]:
        for one, (found,) in zip(texts, llm.decide_all(texts, question), strict=True):
            chances = dict(zip(found.options, found.probabilities, strict=True))
            row = (found.label, f"{chances[found.label]:.3f}", one)
            yield {"text": one, "label": found.label, "probabilities": chances}, row

    tell(shell, text, made, table, json)
