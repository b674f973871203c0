"""The thread that owns a client's socket and session.

Callers in any thread put commands into a deque and wake the thread through a pipe (a pipe, because it
needs no lock and may be written from a destructor). Answers go to each call's sink, which the sync and the
async client implement. A socket monitor notices a broken connection at once; the socket is then thrown
away, so nothing that was queued in it reaches another kernel by surprise. A new one is opened as long as
something waits for it, at most `timeout_s`; and for RETURN_S even if nothing does, for the kernel ends what
belongs to sessions that do not return after its restart.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
import zmq
from llmasos.syscalls import address as addresses
from llmasos.syscalls import errors, table, turns, wire
from llmasos.syscalls import types as t
from zmq.utils.monitor import parse_monitor_message

from . import keys
from .session import Broken, Event, Failed, Forgotten, Greeted, Item, Phase, Refused, Replied, Session

CONNECT_TIMEOUT_S = 5.0
RETRY_S = 0.05
RETURN_S = 30.0
# Heartbeats find a kernel that froze or a cable that was pulled; a busy kernel answers them from its
# I/O thread.
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 30_000
LINGER_MS = 200
FLUSH_MS = 20
NEVER_MS = 3_600_000

_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Sink(Protocol):
    """Where the answers to one call go. Called from the connection's thread; must not block."""

    def item(self, item: Any) -> None: ...

    def done(self, reply: Any) -> None: ...

    def fail(self, error: errors.LLMasOSError) -> None: ...


@dataclass(eq=False, slots=True)
class Ticket:
    """One call that was handed to the connection. `id` belongs to the thread."""

    call: table.Call
    sink: Sink
    window: int
    id: int = 0


@dataclass(frozen=True, slots=True)
class _Grant:
    ticket: Ticket
    n: int


@dataclass(frozen=True, slots=True)
class _Cancel:
    ticket: Ticket


class _Stop:
    pass


def unreachable(address: str, problem: str) -> errors.DaemonUnreachable:
    return errors.DaemonUnreachable(
        f"no kernel answers at {address}: {problem}", hint="start it with: llmasosd", address=address
    )


class Connection:
    """A connection to the kernel at `address` (a ZeroMQ endpoint) that mends itself.

    `greeted` resolves with the first `hello`, or fails with DaemonUnreachable, PermissionDenied (the daemon
    does not know our key) or VersionMismatch. Raises InvalidArgument for what is no address, NoSuchFile,
    NoSuchKey without the keys that tcp needs.
    """

    def __init__(
        self,
        address: str | None,
        label: str,
        timeout_s: float,
        tenant: str | None = None,
        rights: t.Rights | None = None,
    ) -> None:
        self.address = address or addresses.socket_address()
        addresses.check(self.address)
        self._credentials = keys.credentials(self.address)
        self.timeout_s = timeout_s
        self.greeted: concurrent.futures.Future[table.HelloReply] = concurrent.futures.Future()
        self._session = Session(label, secrets.token_hex(16), tenant, rights)
        self._commands: collections.deque[Ticket | _Grant | _Cancel | _Stop] = collections.deque()
        self._tickets: dict[int, Ticket] = {}
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        self._closing = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._read_end, zmq.POLLIN)
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._retry_at = 0.0
        self._return_until = 0.0
        self._give_up_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="llmasos-connection", daemon=True)
        self._thread.start()

    @property
    def hello(self) -> table.HelloReply | None:
        """The kernel's latest greeting: after a reconnect its boot_id may be another."""
        return self._session.hello

    def submit(self, call: table.Call, sink: Sink, window: int = 0) -> Ticket:
        """Starts a call. Its answers go to `sink`, with at most `window` items ahead of the reader.

        Raises ConnectionLost after `close`.
        """
        if isinstance(call, table.Infer) and call.sampling.temperature > 0 and call.sampling.seed is None:
            # Known here, so that another kernel can go on with the same noise.
            sampling = msgspec.structs.replace(call.sampling, seed=secrets.randbits(63))
            call = msgspec.structs.replace(call, sampling=sampling)
        ticket = Ticket(call, sink, min(window, wire.MAX_CREDITS))
        self._command(ticket)
        return ticket

    def grant(self, ticket: Ticket, n: int) -> None:
        """The reader has taken `n` items: that many more may come."""
        self._command(_Grant(ticket, n))

    def cancel(self, ticket: Ticket) -> None:
        """Asks the kernel to end a call. Does nothing after `close` or fork; safe in a destructor."""
        if not self._closed and self._pid == os.getpid():
            self._command(_Cancel(ticket))

    def close(self) -> None:
        """Ends the connection; calls under way fail with ConnectionLost."""
        with self._closing:
            if self._closed or self._pid != os.getpid():
                return
            self._commands.append(_Stop())
            self._wake()
            self._closed = True
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def check_process(self) -> None:
        """Raises ConnectionLost in a fork of the process that connected: the thread did not come along, so
        whoever waits here would wait for ever."""
        if self._pid != os.getpid():
            raise errors.ConnectionLost(
                f"this connection belongs to process {self._pid}, of which this is a fork",
                hint="connect in the child: make the Client, or the LLM, there",
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a connection to the kernel cannot be pickled or copied: make a Client, or an LLM with "
            "from_pretrained, where it is needed"
        )

    def _command(self, command: Ticket | _Grant | _Cancel) -> None:
        self.check_process()
        if self._closed:
            raise errors.ConnectionLost("the client is closed")
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._write_end, b"!")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already
        except OSError:
            if not self._closed:
                raise

    # From here on everything runs in the connection's thread.

    def _run(self) -> None:
        turns.short()
        try:
            while self._obey():
                self._dispatch(self._keep_connected())
                self._send()
                self._wait()
        except BaseException as problem:
            self._end(errors.ConnectionLost(f"the client's connection thread failed: {problem!r}"))
            raise
        self._end(errors.ConnectionLost("the client was closed"))

    def _end(self, error: errors.LLMasOSError) -> None:
        self._closed = True
        self._drop_socket()
        self._dispatch(self._session.offline())
        self._dispatch(self._session.abandon(error))
        while self._commands:
            if isinstance(command := self._commands.popleft(), Ticket):
                command.sink.fail(error)
        if not self.greeted.done():
            self.greeted.set_exception(error)
        self._context.destroy(linger=LINGER_MS)
        os.close(self._read_end)
        os.close(self._write_end)

    def _obey(self) -> bool:
        """Carries out the callers' commands. False: stop."""
        while self._commands:
            match self._commands.popleft():
                case Ticket() as ticket:
                    try:
                        ticket.id = self._session.request(ticket.call, ticket.window)
                        self._tickets[ticket.id] = ticket
                    except errors.LLMasOSError as refusal:
                        ticket.sink.fail(refusal)
                case _Grant(ticket, n):
                    self._session.grant(ticket.id, n)
                case _Cancel(ticket):
                    self._dispatch(self._session.cancel(ticket.id))
                case _Stop():
                    self._send()
                    return False
        return True

    def _keep_connected(self) -> list[Event]:
        """Opens a socket when one is needed, and gives up after the timeout."""
        now = time.monotonic()
        if self._session.phase is Phase.OPEN:
            self._give_up_at, self._return_until = None, 0.0
            return []
        if not self._session.waiting and self.greeted.done():
            self._give_up_at = None
            if now >= self._return_until:
                return []
        elif self._give_up_at is None:
            self._give_up_at = now + self.timeout_s
        if self._give_up_at is not None and now >= self._give_up_at:
            self._give_up_at = None
            self._drop_socket()
            events = self._session.offline()
            return events + self._refuse(unreachable(self.address, f"no answer in {self.timeout_s:g} s"))
        if self._socket is None and now >= self._retry_at:
            self._open_socket()
        return []

    def _refuse(self, error: errors.LLMasOSError) -> list[Event]:
        if not self.greeted.done():
            self.greeted.set_exception(error)
        return self._session.abandon(error)

    def _open_socket(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = LINGER_MS
        # This file reconnects, with a fresh socket. (With -1 libzmq drops what arrived before a break.)
        socket.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, max(wire.MAX_REPLY, wire.MAX_PAYLOAD))
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)  # bounded by the credits instead
        if self._credentials is not None:
            self._credentials.secure(socket)
        self._monitor = socket.get_monitor_socket(_GONE)
        self._socket = socket
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        socket.connect(self.address)
        self._session.online()

    def _drop_socket(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._poller.unregister(self._socket)
            self._poller.unregister(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=LINGER_MS if self._closed else 0)
        self._socket = self._monitor = None
        self._retry_at = time.monotonic() + RETRY_S

    def _send(self) -> None:
        if self._socket is None:
            return
        for message in self._session.outgoing():
            self._socket.send_multipart(message)

    def _wait(self) -> None:
        ready = dict(self._poller.poll(self._sleep_ms()))
        if self._read_end in ready:
            os.read(self._read_end, 4096)
        if self._socket in ready:
            self._receive()
        if self._monitor is not None and self._monitor in ready:
            self._watch()

    def _sleep_ms(self) -> int | None:
        until = self._return_until if self._give_up_at is None else self._give_up_at
        if not until:
            return None
        if self._socket is None:
            until = min(until, self._retry_at)
        return max(1, int((until - time.monotonic()) * 1000) + 1)

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._dispatch(self._session.receive(frames))

    def _watch(self) -> None:
        """The monitor only reports that the connection is gone or never came to be."""
        assert self._monitor is not None
        event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
        if self._socket is not None and self._session.waiting:
            # What arrived before the break counts, and libzmq tells of the break before it hands that over.
            self._socket.poll(FLUSH_MS)
            self._receive()
        self._drop_socket()
        if self._session.phase is Phase.OPEN:
            self._return_until = time.monotonic() + RETURN_S
        self._dispatch(self._session.offline())
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            stranger = f"the daemon at {self.address} does not know this key"
            hint = "`llsh key show` here; there: llsh key authorize KEY --as NAME"
            self._dispatch(self._refuse(errors.PermissionDenied(stranger, hint=hint)))
        if not self.greeted.done() and _path_missing(self.address):
            self._dispatch(self._refuse(unreachable(self.address, "there is no such socket")))

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Item(id_, item):
                    self._tickets[id_].sink.item(item)
                case Replied(id_, reply):
                    self._tickets.pop(id_).sink.done(reply)
                case Failed(id_, error):
                    self._tickets.pop(id_).sink.fail(error)
                case Greeted(hello):
                    if not self.greeted.done():
                        self.greeted.set_result(hello)
                case Refused(error):
                    self._drop_socket()
                    self._dispatch(self._refuse(error))
                case Forgotten():
                    self._drop_socket()
                    self._dispatch(self._session.offline())
                case Broken(error):
                    self._drop_socket()
                    self._dispatch(self._session.broken(error.message))


def _path_missing(address: str) -> bool:
    return address.startswith("ipc://") and not Path(address.removeprefix("ipc://")).exists()
