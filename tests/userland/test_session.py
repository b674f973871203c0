"""The I/O-free session: greeting, streams, credits, and what survives a broken connection."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t
from llmasos.userland.session import (
    MOST_WORK,
    Broken,
    Failed,
    Forgotten,
    Greeted,
    Item,
    Phase,
    Refused,
    Replied,
    Session,
    Window,
)


def greet(session: Session, boot_id: str = "b1") -> list[object]:
    session.online()
    (hello,) = session.outgoing()
    request = wire.decode_request(hello)
    assert isinstance(request, wire.Request)
    reply = table.HelloReply(table.VERSION, table.table_hash(), boot_id, "me", 2**20)
    return session.receive(wire.encode_reply(request.id, table.Hello, reply))


def item(id_: int, seq: int) -> list[bytes]:
    return wire.encode_items([(id_, seq, t.InferEvent([seq]))])


def infer_reply() -> table.InferReply:
    return table.InferReply(1, t.Finish.STOP, 1, 0, 1, 2, 0)


@pytest.fixture
def session() -> Session:
    made = Session()
    greet(made)
    return made


def test_nothing_is_sent_before_the_kernel_greets() -> None:
    session = Session(label="alice")
    session.request(table.Ps())
    assert session.outgoing() == []
    session.online()
    (frames,) = session.outgoing()
    assert wire.decode_request(frames).call == table.Hello(  # type: ignore[union-attr]
        table.VERSION, table.table_hash(), "alice"
    )
    assert greet(session) == [Greeted(session.hello, False)]
    (frames,) = session.outgoing()
    assert wire.decode_request(frames).call == table.Ps()  # type: ignore[union-attr]


def test_a_refused_hello_says_why() -> None:
    session = Session()
    session.online()
    (frames,) = session.outgoing()
    id_ = wire.decode_request(frames).id
    assert id_ is not None
    (event,) = session.receive(wire.encode_error(id_, errors.VersionMismatch("too old", hint="update")))
    assert isinstance(event, Refused)
    assert isinstance(event.error, errors.VersionMismatch)
    assert session.phase is Phase.OFFLINE


def test_a_reply_ends_a_call_and_carries_its_type(session: Session) -> None:
    id_ = session.request(table.Ps())
    assert session.receive(wire.encode_reply(id_, table.Ps, table.PsReply([], False))) == [
        Replied(id_, table.PsReply([], False))
    ]
    assert not session.waiting


def test_an_error_arrives_as_its_class(session: Session) -> None:
    id_ = session.request(table.Kill(7))
    error = errors.NoSuchProcess("no process 7", hint="see ps", pid=7)
    (event,) = session.receive(wire.encode_error(id_, error))
    assert isinstance(event, Failed)
    assert isinstance(event.error, errors.NoSuchProcess)
    assert event.error.details == {"pid": 7}


@pytest.mark.parametrize("wrong", [0, 2, 7])
def test_a_gap_or_a_duplicate_breaks_the_connection(session: Session, wrong: int) -> None:
    id_ = session.request(table.Infer(1), window=10)
    assert session.receive(item(id_, 0)) == [Item(id_, t.InferEvent([0]))]
    (event,) = session.receive(item(id_, wrong))
    assert isinstance(event, Broken)
    assert isinstance(event.error, errors.ConnectionLost)


def test_items_above_the_credits_break_the_connection(session: Session) -> None:
    id_ = session.request(table.Infer(1), window=2)
    session.receive(item(id_, 0))
    session.receive(item(id_, 1))
    assert isinstance(session.receive(item(id_, 2))[0], Broken)


@pytest.mark.parametrize("frames", [[b"\xc1"], [b""], [b"\x93\x04\x63\x80"], [b"a", b"b", b"c"]])
def test_nonsense_breaks_the_connection_and_nothing_else(session: Session, frames: list[bytes]) -> None:
    assert isinstance(session.receive(frames)[0], Broken)


def test_a_reply_of_the_wrong_shape_is_refused(session: Session) -> None:
    id_ = session.request(table.Ps())
    assert isinstance(session.receive([msgspec.msgpack.encode([4, id_, {"processes": 3}])])[0], Broken)


def asked(frames: list[bytes]) -> wire.Request:
    request = wire.decode_request(frames)
    assert isinstance(request, wire.Request)
    return request


def test_after_a_break_what_was_under_way_is_asked_again_under_its_id(session: Session) -> None:
    calls: list[table.Call] = [table.Stat("/models"), table.Kill(3), table.Infer(3, tokens=b"abcd")]
    ids = [session.request(call, window=4) for call in calls]
    session.outgoing()
    assert session.offline() == []
    assert greet(session, "b2") == [Greeted(session.hello, True)]
    again = [asked(frames) for frames in session.outgoing()]
    assert [(request.id, request.call) for request in again] == list(zip(ids, calls, strict=True))


def test_an_infer_goes_on_behind_the_tokens_that_arrived(session: Session) -> None:
    id_ = session.request(table.Infer(3, tokens=t.pack_tokens([7])), window=4)
    session.outgoing()
    session.receive(wire.encode_items([(id_, 0, t.InferEvent(prompt_logprobs=[t.Chosen(-1.0)]))]))
    session.receive(wire.encode_items([(id_, 1, t.InferEvent([5, 6]))]))
    session.offline()
    session.grant(id_, 3)  # the reader goes on with what it has
    greet(session, "b2")
    (frames,) = session.outgoing()
    assert asked(frames).call == table.Infer(3, tokens=t.pack_tokens([7, 5, 6]), seen=2, scored=1, seq=2)
    assert asked(frames).credits == 4 + 3 - 2
    assert session.receive(item(id_, 2)) == [Item(id_, t.InferEvent([2]))]
    session.offline()
    greet(session, "b3")
    (frames,) = session.outgoing()
    assert asked(frames).call == table.Infer(3, tokens=t.pack_tokens([7, 5, 6, 2]), seen=3, scored=1, seq=3)


def test_other_streams_begin_anew(session: Session) -> None:
    pull = session.request(table.Pull("m"), window=4)
    log = session.request(table.Dmesg(follow=True), window=4)
    session.outgoing()
    for id_, event in ((pull, t.PullEvent("download")), (log, t.LogLine(9, 0.0, "info", "up"))):
        session.receive(wire.encode_items([(id_, 0, event)]))
    session.offline()
    greet(session)  # the same kernel: its log goes on
    assert [asked(frames).call for frames in session.outgoing()] == [
        table.Pull("m"),
        table.Dmesg(9, True),
    ]
    session.receive(wire.encode_items([(log, 0, t.LogLine(10, 0.0, "info", "on"))]))
    session.offline()
    greet(session, "b2")
    assert asked(session.outgoing()[1]).call == table.Dmesg(0, True)


def test_a_cancel_is_not_lost_in_a_break(session: Session) -> None:
    id_ = session.request(table.Infer(3), window=4)
    session.outgoing()
    session.offline()
    assert session.cancel(id_) == []
    greet(session, "b2")
    _, cancel = session.outgoing()
    assert wire.decode_request(cancel) == wire.Cancel(id_)


def test_a_name_that_was_removed_before_the_break_is_removed(session: Session) -> None:
    gone = errors.NoSuchModel("no model m")
    first = session.request(table.Unlink("/models/m"))
    (event,) = session.receive(wire.encode_error(first, gone))
    assert isinstance(event, Failed)
    again = session.request(table.Unlink("/models/m"))
    session.outgoing()
    session.offline()
    greet(session, "b2")
    assert session.receive(wire.encode_error(again, gone)) == [Replied(again, table.Done())]


def test_a_shutdown_is_not_asked_for_twice(session: Session) -> None:
    id_ = session.request(table.Shutdown())
    session.outgoing()
    (event,) = session.offline()
    assert isinstance(event, Failed)
    assert (event.id, type(event.error)) == (id_, errors.ConnectionLost)


def test_a_broken_protocol_fails_what_was_sent(session: Session) -> None:
    id_ = session.request(table.Ps())
    session.outgoing()
    (event,) = session.broken("protocol error: it is")
    assert isinstance(event, Failed)
    assert (event.id, type(event.error)) == (id_, errors.ConnectionLost)


def test_what_was_not_sent_yet_survives_a_break_whatever_it_is(session: Session) -> None:
    session.offline()
    id_ = session.request(table.Kill(3))
    assert session.offline() == []
    greet(session)
    (frames,) = session.outgoing()
    assert wire.decode_request(frames).id == id_


def test_the_same_boot_is_not_taken_for_a_restart(session: Session) -> None:
    session.offline()
    assert greet(session, "b1") == [Greeted(session.hello, False)]


def test_cancel_is_sent_only_for_what_the_kernel_knows(session: Session) -> None:
    id_ = session.request(table.Infer(1), window=1)
    session.outgoing()
    assert session.cancel(id_) == []
    assert wire.decode_request(session.outgoing()[0]) == wire.Cancel(id_)
    session.receive(wire.encode_reply(id_, table.Infer, infer_reply()))
    assert session.cancel(id_) == []
    assert session.outgoing() == []
    session.offline()
    unsent = session.request(table.Infer(1), window=1)
    (event,) = session.cancel(unsent)
    assert isinstance(event, Failed)


def test_a_call_that_cannot_be_encoded_is_the_callers_error(session: Session) -> None:
    with pytest.raises(errors.InvalidArgument):
        session.request(table.Infer(1, tokens=b"x" * (wire.MAX_PAYLOAD + 1)))
    with pytest.raises(errors.InvalidArgument):
        session.request(table.Kill(2**80))
    assert not session.waiting


def test_abandon_fails_everything(session: Session) -> None:
    ids = {session.request(table.Ps()), session.request(table.Kill(1))}
    error = errors.DaemonUnreachable("gone")
    assert {event.id for event in session.abandon(error) if isinstance(event, Failed)} == ids
    assert not session.waiting


@given(window=st.integers(1, 100), moves=st.lists(st.booleans(), max_size=400))
def test_credits_bound_what_is_unread_and_never_run_dry(window: int, moves: list[bool]) -> None:
    """True: the kernel sends an item if it may; False: the reader takes one if there is one."""
    session, reader = Session(), Window(window)
    greet(session)
    id_ = session.request(table.Infer(1), window=window)
    session.outgoing()
    credit, sent, unread = window, 0, 0
    for kernel_moves in moves:
        if kernel_moves and credit:
            assert session.receive(item(id_, sent)) == [Item(id_, t.InferEvent([sent]))]
            credit, sent, unread = credit - 1, sent + 1, unread + 1
        elif not kernel_moves and unread:
            unread -= 1
            session.grant(id_, reader.take())
        for frames in session.outgoing():
            grant = wire.decode_request(frames)
            assert isinstance(grant, wire.Credit)
            credit += grant.n
        assert credit + unread <= window
        assert credit or unread  # a reader that reads on is never stalled for ever


def test_no_more_work_is_asked_for_than_the_kernel_takes(session: Session) -> None:
    def asked() -> list[int | None]:
        return [wire.decode_request(frames).id for frames in session.outgoing()]

    ids = [session.request(table.Infer("m", max_tokens=1)) for _ in range(MOST_WORK + 3)]
    kill = session.request(table.Kill(7))
    assert MOST_WORK < wire.MAX_REQUESTS
    assert asked() == [*ids[:MOST_WORK], kill]  # which does not wait for work
    (event,) = session.cancel(ids[MOST_WORK])
    assert isinstance(event, Failed)
    session.receive(wire.encode_reply(ids[5], table.Infer, infer_reply()))
    assert asked() == [ids[MOST_WORK + 1]]
    session.offline()
    greet(session)
    again = asked()
    assert len(again) == MOST_WORK + 1
    for id_ in ids[:3]:
        session.receive(wire.encode_error(id_, errors.QueueFull("no")))
    assert asked() == [ids[-1]]
    assert {*again, ids[-1]} == {*ids, kill} - {ids[5], ids[MOST_WORK]}


def test_a_kernel_that_forgot_the_connection_is_asked_over_another(session: Session) -> None:
    id_ = session.request(table.Ps())
    session.outgoing()
    assert session.receive(wire.encode_error(id_, errors.NotGreeted("hello first"))) == [Forgotten()]
    assert session.offline() == []
    greet(session)
    assert [wire.decode_request(frames).id for frames in session.outgoing()] == [id_]
