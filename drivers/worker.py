"""The process of one device: connects to the kernel's bus, attaches, then serves one message after another.

    python -m llmasos.drivers.worker --device cpu --bus /run/user/1000/llmasos/bus.sock

Single-threaded: what the kernel sends during a step, mostly the next one, waits in the socket. Ends with
status 0 when the kernel closes the bus; dies with the thread that started it (Linux), so that no worker
outlives a killed supervisor.
What fails in a verb is answered with Failed; after a failed step its sequences must be opened anew.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
from llmasos.syscalls import errors, wire

from . import base, kv_file

# Device name before the colon -> (module, class). Imported only when chosen: null needs no torch.
DRIVERS = {
    "cpu": ("llmasos.drivers.cpu", "CpuDriver"),
    "cuda": ("llmasos.drivers.torch.executor", "TorchDriver"),
    "null": ("llmasos.drivers.null", "NullDriver"),
    "simulated": ("llmasos.drivers.simulated", "SimulatedDriver"),
}

_PR_SET_PDEATHSIG = 1

Note = Callable[[str, str], None]


def make_driver(device: str, note: Note) -> base.Driver:
    """The driver of `cpu`, `cuda:0`, `null`, `null:1`, `simulated`. Raises NoSuchDevice."""
    kind = device.partition(":")[0]
    if kind not in DRIVERS:
        raise errors.NoSuchDevice(f"no driver for device {device!r}", hint=f"one of {', '.join(DRIVERS)}")
    module, name = DRIVERS[kind]
    driver = getattr(importlib.import_module(module), name)
    arguments: dict[str, tuple[object, ...]] = {"cpu": (note,), "cuda": (device,)}
    return cast(base.Driver, driver(*arguments.get(kind, ())))


class Worker:
    """Serves a device over a connected stream socket until the other side closes it."""

    def __init__(self, device: str, bus: socket.socket, driver: base.Driver | None = None) -> None:
        self._device = device
        self._bus = bus
        self._loaded: dict[int, base.Loaded] = {}
        self._early: list[base.Note] | None = []  # notes from before the first message, which is Attach
        self._driver = driver or make_driver(
            device, lambda level, text: self._note(level, f"{device}: {text}")
        )

    def serve(self) -> None:
        self._send(base.Attach(self._device, os.getpid(), self._driver.describe()))
        early, self._early = self._early or [], None
        for note in early:
            self._send(note)
        reader = wire.FrameReader()
        while data := self._bus.recv(1 << 20):
            for message in reader.feed(data):
                self._answer(base.to_worker.decode(message))

    def _send(self, message: base.FromWorker) -> None:
        self._bus.sendall(wire.frame(msgspec.msgpack.encode(message)))

    def _note(self, level: str, text: str) -> None:
        note = base.Note(level, text)
        if self._early is not None:
            self._early.append(note)
        else:
            self._send(note)

    def _answer(self, message: base.ToWorker) -> None:
        handle, ticket = 0, 0
        try:
            match message:
                case base.Load(spec):
                    handle = spec.handle
                    self._load(spec)
                case base.Unload(handle):
                    self._loaded.pop(handle, None)
                    self._driver.unload(handle)
                    self._note("info", f"{self._device}: model {handle} unloaded")
                case base.Step(batch):
                    handle, ticket = batch.handle, batch.ticket
                    self._send(base.StepDone(self._driver.collect(self._driver.submit(batch))))
                case base.Export() | base.Import() | base.Relay():
                    ticket = message.ticket
                    self._send(kv_file.carry_out(self._driver, self._loaded, message))
        except errors.LLMasOSError as problem:
            self._fail(handle, ticket, problem)
        except ConnectionError:
            raise
        except Exception as problem:
            # Only the type travels: the text of a foreign exception may quote a prompt.
            fault = errors.DeviceFault(
                f"{self._device}: {type(problem).__name__} in the driver{_place(problem)}",
                hint="this is a bug of the driver; `llsh dmesg` shows what came before",
            )
            self._fail(handle, ticket, fault)

    def _load(self, spec: base.LoadSpec) -> None:
        size = sum(file.size for file in spec.files.values())
        self._note("info", f"{self._device}: loading model {spec.handle}, {size / 1e6:.0f} MB of files")
        begun = time.perf_counter()
        loaded = self._loaded[spec.handle] = self._driver.load(spec)
        seconds = time.perf_counter() - begun
        self._note(
            "info",
            f"{self._device}: model {spec.handle} loaded in {seconds:.1f} s: {loaded.dtype}, weights "
            f"{loaded.weights_bytes / 1e6:.0f} MB, {loaded.blocks} KV blocks of {loaded.block_bytes} bytes "
            f"in {loaded.kv_dtype}; {loaded.engine}",
        )
        self._send(base.LoadDone(loaded, self._driver.describe().memory_free, seconds))

    def _fail(self, handle: int, ticket: int, problem: errors.LLMasOSError) -> None:
        self._note("error", f"{self._device}: {problem}")
        self._send(base.Failed(handle, ticket, errors.to_wire(problem)))


def _place(problem: BaseException) -> str:
    """Where an exception was raised: file and line, no values."""
    frame = problem.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return f" at {os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else ""


def _die_with_parent() -> None:
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="llmasos.drivers.worker", description=__doc__)
    parser.add_argument("--device", required=True, help="cpu, cuda:0, null, null:1 or simulated")
    parser.add_argument("--bus", required=True, help="path of the kernel's Unix stream socket")
    arguments = parser.parse_args()
    _die_with_parent()
    # Ctrl-C on the terminal is for the kernel, which then closes the bus.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bus:
        try:
            bus.connect(arguments.bus)
            Worker(arguments.device, bus).serve()
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the kernel is gone: nobody is left to tell
        except (errors.LLMasOSError, msgspec.DecodeError, ImportError, OSError) as problem:
            print(f"worker of {arguments.device}: {problem}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
