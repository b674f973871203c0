"""The I/O shell of the kernel: sockets, worker connections, programs. It holds no policy: it turns
what arrives into events of `loop.Kernel` and carries out the effects.

One thread, one poll. A client's vanishing is seen by its listener, so what it owned is freed at once, also
when it had nothing to receive.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq
from llmasos.drivers import base
from llmasos.syscalls import errors, turns, wire
from llmasos.syscalls.types import Capability

from . import guard, systemd
from .config import Config, InForce
from .effects import Dump, Effect, Exited, KillWorker, ToWorker
from .journal import Journal
from .keyring import server_pair
from .listener import LINGER_MS, Listener, LocalListener, Phase, RemoteListener
from .loop import Kernel
from .programs import Program
from .sessions import Send

DRAIN_S = 5.0  # for running answers, after SIGTERM
LONGEST_SLEEP_S = 60.0
DUMPS_KEPT = 20


class Worker:
    """A worker's end of the driver bus."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.reader = wire.FrameReader()
        self.unsent = bytearray()

    def send(self, message: base.ToWorker) -> None:
        """Queues a message; raises OSError when the worker is gone."""
        self.unsent += wire.frame(msgspec.msgpack.encode(message))
        self.flush()

    def flush(self) -> None:
        while self.unsent:
            try:
                sent = self.socket.send(self.unsent)
            except BlockingIOError:
                return
            del self.unsent[:sent]


PIPE_BYTES = 1 << 20
"""Room for a line to a program: the longest that the kernel has to say."""


class Running:
    """A program's process and the unread part of its output."""

    def __init__(self, program: Program) -> None:
        self.program = program
        command = [sys.executable, "-m", *program.arguments, "--parent", str(os.getpid())]
        stdin = subprocess.PIPE if program.listens else subprocess.DEVNULL
        with turns.ordinary():  # most of them compute
            self.process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if self.process.stdin:
            os.set_blocking(self.process.stdin.fileno(), False)
            with suppress(OSError):
                fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.fd = self.process.stdout.fileno()
        os.set_blocking(self.fd, False)
        self._buffer = b""

    def tell(self, line: bytes) -> None:
        """Gives it a line to read. One that does not fit into the pipe is lost, as its reader will notice."""
        assert self.process.stdin is not None
        with suppress(OSError):
            os.write(self.process.stdin.fileno(), line)

    def lines(self) -> list[dict[str, Any]] | None:
        """The messages that came; None at the end of the output."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line for line in map(_message, lines) if line is not None]

    def close(self) -> None:
        if self.process.poll() is None and not self.program.abrupt:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()


def _message(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


class Sockets:
    """Owns every file descriptor of the kernel."""

    def __init__(self, kernel: Kernel, journal: Journal, address: str, bus: Path, home: Path) -> None:
        self._kernel = kernel
        self._journal = journal
        self._home = home
        self._running = True
        self._poller = zmq.Poller()
        self._wake = _signals()  # before anybody is told that we are ready, and could send one
        self._poller.register(self._wake, zmq.POLLIN)
        self._workers: dict[int, Worker] = {}
        self._programs: dict[int, Running] = {}
        self._context = zmq.Context()
        self._listeners = self._listen(address)
        self._guard = guard.Guard(
            guard.most_descriptors(kernel.config.max_sessions), kernel.config.max_memory
        )
        self._guard_due = 0.0
        self._bus = self._bind_bus(bus)

    def _listen(self, address: str) -> dict[bytes, Listener]:
        config = self._kernel.config
        rights = frozenset({Capability.CONNECT, *config.user_rights})
        listeners: list[Listener] = [
            LocalListener(self._context, self._poller, address, config.socket_group, rights)
        ]
        if config.listen:
            pair = server_pair(self._home / "keys" / "server.key")
            self._kernel.server_key = pair.public
            listeners.append(
                RemoteListener(self._context, self._poller, config.listen, pair, self._kernel.keys)
            )
        for listener in listeners:
            try:
                listener.open()
            except (zmq.ZMQError, OSError, LookupError) as problem:
                raise errors.Unavailable(
                    f"cannot listen: {problem}",
                    hint="see `llmasosd --check`; the settings are `listen` and `socket_group`",
                ) from None
        return {listener.tag: listener for listener in listeners}

    def _bind_bus(self, path: Path) -> socket.socket:
        path.unlink(missing_ok=True)
        bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            bus.bind(str(path))
        finally:
            os.umask(before)
        bus.listen(16)
        bus.setblocking(False)
        self._poller.register(bus.fileno(), zmq.POLLIN)
        return bus

    def run(self, supervisor: int | None, reload: Callable[[], Config], in_force: InForce) -> None:
        """Serves until the kernel exits, SIGTERM drained it, or the supervisor's pipe closes. SIGHUP has
        `reload` read the configuration, for this kernel and, in `in_force`, the next. Tells systemd's
        watchdog that the loop turns."""
        if supervisor is not None:
            self._poller.register(supervisor, zmq.POLLIN)
        alive_s, alive_due = systemd.watchdog_s(), 0.0
        while self._running:
            ready = dict(self._poller.poll(self._timeout(min(alive_s or LONGEST_SLEEP_S, self._edge_due()))))
            if supervisor in ready and not os.read(supervisor or 0, 1):
                break
            if ready.pop(self._wake, 0):
                numbers = os.read(self._wake, 64)
                if signal.SIGHUP in numbers:
                    self._kernel.reconfigure(reload)
                    in_force.keep(self._kernel.config)
                if signal.SIGTERM in numbers:
                    self._kernel.drain(DRAIN_S)
            self._serve(ready)
            self._watch_edge()
            self._turn()
            if alive_s and clock() >= alive_due:
                systemd.notify("WATCHDOG=1")
                alive_due = clock() + alive_s
        self._close()

    def _timeout(self, most: float) -> int:
        """Milliseconds until the kernel has something to do by itself, rounded up: early is too early."""
        due = self._kernel.next_timer()
        return math.ceil(1000 * (most if due is None else max(0.0, min(most, due - self._kernel.now()))))

    def _serve(self, ready: dict[Any, int]) -> None:
        for listener in self._listeners.values():
            self._leave(listener.gone())
            for session, subject, frames in listener.receive(ready):
                self._kernel.message(session, subject, frames)
            if isinstance(listener, RemoteListener):
                for key in listener.admit(ready):
                    self._kernel.key_refused(key)
        for fd, event in ready.items():
            if fd == self._bus.fileno():
                self._accept_workers()
            elif fd in self._workers:
                self._worker_event(fd, event)
            elif fd in self._programs:
                self._program_event(fd)

    def _turn(self) -> None:
        """Lets the kernel act and carries out its effects, until there are none."""
        while self._running:
            self._kernel.tick()
            effects = self._kernel.take_effects()
            self._run_programs()
            if not effects:
                return
            # Devices need not wait for the disk, clients have to: what they are told is durable.
            told = [effect for effect in effects if isinstance(effect, Send)]
            self._carry_out([effect for effect in effects if not isinstance(effect, Send)])
            if told:
                self._commit()
            self._carry_out(told)

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(session, frames):
                    self._send(session, frames)
                case ToWorker(worker, message):
                    self._tell_worker(worker, message)
                case KillWorker(pid, number):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                case Dump(why, lines):
                    self._keep(why, lines)
                case Exited():
                    self._running = False

    def _commit(self) -> None:
        if changes := self._kernel.ledger.take():
            self._journal.commit(changes)

    # Clients

    def _send(self, session: bytes, frames: list[bytes]) -> None:
        if not self._listeners[session[:1]].send(session, frames):
            self._kernel.disconnected(session)

    def _leave(self, sessions: list[bytes]) -> None:
        for session in sessions:
            self._kernel.disconnected(session)

    def _edge_due(self) -> float:
        """Seconds until the guard looks at the edge again."""
        return max(0.0, self._guard_due - clock())

    def _watch_edge(self) -> None:
        """Opens and shuts the listeners as the guard says, and does what is due now and then."""
        listeners = self._listeners.values()
        if self._edge_due() and sum(listener.arrivals for listener in listeners) < guard.MOST_ARRIVALS:
            return
        fds, resident = guard.descriptors(), guard.resident_bytes()
        verdict = self._guard.judge(fds, resident)
        # A flood on tcp is no reason to keep local clients out.
        flooded = [listener for listener in listeners if listener.arrivals >= guard.MOST_ARRIVALS]
        for listener in listeners:
            if verdict is guard.Verdict.OPEN:
                listener.open()
            elif verdict is guard.Verdict.DROP:
                self._leave(listener.drop())
            elif listener in flooded or not flooded:
                self._leave(listener.shut())
            listener.arrivals = 0
        if verdict is guard.Verdict.DROP:
            guard.give_back()
        self._kernel.edge(verdict, fds, resident)
        self._kernel.keys_changed(self._kernel.keys.refresh())
        self._kernel.audit.sync()
        is_open = all(listener.phase is Phase.OPEN for listener in listeners)
        self._guard_due = clock() + (guard.OPEN_PERIOD_S if is_open else guard.SHUT_PERIOD_S)

    # Workers

    def _accept_workers(self) -> None:
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._bus.accept()
                worker = Worker(connection)
                self._workers[connection.fileno()] = worker
                self._poller.register(connection.fileno(), zmq.POLLIN)

    def _worker_event(self, fd: int, event: int) -> None:
        worker = self._workers[fd]
        try:
            if event & zmq.POLLOUT:
                worker.flush()
                self._poller.modify(fd, zmq.POLLIN | (zmq.POLLOUT if worker.unsent else 0))
            if event & ~zmq.POLLOUT:
                data = worker.socket.recv(1 << 20)
                if not data:
                    raise ConnectionResetError
                for message in worker.reader.feed(data):
                    self._kernel.worker_message(fd, base.from_worker.decode(message))
        except BlockingIOError:
            pass
        except (OSError, errors.BadFrame, msgspec.DecodeError):
            self._worker_lost(fd)

    def _tell_worker(self, fd: int, message: base.ToWorker) -> None:
        worker = self._workers.get(fd)
        if worker is None:
            return
        try:
            worker.send(message)
            if worker.unsent:
                self._poller.modify(fd, zmq.POLLIN | zmq.POLLOUT)
        except OSError:
            self._worker_lost(fd)

    def _worker_lost(self, fd: int) -> None:
        worker = self._workers.pop(fd)
        self._poller.unregister(fd)
        worker.socket.close()
        self._kernel.worker_gone(fd)

    # Programs

    def _run_programs(self) -> None:
        programs = self._kernel.programs
        to_start, programs.to_start = programs.to_start, []
        for program in to_start:
            try:
                running = Running(program)
            except OSError as problem:
                failed = errors.Unavailable(f"{program.arguments[0]} cannot be started: {problem.strerror}")
                programs.over(program.number, failed)
                continue
            self._programs[running.fd] = running
            self._poller.register(running.fd, zmq.POLLIN)
        to_tell, programs.to_tell = programs.to_tell, []
        for number, line in to_tell:
            for running in self._programs.values():
                if running.program.number == number:
                    running.tell(line)
        to_stop, programs.to_stop = set(programs.to_stop), []
        for fd, running in list(self._programs.items()):
            if running.program.number in to_stop:
                self._program_ended(fd)

    def _program_event(self, fd: int) -> None:
        running = self._programs[fd]
        lines = running.lines()
        if lines is None:
            self._program_ended(fd)
            return
        for line in lines:
            self._kernel.programs.line(running.program.number, line)

    def _program_ended(self, fd: int) -> None:
        running = self._programs.pop(fd)
        self._poller.unregister(fd)
        running.close()
        self._kernel.programs.over(running.program.number)

    def _keep(self, why: str, lines: bytes) -> None:
        """Writes a dump of the flight recorder; the oldest go. Not being able to is no reason to stop."""
        folder = self._home / "state" / "flight"
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{why.replace(':', '_')}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lines)
            for old in sorted(folder.glob("*.jsonl"))[:-DUMPS_KEPT]:
                old.unlink()
        except OSError as problem:
            self._kernel.log.warn(f"the flight recorder cannot be kept: {problem.strerror}")
            return
        self._kernel.log.info(f"the last scheduling decisions are in {path}")

    def _close(self) -> None:
        self._commit()
        for effect in self._kernel.take_effects():
            if isinstance(effect, Send):
                self._send(effect.session, effect.frames)
        for running in self._programs.values():
            running.close()
        self._kernel.audit.sync()
        for listener in self._listeners.values():
            listener.drop(LINGER_MS)
        self._bus.close()
        for worker in self._workers.values():
            worker.socket.close()
        self._context.destroy(LINGER_MS)


def _signals() -> int:
    """Where the numbers of SIGTERM and SIGHUP are read as they come; SIGINT is the supervisor's."""
    wake, ring = os.pipe()
    for fd in (wake, ring):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(ring)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return wake


def clock() -> float:
    """Seconds on a clock that never jumps."""
    return time.monotonic()
