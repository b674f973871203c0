"""The client's side of a connection, without I/O: frames and requests in, frames and events out.

States: OFFLINE --online()--> GREETING --hello's reply--> OPEN, and back to OFFLINE with offline().
A request waits until OPEN, is sent, and ends with exactly one Replied or Failed. When the connection
breaks, what has been sent waits and is sent again under its id: the kernel knows the session by its token and
answers what it has done already as it did; an infer brings the tokens that arrived and goes on behind them.
No more work is asked for at once than the kernel takes of a connection.
Sequence numbers of stream items are checked, so an item is never lost or repeated unseen.

Never touches a socket, a clock or a thread: `connection.py` does.
"""

from __future__ import annotations

import collections
import enum
import itertools
from array import array
from dataclasses import dataclass, field

import msgspec
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t
from llmasos.syscalls.types import Wire

ITEM_WINDOW = 64
"""Stream items that may be under way before their reader has taken any."""
MOST_WORK = wire.MAX_REQUESTS - 64
"""Calls that devices work on and that the kernel is asked at once; further ones wait here for an answer. The
rest of its requests is for calls like `kill`, which must not wait for work."""


class Phase(enum.Enum):
    OFFLINE = "offline"
    GREETING = "greeting"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Greeted:
    """The kernel answered `hello`. `restarted`: it is not the boot that this session knew before."""

    hello: table.HelloReply
    restarted: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The kernel refused `hello`: this client cannot talk to it."""

    error: errors.LLMasOSError


@dataclass(frozen=True, slots=True)
class Broken:
    """What arrived makes no sense; the connection must be dropped."""

    error: errors.ConnectionLost


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The kernel does not know this connection any more; over another one everything goes on."""


@dataclass(frozen=True, slots=True)
class Item:
    id: int
    item: Wire


@dataclass(frozen=True, slots=True)
class Replied:
    id: int
    reply: Wire


@dataclass(frozen=True, slots=True)
class Failed:
    id: int
    error: errors.LLMasOSError


Event = Greeted | Refused | Broken | Forgotten | Item | Replied | Failed


@dataclass(slots=True)
class _Pending:
    """A request without its answer, `asked` so many times; `sent`: over this connection. Of an
    infer `seen` are the tokens that arrived and `scored` counts the scores of its input; `line` is a log's
    last."""

    call: table.Call
    credits: int
    asked: int = 0
    sent: bool = False
    cancelled: bool = False
    next_seq: int = 0
    seen: array[int] = field(default_factory=lambda: array("I"))
    scored: int = 0
    line: int = 0

    @property
    def is_work(self) -> bool:
        return isinstance(self.call, table.Infer | table.Encode)

    def take(self, item: Wire) -> None:
        self.next_seq += 1
        match item:
            case t.InferEvent():
                self.seen.extend(item.tokens)
                self.scored += len(item.prompt_logprobs)
            case t.LogLine():
                self.line = item.seq

    def again(self, restarted: bool) -> table.Call:
        """The call that gets what is still to come, from a kernel that was `restarted` or not."""
        match self.call:
            case table.Infer() as call if self.next_seq:
                tokens = call.tokens + t.pack_tokens(self.seen)
                return msgspec.structs.replace(
                    call, tokens=tokens, seen=len(self.seen), scored=self.scored, seq=self.next_seq
                )
            case table.Dmesg() as call if self.line:
                self.call = msgspec.structs.replace(call, after=0 if restarted else self.line)
        # Other streams begin anew.
        self.credits -= self.next_seq
        self.next_seq = self.line = 0
        return self.call


@dataclass(slots=True)
class Window:
    """Credits of one stream, counted by its reader: half a window at a time goes back to the kernel."""

    size: int = ITEM_WINDOW
    _taken: int = 0

    def take(self) -> int:
        """The reader has taken one item. Returns how many credits to grant now, mostly 0."""
        self._taken += 1
        if self._taken * 2 < self.size:
            return 0
        granted, self._taken = self._taken, 0
        return granted


@dataclass(slots=True)
class Session:
    """One client's conversation with the kernel over any number of connections."""

    label: str = ""
    token: str = ""
    tenant: str | None = None
    rights: t.Rights | None = None
    phase: Phase = Phase.OFFLINE
    hello: table.HelloReply | None = None
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _hello_id: int = 0
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _out: list[list[bytes]] = field(default_factory=list)
    _working: set[int] = field(default_factory=set)
    _held: collections.deque[int] = field(default_factory=collections.deque)

    @property
    def waiting(self) -> bool:
        """Whether anything needs a connection."""
        return bool(self._pending)

    def request(self, call: table.Call, window: int = 0) -> int:
        """Queues a call and returns its id. `window` is the credit for its stream, 0 without one.

        Raises InvalidArgument when the call does not fit into a message.
        """
        id_ = next(self._ids)
        try:
            frames = wire.encode_request(id_, call, window)
        except OverflowError:
            raise errors.InvalidArgument(f"{call.name}: a number does not fit into 64 bits") from None
        except (TypeError, ValueError) as problem:
            raise errors.InvalidArgument(f"{call.name}: {problem}") from None
        pending = self._pending[id_] = _Pending(call, window)
        if self.phase is Phase.OPEN and self._has_room(id_, pending):
            pending.asked, pending.sent = pending.asked + 1, True
            self._out.append(frames)
        return id_

    def _has_room(self, id_: int, pending: _Pending) -> bool:
        """Whether a call may be sent now; else it is held until an answer makes room."""
        if not pending.is_work:
            return True
        if len(self._working) >= MOST_WORK:
            self._held.append(id_)
            return False
        self._working.add(id_)
        return True

    def _over(self, id_: int) -> _Pending:
        self._working.discard(id_)
        return self._pending.pop(id_)

    def _send_held(self) -> list[Event]:
        events: list[Event] = []
        while self._held and len(self._working) < MOST_WORK and self.phase is Phase.OPEN:
            id_ = self._held.popleft()
            if pending := self._pending.get(id_):
                events += self._send(id_, pending, False)
        return events

    def grant(self, id_: int, n: int) -> None:
        """Lets the kernel send `n` more items of stream `id_`."""
        if n > 0 and (pending := self._pending.get(id_)) is not None and pending.asked > 0:
            pending.credits += n
            if pending.sent:
                self._out.append(wire.encode_credit(id_, n))

    def cancel(self, id_: int) -> list[Event]:
        """Asks for the end of a request; its answer still comes. One that was not sent ends at once."""
        if (pending := self._pending.get(id_)) is None:
            return []
        if pending.asked > 0:
            pending.cancelled = True
            if pending.sent:
                self._out.append(wire.encode_cancel(id_))
            return []
        self._over(id_)
        return [Failed(id_, errors.ConnectionLost(f"{pending.call.name}: cancelled before it was sent"))]

    def online(self) -> None:
        """A fresh connection is being made: greet the kernel."""
        self.phase = Phase.GREETING
        self._hello_id = next(self._ids)
        hello = table.Hello(
            table.VERSION, table.table_hash(), self.label, self.token, self.tenant, self.rights
        )
        self._out = [wire.encode_request(self._hello_id, hello, 0)]

    def offline(self) -> list[Event]:
        """The connection is gone. Fails what must not be sent twice; the rest waits."""
        self.phase = Phase.OFFLINE
        self._out = []
        self._working.clear()
        self._held.clear()
        for pending in self._pending.values():
            pending.sent = False
        once = [id_ for id_, p in self._pending.items() if p.asked and isinstance(p.call, table.Shutdown)]
        return [self._lost(id_, "the connection to the kernel broke") for id_ in once]

    def broken(self, reason: str) -> list[Event]:
        """The connection made no sense and was dropped. Fails all that was sent: it might make none again."""
        sent = [id_ for id_, pending in self._pending.items() if pending.sent]
        return [self._lost(id_, reason) for id_ in sent] + self.offline()

    def _lost(self, id_: int, reason: str) -> Failed:
        pending = self._over(id_)
        hint = "it may or may not have been done; see `llsh ps` and `llsh dmesg`"
        return Failed(
            id_, errors.ConnectionLost(f"{reason} while {pending.call.name} was under way", hint=hint)
        )

    def abandon(self, error: errors.LLMasOSError) -> list[Event]:
        """Fails everything that waits: no connection can be had."""
        events: list[Event] = [Failed(id_, error) for id_ in self._pending]
        self._pending.clear()
        self._working.clear()
        self._held.clear()
        return events

    def outgoing(self) -> list[list[bytes]]:
        """Messages to send now, in order."""
        out, self._out = self._out, []
        return out

    def receive(self, frames: list[bytes]) -> list[Event]:
        """What a message of the kernel means."""
        events: list[Event] = []
        try:
            for answer in wire.decode_answers(frames):
                if answer.id == self._hello_id:
                    events += self._greeting(answer)
                    continue
                if answer.id == 0:
                    raise errors.BadFrame(f"the kernel could not read a message: {_error(answer)}")
                if (pending := self._pending.get(answer.id)) is None or not pending.sent:
                    raise errors.BadFrame(f"answer to request {answer.id}, which is not under way")
                events.append(self._answer(answer, pending))
            events += self._send_held()
        except errors.BadFrame as problem:
            events.append(Broken(errors.ConnectionLost(f"protocol error: {problem.message}")))
        return events

    def _greeting(self, answer: wire.FromKernel) -> list[Event]:
        if answer.kind is not wire.Kind.REPLY:
            self.phase = Phase.OFFLINE
            return [Refused(_error(answer))]
        hello = wire.typed_reply(table.Hello, answer)
        assert isinstance(hello, table.HelloReply)
        restarted = self.hello is not None and self.hello.boot_id != hello.boot_id
        self.hello, self.phase, self._hello_id = hello, Phase.OPEN, 0
        events: list[Event] = [Greeted(hello, restarted)]
        for id_, pending in list(self._pending.items()):
            events += self._send(id_, pending, restarted)
        return events

    def _answer(self, answer: wire.FromKernel, pending: _Pending) -> Event:
        match answer.kind:
            case wire.Kind.ITEMS:
                if answer.seq != pending.next_seq:
                    raise errors.BadFrame(f"stream item {answer.seq} instead of {pending.next_seq}")
                if pending.next_seq >= pending.credits:
                    raise errors.BadFrame(f"stream item {answer.seq} above the credits given")
                item = wire.typed_item(type(pending.call), answer)
                pending.take(item)
                return Item(answer.id, item)
            case wire.Kind.REPLY:
                reply = wire.typed_reply(type(pending.call), answer)
                self._over(answer.id)
                return Replied(answer.id, reply)
            case _:
                error = _error(answer)
                if isinstance(error, errors.NotGreeted):
                    return Forgotten()
                self._over(answer.id)
                again = pending.asked > 1 and isinstance(pending.call, table.Unlink)
                if again and isinstance(error, errors.NoSuchModel | errors.NoSuchFile):
                    # The name went the first time, but the kernel died before that was in its journal.
                    return Replied(answer.id, table.Done())
                return Failed(answer.id, error)

    def _send(self, id_: int, pending: _Pending, restarted: bool) -> list[Event]:
        if not self._has_room(id_, pending):
            return []
        call = pending.again(restarted)
        try:
            frames = wire.encode_request(id_, call, pending.credits - pending.next_seq)
        except errors.InvalidArgument:
            return [self._lost(id_, "what arrived is too much to go on with")]
        pending.asked, pending.sent = pending.asked + 1, True
        self._out.append(frames)
        if pending.cancelled:
            self._out.append(wire.encode_cancel(id_))
        return []


def _error(answer: wire.FromKernel) -> errors.LLMasOSError:
    try:
        return errors.from_wire(answer.body)
    except (TypeError, ValueError):
        return errors.LLMasOSError("the kernel sent an error that cannot be read")
