"""The process of one device: connects to the kernel's bus, attaches, then serves one message after another.

    python -m llmasos.drivers.worker --device cpu --bus /run/user/1000/llmasos/bus.sock

Single-threaded: what the kernel sends during a step, mostly the next one, waits; but a step that overtakes
is computed at once where the driver can interrupt the one that runs. Outlives the kernel: when the bus breaks
it keeps what it has loaded, connects again and tells the next kernel of it. Ends with status 0 when no kernel
listens for KERNEL_TIMEOUT_S; dies with the thread that started it (Linux), so that no worker outlives a
killed supervisor. What fails in a verb is answered with Failed; after a failed step its sequences must be
opened anew."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import msgspec
from llmasos.syscalls import errors, garbage, wire

from . import base, host, kv_file
from .launcher import Place, launcher

# Device name before the colon -> (module, class). Imported only when chosen: null needs no torch.
DRIVERS = {
    "cpu": ("llmasos.drivers.cpu", "CpuDriver"),
    "cuda": ("llmasos.drivers.torch.executor", "TorchDriver"),
    "null": ("llmasos.drivers.null", "NullDriver"),
    "simulated": ("llmasos.drivers.simulated", "SimulatedDriver"),
}

KERNEL_TIMEOUT_S = 60.0
"""How long a worker waits for a kernel: longer than the supervisor's longest pause before it starts one."""

RETRY_S = 0.02

Note = Callable[[str, str], None]


def make_driver(device: str, note: Note, place: Place | None = None) -> base.Driver:
    """The driver of `cpu`, `cuda:0`, `null`, `null:1`, `simulated`, or of a group (`cpu*2`), of which this
    process is rank 0 at `place`. Raises NoSuchDevice."""
    if place is not None:
        with garbage.importing():
            from .torch.group import GroupDriver

        return GroupDriver(_kind(device), place)
    kind = device.partition(":")[0]
    if kind not in DRIVERS:
        raise errors.NoSuchDevice(f"no driver for device {device!r}", hint=f"one of {', '.join(DRIVERS)}")
    module, name = DRIVERS[kind]
    with garbage.importing():
        driver = getattr(importlib.import_module(module), name)
    arguments: dict[str, tuple[object, ...]] = {"cpu": (note,), "cuda": (device,)}
    return cast(base.Driver, driver(*arguments.get(kind, ())))


class Worker:
    """Serves a device over one connected stream socket after another."""

    def __init__(self, device: str, place: Place | None = None) -> None:
        self._device = device
        self._bus: socket.socket | None = None
        self._loaded: dict[int, base.Loaded] = {}
        self._specs: dict[int, base.LoadSpec] = {}
        self._open: dict[int, set[int]] = {}  # by handle: the sequences that the driver remembers
        self._adapters: dict[int, set[int]] = {}
        self._early: list[base.Note] = []  # notes from before the first message, which is Attach
        self._driver = make_driver(device, lambda level, text: self._note(level, f"{device}: {text}"), place)

    def serve(self, bus: socket.socket) -> None:
        """Returns, or raises ConnectionError, when the other side is gone."""
        self._bus = bus
        try:
            self._send(base.Attach(self._device, os.getpid(), self._driver.describe(), self._residents()))
            early, self._early = self._early, []
            for note in early:
                self._send(note)
            reader, waiting = wire.FrameReader(), deque[base.ToWorker]()

            def hear(running: bool = False) -> bool:
                """Takes in what came; False: the other side is gone. A step that overtakes goes before all
                that wait while another one is `running`; else behind them, for a step that has not begun may
                still close or copy what it needs."""
                data = bus.recv(1 << 20)
                for message in map(base.to_worker.decode, reader.feed(data)):
                    ahead = running and _overtakes(message)
                    (waiting.appendleft if ahead else waiting.append)(message)
                return bool(data)

            def due() -> bool:
                return bool(waiting) and _overtakes(waiting[0])

            def is_cut() -> bool:
                return any(isinstance(message, base.Step) and message.batch.cuts for message in waiting)

            def interrupted() -> None:
                if not due() and not hear(running=True):
                    interrupt.fd = -1
                interrupt.is_cut = is_cut()
                while due():
                    self._answer(waiting.popleft(), None)

            while waiting or hear():
                if waiting:
                    message = waiting.popleft()
                    interrupt = base.Interrupt(bus.fileno(), interrupted, due(), is_cut())
                    self._answer(message, interrupt)
        finally:
            self._bus = None

    def _residents(self) -> list[base.Resident]:
        return [
            base.Resident(
                spec, self._loaded[handle], sorted(self._open[handle]), sorted(self._adapters[handle])
            )
            for handle, spec in self._specs.items()
        ]

    def _send(self, message: base.FromWorker) -> None:
        assert self._bus is not None
        self._bus.sendall(wire.frame(msgspec.msgpack.encode(message)))

    def _note(self, level: str, text: str) -> None:
        note = base.Note(level, text)
        if self._bus is None:
            self._early.append(note)
        else:
            self._send(note)

    def _answer(self, message: base.ToWorker, interrupt: base.Interrupt | None) -> None:
        handle, ticket = 0, 0
        try:
            match message:
                case base.Load(spec):
                    handle = spec.handle
                    self._load(spec)
                case base.Unload(handle):
                    for known in (self._loaded, self._specs, self._open, self._adapters):
                        known.pop(handle, None)
                    self._driver.unload(handle)
                    self._note("info", f"{self._device}: model {handle} unloaded")
                case base.LoadAdapter(ticket, handle, adapter, files):
                    self._load_adapter(ticket, handle, adapter, files)
                case base.UnloadAdapter(handle, adapter):
                    self._adapters[handle].discard(adapter)
                    self._driver.unload_adapter(handle, adapter)
                    self._note("info", f"{self._device}: adapter {adapter} of model {handle} unloaded")
                case base.Step(batch):
                    handle, ticket = batch.handle, batch.ticket
                    opened = self._open.setdefault(handle, set())
                    opened.difference_update(batch.closes)
                    opened.update(opening.seq for opening in batch.opens)
                    result = self._driver.collect(self._driver.submit(batch), interrupt)
                    self._send(base.StepDone(result))
                case base.Encode(ticket, handle):
                    self._send(self._driver.encode(message))
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
        self._specs[spec.handle], self._open[spec.handle], self._adapters[spec.handle] = spec, set(), set()
        seconds = time.perf_counter() - begun
        keeps = f"{loaded.blocks} KV blocks of {loaded.block_bytes} bytes in {loaded.kv_dtype}"
        self._note(
            "info",
            f"{self._device}: model {spec.handle} loaded in {seconds:.1f} s: {loaded.dtype}, weights "
            f"{loaded.weights_bytes / 1e6:.0f} MB, {'an encoder' if loaded.encodes else keeps}; "
            f"{loaded.engine}",
        )
        self._send(base.LoadDone(loaded, self._driver.describe().memory_free, seconds))

    def _load_adapter(self, ticket: int, handle: int, adapter: int, files: dict[str, base.File]) -> None:
        begun = time.perf_counter()
        size = self._driver.load_adapter(handle, adapter, files)
        self._adapters[handle].add(adapter)
        seconds = time.perf_counter() - begun
        self._note(
            "info",
            f"{self._device}: adapter {adapter} of model {handle} loaded in {seconds:.2f} s, "
            f"{size / 1e6:.1f} MB",
        )
        self._send(base.Moved(ticket, size, seconds))

    def _fail(self, handle: int, ticket: int, problem: errors.LLMasOSError) -> None:
        self._note("error", f"{self._device}: {problem}")
        self._send(base.Failed(handle, ticket, errors.to_wire(problem)))


def _overtakes(message: base.ToWorker) -> bool:
    return isinstance(message, base.Step) and message.batch.overtakes


def _place(problem: BaseException) -> str:
    """Where an exception was raised: file and line, no values."""
    frame = problem.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return f" at {os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="llmasos.drivers.worker", description=__doc__)
    parser.add_argument(
        "--device", required=True, help="cpu, cuda:0, null, null:1, simulated, or a group: cpu*2"
    )
    parser.add_argument("--bus", required=True, help="path of the kernel's Unix stream socket")
    parser.add_argument("--parent", type=int, default=0, help="end when this is not the parent process")
    parser.add_argument("--rank", type=int, default=0, help="of a group: which one this is")
    parser.add_argument("--rendezvous", default="", help="of a group: where its ranks meet")
    arguments = parser.parse_args()
    if not host.die_with_parent(arguments.parent):
        return 0
    faulthandler.enable()  # a worker that hangs is sent SIGABRT, and says where it was
    # Ctrl-C on the terminal is for the kernel, which then closes the bus.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        place = _join(arguments) if "*" in arguments.device else None
        if place is not None and place.rank > 0:
            with garbage.importing():
                from .torch.group import follow

            follow(_kind(arguments.device), place)
            return 0
        worker = Worker(arguments.device, place)
        while bus := _connect(arguments.bus):
            with bus, suppress(ConnectionError):
                worker.serve(bus)
    except (errors.LLMasOSError, msgspec.DecodeError, ImportError, OSError) as problem:
        print(f"worker of {arguments.device}: {problem}", file=sys.stderr)
        return 1
    return 0


def _kind(device: str) -> str:
    """Raises NoSuchDevice unless `device` names a group."""
    kind, _, size = device.partition("*")
    if kind not in ("cpu", "cuda") or not size.isdecimal() or not 2 <= int(size) <= base.MOST_RANKS:
        ranks = f"cpu*N or cuda*N, of 2 to {base.MOST_RANKS} ranks"
        raise errors.NoSuchDevice(f"no group {device!r}", hint=ranks)
    return kind


def _join(arguments: argparse.Namespace) -> Place:
    """This process's place in the group, whose other ranks are started if that is its to do."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in cpu.py; here ranks share the cores as well
    _kind(arguments.device)
    command = ["llmasos.drivers.worker", "--device", arguments.device, "--bus", arguments.bus]
    size = int(arguments.device.partition("*")[2])
    return launcher(arguments.rank, arguments.rendezvous).join(size, command)


def _connect(path: str) -> socket.socket | None:
    """A connection to the kernel; None when none listens for long. Raises OSError when the path is none."""
    deadline = time.monotonic() + KERNEL_TIMEOUT_S
    while time.monotonic() < deadline:
        bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            bus.connect(path)
            return bus
        except (ConnectionRefusedError, FileNotFoundError):
            bus.close()
            time.sleep(RETRY_S)
    return None


if __name__ == "__main__":
    sys.exit(main())
