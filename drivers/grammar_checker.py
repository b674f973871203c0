"""The program that looks whether a grammar can be used, so that a bad one harms nobody but its sender.

Reads requests from stdin, a JSON line each, {"kind": …, "text": …}, and answers each with one,
{"problem": "…"}, empty if it is good. It may take little memory; whether an answer comes at all is its
reader's to watch.
"""

from __future__ import annotations

import resource
import sys
import time

import msgspec
from llmasos.syscalls import types as t

from . import host
from .grammar import problem_of

MEMORY = 1 << 30

MOST_S = 0.2
"""Of processor time for one grammar: a driver that compiles it anew keeps everybody waiting for as long."""


def verdict(grammar: t.Grammar, most_s: float = MOST_S) -> str:
    """Why the grammar cannot be used, "" if it can."""
    begun = time.process_time()
    problem = problem_of(grammar)
    took = time.process_time() - begun
    return problem or ("it takes too much time to compile" if took > most_s else "")


def main() -> int:
    parent = int(sys.argv[sys.argv.index("--parent") + 1])
    host.die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    problem_of(t.Grammar(t.GrammarKind.REGEX, "a"))  # what the first one takes to import is nobody's fault
    for line in sys.stdin.buffer:
        problem = verdict(msgspec.json.decode(line, type=t.Grammar))
        sys.stdout.buffer.write(msgspec.json.encode({"problem": problem[:500]}) + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
