"""What llsh tells about itself: the list of commands by purpose, and near misses of a wrong word."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SECTIONS: dict[str, list[str]] = {
    "Talk": ["run", "chat", "embed", "classify"],
    "Processes": ["ps", "top", "kill", "stop", "cont", "nice", "fork", "spawn", "wait", "jobs", "fg"],
    "Snapshots": ["snapshot", "restore", "migrate"],
    "Training": ["train", "plot", "merge"],
    "Models": ["pull", "list", "show", "rm", "cp"],
    "Files": ["ls", "cat", "df"],
    "Machine": ["serve", "lsdev", "stats", "dmesg", "flight", "audit", "key", "quota", "whoami", "shutdown"],
    "Help": ["help"],
}

EXAMPLES = """\
Examples:
  llsh run smollm2 "What is the capital of France?"
  cat notes.txt | llsh run smollm2 "Summarise:"
  llsh chat smollm2                  a conversation; /? inside helps
  llsh ps                            who runs, at which priority, how fast
  llsh                               all of this as a shell, with history and Tab
  llsh -c 'run smollm2 Hi & ps; wait'
"""


def overview(summaries: dict[str, str], interactive: bool = False) -> str:
    """The commands by purpose. `summaries` maps each command to its one line."""
    lines = []
    for section, names in SECTIONS.items():
        lines.append(f"{section}:")
        lines += [f"  {name:<10}{summaries[name]}" for name in names if name in summaries]
        lines.append("")
    where = "help COMMAND" if interactive else "llsh help COMMAND"
    lines.append(f"`{where}` tells the options of one, with examples.")
    return "\n".join(lines) + "\n"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest known words, or ""."""
    near = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""
