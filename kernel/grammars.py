"""Which grammars may be used. A program with little memory looks at each new one; who takes too long is
refused, and the program started anew.

Tenants are served by turns, so one who sends many waits for himself. No I/O."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .programs import Program

if TYPE_CHECKING:
    from .loop import Kernel

CHECKER = "llmasos.drivers.grammar_checker"

PATIENCE_S = 2.0
"""So long one grammar may take. The program's own start counts: a twentieth of it."""

MOST_KNOWN = 4096
"""Grammars whose verdict is remembered, by their hashes."""

MOST_WAITING = 64
"""Grammars of one owner that wait."""

Verdict = Callable[[errors.LLMasOSError | None], None]


class Grammars:
    """Asks for each grammar once. `kernel` gives the clock and starts the program."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._waiting: OrderedDict[str, deque[tuple[t.Grammar, Verdict]]] = OrderedDict()
        self._asked: tuple[t.Grammar, Verdict] | None = None
        self._program: Program | None = None
        self._call_off: Callable[[], object] = lambda: None

    def check(self, owner: str, grammar: t.Grammar, then: Verdict) -> None:
        """Has `then` told, at once if the grammar is known, what is wrong with it. Raises QueueFull."""
        if (problem := self._known.get(_key(grammar))) is not None:
            then(_refusal(problem))
            return
        queue = self._waiting.setdefault(owner, deque())
        if len(queue) >= MOST_WAITING:
            raise errors.QueueFull(f"{MOST_WAITING} grammars of {owner} wait to be looked at")
        queue.append((grammar, then))
        self._next()

    def _next(self) -> None:
        while self._asked is None and self._waiting:
            owner, queue = next(iter(self._waiting.items()))
            grammar, then = queue.popleft()
            self._waiting.move_to_end(owner)
            if not queue:
                del self._waiting[owner]
            if (problem := self._known.get(_key(grammar))) is not None:
                then(_refusal(problem))
                continue
            self._asked = grammar, then
            if self._program is None:
                start = self._kernel.programs.start
                self._program = start([CHECKER], self._said, self._ended, abrupt=True, listens=True)
            self._kernel.programs.tell(self._program, msgspec.json.encode(grammar) + b"\n")
            self._call_off = self._kernel.at(self._kernel.now() + PATIENCE_S, self._too_long)

    def _said(self, line: dict[str, Any]) -> None:
        if self._asked is not None and isinstance(problem := line.get("problem"), str):
            self._known[_key(self._asked[0])] = problem
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
            self._answer(_refusal(problem))

    def _too_long(self) -> None:
        if self._program is not None:
            self._kernel.programs.stop(self._program)

    def _ended(self, outcome: object) -> None:
        """The program is gone: of too big a grammar, or it could not be started."""
        self._program = None
        if self._asked is None:
            return
        if isinstance(outcome, errors.Unavailable):
            self._answer(outcome)
        else:  # not remembered: the machine may have been busy, or somebody killed the program
            self._answer(_refusal("it takes too much time or memory to compile"))

    def _answer(self, refusal: errors.LLMasOSError | None) -> None:
        assert self._asked is not None
        (_, then), self._asked = self._asked, None
        self._call_off()
        then(refusal)
        self._next()


def _key(grammar: t.Grammar) -> bytes:
    return hashlib.sha256(msgspec.json.encode(grammar)).digest()


def _refusal(problem: str) -> errors.LLMasOSError | None:
    if not problem:
        return None
    return errors.InvalidArgument(f"the grammar cannot be used: {problem}", field="sampling.grammar")
