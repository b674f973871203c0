"""One line of the shell, cut into commands: words, quotes, `;`, `&&`, `&` and `#` comments.

Nothing else is special: `|`, `>`, `*`, `$` and a `#` inside a word stay as they are, because prompts are
written in these lines.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class End(enum.Enum):
    """What follows a command."""

    NEXT = ";"
    AND = "&&"
    BACKGROUND = "&"


@dataclass(frozen=True, slots=True)
class Command:
    """`words` and how the line goes on after them."""

    words: list[str]
    end: End


class BadLine(ValueError):
    """A line that is no sequence of commands."""


def parse(line: str) -> list[Command]:
    """The commands of `line`. Raises BadLine on an open quote or an operator without a command."""
    commands: list[Command] = []
    words: list[str] = []
    for token in _tokens(line):
        if isinstance(token, str):
            words.append(token)
        elif words:
            commands.append(Command(words, token))
            words = []
        elif token is not End.NEXT:
            raise BadLine(f"no command before {token.value!r}")
    if words:
        commands.append(Command(words, End.NEXT))
    elif commands and commands[-1].end is End.AND:
        raise BadLine("no command after '&&'")
    return commands


def _tokens(line: str) -> list[str | End]:
    tokens: list[str | End] = []
    word: str | None = None
    place = 0
    while place < len(line):
        sign = line[place]
        place += 1
        if sign in "'\"":
            text, place = _quoted(line, place, sign)
            word = (word or "") + text
        elif sign == "\\":
            word = (word or "") + line[place : place + 1]
            place += 1
        elif sign == "#" and word is None:
            newline = line.find("\n", place)
            place = len(line) if newline < 0 else newline
        elif sign.isspace() or sign in ";&":
            if word is not None:
                tokens.append(word)
                word = None
            if sign == "&" and line.startswith("&", place):
                tokens.append(End.AND)
                place += 1
            elif sign in ";&\n":
                tokens.append(End.BACKGROUND if sign == "&" else End.NEXT)
        else:
            word = (word or "") + sign
    return tokens if word is None else [*tokens, word]


def _quoted(line: str, place: int, quote: str) -> tuple[str, int]:
    """The text up to the closing `quote` and the place after it; `\\` escapes inside double quotes."""
    text = ""
    while place < len(line):
        sign = line[place]
        place += 1
        if sign == quote:
            return text, place
        if sign == "\\" and quote == '"' and line[place : place + 1] in {'"', "\\"}:
            sign = line[place]
            place += 1
        text += sign
    raise BadLine(f"no closing {quote}")
