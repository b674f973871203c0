"""What a line that begins with / does in a chat: /set, /show, /clear, /help, /bye."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.syscalls.bounds import refused

from . import guide
from .answer import Settings
from .conversation import Conversation
from .terminal import Terminal

HELP = '''\
  """            begin and end a message of many lines
  Ctrl-C         stop the answer, not the chat
  /set           show the settings
  /set NAME V    max_tokens, temperature, top_p, seed, system, nice, class, verbose
  /show          the model, its process and how full the context is
  /clear         forget everything said
  /bye           leave (Ctrl-D does too)
  /help, /?      this'''

WORDS = ["/set", "/show", "/clear", "/help", "/?", "/bye"]
NAMES = ["max_tokens", "temperature", "top_p", "seed", "system", "nice", "class", "verbose"]


class Leave(Exception):
    """The person wants to go."""


class Slash:
    """The settings of one chat and the words that change them."""

    def __init__(self, terminal: Terminal, talk: Conversation, settings: Settings, verbose: bool) -> None:
        self.settings = settings
        self.verbose = verbose
        self._terminal = terminal
        self._talk = talk

    def obey(self, line: str) -> None:
        """Does what `line` says. Raises Leave, or InvalidArgument with what was meant."""
        word, _, rest = line.strip().partition(" ")
        match word:
            case "/bye" | "/exit" | "/quit":
                raise Leave
            case "/help" | "/?":
                self._terminal.line(HELP)
            case "/clear":
                self._talk.clear()
                self._terminal.line("the context is empty")
            case "/show":
                self._show()
            case "/set" if not rest:
                self._terminal.line("\n".join(f"  {name:<12}{self._get(name)}" for name in NAMES))
            case "/set":
                self._set(*rest.split(maxsplit=1))
            case _:
                near = guide.did_you_mean(word, WORDS)
                raise errors.InvalidArgument(f"no command {word}", hint=near or "/? lists them")

    def complete(self, before: list[str], word: str) -> Iterator[str]:
        """For the Tab key: these words and the names of settings."""
        if not before and word.startswith("/"):
            yield from (known for known in WORDS if known.startswith(word))
        elif before == ["/set"]:
            yield from (name for name in NAMES if name.startswith(word))

    def _show(self) -> None:
        row = self._talk.process.info()
        limit = self._talk.llm.context_length
        self._terminal.line(
            f"  model       {self._talk.model}\n"
            f"  process     {row.pid}, class {row.sched_class}, nice {row.nice}, on {row.device}\n"
            f"  context     {row.context} of {limit} tokens, {len(self._talk.turns)} messages"
        )

    def _get(self, name: str) -> str:
        if name == "system":
            return self._talk.system or "-"
        if name == "verbose":
            return "on" if self.verbose else "off"
        if name in {"nice", "class"}:
            row = self._talk.process.info()
            return str(row.nice) if name == "nice" else str(row.sched_class)
        value = getattr(self.settings, name)
        return "the model's" if value is None else str(value)

    def _set(self, name: str, value: str = "") -> None:
        if name not in NAMES:
            near = guide.did_you_mean(name, NAMES)
            raise errors.InvalidArgument(f"no setting {name}", hint=near or f"one of {', '.join(NAMES)}")
        match name:
            case "system":
                self._talk.system = value
            case "verbose":
                self.verbose = _checked(name, value or "true")
            case "nice":
                self._reclass(nice=_checked(name, value))
            case "class":
                self._reclass(sched_class=_checked(name, value))
            case "max_tokens":
                self.settings.max_tokens = _checked(name, value)
            case _:
                setattr(self.settings, name, _checked(name, value) if value else None)

    def _reclass(self, nice: int | None = None, sched_class: t.SchedClass | None = None) -> None:
        self._talk.llm.client.call(table.SetPriority(self._talk.pid, nice, sched_class))


class _Values(t.Sampling, frozen=True):
    """What /set takes, with its bounds."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1
    nice: int = 0
    sched_class: t.SchedClass = t.SchedClass.INTERACTIVE
    verbose: bool = False


def _checked(name: str, text: str) -> Any:
    """The value of a setting. Raises InvalidArgument."""
    words = {"on": "true", "off": "false"}
    field = "sched_class" if name == "class" else name
    try:
        return getattr(msgspec.convert({field: words.get(text, text)}, _Values, strict=False), field)
    except msgspec.ValidationError as problem:
        raise errors.InvalidArgument(f"{name}: {refused(problem, _Values)[1]}", field=name) from None
