"""Where clients connect: a ROUTER on the local socket, and one on tcp. Knows whose connection a message came
over, and notices vanished clients. I/O only, no policy.

Who a client is comes from its connection, never from what it says: locally the peer's uid (`Peer-Address`,
from SO_PEERCRED), remotely the key that CURVE proved (`User-Id`, which there only our ZAP handler sets).

    OPEN --shut()--> SHUT --open()--> OPEN
    OPEN, SHUT --drop()--> CLOSED --open()--> OPEN     what libzmq holds for its peers is freed as well
Both throw everybody out: libzmq cannot throw out one peer, and its connections end with their listener.
"""

from __future__ import annotations

import enum
import os
import pwd
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zmq
from llmasos.syscalls import wire
from llmasos.syscalls.keys import KeyPair
from llmasos.syscalls.types import Capability
from zmq.utils.monitor import recv_monitor_message

from .keyring import Keyring
from .tenants import Subject

# A client that has not read this many messages is not reading at all: credits keep streams far below.
SEND_LIMIT = 512
LINGER_MS = 1000
HANDSHAKE_MS = 1000
"""Who connects and does not shake hands is dropped after this."""

MOST_DEAD = 1024

MOST_MESSAGES = 256
"""Messages taken in one turn, so that a flood of them cannot keep the workers waiting."""


class Phase(enum.Enum):
    OPEN = "open"
    SHUT = "shut"
    CLOSED = "closed"


class Listener(ABC):
    """A ROUTER at `address`. A session's id is `tag` and the peer's: listeners do not mix theirs up."""

    tag: bytes

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller, address: str) -> None:
        self.address = address
        self.phase = Phase.CLOSED
        self.arrivals = 0  # connections since somebody set it to 0
        self._context = context
        self._poller = poller
        self._router: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._bound_before = False
        self._known: dict[bytes, tuple[int, Subject]] = {}
        self._on: dict[int, set[bytes]] = {}
        self._alive: set[int] = set()  # descriptors of connections
        self._ended: list[bytes] = []
        self._dead: dict[bytes, None] = {}  # the last that ended, in order: what they sent may still come

    @abstractmethod
    def _secure(self, router: zmq.Socket[bytes]) -> None:
        """Sets what the socket demands of its peers."""

    @abstractmethod
    def _bind(self, router: zmq.Socket[bytes]) -> bool:
        """False: libzmq, which closes in its own time, still holds the address."""

    @abstractmethod
    def _identify(self, frame: zmq.Frame) -> Subject | None:
        """Who is behind the connection that a frame came over; None: nobody whom we know."""

    def open(self) -> bool:
        """Accepts connections. False: not yet, try again. Raises ZMQError when the address is another's."""
        if self._router is None:
            self._router = self._make()
        if self.phase is not Phase.OPEN and self._bind(self._router):
            self.phase, self._bound_before = Phase.OPEN, True
        return self.phase is Phase.OPEN

    def shut(self) -> list[bytes]:
        """Lets nobody in; returns the sessions that this ends, of which the monitor tells nothing."""
        if self.phase is not Phase.OPEN or self._router is None:
            return []
        self._router.unbind(self._router.get_string(zmq.LAST_ENDPOINT))  # of *:5570, what it became
        self.phase = Phase.SHUT
        gone = list(self._known)
        self._bury(gone)
        self._known.clear()
        self._on.clear()
        self._alive.clear()
        return gone

    def drop(self, linger_ms: int = 0) -> list[bytes]:
        """Closes every connection; returns the sessions that this ends."""
        gone = self.shut()
        if self._router is not None and self._monitor is not None:
            self._poller.unregister(self._router)
            self._poller.unregister(self._monitor)
            self._router.disable_monitor()
            self._monitor.close(0)
            self._router.close(linger_ms)
        self._router = self._monitor = None
        self.phase = Phase.CLOSED
        return gone

    def receive(self, ready: dict[Any, int]) -> Iterator[tuple[bytes, Subject, list[bytes]]]:
        """(session, whose it is, frames) of the messages that have come."""
        if self._router is None or self._router not in ready:
            return
        for _ in range(MOST_MESSAGES):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = parts[0].bytes
            # A client that names itself could take another's place; ours begin with a zero byte.
            if len(parts) < 2 or peer[:1] != b"\0":
                continue
            session = self.tag + peer
            known = self._known.get(session)
            subject = known[1] if known else self._greet(session, parts[1])
            if subject is not None:
                yield session, subject, [part.bytes for part in parts[1:]]

    def gone(self) -> list[bytes]:
        """The sessions whose connections have ended since the last time."""
        self._watch()
        ended, self._ended = self._ended, []
        return ended

    def send(self, session: bytes, frames: list[bytes]) -> bool:
        """False: the client is gone, or has stopped reading altogether, which ends its session too: an answer
        is never lost unseen."""
        if self._router is None:
            return False
        try:
            self._router.send_multipart([session[len(self.tag) :], *frames], zmq.NOBLOCK)
        except zmq.ZMQError as problem:
            if problem.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.forget(session)
            return False
        return True

    def forget(self, session: bytes) -> None:
        fd, _ = self._known.pop(session, (-1, None))
        there = self._on.get(fd, set())
        there.discard(session)
        if not there:
            self._on.pop(fd, None)

    def _watch(self) -> None:
        while self._monitor is not None and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            fd = event["value"]
            if event["event"] == zmq.EVENT_ACCEPTED:
                self.arrivals += 1
                self._alive.add(fd)
                continue
            self._alive.discard(fd)
            ended = self._on.pop(fd, set())
            for session in ended:
                del self._known[session]
            self._bury(ended)
            self._ended += ended

    def _bury(self, sessions: Iterable[bytes]) -> None:
        """Nothing that these sent counts any more."""
        self._dead.update(dict.fromkeys(sessions))
        while len(self._dead) > MOST_DEAD:
            del self._dead[next(iter(self._dead))]

    def _make(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD)
        router.set(zmq.SNDHWM, SEND_LIMIT)
        router.set(zmq.RCVHWM, MOST_MESSAGES)
        router.set(zmq.LINGER, LINGER_MS)
        router.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._secure(router)
        self._monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_ACCEPTED)
        self._poller.register(router, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        return router

    def _greet(self, session: bytes, frame: zmq.Frame) -> Subject | None:
        self._watch()  # the descriptor's owner before may have left a moment ago
        fd = int(frame.get(zmq.SRCFD))
        if session in self._dead or fd not in self._alive:
            return None
        subject = self._identify(frame)
        if subject is not None:
            self._known[session] = (fd, subject)
            # A set: the first message of a connection that has ended may come after its descriptor has a new
            # owner; its session then ends with that one's.
            self._on.setdefault(fd, set()).add(session)
        return subject


class LocalListener(Listener):
    """On a Unix socket: mode 0600, or 0660 for `group`."""

    tag = b"l"

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        address: str,
        group: str,
        user_rights: frozenset[Capability],
    ) -> None:
        super().__init__(context, poller, address)
        self._path = Path(address.removeprefix("ipc://"))
        self._group = group
        self._user_rights = user_rights

    def _secure(self, router: zmq.Socket[bytes]) -> None:
        """The file's mode decides who gets in."""

    def _bind(self, router: zmq.Socket[bytes]) -> bool:
        # libzmq makes the socket file under the umask, and leaves it there when it unbinds.
        before = os.umask(0o177)
        try:
            router.bind(self.address)
        finally:
            os.umask(before)
        if self._group:
            shutil.chown(self._path, group=self._group)
            self._path.chmod(0o660)
        return True

    def _identify(self, frame: zmq.Frame) -> Subject | None:
        try:
            _, uid, _, pid = str(frame.get("Peer-Address")).rsplit(":", 3)
            admin = int(uid) in (0, os.getuid())
            return Subject(_user(int(uid)), int(uid), int(pid), admin, self._user_rights)
        except (ValueError, zmq.ZMQError):
            return None


class RemoteListener(Listener):
    """On tcp, for the keys of the keyring. Answers libzmq's questions about keys (ZAP, RFC 27)."""

    tag = b"r"

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        address: str,
        pair: KeyPair,
        keyring: Keyring,
    ) -> None:
        super().__init__(context, poller, address)
        self._pair = pair
        self._keyring = keyring
        # There before the first connection: without it libzmq lets every key in.
        self._zap = context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        poller.register(self._zap, zmq.POLLIN)

    def _secure(self, router: zmq.Socket[bytes]) -> None:
        router.set(zmq.ZAP_DOMAIN, b"llmasos")
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, bytes.fromhex(self._pair.secret))

    def _bind(self, router: zmq.Socket[bytes]) -> bool:
        try:
            router.bind(self.address)
        except zmq.ZMQError as problem:
            if problem.errno != zmq.EADDRINUSE or not self._bound_before:
                raise
            return False
        return True

    def _identify(self, frame: zmq.Frame) -> Subject | None:
        try:
            return self._keyring.subject(str(frame.get("User-Id")))
        except zmq.ZMQError:
            return None

    def admit(self, ready: dict[Any, int]) -> list[str]:
        """Tells libzmq whether it may let a key in. Returns the keys that we do not know."""
        if self._zap not in ready:
            return []
        version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
        key = credentials[0].hex() if mechanism == b"CURVE" and credentials else ""
        known = self._keyring.subject(key) is not None
        verdict = (b"200", b"") if known else (b"400", b"this key is not known")
        self._zap.send_multipart([version, request, *verdict, key.encode() if known else b"", b""])
        return [] if known else [key]


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"
