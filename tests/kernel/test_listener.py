"""A listener on a real socket: what it knows of its peers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from llmasos.kernel.listener import MOST_MESSAGES, LocalListener, Phase


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[LocalListener]:
    context = zmq.Context()
    made = LocalListener(context, zmq.Poller(), f"ipc://{tmp_path}/s", "", frozenset())
    assert made.open()
    yield made
    made.drop()
    context.destroy(0)


def client(listener: LocalListener) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(listener.address)
    return socket


def ready(listener: LocalListener) -> dict[object, int]:
    return dict(listener._poller.poll(1000))


def test_a_client_is_known_by_its_uid_and_missed_when_it_leaves(listener: LocalListener) -> None:
    socket = client(listener)
    socket.send_multipart([b"one", b"two"])
    ready(listener)
    time.sleep(0.05)
    [(session, subject, frames)] = listener.receive(ready(listener))
    assert (subject.uid, subject.pid, frames) == (os.getuid(), os.getpid(), [b"one", b"two"])
    assert listener.send(session, [b"answer"])
    assert socket.recv() == b"answer"
    socket.close()
    until = time.monotonic() + 2
    while not (gone := listener.gone()):
        assert time.monotonic() < until
    assert gone == [session]


@pytest.mark.parametrize("seen", [True, False], ids=["known before", "never seen"])
def test_what_a_client_sent_before_it_left_comes_to_nothing(listener: LocalListener, seen: bool) -> None:
    """The end is told before the messages are read: they must not open a session that nobody ends."""
    socket = client(listener)
    count = MOST_MESSAGES - 10
    for _ in range(count):
        socket.send(b"x")
    ready(listener)
    time.sleep(0.1)
    if seen:
        next(iter(listener.receive(ready(listener))))
    socket.close()
    time.sleep(0.1)
    assert len(listener.gone()) == int(seen)
    assert not list(listener.receive(ready(listener)))
    assert not listener.gone()


def test_who_is_connected_stays_while_nobody_is_let_in(listener: LocalListener) -> None:
    socket = client(listener)
    socket.send(b"x")
    ready(listener)
    time.sleep(0.05)
    [(session, _, _)] = listener.receive(ready(listener))
    listener.shut()
    assert listener.phase is Phase.SHUT
    late = client(listener)
    late.send(b"late")
    assert listener.send(session, [b"still here"])
    assert socket.poll(1000)
    time.sleep(0.05)
    assert not list(listener.receive(ready(listener) if listener._poller.poll(0) else {}))
    assert listener.open()
    ready(listener)
    time.sleep(0.3)
    assert [frames for _, _, frames in listener.receive(ready(listener))] == [[b"late"]]
    assert listener.drop() != []
    assert listener.phase is Phase.CLOSED
    for one in (socket, late):
        one.close()
