"""`chat`: a conversation in the terminal.

States: PROMPT (the person types) --Enter--> ANSWER (the model writes) --end or Ctrl-C--> PROMPT.
Ctrl-C never leaves, Ctrl-D and /bye do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .answer import DEFAULT_TOKENS, Answer, Settings, timings
from .argument import Class, Json, Nice, examples
from .conversation import Conversation, opened
from .run import MaxTokens, Seed, Target, Temperature, TopP
from .shell import Shell, shell_of
from .slash import Leave, Slash
from .terminal import Terminal

app = typer.Typer()

# A greedy conversation soon repeats itself; models that know better say so in their configuration.
CHAT_TEMPERATURE = 0.7

HINT = "(Ctrl-D or /bye leaves, /? helps)"


@app.command(
    epilog=examples(
        "llsh chat smollm2",
        "llsh chat smollm2 --system 'You answer in one sentence.'",
        "llsh chat 13                    # go on with a process, for example a fork",
        "printf 'Hi!\\nTell me more.\\n' | llsh chat smollm2",
    )
)
def chat(
    context: typer.Context,
    model: Target,
    system: Annotated[str, typer.Option("--system", help="What the model is told first.")] = "",
    max_tokens: MaxTokens = DEFAULT_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    nice: Nice = 0,
    sched_class: Class = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Timings after each answer.")] = False,
    json: Json = False,
) -> None:
    """Talk with a model over many turns.

    One process keeps the conversation: only what is new is computed. \"\"\" begins and ends a message of
    many lines, Ctrl-C stops the answer only, /? tells the rest. Without a terminal every line of stdin is a
    message. The temperature is the model's own, or 0.7.
    """
    settings = Settings(max_tokens, temperature, top_p, seed)
    converse(shell_of(context), model, settings, sched_class, nice, verbose, system=system, json=json)


def converse(
    shell: Shell,
    target: str,
    settings: Settings,
    sched_class: t.SchedClass | None,
    nice: int,
    verbose: bool,
    *,
    system: str = "",
    json: bool = False,
) -> None:
    """Opens a conversation and stays in it until the person leaves."""
    with opened(shell, target, sched_class, nice) as talk:
        if not talk.has_template:
            raise errors.UnsupportedModel(
                f"{talk.model} has no chat template: it was not trained to chat",
                hint=f'`llsh run {target} --raw "Once upon a time"` continues a text',
            )
        talk.system = system
        if settings.temperature is None and not talk.llm.tokenizer.generation.get("do_sample"):
            settings.temperature = CHAT_TEMPERATURE
        person = shell.stdin.isatty() and shell.terminal.is_tty
        slash = Slash(shell.terminal, talk, settings, verbose)
        if person:
            shell.terminal.say(f"{talk.model.removesuffix(':latest')}, process {talk.pid} {HINT}")
        _loop(shell, talk, slash, _reader(shell, slash, person), json)


def _loop(shell: Shell, talk: Conversation, slash: Slash, read: Callable[[], str], json: bool) -> None:
    while True:
        try:
            _obey(shell.terminal, talk, slash, read(), json)
        except (EOFError, Leave):
            return
        except KeyboardInterrupt:
            shell.terminal.say(HINT)


def _obey(terminal: Terminal, talk: Conversation, slash: Slash, text: str, json: bool) -> None:
    """Does what one line asks. Errors that another line can mend are told, others raised."""
    try:
        if text.startswith("/"):
            slash.obey(text)
        elif text.strip():
            _turn(terminal, talk, slash, text, json)
    except (errors.Unavailable, errors.NoSuchProcess):
        raise
    except errors.ContextOverflow as problem:
        terminal.fail(problem.message, "/clear forgets what was said")
    except errors.LLMasOSError as problem:
        terminal.fail_with(problem)


def _turn(terminal: Terminal, talk: Conversation, slash: Slash, text: str, json: bool) -> None:
    """One question and its answer, which Ctrl-C stops: what was said so far counts."""
    answer = Answer(terminal, show=not json)
    with talk.ask(text, slash.settings) as pieces:
        try:
            reply = answer.stream(pieces, "thinking")
        except KeyboardInterrupt:
            pieces.close()
            terminal.say("(stopped)")
            return
        finally:
            talk.heard(answer.text)
    info = answer.info(talk.model, reply)
    if json:
        terminal.document(info)
    if slash.verbose:
        terminal.say(timings(info))
    if info.finish is t.Finish.KILLED:
        raise errors.NoSuchProcess(f"process {talk.pid} was killed", hint="start another chat")
    if info.finish is t.Finish.LENGTH and terminal.is_tty:
        terminal.say(f"(stopped after {info.generated_tokens} tokens; /set max_tokens N allows more)")


def _reader(shell: Shell, slash: Slash, person: bool) -> Callable[[], str]:
    """How the next message comes: typed with editing and history, or line by line from a pipe."""
    from .editor import Editor, unfenced

    if person:
        editor = Editor("chat", slash.complete)
        return lambda: editor.read(">>> ")

    def line() -> str:
        text = shell.stdin.readline()
        if not text:
            raise EOFError
        return text.rstrip("\n")

    return lambda: unfenced(line(), line)
