"""A listener on a real socket: what it knows of its peers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from socket import create_server

import pytest
import zmq
from llmasos.kernel.keyring import Keyring
from llmasos.kernel.listener import MOST_MESSAGES, LocalListener, Phase, RemoteListener
from llmasos.kernel.tenants import Subject
from llmasos.syscalls.keys import KeyPair
from zmq.utils import z85


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


def ready(listener: LocalListener, timeout_ms: int = 1000) -> dict[object, int]:
    return dict(listener._poller.poll(timeout_ms))


def first(listener: LocalListener) -> tuple[bytes, Subject, list[bytes]]:
    """The next message, as soon as it comes."""
    until = time.monotonic() + 5
    while True:
        for message in listener.receive(ready(listener, 20)):
            return message
        listener.gone()
        assert time.monotonic() < until


def test_a_client_is_known_by_its_uid_and_missed_when_it_leaves(listener: LocalListener) -> None:
    socket = client(listener)
    socket.send_multipart([b"one", b"two"])
    session, subject, frames = first(listener)
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


def test_nobody_is_let_in_until_it_is_open_again(listener: LocalListener) -> None:
    socket = client(listener)
    socket.send(b"x")
    session, _, _ = first(listener)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    assert listener.shut() == [session]
    assert listener.phase is Phase.SHUT
    late = client(listener)
    late.send(b"late")
    assert not list(listener.receive(ready(listener, 50)))
    assert listener.open()
    assert first(listener)[2] == [b"late"]
    assert len(listener.drop()) == 1
    assert listener.phase is Phase.CLOSED
    for one in (socket, late):
        one.close()


@pytest.mark.parametrize("host", ["*", "lo", "localhost"])
def test_an_address_that_libzmq_spells_in_another_way_can_be_shut(tmp_path: Path, host: str) -> None:
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    public, secret = (z85.decode(key).hex() for key in zmq.curve_keypair())
    keys = Keyring(tmp_path / "keys")
    with zmq.Context() as context:
        made = RemoteListener(context, zmq.Poller(), f"tcp://{host}:{port}", KeyPair(public, secret), keys)
        assert made.open()
        assert made.shut() == []
        assert made.phase is Phase.SHUT
        made.drop()
        made._zap.close(0)
