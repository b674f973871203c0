"""How bytes travel: envelopes, limits and the decoding of hostile frames. No I/O.

A message is one control frame of msgpack, at most MAX_CONTROL bytes, and at most one payload frame of raw
bytes, at most MAX_PAYLOAD, that msgpack never parses. The frame size is the memory limit: msgpack can blow
a frame up about 72 times (measured), so control frames are small.

    client -> kernel   [REQUEST, id, name, arguments, credits]   [CREDIT, id, n]   [CANCEL, id]
    kernel -> client   [REPLY, id, reply]   [ERROR, id, error]   [ITEMS, [id, seq, item], …]

Every REQUEST gets exactly one REPLY or ERROR, after all its items. Items count from 0 and stop when the
credits are used up, until CREDIT gives more. What a step has made for one client's streams travels together.

The driver bus uses `FrameReader`/`frame`: a little-endian u32 length before each msgpack message.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import msgpack
import msgspec

from . import errors
from .bounds import refused
from .table import BY_NAME, Call, reply_payload
from .types import Wire

MAX_CONTROL = 64 * 1024
MAX_PAYLOAD = 1024 * 1024
MAX_REPLY = 16 * 1024 * 1024  # control frames from the kernel, which the client trusts more
MAX_CREDITS = 4096
MAX_REQUESTS = 1024  # open ones of a connection, unless the kernel is told otherwise
MAX_ID = 2**53

# Of a control frame: no legitimate argument has more items than this.
_MAX_ITEMS = 1024
_MAX_STRING = 48 * 1024


class Kind(enum.IntEnum):
    REQUEST = 1
    CREDIT = 2
    CANCEL = 3
    REPLY = 4
    ERROR = 5
    ITEMS = 6


class Request(msgspec.Struct, frozen=True):
    """A validated syscall of one client; `id` is the client's, `credits` how many items it can take."""

    id: int
    call: Call
    credits: int


class Credit(msgspec.Struct, frozen=True):
    id: int
    n: int


class Cancel(msgspec.Struct, frozen=True):
    id: int


class Refused(msgspec.Struct, frozen=True):
    """A frame that cannot be served. `id` is None when the frame does not even name a request."""

    id: int | None
    error: errors.InvalidRequest


FromClient = Request | Credit | Cancel | Refused


def _no_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _unpack(control: bytes, limit: int, items: int) -> Any:
    if len(control) > limit:
        raise errors.BadFrame(f"control frame of {len(control)} bytes, limit {limit}")
    try:
        return msgpack.unpackb(
            control,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_ext,
            max_array_len=items,
            max_map_len=_MAX_ITEMS,
            max_str_len=limit if items > _MAX_ITEMS else _MAX_STRING,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as problem:
        raise errors.BadFrame(f"not a msgpack message within the limits: {type(problem).__name__}") from None


def decode_request(frames: list[bytes]) -> FromClient:
    """What a client sent. Never raises: everything that cannot be served becomes Refused."""
    try:
        if not 1 <= len(frames) <= 2:
            raise errors.BadFrame(f"message of {len(frames)} frames, 1 or 2 allowed")
        body = _unpack(frames[0], MAX_CONTROL, _MAX_ITEMS)
    except errors.InvalidRequest as refusal:
        return Refused(None, refusal)
    match body:
        case [Kind.CREDIT, int(id_), int(n)] if _is_id(id_) and 0 < n <= MAX_CREDITS and len(frames) == 1:
            return Credit(id_, n)
        case [Kind.CANCEL, int(id_)] if _is_id(id_) and len(frames) == 1:
            return Cancel(id_)
        case [Kind.REQUEST, int(id_), str(name), dict(arguments), int(credits_)] if _is_id(id_):
            try:
                if not 0 <= credits_ <= MAX_CREDITS:
                    raise errors.InvalidArgument(f"credits must be 0 to {MAX_CREDITS}", field="credits")
                return Request(id_, _call(name, arguments, frames[1:]), credits_)
            except errors.InvalidRequest as refusal:
                return Refused(id_, refusal)
        case [_, int(id_), *_] if _is_id(id_):
            return Refused(id_, errors.BadFrame("unknown envelope"))
        case _:
            return Refused(None, errors.BadFrame("unknown envelope"))


def _is_id(value: int) -> bool:
    return 0 < value <= MAX_ID and not isinstance(value, bool)


def _call(name: str, arguments: dict[str, Any], payload: list[bytes]) -> Call:
    if (kind := BY_NAME.get(name)) is None:
        raise errors.UnknownCall(f"no syscall {name[:64]!r}", hint="see `llsh help`")
    if kind.payload in arguments:
        raise errors.InvalidArgument(f"{kind.payload} travels as the second frame", field=kind.payload)
    if payload and not kind.payload:
        raise errors.InvalidArgument(f"{name} takes no payload frame", field="payload")
    if payload and len(payload[0]) > MAX_PAYLOAD:
        raise errors.InvalidArgument(f"payload over {MAX_PAYLOAD} bytes", field=kind.payload)
    try:
        call = msgspec.convert(arguments, kind)
    except msgspec.ValidationError as problem:
        field, words = refused(problem, kind)
        if not field:
            raise errors.InvalidArgument(f"{name}: {problem}", field=_quoted(str(problem))) from None
        raise errors.InvalidArgument(f"{name}: {field} {words}", field=field) from None
    return msgspec.structs.replace(call, **{kind.payload: payload[0]}) if payload else call


def _quoted(text: str) -> str:
    """The field that a msgspec validation error quotes: one that is missing, or unknown."""
    return text.split("`")[1] if text.count("`") >= 2 else ""


def _control(body: list[Any]) -> bytes:
    return msgspec.msgpack.encode(body)


def _split(struct: Wire, payload: str) -> tuple[dict[str, Any], list[bytes]]:
    fields = msgspec.structs.asdict(struct)
    return fields, [fields.pop(payload)] if payload else []


def encode_request(id_: int, call: Call, credits_: int) -> list[bytes]:
    arguments, payload = _split(call, call.payload)
    control = _control([Kind.REQUEST, id_, call.name, arguments, credits_])
    if len(control) > MAX_CONTROL or any(len(frame) > MAX_PAYLOAD for frame in payload):
        raise errors.InvalidArgument(f"{call.name}: request is too big for one message", field=call.payload)
    return [control, *(frame for frame in payload if frame)]


def encode_credit(id_: int, n: int) -> list[bytes]:
    return [_control([Kind.CREDIT, id_, n])]


def encode_cancel(id_: int) -> list[bytes]:
    return [_control([Kind.CANCEL, id_])]


def encode_reply(id_: int, call: type[Call], reply: Wire) -> list[bytes]:
    body, payload = _split(reply, reply_payload(call))
    return [_control([Kind.REPLY, id_, body]), *payload]


def encode_error(id_: int, error: errors.LLMasOSError) -> list[bytes]:
    """`id_` 0 answers a frame that named no request."""
    return [_control([Kind.ERROR, id_, errors.to_wire(error)])]


def encode_items(items: Sequence[tuple[int, int, Wire]]) -> list[bytes]:
    """Stream items as (request id, sequence number, item)."""
    return [_control([Kind.ITEMS, *items])]


class FromKernel(msgspec.Struct, frozen=True):
    """A message of the kernel, its body not yet typed (the session knows which call `id` is)."""

    kind: Kind
    id: int
    seq: int
    body: dict[str, Any]
    payload: bytes


def decode_answers(frames: list[bytes]) -> list[FromKernel]:
    """What the kernel sent: one answer, or any number of items. Raises BadFrame."""
    if not 1 <= len(frames) <= 2:
        raise errors.BadFrame(f"message of {len(frames)} frames, 1 or 2 allowed")
    payload = frames[1] if len(frames) == 2 else b""
    match _unpack(frames[0], MAX_REPLY, MAX_REPLY):
        case [Kind.REPLY | Kind.ERROR as kind, int(id_), dict(body)]:
            return [FromKernel(Kind(kind), id_, 0, body, payload)]
        case [Kind.ITEMS, *items] if not payload:
            return [_item(item) for item in items]
        case _:
            raise errors.BadFrame("unknown envelope")


def _item(item: Any) -> FromKernel:
    match item:
        case [int(id_), int(seq), dict(body)]:
            return FromKernel(Kind.ITEMS, id_, seq, body, b"")
        case _:
            raise errors.BadFrame("unknown envelope of an item")


def typed_reply(call: type[Call], answer: FromKernel) -> Wire:
    """The reply struct of `call`. Raises BadFrame when the kernel's answer does not fit."""
    body = {**answer.body, field: answer.payload} if (field := reply_payload(call)) else answer.body
    return _typed(body, call.Reply)


def typed_item(call: type[Call], answer: FromKernel) -> Wire:
    if call.Item is None:
        raise errors.BadFrame(f"{call.name} has no stream")
    return _typed(answer.body, call.Item)


def _typed(body: dict[str, Any], kind: type[Wire]) -> Wire:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as problem:
        raise errors.BadFrame(f"{kind.__name__}: {problem}") from None


MAX_BUS_FRAME = 256 * 1024 * 1024


def frame(message: bytes) -> bytes:
    """A driver-bus message with its length before it."""
    return len(message).to_bytes(4, "little") + message


class FrameReader:
    """Cuts a byte stream of the driver bus into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes. Raises BadFrame above MAX_BUS_FRAME."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if size > MAX_BUS_FRAME:
                raise errors.BadFrame(f"driver-bus message of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            messages.append(bytes(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
        return messages
