"""Hostile bytes at the socket: the kernel lives, and answers the next good client at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import msgpack
import pytest
import zmq
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t

BOMBS = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 60000,
    msgpack.packb([{}] * 60000),
    msgpack.packb([[{}] * 1000] * 60),
]
FRAMES = int(os.environ.get("HOSTILE_FRAMES", "20000"))


@pytest.fixture(scope="module")
def daemon(daemons):
    settings = ('devices=["null"]', "max_bad_frames=1000000")
    return daemons(*settings, tiny={"llmasos_null_blocks": 64, "max_position_embeddings": 512})


def good_request(dice: random.Random, id_: int) -> list[bytes]:
    call = dice.choice(
        [
            table.Hello(table.VERSION, table.table_hash(), label="mallory"),
            table.Whoami(),
            table.Ps(),
            table.Infer(model="tiny", tokens=t.pack_tokens([1, 2]), max_tokens=3),
            table.SpawnModel(model="tiny"),
            table.Kill(dice.randrange(1, 50)),
            table.Read("/models/tiny/config.json"),
            table.Wait(dice.randrange(1, 50), 0.0),
        ]
    )
    return wire.encode_request(id_, call, dice.choice([0, 1, 64]))


def garbage(dice: random.Random) -> object:
    """A random msgpack value."""
    kind = dice.randrange(9)
    if kind < 4:
        return dice.choice([None, True, -1, 0, 2**63, 1.5, float("nan"), "x", "pid", b"y", [], {}])
    if kind < 6:
        return [garbage(dice) for _ in range(dice.randrange(5))]
    if kind < 8:
        return {dice.choice(["pid", "model", "tokens", "x"]): garbage(dice) for _ in range(dice.randrange(4))}
    return msgpack.ExtType(dice.randrange(128), b"z")


def hostile(dice: random.Random, id_: int) -> list[bytes]:
    """One hostile message."""
    match dice.randrange(9):
        case 0:
            return [dice.randbytes(dice.randrange(1, 300))]
        case 1:
            frames = good_request(dice, id_)
            return [frames[0][: dice.randrange(len(frames[0]))], *frames[1:]]
        case 2:
            return [dice.choice(BOMBS)]
        case 3:
            name = dice.choice([*table.BY_NAME, "nope", "__init__"])
            return [msgpack.packb([1, id_, name, garbage(dice), 1])]
        case 4:
            arguments = {dice.choice(["pid", "model", "path", "nice", "sampling"]): garbage(dice)}
            call = dice.choice(list(table.BY_NAME))
            return [msgpack.packb([1, id_, call, arguments, dice.randrange(-2, 9)])]
        case 5:
            parts = [garbage(dice) for _ in range(dice.randrange(5))]
            return [msgpack.packb([dice.randrange(-1, 9), *parts])]
        case 6:
            frames = good_request(dice, id_)
            return frames + [dice.randbytes(10)] * dice.randrange(1, 20)
        case 7:
            frames = bytearray(good_request(dice, id_)[0])
            frames[dice.randrange(len(frames))] = dice.randrange(256)
            return [bytes(frames)]
        case _:
            return good_request(dice, dice.choice([id_, 1, 2, 3]))  # wrong order, ids used twice


def test_hostile_frames_do_not_hurt(daemon):
    dice = random.Random(7)
    kernel = daemon.kernel()
    context = zmq.Context()
    sent = 0
    while sent < FRAMES:
        socket = context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(daemon.address)
        for id_ in range(1, min(1001, FRAMES - sent + 1)):
            socket.send_multipart(hostile(dice, id_))
            sent += 1
        # Reading an answer makes sure that all was taken in.
        socket.send_multipart(wire.encode_cancel(1))
        socket.send(b"\xc1")
        while socket.poll(200):
            socket.recv_multipart()
        socket.close()
    context.destroy(0)
    begun = time.monotonic()
    with daemon.client() as client:
        reply = client.call(table.Infer(model="tiny", tokens=t.pack_tokens([1]), max_tokens=3))
        assert reply.generated_tokens == 3
        assert time.monotonic() - begun < 1.0
        assert daemon.kernel() == kernel, "the kernel was restarted"
        while client.ps():
            assert time.monotonic() - begun < 5.0
        pool = client.call(table.Df()).pools[0]
        assert pool.blocks_free == pool.blocks_total


def test_a_message_of_endless_parts_is_refused(daemon):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(daemon.address)
    socket.send_multipart([b"x"] * 5000)
    kind, _, error = msgpack.unpackb(socket.recv_multipart()[0])
    assert kind == wire.Kind.ERROR
    assert "5000 frames" in error["message"]
    context.destroy(0)


def test_the_socket_is_private(daemon):
    path = daemon.address.removeprefix("ipc://")
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    assert os.stat(os.path.dirname(path) + "/bus.sock").st_mode & 0o777 == 0o600


def test_a_second_daemon_is_refused(daemon):
    env = {**os.environ, "LLMASOS_HOME": str(daemon.home)}
    second = subprocess.run(
        [sys.executable, "-m", "llmasos.kernel.main"], env=env, capture_output=True, timeout=20
    )
    assert second.returncode == 75
    assert b"another daemon" in second.stderr
    with daemon.client() as client:
        assert client.call(table.Whoami()).admin
