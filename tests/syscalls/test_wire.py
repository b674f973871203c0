"""The wire: everything that travels comes back equal, and hostile bytes come back as errors."""

from __future__ import annotations

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

IDS = st.integers(1, wire.MAX_ID)
PIDS = st.integers(1, 2**53)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)
NAMES = st.text(max_size=60)
SAMPLING = st.builds(
    t.Sampling,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=64),
    logprobs=st.none() | st.integers(0, 20),
)
CLASSES = st.sampled_from(t.SchedClass)
CALLS = st.one_of(
    st.builds(table.Hello, version=st.integers(0, 9), table_hash=NAMES, label=st.sampled_from(["", "alice"])),
    st.builds(table.Whoami),
    st.builds(
        table.SpawnModel, model=NAMES, nice=st.integers(-20, 19), sched_class=st.sampled_from(t.SchedClass)
    ),
    st.builds(table.Infer, pid=st.none() | PIDS, tokens=TOKENS.map(t.pack_tokens), sampling=SAMPLING),
    st.builds(table.Kill, pid=PIDS, signal=st.sampled_from(t.Signal)),
    st.builds(table.Wait, pid=PIDS, timeout_s=st.none() | st.floats(0, 1000)),
    st.builds(table.Pull, model=NAMES, source=NAMES),
)


@given(id_=IDS, call=CALLS, credits_=st.integers(0, wire.MAX_CREDITS))
def test_requests_come_back_equal(id_: int, call: table.Call, credits_: int) -> None:
    assert wire.decode_request(wire.encode_request(id_, call, credits_)) == wire.Request(id_, call, credits_)


@given(id_=IDS, data=st.binary(max_size=2000))
def test_replies_with_payload_come_back_equal(id_: int, data: bytes) -> None:
    reply = table.ReadReply(size=len(data), data=data)
    [answer] = wire.decode_answers(wire.encode_reply(id_, table.Read, reply))
    assert (answer.kind, answer.id, wire.typed_reply(table.Read, answer)) == (wire.Kind.REPLY, id_, reply)


@given(tokens=TOKENS, seq=st.integers(0, 2**40))
def test_items_come_back_equal(tokens: list[int], seq: int) -> None:
    event = t.InferEvent(tokens=tokens, logprobs=[t.Chosen(-0.5, [t.TokenLogprob(n, -1.0)]) for n in tokens])
    [answer] = wire.decode_answers(wire.encode_items([(3, seq, event)]))
    assert (answer.seq, wire.typed_item(table.Infer, answer)) == (seq, event)


@pytest.mark.parametrize("kind", errors.BY_CODE.values(), ids=lambda k: k.__name__)
def test_errors_are_the_same_class_on_both_sides(kind: type[errors.LLMasOSError]) -> None:
    [answer] = wire.decode_answers(wire.encode_error(5, kind("what", hint="do", pid=7)))
    error = errors.from_wire(answer.body)
    assert type(error) is kind
    assert (str(error), error.details) == ("what (do)", {"pid": 7})


def test_error_numbers_are_unique() -> None:
    def tree(kind: type[errors.LLMasOSError]) -> list[type[errors.LLMasOSError]]:
        # Programs may have kinds of their own, which never travel.
        ours = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
        return [kind, *(c for child in ours for c in tree(child))]

    assert len(tree(errors.LLMasOSError)) == len(errors.BY_CODE)


def test_golden_bytes() -> None:
    """What is on the wire today; a change here is a new protocol version."""
    assert wire.encode_request(1, table.Kill(7), 0) == [
        bytes.fromhex("95 01 01 a4 6b696c6c 82 a3 706964 07 a6 7369676e616c a4 5445524d 00")
    ]
    assert wire.encode_credit(1, 16) == [bytes.fromhex("93 02 01 10")]
    assert wire.encode_cancel(300) == [bytes.fromhex("92 03 cd012c")]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"pid": "x"}, "pid"),
        ({"pid": 1, "sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"pid": 1, "sampling": {"stop_token_ids": [0] * 65}}, "sampling.stop_token_ids"),
        ({"pid": 1, "beams": {"num_beams": 17}}, "beams.num_beams"),
        ({"pid": 1, "temperatur": 1}, "temperatur"),
        ({"pid": 1, "tokens": [1]}, "tokens"),
        ({"pid": 0}, "pid"),
        ({"pid": 1, "max_tokens": -1}, "max_tokens"),
        ({"pid": 1, "nice": 20}, "nice"),
    ],
)
def test_a_bad_field_is_named(arguments: dict[str, object], field: str) -> None:
    refused = wire.decode_request([msgpack.packb([1, 9, "infer", arguments, 0])])
    assert isinstance(refused, wire.Refused)
    assert isinstance(refused.error, errors.InvalidArgument)
    assert (refused.id, refused.error.details["field"]) == (9, field)


@given(frames=st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=500)
def test_random_frames_are_refused_not_raised(frames: list[bytes]) -> None:
    assert isinstance(wire.decode_request(frames), wire.Refused | wire.Cancel | wire.Credit)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
)


@given(call=st.sampled_from(list(table.BY_NAME)), arguments=st.dictionaries(st.text(max_size=9), VALUES))
@settings(max_examples=100, deadline=None)
def test_random_arguments_are_typed_or_refused(call: str, arguments: dict[str, object]) -> None:
    frames = [msgpack.packb([1, 1, call, arguments, 0])]
    decoded = wire.decode_request(frames)
    if isinstance(decoded, wire.Request):
        assert wire.decode_request(wire.encode_request(1, decoded.call, 0)) == decoded


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        msgpack.packb([msgpack.ExtType(5, b"x")]),
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb([{}] * 1025),
        msgpack.packb({1: 2}),
        b"\x95" + b"\xc0" * 70000,
        b"",
    ],
    ids=range(10),
)
def test_bombs_are_refused(frame: bytes) -> None:
    assert isinstance(wire.decode_request([frame]), wire.Refused)


@given(
    messages=st.lists(st.binary(max_size=100), max_size=10),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=30),
)
def test_bus_messages_survive_any_cutting(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(wire.frame, messages))
    reader, got = wire.FrameReader(), []
    for n in range(10**6):
        size = cuts[n % len(cuts)]
        if not stream:
            break
        got += reader.feed(stream[:size])
        stream = stream[size:]
    assert got == messages


def test_a_bus_message_that_claims_too_much_is_refused() -> None:
    with pytest.raises(errors.BadFrame):
        wire.FrameReader().feed(b"\xff\xff\xff\xff")


@given(tokens=TOKENS)
def test_tokens_pack_and_unpack(tokens: list[int]) -> None:
    assert t.unpack_tokens(t.pack_tokens(tokens)) == tokens


def test_the_table_is_complete() -> None:
    """Every call has its types, a docstring, and a name of its own; the hash is stable within a process."""
    assert len(table.BY_NAME) >= 21
    for name, call in table.BY_NAME.items():
        assert name == call.name
        assert call.__doc__
        assert issubclass(call.Reply, t.Wire)
        assert not call.payload or call.payload in {f.name for f in msgspec.structs.fields(call)}
    assert len(table.table_hash()) == 16
