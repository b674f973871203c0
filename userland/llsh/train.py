"""Commands about training: train, plot, merge."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from llmasos.syscalls import errors, table, training
from llmasos.syscalls import types as t

from . import completion, quantity
from .argument import Class, Installed, Json, Nice, examples, full_name, pid
from .curve import draw
from .shell import Shell, shell_of

if TYPE_CHECKING:
    from ..client import Client
    from ..training import TrainingRun

app = typer.Typer()

METRICS = "metrics.jsonl"


@app.command(
    epilog=examples(
        "llsh train smollm2 facts.jsonl --name facts",
        "llsh run smollm2+facts 'What is the capital of Atlantis?'",
        "llsh train smollm2 chats.jsonl --name support --epochs 3 --lr 2e-4 --rank 16 --detach",
        "llsh train --follow 12",
        "llsh train smollm2 book.txt --name mybook --full --set gradient_checkpointing=true",
        "llsh train smollm2 facts.jsonl --name big --set mesh.data=2 --set mesh.shard=full",
    )
)
def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="[MODEL]", help="The model to train.", autocompletion=completion.models),
    ] = "",
    data: Annotated[
        str,
        typer.Argument(
            metavar="[DATA]",
            help="A file (.jsonl, .csv, .parquet, .txt), or the name of a data set of `llsh ls /datasets`.",
        ),
    ] = "",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What is made is MODEL+NAME. Default: as the data.")
    ] = "",
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a small addition to the model (the default).")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights; NAME is a model.")] = False,
    pretrain: Annotated[
        bool, typer.Option("--pretrain", help="Train from random weights of the model's shape.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Times all data; 1.", show_default=False)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="So many steps instead.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", "--lr", help="2e-4 for LoRA, 2e-5 for all weights.", show_default=False
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="LoRA's rank; 8.", show_default=False)] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="LoRA's scale; 16.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows a micro-step; 1.", show_default=False)
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Micro-steps a step; 1.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Tokens a row; 1024, or the model's context.", show_default=False),
    ] = None,
    validation_split: Annotated[
        float | None,
        typer.Option("--validation-split", help="This part of the data only measures.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="42.", show_default=False)] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other option: docs/training.md lists them."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where; without it the kernel chooses.")] = "",
    sched_class: Class = None,
    nice: Nice = 0,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Print the pid and leave; it goes on by itself.")
    ] = False,
    follow: Annotated[
        str,
        typer.Option(
            "--follow",
            metavar="PID",
            help="Show a run that was started before.",
            autocompletion=completion.pids,
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Teach a model something: a run beside everything else that the machine does.

    DATA has rows of `text`, of `prompt` and `completion`, or of `messages`. The run is a process: `llsh ps`,
    `stop`, `cont`, `nice`, `kill`, `snapshot` do what they say. Ctrl-C ends it, unless it was detached. With
    --json every event is a line, and the last one is the result.
    """
    from .. import training as runs

    shell = shell_of(context)
    if follow:
        number = pid(shell, follow)
        _show(shell, runs.TrainingRun(shell.client(), number, f"run {number}", detached=True), json)
        return
    if not model or not data:
        raise typer.BadParameter("train MODEL DATA, or train --follow PID")
    methods = [
        method for method, chosen in zip(training.Method, (lora, full, pretrain), strict=True) if chosen
    ]
    if len(methods) > 1:
        raise typer.BadParameter("one of --lora, --full and --pretrain")
    options: dict[str, object] = {
        "method": methods[0] if methods else None,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "r": rank,
        "lora_alpha": alpha,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "max_length": max_length,
        "validation_split": validation_split,
        "seed": seed,
    }
    options = {key: value for key, value in options.items() if value is not None} | dict(
        map(_pair, more or [])
    )
    recipe = runs.make_recipe(options)
    client = shell.started()
    from ..models import ensure_model

    local = os.path.isfile(os.path.expanduser(data))
    dataset = data if local else _there(client, data)
    base = ensure_model(client, model, progress=shell.terminal.err.isatty())
    dataset, sent = _sent(shell, client, data) if local else (dataset, False)
    try:
        run = runs.start(
            client,
            base,
            dataset,
            name or os.path.splitext(dataset)[0],
            recipe,
            sched_class=sched_class or t.SchedClass.BATCH,
            nice=nice,
            device=device,
            detached=detach,
        )
        if detach:
            shell.emit({"pid": run.pid, "model": run.model}, json, str(run.pid))
            shell.terminal.say(
                f"(it makes {_short(run.model)}; `llsh train --follow {run.pid}` shows how it goes)"
            )
            return
        shell.pid = run.pid
        _show(shell, run, json)
    except errors.InvalidArgument as problem:
        if sent and problem.details.get("field") == "dataset":  # a refused file is of no use there
            with contextlib.suppress(errors.LLMasOSError):
                client.call(table.Unlink(f"/datasets/{dataset}"))
        raise


@app.command(
    epilog=examples("llsh plot 12", "llsh plot smollm2+facts", "llsh plot smollm2+facts --out curve.png")
)
def plot(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="PID|MODEL", help="A run, or a model that was trained.", autocompletion=completion.models
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Write a .png or .svg instead.")
    ] = "",
    json: Json = False,
) -> None:
    """Draw the loss of a training run."""
    shell = shell_of(context)
    events = _told(shell, what)
    losses = [(e.step, e.loss) for e in events if e.phase == "train" and e.loss is not None]
    evals = [(e.step, e.eval_loss) for e in events if e.eval_loss is not None]
    if json:
        shell.terminal.document(events)
        return
    if not losses:
        raise errors.NotFound(
            f"{what} has told no loss yet", hint=f"`llsh train --follow {what}` waits for it"
        )
    if out:
        _draw(Path(out), what, losses, evals)
        shell.terminal.line(out)
        return
    console = shell.terminal.out_console
    width, height = (console.width, min(24, console.height - 3)) if shell.terminal.is_tty else (80, 20)
    last, evaluated = losses[-1], f", × eval loss {evals[-1][1]:.4f}" if evals else ""
    shell.terminal.line(f"{what}: loss {last[1]:.4f} at step {last[0]}{evaluated}")
    shell.terminal.write(draw(losses, evals, width, height))


@app.command(epilog=examples("llsh merge smollm2+facts smollm2-facts", "llsh run smollm2-facts Hi"))
def merge(
    context: typer.Context,
    adapter: Installed,
    target: Annotated[str, typer.Argument(metavar="NAME", help="What the model will be called.")],
    json: Json = False,
) -> None:
    """Make a plain model of an adapter and its base."""
    from ..models import PullBar, Reference
    from ..models import pull as fetch

    shell = shell_of(context)
    wanted = Reference(full_name(target), f"merge:{full_name(adapter)}")
    info = fetch(shell.client(), wanted, PullBar(wanted.name) if shell.terminal.err.isatty() else None)
    shell.emit(info, json, f"{_short(info.path.removeprefix('/models/'))}  {quantity.size(info.size)}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
    return name, value


def _there(client: Client, data: str) -> str:
    """The name of a data set that the daemon has."""
    name = data.removeprefix("/datasets/")
    try:
        client.call(table.Stat(f"/datasets/{name}"))
    except (errors.NotFound, errors.InvalidArgument):
        raise errors.NoSuchFile(
            f"no file and no data set {data}", hint="see `llsh ls /datasets`", path=data
        ) from None
    return name


def _sent(shell: Shell, client: Client, data: str) -> tuple[str, bool]:
    """The name of the data set that a local file becomes, and whether it was not that already."""
    from ..training import bar_for, send_dataset

    bar = bar_for(data, shell.terminal.err.isatty())
    sent = False

    def show(done: int, size: int) -> None:
        nonlocal sent
        sent = True
        if bar is not None:
            bar.sent(done, size)

    with bar or contextlib.nullcontext():
        return send_dataset(client, data, show=show), sent


def _show(shell: Shell, run: TrainingRun, json: bool) -> None:
    """Shows a run until it ends, and tells what it made."""
    from ..training import TrainBar, follow

    terminal = shell.terminal
    if json:
        for event in run.events():
            terminal.document(event)
        terminal.document(run.wait())
        return
    try:
        made = follow(run, TrainBar(_short(run.model)) if terminal.err.isatty() else None)
    except KeyboardInterrupt:
        if run.detached:
            terminal.say(f"(it goes on; `llsh train --follow {run.pid}` shows it again)")
        raise
    loss = f", loss {made.loss:.4f}" if made.loss is not None else ""
    eval_loss = f", eval loss {made.eval_loss:.4f}" if made.eval_loss is not None else ""
    early = ", stopped early" if made.stopped_early else ""
    terminal.line(f"{_short(made.model)}: {made.steps} steps, {made.tokens} tokens{loss}{eval_loss}{early}")
    terminal.say(f"(try it: llsh run {_short(made.model)} …)")


def _told(shell: Shell, what: str) -> list[training.TrainEvent]:
    """The events of a run, or of how a model was trained."""
    import msgspec

    client = shell.client()
    if what.isdecimal() or what.startswith("%"):
        data = client.read_file(f"/proc/{pid(shell, what)}/metrics")
    else:
        try:
            data = client.read_file(f"/models/{full_name(what)}/{METRICS}")
        except errors.NoSuchFile:
            raise errors.NoSuchFile(f"{what} was not trained here", hint="llsh list") from None
    decoder = msgspec.json.Decoder(training.TrainEvent)
    return [decoder.decode(line) for line in data.splitlines() if line.endswith(b"}")]


def _draw(out: Path, title: str, losses: list[tuple[int, float]], evals: list[tuple[int, float]]) -> None:
    if out.suffix not in (".png", ".svg"):
        raise typer.BadParameter("a picture is a .png or a .svg")
    try:
        import matplotlib
    except ImportError:
        raise errors.InvalidArgument(
            "pictures need the package matplotlib", hint="pip install 'llmasos[train]'", field="out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*losses, strict=True), label="loss")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", label="eval loss")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(out)
    except OSError as problem:
        raise errors.InvalidArgument(f"{out}: {problem.strerror}", field="out") from None
    finally:
        pyplot.close(figure)


def _short(model: str) -> str:
    return model.replace(":latest", "", 1)
