"""One `encode`: texts that an encoder reads whole, each by itself; its steps, and how it is answered.

It is the work of a process that lives as long as the call, so it queues, is charged, stopped and killed as
any other. An encoder keeps nothing between texts, so there are no blocks. A step has as many whole texts as
its time allows; texts are sent and booked in order, and those of a worker that died are sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from llmasos.drivers import base
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from . import adapters, planning, scheduler
from .devices import Device, Flight, Pool, Texts
from .effects import ToWorker
from .process import CLASS_RANK, Process
from .sessions import Request

if TYPE_CHECKING:
    from .loop import Kernel
    from .metrics import Tally

MOST_TOKENS = 8192
"""A step has no more, however fast the device: what it needs for the vectors between layers is bounded."""

MOST_HELD = 128 << 20
"""Bytes that the encodes of a tenant, texts and rows, may take of the kernel at once."""

ASSUMED_WIDTH = 1024
"""Of a model that is not resident yet."""


@dataclass(slots=True, eq=False)
class Encoding:
    """`tokens` (packed u32) are the texts, `ends` where each ends, in tokens. Of them `sent` are with the
    device or computed, and `done` computed: their rows are in `rows`."""

    request: Request
    encodes: t.Encodes
    tokens: memoryview
    ends: list[int]
    pairs: list[int]
    tally: Tally
    sent: int = 0
    done: int = 0
    rows: bytearray = field(default_factory=bytearray)
    crashes: int = 0
    arrived: float = 0.0

    def size(self, first: int, count: int) -> int:
        """Tokens of `count` texts from `first` on."""
        return self._end(first + count) - self._end(first)

    def within(self, first: int, room: int) -> int:
        """How many texts from `first` on have no more than `room` tokens."""
        limit, end = self._end(first) + room, first
        while end < len(self.ends) and self.ends[end] <= limit:
            end += 1
        return end - first

    def packed(self, first: int, count: int) -> memoryview:
        return self.tokens[4 * self._end(first) : 4 * self._end(first + count)]

    @property
    def total(self) -> int:
        """Tokens of all texts."""
        return self.ends[-1]

    @property
    def rows_made(self) -> int:
        """How many rows all of it makes."""
        return self.total if self.encodes is t.Encodes.TOKENS else len(self.ends)

    @property
    def computed(self) -> int:
        return self._end(self.done)

    @property
    def waits(self) -> bool:
        """Whether there are texts to send."""
        return self.sent < len(self.ends)

    def lose(self) -> None:
        """The device is gone, with what was sent."""
        self.sent = self.done

    def _end(self, count: int) -> int:
        return self.ends[count - 1] if count else 0


def encode(kernel: Kernel, request: Request, call: table.Encode, process: Process) -> None:
    """Lets a new process do what `call` asks for, and end with it. Raises what `table.Encode` names."""
    ends = list(accumulate(call.lengths))
    encoding = Encoding(
        request,
        call.encodes,
        memoryview(call.tokens),
        ends,
        list(call.pairs) or [0] * len(ends),
        kernel.metrics.came(process),
        arrived=kernel.now(),
    )
    process.encoding = encoding
    pool = process.pool

    if _held(kernel, process.tenant) > MOST_HELD:
        busy = errors.QueueFull(
            f"{process.tenant} has {MOST_HELD >> 20} MB of texts and vectors waiting",
            hint="send less at once, wait for answers",
        )
        kernel.fail(process, busy)
        return

    def start(error: errors.LLMasOSError | None) -> None:
        if process.encoding is not encoding:
            return
        try:
            if error is not None:
                raise error
            if process.adapter is not None:
                raise errors.UnsupportedModel(
                    f"{process.model} is an adapter of an encoder, which is not computed",
                    hint="merge it into a model of its own: llsh merge",
                )
            _admit(pool, encoding, call)
        except errors.LLMasOSError as refusal:
            kernel.fail(process, refusal)
            return
        pool.queue.touch(process)

    def late() -> None:
        kernel.fail(
            process, errors.TimedOut(f"not encoded within {call.deadline_ms} ms", field="deadline_ms")
        )

    if call.deadline_ms is not None:
        call_off = kernel.at(kernel.now() + call.deadline_ms / 1000, late)
        kernel.sessions.on_close(request, call_off)
    kernel.sessions.on_close(request, lambda: adapters.forgo(pool, None, start))
    kernel.sessions.on_cancel(request, lambda: kernel.fail(process, errors.Unavailable("cancelled")))
    pool.when_ready(start)


def _held(kernel: Kernel, tenant: str) -> int:
    """Bytes that the encodes of a tenant take, or will."""
    held = 0
    for pool in (pool for device in kernel.devices.values() for pool in device.pools):
        width = pool.loaded.width if pool.loaded else ASSUMED_WIDTH
        for process in pool.processes if width else ():
            if process.encoding is not None and process.tenant == tenant:
                held += len(process.encoding.tokens) + 4 * width * process.encoding.rows_made
    return held


def check(call: table.Encode) -> None:
    """Raises InvalidArgument for what no model could encode."""
    if not call.lengths:
        raise errors.InvalidArgument("there is nothing to encode", field="lengths")
    if 4 * sum(call.lengths) != len(call.tokens):
        raise errors.InvalidArgument("tokens are packed u32, as many as the lengths say", field="tokens")
    if call.pairs and (
        len(call.pairs) != len(call.lengths)
        or any(second >= length for second, length in zip(call.pairs, call.lengths, strict=True))
    ):
        raise errors.InvalidArgument("a pair has its second text within its sequence", field="pairs")


_DOES = {
    None: "generates text",
    t.Encodes.EMBED: "embeds texts",
    t.Encodes.CLASSIFY: "classifies texts",
    t.Encodes.TOKENS: "labels tokens",
}


def _admit(pool: Pool, encoding: Encoding, call: table.Encode) -> None:
    """Raises what keeps the model from encoding this."""
    loaded = pool.loaded
    assert loaded is not None
    if loaded.encodes is not call.encodes:
        raise errors.UnsupportedModel(
            f"{pool.model} {_DOES[loaded.encodes]}; this takes a model that {_DOES[call.encodes]}",
            hint=t.ENCODED_BY[loaded.encodes] if loaded.encodes else "choose another model: llsh list",
        )
    if (longest := max(call.lengths)) > loaded.context_length:
        raise errors.ContextOverflow(
            f"text {call.lengths.index(longest)} has {longest} tokens, the model's context is "
            f"{loaded.context_length}",
            hint="shorten it or cut it in pieces",
            context_length=loaded.context_length,
            tokens=longest,
            index=call.lengths.index(longest),
        )
    if max(t.unpack_tokens(call.tokens)) >= loaded.vocab_size:
        raise errors.InvalidArgument(f"token ids go up to {loaded.vocab_size - 1}", field="tokens")
    size = 4 * loaded.width * encoding.rows_made
    if size > table.MAX_ENCODED:
        raise errors.InvalidArgument(
            f"the reply would have {size} bytes, at most {table.MAX_ENCODED} are sent",
            hint="send fewer sequences at once",
            field="lengths",
        )


# Steps


def plan(kernel: Kernel, device: Device, pool: Pool, taken: Iterator[Process]) -> bool:
    """Sends the next step, of processes of one class. False: there is nothing to send.

    Who is not alone gets half of what is left, so that a few texts need not wait for many; what then is left
    goes to the first ones."""
    budget = _budget(kernel, device, pool)
    chosen: dict[Process, int] = {}  # texts of each
    rank: int | None = None

    def give(process: Process, room: int) -> None:
        nonlocal budget
        encoding, had = process.encoding, chosen.get(process, 0)
        assert encoding is not None
        first = encoding.sent + had
        count = encoding.within(first, room)
        if not (count or chosen):
            count = 1  # however long it is
        if count:
            chosen[process] = had + count
            budget -= encoding.size(first, count)

    alone, seen = len(pool.queue) == 1, 0
    for process in taken:
        if rank is not None and CLASS_RANK[process.sched_class] != rank:
            break
        rank, seen = CLASS_RANK[process.sched_class], seen + 1
        give(process, budget if alone else budget // 2)
        if budget <= 0 or seen - len(chosen) >= scheduler.MOST_REFUSALS:
            break
    for process in list(chosen):
        give(process, budget)
    if not chosen:
        return False
    _send(kernel, device, pool, chosen)
    return True


def _budget(kernel: Kernel, device: Device, pool: Pool) -> int:
    """Tokens of a step: where people wait for a decoder's tokens beside it, of a short one."""
    longest_s = kernel.config.step_ms / 1000
    if any(other.admitted for other in device.pools):
        longest_s = min(longest_s, planning.SHORT_S)
    return min(kernel.config.step_tokens or MOST_TOKENS, MOST_TOKENS, pool.pace.tokens_within(0, longest_s))


def _send(kernel: Kernel, device: Device, pool: Pool, chosen: dict[Process, int]) -> None:
    assert device.worker is not None
    texts, tokens, now = [], 0, kernel.now()
    packed, lengths, pairs = bytearray(), list[int](), list[int]()
    for process, count in chosen.items():
        encoding = process.encoding
        assert encoding is not None
        first = encoding.sent
        packed += encoding.packed(first, count)
        lengths.extend(encoding.size(index, 1) for index in range(first, first + count))
        pairs.extend(encoding.pairs[first : first + count])
        texts.append(Texts(process, encoding, first, count))
        size = encoding.size(first, count)
        tokens += size
        scheduler.charge(process, pool.pace.cost(size) + pool.pace.fixed / len(chosen), now)
    order = base.Encode(next(kernel.numbers), pool.handle, bytes(packed), lengths, pairs)
    flight = Flight(order.ticket, pool, [], [], set(), 0, tokens, 1, texts)
    kernel.recorder.sent(device.name, flight, len(pool.queue))
    for one in texts:
        if not one.encoding.tally.planned:
            kernel.metrics.encoding(one.encoding)
        one.encoding.sent += one.count
        one.process.flights += 1
    kernel.effects.append(ToWorker(device.worker, order))
    planning.sent(kernel, device, flight)


def landed(kernel: Kernel, device: Device, flight: Flight, answer: base.Encoded) -> None:
    """Books the rows of a step that has been taken off the device, and answers those that are complete."""
    kernel.recorder.landed(flight.ticket, answer.seconds, "done")
    device.worked = kernel.now()
    device.step_seconds.append(answer.seconds)
    kernel.metrics.step(device.name, 1, answer.seconds)
    flight.pool.pace.learn(0, flight.tokens, answer.seconds)
    at = 0
    for one in flight.texts:
        size = row_bytes(flight.pool, one)
        rows, at = memoryview(answer.data)[at : at + size], at + size
        encoding = one.encoding
        if one.process.encoding is encoding:
            encoding.rows += rows
            encoding.done += one.count
            if encoding.done == len(encoding.ends):
                kernel.processes.end_encoding(one.process)


def row_bytes(pool: Pool, texts: Texts) -> int:
    """Bytes of the rows of some texts."""
    assert pool.loaded is not None
    by_token = pool.loaded.encodes is t.Encodes.TOKENS
    rows = texts.encoding.size(texts.first, texts.count) if by_token else texts.count
    return 4 * pool.loaded.width * rows
