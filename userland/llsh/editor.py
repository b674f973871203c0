"""The line that a person types: editing, history, completion and `\"""` blocks, by prompt_toolkit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output.color_depth import ColorDepth

from .history import history_file
from .terminal import plain_wanted

if TYPE_CHECKING:
    from typer.core import TyperCommand

FENCE = '"""'

Complete = Callable[[list[str], str], Iterable[str]]
"""From the words before the cursor and the unfinished one to what it may become."""


class Editor:
    """Reads lines with the history `name`. `complete` is asked when Tab is pressed."""

    def __init__(self, name: str, complete: Complete) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(name),
            completer=_Completer(complete),
            complete_while_typing=False,
            auto_suggest=AutoSuggestFromHistory(),
            color_depth=ColorDepth.DEPTH_1_BIT if plain_wanted() else None,
        )

    def read(self, prompt: str, more: str = "... ") -> str:
        """One line, or the text between two fences. Raises EOFError (Ctrl-D), KeyboardInterrupt (Ctrl-C)."""
        return unfenced(self._session.prompt(prompt), lambda: self._session.prompt(more))


def unfenced(first: str, following: Callable[[], str]) -> str:
    """`first`, or if it opens a fence the lines up to the closing one."""
    if not first.lstrip().startswith(FENCE):
        return first
    lines = [first.lstrip().removeprefix(FENCE)]
    while not lines[-1].rstrip().endswith(FENCE):
        lines.append(following())
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip("\n")


def command_words(tree: dict[str, TyperCommand]) -> Complete:
    """Completes a line of the shell: commands, their options, models, pids and job numbers."""
    from . import completion

    known = {
        "MODEL": completion.models,
        "PID": completion.pids,
        "DST": completion.models,
        "PATH": completion.paths,
    }

    def complete(before: list[str], word: str) -> Iterator[str]:
        words = _last_command(before)
        if not words:
            yield from (name for name in [*tree, "exit"] if name.startswith(word))
            return
        if words[0] == "help":
            yield from (name for name in tree if name.startswith(word))
        if (command := tree.get(words[0])) is None:
            return
        if word.startswith("-"):
            for parameter in command.params:
                yield from (option for option in parameter.opts if option.startswith(word))
            return
        arguments = [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]
        kinds = " ".join(getattr(parameter, "metavar", "") or "" for parameter in arguments[:1])
        for kind, lookup in known.items():
            if kind in kinds:
                yield from lookup(word)

    return complete


class _Completer(Completer):
    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        word = document.get_word_before_cursor(WORD=True)
        before = text[: len(text) - len(word)].split()
        for found in self._complete(before, word):
            yield Completion(found, start_position=-len(word))


def _last_command(words: list[str]) -> list[str]:
    for place in range(len(words) - 1, -1, -1):
        if words[place].endswith((";", "&")):
            return words[place + 1 :]
    return words


class _Remembered(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the shell works, it only forgets
            super().store_string(string)


def _history(name: str) -> History:
    try:
        return _Remembered(str(history_file(name)))
    except OSError:  # a read-only home: the shell works, it only forgets
        return InMemoryHistory()
