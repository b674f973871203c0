"""What a command runs in: the terminal, the connection to the kernel, the jobs.

One Shell serves one `llsh PS`, all commands of one `llsh -c LINE`, or a whole interactive session, so the
processes that a command starts live as long as the shell that it was typed into.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer
from llmasos.syscalls import errors
from llmasos.syscalls.address import socket_address

from .terminal import Terminal

if TYPE_CHECKING:
    from ..client import Client
    from .job import Jobs


class Shell:
    """`pid` is the process of the command that runs now, 0 if it has none.

    `kernel` is given by tests; otherwise the daemon at `address`, by default the user's, is connected to when
    a command needs it.
    """

    def __init__(
        self,
        terminal: Terminal | None = None,
        *,
        kernel: Client | None = None,
        stdin: TextIO | None = None,
        jobs: Jobs | None = None,
        address: str = "",
    ) -> None:
        from .job import Jobs

        self.terminal = terminal or Terminal()
        self.stdin = sys.stdin if stdin is None else stdin
        self.jobs = Jobs() if jobs is None else jobs
        self.pid = 0
        self.address = address or socket_address()
        self._client = kernel
        self._given = kernel is not None

    def client(self) -> Client:
        """The kernel's connection. Raises DaemonUnreachable when no daemon runs: never starts one."""
        if self._client is None:
            from ..client import Client
            from ..daemon import is_listening

            if not is_listening(self.address):
                raise errors.DaemonUnreachable(
                    "the daemon is not running",
                    hint="`llmasosd` starts it; so do `llsh run`, `llsh chat` and `llsh pull`",
                )
            self._client = Client(self.address)
        return self._client

    def started(self) -> Client:
        """The kernel's connection, after starting the daemon if none runs."""
        if self._client is None:
            from ..daemon import ensure_daemon, is_listening

            if is_listening(self.address):
                return self.client()
            with self.terminal.spinner("starting llmasosd"):
                self._client = ensure_daemon(self.address)
        return self._client

    def twin(self, terminal: Terminal, stdin: TextIO) -> Shell:
        """A shell for a background job: its own terminal, input and connection."""
        kernel = self._client if self._given else None
        return Shell(terminal, kernel=kernel, stdin=stdin, jobs=self.jobs, address=self.address)

    def close(self) -> None:
        """Ends the session, and with it the processes that it started."""
        if self._client is not None and not self._given:
            self._client.close()
        self._client = None

    def emit(self, value: Any, json: bool, text: str) -> None:
        """The result of a command that has one line to say."""
        if json:
            self.terminal.document(value)
        else:
            self.terminal.line(text)


def shell_of(context: typer.Context) -> Shell:
    """The Shell that a command was started in."""
    shell = context.find_root().obj
    assert isinstance(shell, Shell)
    return shell
