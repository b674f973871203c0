"""Who is connected, which requests are open, and what they are told.

Every request gets exactly one final answer: `reply` or `fail` closes it, and only an open request can be
answered. A session that is gone hears nothing and is not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from llmasos.syscalls import errors, wire
from llmasos.syscalls.table import Call
from llmasos.syscalls.types import Wire

from .ledger import Ledger
from .tenants import Subject

MOST_ITEMS = 64
"""Items in one message at most: the largest have 150 KB."""

Request = tuple[bytes, int]
"""A request: (session, the client's id)."""


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: frames for a session."""

    session: bytes
    frames: list[bytes]


@dataclass(slots=True)
class Open:
    """An unanswered request: what to do when its caller cancels it or gives it credits, and when it is
    answered or its session ends. `kept`: the answer is, for a client that asks again."""

    call: type[Call]
    kept: bool = False
    cancel: Callable[[], None] = lambda: None
    credit: Callable[[int], None] = lambda n: None
    closed: Callable[[], object] = lambda: None


@dataclass(slots=True)
class Session:
    """One connection. `subject` may narrow once, in `hello`, which also sets the `key` that processes and
    answers are owned by: it outlives the connection if the client has a token to say it is back."""

    id: bytes
    subject: Subject
    key: bytes
    greeted: bool = False
    leaving: bool = False  # what it asked for ends with its connection
    open: dict[int, Open] = field(default_factory=dict)

    @property
    def returns(self) -> bool:
        """Whether the client can say over another connection that it is the same."""
        return self.key != self.id


class Sessions:
    """All sessions, and the outbox of what they are to be sent."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.by_id: dict[bytes, Session] = {}
        self.strikes: dict[bytes, int] = {}  # frames that were no messages, by connection
        self._outbox: list[Send] = []
        self._items: dict[bytes, list[tuple[int, int, Wire]]] = {}  # not yet sent, to go in one message

    def open(self, session: Session, id_: int, call: type[Call], kept: bool, limit: int) -> None:
        """Registers a request, whose answer is `kept` or not. Raises InvalidArgument for a reused id,
        QueueFull over `limit`."""
        if id_ in session.open:
            raise errors.InvalidArgument(f"request id {id_} is already open", field="id")
        if len(session.open) >= limit:
            raise errors.QueueFull(f"{limit} requests are open on this connection", hint="wait for answers")
        session.open[id_] = Open(call, kept)

    def is_open(self, request: Request) -> bool:
        return self._entry(request) is not None

    def on_cancel(self, request: Request, cancel: Callable[[], None]) -> None:
        if entry := self._entry(request):
            entry.cancel = cancel

    def on_credit(self, request: Request, credit: Callable[[int], None]) -> None:
        if entry := self._entry(request):
            entry.credit = credit

    def on_close(self, request: Request, closed: Callable[[], object]) -> None:
        """Has `closed` called when the request is over, after what was to be called before."""
        if entry := self._entry(request):
            before = entry.closed

            def both() -> None:
                before()
                closed()

            entry.closed = both

    def reply(self, request: Request, reply: Wire) -> None:
        if entry := self._close(request):
            frames = wire.encode_reply(request[1], entry.call, reply)
            if entry.kept:
                self._ledger.answer(self.by_id[request[0]].key, request[1], frames)
            self._send(request, frames)

    def answer_again(self, request: Request, frames: list[bytes]) -> None:
        """Answers a request as it was answered before."""
        if self._close(request):
            self._send(request, frames)

    def drop(self, session: bytes) -> None:
        """The connection is gone: nothing more is sent to it."""
        self.by_id.pop(session, None)
        self._items.pop(session, None)
        self._outbox = [send for send in self._outbox if send.session != session]

    def fail(self, request: Request, error: errors.LLMasOSError) -> None:
        if self._close(request):
            self._send(request, wire.encode_error(request[1], error))

    def item(self, request: Request, seq: int, item: Wire) -> None:
        if self._entry(request):
            waiting = self._items.setdefault(request[0], [])
            waiting.append((request[1], seq, item))
            if len(waiting) >= MOST_ITEMS:
                self._flush(request[0])

    def refuse(self, session: bytes, id_: int | None, error: errors.LLMasOSError) -> None:
        """Answers a frame that opened no request."""
        self._flush(session)
        self._outbox.append(Send(session, wire.encode_error(id_ or 0, error)))

    def take_outbox(self) -> list[Send]:
        """What is to be sent now, in order."""
        for session in list(self._items):
            self._flush(session)
        outbox, self._outbox = self._outbox, []
        return outbox

    def _send(self, request: Request, frames: list[bytes]) -> None:
        self._flush(request[0])  # a request's items come before its answer
        self._outbox.append(Send(request[0], frames))

    def _flush(self, session: bytes) -> None:
        if items := self._items.pop(session, None):
            self._outbox.append(Send(session, wire.encode_items(items)))

    def _entry(self, request: Request) -> Open | None:
        session = self.by_id.get(request[0])
        return session.open.get(request[1]) if session else None

    def _close(self, request: Request) -> Open | None:
        session = self.by_id.get(request[0])
        entry = session.open.pop(request[1], None) if session else None
        if entry is not None:
            entry.closed()
        return entry
