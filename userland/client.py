"""The synchronous client: syscalls as method calls, for any number of threads.

    with Client() as client:
        for process in client.ps(): ...
        with client.stream(table.Infer(model="smollm2", tokens=packed)) as stream:
            for event in stream: ...
            print(stream.reply.finish)

`call` and `stream` take any struct of the syscall table and are typed by it; the other methods exist only
where they add something (whole files, all pages, defaults).
"""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .connection import CONNECT_TIMEOUT_S, Connection
from .session import ITEM_WINDOW, Window

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
I = TypeVar("I")  # noqa: E741
I_co = TypeVar("I_co", covariant=True)

# How long a cancelled stream is waited for: the kernel confirms within a step or two.
CONFIRM_S = 10.0


class Answers(Protocol[R_co]):
    """A call of the table that is answered with an R."""

    @property
    def Reply(self) -> type[R_co]: ...


class Streams(Protocol[I_co, R_co]):
    """A call of the table that streams items I and is answered with an R."""

    @property
    def Item(self) -> type[I_co]: ...

    @property
    def Reply(self) -> type[R_co]: ...


class _Mailbox:
    """A call's sink: events wait here for the thread that reads them. Several calls may share a queue."""

    __slots__ = ("_put", "key")

    def __init__(self, put: Callable[[tuple[int, str, Any]], None], key: int = 0) -> None:
        self._put = put
        self.key = key

    def item(self, item: Any) -> None:
        self._put((self.key, "item", item))

    def done(self, reply: Any) -> None:
        self._put((self.key, "done", reply))

    def fail(self, error: errors.LLMasOSError) -> None:
        self._put((self.key, "fail", error))


class Stream(Generic[I, R]):
    """The items of one call, in order; `reply` is there when they have ended.

    A reader that stops reading lets only this stream wait. Leaving the `with` block or dropping the object
    early cancels the call in the kernel. It keeps `client`, which else ends when nobody holds it.
    """

    def __init__(
        self, connection: Connection, call: table.Call, window: int, client: Client | None = None
    ) -> None:
        self._connection = connection
        self._client = client
        self._events: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._window = Window(window)
        self._reply: R | None = None
        self._error: errors.LLMasOSError | None = None
        self._ticket = connection.submit(call, _Mailbox(self._events.put), window)

    def __iter__(self) -> Iterator[I]:
        return self

    def __next__(self) -> I:
        item = self._next(None)
        if item is None:
            raise StopIteration
        return item

    @property
    def ended(self) -> bool:
        return self._reply is not None or self._error is not None

    @property
    def reply(self) -> R:
        """The final answer. Raises the call's error, or RuntimeError when items are still to be read."""
        if self._error is not None:
            raise self._error
        if self._reply is None:
            raise RuntimeError("the stream has not ended: read it to its end, or call result()")
        return self._reply

    def result(self) -> R:
        """Reads what is left and returns the final answer."""
        for _ in self:
            pass
        return self.reply

    def cancel(self) -> None:
        """Asks the kernel to end the call. Items under way and the final answer can still be read."""
        if not self.ended:
            self._connection.cancel(self._ticket)

    def close(self) -> None:
        """Cancels if need be and waits until the kernel confirms."""
        if self.ended:
            return
        self.cancel()
        try:
            while self._next(CONFIRM_S) is not None:
                pass
        except (queue.Empty, errors.LLMasOSError):
            pass

    def _next(self, timeout_s: float | None) -> I | None:
        """The next item, None at the end. Raises the call's error, queue.Empty after the timeout."""
        if self.ended:
            return None
        self._connection.check_process()
        event = self._events.get(timeout=timeout_s)
        _, what, value = event
        if what == "item":
            if granted := self._window.take():
                self._connection.grant(self._ticket, granted)
            return cast(I, value)
        self._events.put(event)  # another thread may read this stream, or close it
        if what == "done":
            self._reply = value
            return None
        self._error = value
        raise value

    def __enter__(self) -> Stream[I, R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_ticket", None) is not None and not self.ended:
            self._connection.cancel(self._ticket)


class Gather(Generic[I, R]):
    """Several streams read as one: yields (index of the call, item) in order of arrival.

    `replies[i]` is the final answer of call i. The first error cancels the rest and is raised. It keeps
    `client`, as a Stream does.
    """

    def __init__(
        self, connection: Connection, calls: Sequence[table.Call], window: int, client: Client | None = None
    ) -> None:
        self._connection = connection
        self._client = client
        self._events: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._windows = [Window(window) for _ in calls]
        self.replies: list[R | None] = [None] * len(calls)
        self._open = set(range(len(calls)))
        self._tickets = [
            connection.submit(call, _Mailbox(self._events.put, key), window) for key, call in enumerate(calls)
        ]

    def __iter__(self) -> Iterator[tuple[int, I]]:
        try:
            while self._open:
                key, what, value = self._events.get()
                if what == "item":
                    if granted := self._windows[key].take():
                        self._connection.grant(self._tickets[key], granted)
                    yield key, value
                    continue
                self._open.discard(key)
                if what == "fail":
                    raise value
                self.replies[key] = value
        finally:
            self._close()

    def cancel(self, index: int) -> None:
        """Asks the kernel to end one of the calls; its answer still comes."""
        if index in self._open:
            self._connection.cancel(self._tickets[index])

    def _close(self) -> None:
        for index in self._open:
            self._connection.cancel(self._tickets[index])
        try:
            while self._open:
                key, what, _ = self._events.get(timeout=CONFIRM_S)
                if what != "item":
                    self._open.discard(key)
        except queue.Empty:
            self._open.clear()


class Client:
    """A connection to the kernel. Thread-safe; reconnects by itself.

    `address` is a ZeroMQ endpoint, by default that of the user's daemon. `label` names a sub-tenant of the
    caller, `tenant` on whose behalf an administrator speaks; either holds at most `rights`. Raises
    DaemonUnreachable when nothing answers within `timeout_s`, VersionMismatch when the kernel has another
    syscall table.

    When the connection breaks or the kernel is restarted, calls under way go on when it is back, each done
    once; streams continue behind what was received. DaemonUnreachable when it is not back within `timeout_s`.
    A session's processes end with it."""

    def __init__(
        self,
        address: str | None = None,
        *,
        label: str = "",
        tenant: str | None = None,
        rights: t.Rights | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.connection = Connection(address, label, timeout_s, tenant, rights)
        self._finalizer = weakref.finalize(self, Connection.close, self.connection)
        try:
            self.connection.greeted.result()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self.connection.address

    @property
    def hello(self) -> table.HelloReply:
        """The kernel's latest greeting: version, boot_id, who it takes us for."""
        hello = self.connection.hello
        assert hello is not None
        return hello

    @property
    def boot_id(self) -> str:
        """Changes when the kernel was restarted."""
        return self.hello.boot_id

    def call(self, call: Answers[R], *, timeout_s: float | None = None) -> R:
        """Makes a syscall and returns its reply. Items of a stream are dropped.

        Raises the error the kernel answers with, ConnectionLost, DaemonUnreachable, and TimedOut after
        `timeout_s`. An interrupt (Ctrl-C) cancels the call in the kernel.
        """
        request = cast(table.Call, call)
        window = 0 if request.Item is None else ITEM_WINDOW
        stream: Stream[Any, R] = Stream(self.connection, request, window)
        with stream:
            try:
                while stream._next(timeout_s) is not None:
                    pass
            except queue.Empty:
                raise errors.TimedOut(f"{request.name}: no answer in {timeout_s:g} s") from None
        return stream.reply

    def stream(self, call: Streams[I, R], *, window: int = ITEM_WINDOW) -> Stream[I, R]:
        """Starts a syscall that streams. At most `window` items are under way ahead of the reader."""
        return Stream(self.connection, cast(table.Call, call), window, self)

    def gather(self, calls: Sequence[Streams[I, R]], *, window: int = ITEM_WINDOW) -> Gather[I, R]:
        """Starts several syscalls that stream and reads them together."""
        return Gather(self.connection, cast(Sequence[table.Call], calls), window, self)

    def ps(self) -> list[t.ProcessInfo]:
        """All processes the caller may see, by pid."""
        rows: list[t.ProcessInfo] = []
        while True:
            page = self.call(table.Ps(after=rows[-1].pid if rows else 0))
            rows += page.processes
            if not page.more or not page.processes:
                return rows

    def kill(self, pid: int, signal: t.Signal | str = t.Signal.TERM) -> None:
        """Sends a signal: TERM, KILL, STOP or CONT, with or without "SIG", in any case."""
        self.call(table.Kill(pid, to_signal(signal)))

    def wait(self, pid: int, timeout_s: float | None = None) -> table.WaitReply:
        """Waits for a process's end and reaps it."""
        return self.call(table.Wait(pid, timeout_s))

    def ls(self, path: str = "/") -> list[t.FileInfo]:
        return self.call(table.Ls(path)).entries

    def read_file(self, path: str) -> bytes:
        """A whole file of the model filesystem, in as many reads as it takes."""
        return self._whole(lambda done: self.call(table.Read(path, done)))

    def read_audit(self) -> bytes:
        """The whole audit log: the lines that `syscalls.chain.verify` takes."""
        return self._whole(lambda done: self.call(table.ReadAudit(done)))

    def _whole(self, read: Callable[[int], table.ReadReply]) -> bytes:
        parts: list[bytes] = []
        done = 0
        while True:
            reply = read(done)
            parts.append(reply.data)
            done += len(reply.data)
            if done >= reply.size or not reply.data:
                return b"".join(parts)

    def close(self) -> None:
        """Ends the session: the kernel ends its processes. Calls under way raise ConnectionLost."""
        self._finalizer()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        hello = self.connection.hello
        state = f"subject={hello.subject!r} boot_id={hello.boot_id!r}" if hello else "not connected"
        return f"<Client {self.address} {state} pid={os.getpid()}>"


def to_signal(signal: t.Signal | str) -> t.Signal:
    """The signal a name means. Raises InvalidArgument."""
    name = str(signal).upper().removeprefix("SIG")
    try:
        return t.Signal(name)
    except ValueError:
        known = ", ".join(t.Signal)
        raise errors.InvalidArgument(
            f"no signal {signal!r}", hint=f"one of {known}", field="signal"
        ) from None
