"""The program that looks whether a grammar can be used, so that a bad one harms nobody but its sender.

Reads requests from stdin, a JSON line each, {"kind": …, "text": …}, and answers each with one,
{"problem": "…"}, empty if it is good. It may take little memory; how long an answer takes is its reader's to
watch.
"""

from __future__ import annotations

import resource
import sys

import msgspec
from llmasos.syscalls import types as t

from . import host
from .grammar import problem_of

MEMORY = 1 << 30


def main() -> int:
    parent = int(sys.argv[sys.argv.index("--parent") + 1])
    host.die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        problem = problem_of(msgspec.json.decode(line, type=t.Grammar))
        sys.stdout.buffer.write(msgspec.json.encode({"problem": problem[:500]}) + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
