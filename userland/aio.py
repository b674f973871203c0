"""The asynchronous client: the same connection as client.py, its answers handed to an event loop.

    async with AsyncClient() as client:
        rows = (await client.call(table.Ps())).processes
        async with client.stream(table.Infer(model="smollm2", tokens=packed)) as stream:
            async for event in stream: ...

The connection's own thread reads the socket and wakes the loop, so no edge-triggered file descriptor has
to be watched here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from llmasos.syscalls import errors, table

from .client import CONFIRM_S, Answers, Streams
from .connection import CONNECT_TIMEOUT_S, Connection
from .session import ITEM_WINDOW, Window

R = TypeVar("R")
I = TypeVar("I")  # noqa: E741


class _LoopSink:
    """A call's sink: hands events from the connection's thread to a queue of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[str, Any]]) -> None:
        self._loop = loop
        self._events = events

    def item(self, item: Any) -> None:
        self._put("item", item)

    def done(self, reply: Any) -> None:
        self._put("done", reply)

    def fail(self, error: errors.LLMasOSError) -> None:
        self._put("fail", error)

    def _put(self, what: str, value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (what, value))
        except RuntimeError:
            pass  # the loop was closed: nobody reads this stream any more


class AsyncStream(Generic[I, R]):
    """The items of one call, in order; `reply` is there when they have ended. See client.Stream."""

    def __init__(self, connection: Connection, call: table.Call, window: int) -> None:
        self._connection = connection
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._window = Window(window)
        self._reply: R | None = None
        self._error: errors.LLMasOSError | None = None
        sink = _LoopSink(asyncio.get_running_loop(), self._events)
        self._ticket = connection.submit(call, sink, window)

    def __aiter__(self) -> AsyncIterator[I]:
        return self

    async def __anext__(self) -> I:
        item = await self._next()
        if item is None:
            raise StopAsyncIteration
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
            raise RuntimeError("the stream has not ended: read it to its end, or await result()")
        return self._reply

    async def result(self) -> R:
        """Reads what is left and returns the final answer."""
        async for _ in self:
            pass
        return self.reply

    def cancel(self) -> None:
        """Asks the kernel to end the call. Items under way and the final answer can still be read."""
        if not self.ended:
            self._connection.cancel(self._ticket)

    async def aclose(self) -> None:
        """Cancels if need be and waits until the kernel confirms."""
        self.cancel()
        try:
            async with asyncio.timeout(CONFIRM_S):
                while await self._next() is not None:
                    pass
        except (TimeoutError, errors.LLMasOSError):
            pass

    async def _next(self) -> I | None:
        if self.ended:
            return None
        what, value = await self._events.get()
        if what == "item":
            if granted := self._window.take():
                self._connection.grant(self._ticket, granted)
            return cast(I, value)
        if what == "done":
            self._reply = value
            return None
        self._error = value
        raise value

    async def __aenter__(self) -> AsyncStream[I, R]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_ticket", None) is not None and not self.ended:
            self._connection.cancel(self._ticket)


class AsyncClient:
    """A connection to the kernel for asyncio. Arguments, errors and reconnecting as in client.Client.

    Connects in `async with` or `open()`. With `connection` it shares that of a sync client and leaves
    it open.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        label: str = "",
        timeout_s: float = CONNECT_TIMEOUT_S,
        connection: Connection | None = None,
    ) -> None:
        self.connection = connection or Connection(address, label, timeout_s)
        self._owner = connection is None

    async def open(self) -> AsyncClient:
        """Waits until the kernel answers. Raises DaemonUnreachable, VersionMismatch."""
        await asyncio.shield(asyncio.wrap_future(self.connection.greeted))
        return self

    @property
    def hello(self) -> table.HelloReply:
        """The kernel's latest greeting."""
        if (hello := self.connection.hello) is None:
            raise RuntimeError("not connected: use `async with AsyncClient()` or await open()")
        return hello

    @property
    def boot_id(self) -> str:
        """Changes when the kernel was restarted."""
        return self.hello.boot_id

    async def call(self, call: Answers[R], *, timeout_s: float | None = None) -> R:
        """Makes a syscall and returns its reply. Items of a stream are dropped.

        Raises the error the kernel answers with, ConnectionLost, DaemonUnreachable, and TimedOut after
        `timeout_s`. Cancelling the task cancels the call in the kernel.
        """
        request = cast(table.Call, call)
        window = 0 if request.Item is None else ITEM_WINDOW
        stream: AsyncStream[Any, R] = AsyncStream(self.connection, request, window)
        async with stream:
            try:
                async with asyncio.timeout(timeout_s):
                    return await stream.result()
            except TimeoutError:
                raise errors.TimedOut(f"{request.name}: no answer in {timeout_s:g} s") from None

    def stream(self, call: Streams[I, R], *, window: int = ITEM_WINDOW) -> AsyncStream[I, R]:
        """Starts a syscall that streams. At most `window` items are under way ahead of the reader."""
        return AsyncStream(self.connection, cast(table.Call, call), window)

    async def aclose(self) -> None:
        """Ends the session, unless the connection is another client's."""
        if self._owner:
            await asyncio.to_thread(self.connection.close)

    async def __aenter__(self) -> AsyncClient:
        try:
            return await self.open()
        except BaseException:
            await self.aclose()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        hello = self.connection.hello
        state = f"subject={hello.subject!r} boot_id={hello.boot_id!r}" if hello else "not connected"
        return f"<AsyncClient {self.connection.address} {state}>"
