"""The worker process over a real socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llmasos.drivers import base, null
from llmasos.syscalls import errors, wire
from llmasos.syscalls import types as t
from msgspec.structs import replace

from .conftest import Tiny, file_of


class Bus:
    """The kernel's end of one worker's connection."""

    def __init__(self, path: Path, device: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(60)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmasos.drivers.worker", "--device", device, "--bus", str(path)]
        )
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(60)
        self._reader, self._messages = wire.FrameReader(), []
        self.notes: list[base.Note] = []

    def send(self, message: base.ToWorker) -> None:
        self.connection.sendall(wire.frame(msgspec.msgpack.encode(message)))

    def receive(self) -> Any:
        """The next message that is no note."""
        while True:
            while not self._messages:
                data = self.connection.recv(1 << 16)
                assert data, "the worker closed the bus"
                self._messages += self._reader.feed(data)
            message = base.from_worker.decode(self._messages.pop(0))
            if not isinstance(message, base.Note):
                return message
            self.notes.append(message)

    def reconnect(self) -> Any:
        """As a kernel does that was started again; returns what the worker says first."""
        self.connection.close()
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(60)
        self._reader, self._messages = wire.FrameReader(), []
        return self.receive()

    def close(self) -> None:
        self.connection.close()
        self._listener.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def bus_to(tmp_path: Path) -> Iterator[Callable[[str], Bus]]:
    buses: list[Bus] = []

    def connect(device: str) -> Bus:
        buses.append(Bus(tmp_path / f"bus{len(buses)}", device))
        return buses[-1]

    yield connect
    for bus in buses:
        bus.close()


def step(ticket: int, tokens: list[int], handle: int = 1, seq: int = 1, overtakes: bool = False) -> base.Step:
    blocks = [4 * seq, 4 * seq + 1]
    opened = base.SeqOpen(seq, t.pack_tokens(tokens), len(tokens), 0, 99, blocks, t.Sampling(seed=0))
    work = base.Work(seq, len(tokens), [], [], True)
    return base.Step(base.Batch(ticket, handle, [], [opened], [], [work], overtakes=overtakes))


def test_a_step_that_overtakes_interrupts_the_one_that_runs(
    bus_to: Callable[[str], Bus], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"llmasos_null_step_seconds": 0.5}')
    bus = bus_to("null")
    bus.receive()
    bus.send(base.Load(base.LoadSpec(1, {"config.json": file_of(tmp_path / "config.json")}, "", 0.5)))
    bus.receive()
    for ticket in (1, 2):
        bus.send(step(ticket, [3, 1, 4], seq=ticket))
    time.sleep(0.1)
    bus.send(step(3, [9, 9], seq=3, overtakes=True))
    done = [bus.receive().result for _ in range(3)]
    assert [result.ticket for result in done] == [3, 1, 2]
    expected = [null.next_token(tokens) for tokens in ([9, 9], [3, 1, 4], [3, 1, 4])]
    assert [result.outputs[0].tokens for result in done] == [[token] for token in expected]
    assert all(0.5 <= result.seconds < 0.9 for result in done), "the other's time is not its own"


def test_a_step_that_cuts_ends_the_rounds_of_the_one_that_runs(
    bus_to: Callable[[str], Bus], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"llmasos_null_step_seconds": 0.2}')
    bus = bus_to("null")
    bus.receive()
    bus.send(base.Load(base.LoadSpec(1, {"config.json": file_of(tmp_path / "config.json")}, "", 0.5)))
    bus.receive()
    bus.send(base.Step(replace(step(1, [3, 1, 4]).batch, rounds=16)))
    bus.send(step(2, [9, 9], seq=2))  # that one may wait
    time.sleep(0.3)
    bus.send(base.Step(replace(step(3, [2, 7], seq=3).batch, cuts=True)))
    done = [bus.receive().result for _ in range(3)]
    assert [result.ticket for result in done] == [1, 2, 3]
    assert 2 <= done[0].rounds <= 4
    made = [3, 1, 4]
    for _ in range(done[0].rounds):
        made.append(null.next_token(made))
    assert done[0].outputs[0].tokens == made[3:]


def test_a_step_is_not_overtaken_before_it_has_begun(bus_to: Callable[[str], Bus]) -> None:
    """It may close what the other opens; both have come before it begins."""
    bus = bus_to("null")
    bus.receive()
    bus.send(base.Load(base.LoadSpec(1, {}, "", 0.5)))
    bus.receive()
    closing = step(1, [3, 1, 4])
    closing = base.Step(replace(closing.batch, closes=[3]))
    both = [closing, step(2, [9, 9], seq=3, overtakes=True)]
    bus.connection.sendall(b"".join(wire.frame(msgspec.msgpack.encode(each)) for each in both))
    assert [bus.receive().result.ticket for _ in both] == [2, 1]
    work = base.Work(3, 1, [], [], True)
    bus.send(base.Step(base.Batch(3, 1, [], [], [], [work])))
    [out] = bus.receive().result.outputs
    assert not out.error


@pytest.mark.parametrize("device", ["null", "null:1", "simulated"])
def test_a_worker_attaches_computes_and_outlives_the_bus(device: str, bus_to: Callable[[str], Bus]) -> None:
    bus = bus_to(device)
    attach = bus.receive()
    assert (attach.device, attach.pid) == (device, bus.process.pid)
    assert attach.description.driver == device.partition(":")[0]
    bus.send(base.Load(base.LoadSpec(1, {}, "", 0.5)))
    assert bus.receive().loaded.blocks == 4096
    assert ["loading" in bus.notes[0].text, "loaded in" in bus.notes[1].text] == [True, True]
    assert "hashes of the history" in bus.notes[1].text
    for ticket in (1, 2):  # the second is sent before the first is answered
        bus.send(step(ticket, [3, 1, 4, 1, 5]))
    for ticket in (1, 2):
        done = bus.receive()
        [out] = done.result.outputs
        assert (done.result.ticket, out.tokens) == (ticket, [null.next_token([3, 1, 4, 1, 5])])
    attach = bus.reconnect()
    assert (attach.pid, attach.residents[0].spec.handle) == (bus.process.pid, 1)
    assert (attach.residents[0].loaded.blocks, attach.residents[0].sequences) == (4096, [1])
    bus.send(step(3, [2, 7]))  # nothing has to be loaded again
    assert bus.receive().result.outputs[0].tokens == [null.next_token([2, 7])]
    bus.send(base.Unload(1))
    assert bus.reconnect().residents == []


def test_what_fails_is_answered_and_the_worker_goes_on(bus_to: Callable[[str], Bus], tmp_path: Path) -> None:
    bus = bus_to("null")
    bus.receive()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": "many"}))
    bus.send(base.Load(base.LoadSpec(8, {"config.json": file_of(config)}, "", 0.5)))
    failed = bus.receive()
    assert (failed.handle, failed.ticket) == (8, 0)
    assert isinstance(errors.from_wire(failed.error), errors.UnsupportedModel)
    bus.send(step(3, [1, 2], handle=8))
    failed = bus.receive()
    assert (failed.handle, failed.ticket) == (8, 3)
    assert isinstance(errors.from_wire(failed.error), errors.DeviceFault)
    bus.send(base.Load(base.LoadSpec(8, {}, "", 0.5)))
    assert bus.receive().loaded.handle == 8
    bus.send(base.Unload(8))
    bus.send(step(4, [1, 2], handle=8))
    assert "handle 8" in bus.receive().error["message"]


def test_adapters_come_and_go_over_the_bus(bus_to: Callable[[str], Bus]) -> None:
    bus = bus_to("null")
    bus.receive()
    bus.send(base.Load(base.LoadSpec(1, {}, "", 0.5)))
    bus.receive()
    files = {"adapter_config.json": base.File("", "sha256:1", 10)}
    bus.send(base.LoadAdapter(5, 1, 3, files))
    moved = bus.receive()
    assert (moved.ticket, moved.bytes) == (5, 10)
    adapted = step(6, [3, 1, 4])
    adapted.batch.opens[0] = replace(adapted.batch.opens[0], adapter=3)
    bus.send(adapted)
    token = null.next_token([3, 1, 4], mark=null.adapter_mark(files))
    assert bus.receive().result.outputs[0].tokens == [token]
    bus.send(base.UnloadAdapter(1, 3))
    bus.send(replace(adapted, batch=replace(adapted.batch, ticket=7)))
    assert "adapter 3 is not loaded" in bus.receive().result.outputs[0].error
    bus.send(base.LoadAdapter(8, 2, 3, files))
    failed = bus.receive()
    assert (failed.ticket, failed.handle) == (8, 2)


def test_a_bug_in_a_driver_names_its_type_and_no_text(bus_to: Callable[[str], Bus]) -> None:
    bus = bus_to("null")
    bus.receive()
    bus.send(base.Load(base.LoadSpec(1, {"config.json": base.File("\0", "", 0)}, "", 0.5)))
    failed = bus.receive()
    assert failed.error["code"] == errors.DeviceFault.code
    assert "ValueError" in failed.error["message"]
    assert "null byte" not in str(failed.error)


def test_the_cpu_worker_computes_a_real_model(
    bus_to: Callable[[str], Bus], tiny: Callable[[str], Tiny]
) -> None:
    bus, model = bus_to("cpu"), tiny("llama")
    assert "native engine" in bus.receive().description.text
    bus.send(base.Load(base.LoadSpec(1, model.files, "float32", 0.05)))
    bus.receive()
    bus.send(step(1, [3, 1, 4]))
    assert bus.receive().result.outputs[0].tokens == model.greedy([3, 1, 4], 1)


@pytest.mark.parametrize("arguments", [["--device", "abacus", "--bus", "/nowhere"], ["--device", "null"]])
def test_bad_arguments_end_it_with_a_message(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmasos.drivers.worker", *arguments], capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "bus"))
    listener.listen()
    listener.settimeout(30)
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-m', 'llmasos.drivers.worker', "
        f"'--device', 'null', '--bus', {str(tmp_path / 'bus')!r}]); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    connection, _ = listener.accept()
    reader, pid = wire.FrameReader(), 0
    while not pid:
        for message in reader.feed(connection.recv(1 << 16)):
            pid = base.from_worker.decode(message).pid  # type: ignore[union-attr]
    parent.kill()
    parent.wait()
    connection.settimeout(10)
    assert connection.recv(1 << 16) == b""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the worker outlived its parent")
    connection.close()
    listener.close()
