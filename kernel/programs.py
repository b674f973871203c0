"""The processes that the kernel starts for one task each: importers, preparers of data sets, trainers. No
I/O: the I/O shell starts and stops them, and hands on the JSON lines that they print.

A program's last line is {"ok": {…}} or {"error": {…}}; whoever ends without one has died. Lines before tell
how it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmasos.syscalls import errors

Said = Callable[[dict[str, Any]], None]
Ended = Callable[[dict[str, Any] | errors.LLMasOSError], None]


@dataclass(slots=True, eq=False)
class Program:
    """One that runs, or is about to. `arguments` follow `python -m`; the I/O shell adds `--parent PID`, the
    kernel's: a program that has another parent is an orphan, and ends. `ended` is told what its last line
    said, once. `abrupt`: it has nothing to tidy up, so it need not be asked to end. `listens`:
    it reads lines from stdin."""

    number: int
    arguments: list[str]
    said: Said
    ended: Ended
    abrupt: bool
    listens: bool
    outcome: dict[str, Any] | errors.LLMasOSError


class Programs:
    """Programs by number. `to_start`, `to_tell` and `to_stop` are for the I/O shell to take."""

    def __init__(self) -> None:
        self._running: dict[int, Program] = {}
        self._next = 1
        self.to_start: list[Program] = []
        self.to_stop: list[int] = []
        self.to_tell: list[tuple[int, bytes]] = []

    def start(
        self, arguments: list[str], said: Said, ended: Ended, abrupt: bool = False, listens: bool = False
    ) -> Program:
        """Has a program started."""
        died = errors.DeviceFault(f"{arguments[0]} died", hint="see the daemon's log")
        program = Program(self._next, arguments, said, ended, abrupt, listens, died)
        self._next += 1
        self._running[program.number] = program
        self.to_start.append(program)
        return program

    def stop(self, program: Program) -> None:
        """Has it end; its `ended` is still called, when it has."""
        if program.number in self._running:
            self.to_stop.append(program.number)

    def tell(self, program: Program, line: bytes) -> None:
        """Writes to the stdin of one that listens, at most a megabyte that it has not read."""
        self.to_tell.append((program.number, line))

    def line(self, number: int, line: dict[str, Any]) -> None:
        """It printed a line."""
        program = self._running[number]
        if isinstance(line.get("ok"), dict):
            program.outcome = line["ok"]
        elif isinstance(line.get("error"), dict):
            program.outcome = errors.from_wire(line["error"])
        else:
            program.said(line)

    def over(self, number: int, problem: errors.LLMasOSError | None = None) -> None:
        """It has ended, or could not be started."""
        program = self._running.pop(number)
        program.ended(problem or program.outcome)
