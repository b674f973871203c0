"""How the kernel and the workers are started, watched and restarted. Tiny; no tenant can reach it.

Children are found dead by pidfds. Whatever dies is started again after a pause that doubles from 0.1 s to
30 s (0.3 s for the kernel, which starts quickly) and is forgotten once a child ran for 2 s. The kernel ending
with code 0, or DAMAGED, ends the daemon, and so does one that ends by itself before any was ready. The
kernel's standard input is a pipe from here: when this process is gone the kernel sees its end and stops.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from .systemd import notify

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
KERNEL_PAUSE_S = 0.3
HEALTHY_S = 2.0
STOP_TIMEOUT_S = 10.0
UNDRAINED = 70
"""Exit code when the kernel did not end by itself after it was told to."""

DAMAGED = 65
"""Exit code of a kernel that does not start because its journal is damaged: trying again makes it no
better."""


@dataclass(slots=True)
class Child:
    """A process that has to run. `due` is when to start it (again)."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started: float = 0.0
    due: float = 0.0
    pause: float = FIRST_PAUSE_S
    longest: float = LONGEST_PAUSE_S
    fds: tuple[int, ...] = ()  # of ours, which it inherits

    def start(self, stdin: int, stdout: int | None) -> None:
        self.process = subprocess.Popen(self.command, stdin=stdin, stdout=stdout, pass_fds=self.fds)
        self.pidfd = os.pidfd_open(self.process.pid)
        self.started = time.monotonic()

    def reaped(self) -> int:
        """Collects the dead process; returns its code and sets when the next one is due."""
        assert self.process is not None
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        os.close(self.pidfd)
        self.process, self.pidfd = None, -1
        if time.monotonic() - self.started > HEALTHY_S:
            self.pause = FIRST_PAUSE_S
        self.due = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, self.longest)
        return code


class Supervisor:
    """Runs one kernel and its workers until the kernel ends by itself or a signal says stop."""

    def __init__(self, kernel: list[str], fd: int, worker_commands: dict[str, list[str]]) -> None:
        """The commands; the kernel inherits `fd`."""
        self._kernel = Child("kernel", kernel, longest=KERNEL_PAUSE_S, fds=(fd,))
        self._workers = [Child(name, command) for name, command in worker_commands.items()]
        self._stopping = False
        self._served = False
        self._wake, ring = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(ring, False)
        signal.set_wakeup_fd(ring)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """Returns the exit code of the daemon."""
        try:
            while self._kernel.process is not None or not self._stopping:
                self._start_due()
                for child in self._wait():
                    code = child.reaped()
                    if child is self._kernel and code in (0, DAMAGED):
                        return code
                    if child is self._kernel and self._stopping:
                        return UNDRAINED
                    if child is self._kernel and code > 0 and not self._served:
                        return code  # it said why, and would again
                    if not self._stopping:
                        _say(f"{child.name} ended with {code}, starting it again in {child.pause / 2:g} s")
            return UNDRAINED  # stopped between two kernels
        finally:
            self._stop_all()

    def _start_due(self) -> None:
        """Starts what is due: kernel and workers together, who connect as soon as it listens."""
        now = time.monotonic()
        boots = self._kernel.process is None and now >= self._kernel.due
        if boots:
            self._kernel.start(subprocess.PIPE, subprocess.PIPE)
        if self._kernel.process is not None:
            for worker in self._workers:
                if worker.process is None and now >= worker.due:
                    worker.start(subprocess.DEVNULL, None)
            assert self._kernel.process.stdout is not None
            if boots and (line := self._kernel.process.stdout.readline().decode().strip()):
                self._served = True
                _say(line)
                notify("READY=1")

    def _wait(self) -> list[Child]:
        children = [c for c in (self._kernel, *self._workers) if c.process is not None]
        due = [c.due for c in (self._kernel, *self._workers) if c.process is None]
        poll = select.poll()
        for fd in (self._wake, *(c.pidfd for c in children)):
            poll.register(fd, select.POLLIN)
        pause = max(0.0, min(due) - time.monotonic()) * 1000 + 1 if due else None
        ready = {fd for fd, _ in poll.poll(pause)}
        if self._wake in ready:
            numbers = os.read(self._wake, 64)
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                self._stop_kernel()
            elif signal.SIGHUP in numbers and self._kernel.process is not None:
                self._kernel.process.send_signal(signal.SIGHUP)
        return [c for c in children if c.pidfd in ready]

    def _stop_kernel(self) -> None:
        """The first signal lets the kernel drain; a second one does not wait."""
        notify("STOPPING=1")
        if self._kernel.process is not None:
            self._kernel.process.send_signal(signal.SIGKILL if self._stopping else signal.SIGTERM)
        self._stopping = True

    def _stop_all(self) -> None:
        children = [c for c in (self._kernel, *self._workers) if c.process is not None]
        for child in children:
            assert child.process is not None
            child.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            assert child.process is not None
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
            child.reaped()


def _say(text: str) -> None:
    with suppress(OSError):  # its log may be on a disk that is full: no reason to end
        print(f"llmasosd: {text}", file=sys.stderr, flush=True)
