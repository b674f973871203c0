"""`run`: one prompt, one answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from llmasos.syscalls import types as t

from . import completion
from .answer import DEFAULT_TOKENS, Answer, AnswerInfo, Settings, timings
from .argument import Class, Json, Nice, examples, text_of
from .conversation import opened
from .shell import shell_of

app = typer.Typer()

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|PID",
        help="A model (pulled if it is not there), or a process to go on with.",
        autocompletion=completion.models,
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0, max=100, help="0 always takes the likeliest token.", show_default=False
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0.0001, max=1, help="Only the likeliest tokens up to this sum.", show_default=False
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="The same seed, the same answer.", show_default=False)
]

_OPTIONS = {"json": "--schema", "regex": "--regex", "choice": "--choice"}
"""The options of generate's `structured_outputs`."""

MaxTime = Annotated[
    float | None,
    typer.Option(
        "--max-time",
        metavar="SECONDS",
        min=0.001,
        help="An answer ends after so long, as far as it is; waiting counts.",
        show_default=False,
    ),
]


@app.command(
    epilog=examples(
        'llsh run smollm2 "What is the capital of France?"',
        'git diff | llsh run smollm2 "Write a commit message for this:"',
        "llsh run smollm2 --temperature 0.8 --seed 7 Tell me a joke",
        'llsh run gpt2 --raw "Once upon a time"',
        "llsh run smollm2 --json Hi | jq -r .text",
        'llsh run smollm2 --regex "[0-9]{4}" "In which year did the Second World War end?"',
        "llsh run smollm2                # no prompt on a terminal: a chat",
    )
)
def run(
    context: typer.Context,
    model: Target,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to ask; stdin is added to it.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    max_tokens: MaxTokens = DEFAULT_TOKENS,
    max_time: MaxTime = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            "--schema", metavar="FILE", exists=True, help="The answer is JSON that matches this JSON schema."
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="The answer matches this.", show_default=False)
    ] = None,
    choice: Annotated[
        str | None,
        typer.Option(
            "--choice",
            metavar="A,B,…",
            help="The answer is one of these; `classify` weighs them instead.",
            show_default=False,
        ),
    ] = None,
    nice: Nice = 0,
    sched_class: Class = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Timings at the end, on stderr.")] = False,
    json: Json = False,
) -> None:
    """Ask a model and print its answer as it comes.

    Starts the daemon and pulls the model if need be. The prompt goes through the model's chat template if
    it has one. Text on stdin is added after the prompt. Without a prompt on a terminal it is a chat.
    Fails when the answer was cut before it is what --schema, --regex or --choice asked for.
    """
    shell = shell_of(context)
    wanted = _structured(schema, regex, choice)
    settings = Settings(max_tokens, temperature, top_p, seed, max_time, wanted)
    piped = "" if shell.stdin.isatty() else shell.stdin.read()
    text = "\n\n".join(part for part in (" ".join(prompt or []), piped.rstrip("\n")) if part)
    if not text:
        if not shell.stdin.isatty() or json or not shell.terminal.is_tty:
            raise typer.BadParameter("no prompt: give one, or pipe text in")
        from .chat import converse

        return converse(shell, model, settings, sched_class, nice, verbose)
    with opened(shell, model, sched_class, nice) as talk:
        answer = Answer(shell.terminal, show=not json)
        with talk.raw(text, settings) if raw or not talk.has_template else talk.ask(text, settings) as pieces:
            reply = answer.stream(pieces, "thinking")
        info = answer.info(talk.model, reply)
    if json:
        shell.terminal.document(info)
    if verbose:
        shell.terminal.say(timings(info))
    where, more = _cut(info, settings)
    if where and wanted and not _is_whole(wanted, info.text):
        (asked,) = (_OPTIONS[name] for name in wanted)
        shell.terminal.fail(f"the answer was cut {where}, before it was what {asked} asks for", more)
        raise typer.Exit(1)
    if where and shell.terminal.is_tty:
        shell.terminal.say(f"(stopped {where}; {more})")
    if info.finish is t.Finish.KILLED:
        shell.terminal.fail(f"process {info.pid} was killed")
        raise typer.Exit(1)
    return None


def _structured(schema: Path | None, regex: str | None, choice: str | None) -> dict[str, Any] | None:
    """What the options ask for, as generate's `structured_outputs`."""
    given: dict[str, Any] = {}
    if schema is not None:
        given["json"] = text_of(schema)
    if regex is not None:
        given["regex"] = regex
    if choice is not None:
        given["choice"] = [one.strip() for one in choice.split(",") if one.strip()]
    if len(given) > 1:
        raise typer.BadParameter("only one of --schema, --regex and --choice")
    for name, value in given.items():
        if not value:
            raise typer.BadParameter(f"{_OPTIONS[name]} is empty")
    return given or None


def _cut(info: AnswerInfo, settings: Settings) -> tuple[str, str]:
    """Where a limit ended an answer, and what allows more; "" twice if none did."""
    if info.finish is t.Finish.DEADLINE:
        return f"after {settings.max_time:g} s", "--max-time allows more"
    if info.finish is t.Finish.LENGTH:
        full = info.generated_tokens < settings.max_tokens
        return (
            f"after {info.generated_tokens} tokens",
            "the model's context is full" if full else "--max-tokens allows more",
        )
    return "", ""


def _is_whole(wanted: dict[str, Any], text: str) -> bool:
    """Whether an answer that a limit ended is what was asked for all the same."""
    try:
        match wanted:
            case {"choice": choices}:
                return text in choices
            case {"regex": regex}:
                return re.fullmatch(regex, text) is not None
        msgspec.json.decode(text)
    except (msgspec.DecodeError, re.error):
        return False
    return True
