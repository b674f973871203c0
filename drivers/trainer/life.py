"""The life of a trainer: its place among the machine's processes, its bus, and how it ends.

The main thread computes; another one listens, so that a call is answered while a layer is multiplied.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from llmasos.syscalls import errors, garbage, wire

from .. import base, host
from ..launcher import Local, Place, end, launcher

if TYPE_CHECKING:
    from ..torch.ranks import Ranks
    from .gate import Gate

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the system call's number
_IOPRIO_IDLE = 3 << 13
_OOM_FIRST = b"1000"
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def keep_heap() -> None:
    """Has glibc reuse the memory of tensors that are gone. It would give big ones back to the system, and
    take them anew, zeroed page by page, in each layer: a quarter of a step, in which nobody else gets the
    processor either."""
    with suppress(OSError, AttributeError):
        libc: Any = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def trim_heap() -> None:
    """Gives back what was used once, while loading."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def step_back(parent: int) -> bool:
    """Gives the process the lowest priorities there are, for processor, disk and memory, and lets it die with
    the thread that started it (Linux). False: `parent` (0: whoever it is) was dead already."""
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        os.nice(19)
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        if number := _IOPRIO_SET.get(os.uname().machine):
            libc.syscall(number, 1, 0, _IOPRIO_IDLE)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_bytes(_OOM_FIRST)
    return host.die_with_parent(parent)


class Bus:
    """The connection to the kernel. Any thread may send."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._sending = threading.Lock()

    def send(self, message: base.FromWorker) -> None:
        """A kernel that is gone hears nothing; `messages` ends then."""
        with self._sending, suppress(OSError):
            self._socket.sendall(wire.frame(msgspec.msgpack.encode(message)))

    def messages(self) -> Iterator[base.ToWorker]:
        """Until the kernel is gone."""
        reader = wire.FrameReader()
        with suppress(ConnectionError):
            while data := self._socket.recv(1 << 16):
                for message in reader.feed(data):
                    yield base.to_worker.decode(message)

    def fail(self, problem: errors.LLMasOSError) -> None:
        self.send(base.Failed(0, 0, errors.to_wire(problem)))


class Ear(threading.Thread):
    """Listens to the kernel, and works the gate for it."""

    def __init__(self, messages: Iterator[base.ToWorker], bus: Bus, gate: Gate) -> None:
        super().__init__(name="ear", daemon=True)
        self._messages, self._bus, self._gate = messages, bus, gate
        self._over = threading.Lock()  # of a grant, which either side may end
        self._ticket: int | None = None
        self._computed = 0.0

    def run(self) -> None:
        for message in self._messages:
            match message:
                case base.Grant(ticket):
                    with self._over:
                        self._ticket, self._computed = ticket, self._gate.seconds
                    self._gate.open()
                case base.CallIn():
                    self._gate.close()
                    self.end_grant()
                case base.Leave():
                    self._gate.leave()
        self._gate.leave()  # the kernel is gone

    def end_grant(self) -> None:
        """Tells that the grant is over, if there is one."""
        with self._over:
            if self._ticket is not None:
                self._bus.send(base.Granted(self._ticket, self._gate.seconds - self._computed))
                self._ticket = None


def live(arguments: argparse.Namespace) -> int:
    """The whole life; returns the exit status."""
    if not step_back(arguments.parent):
        return 0
    keep_heap()
    if arguments.rank or int(os.environ.get("RANK", "0")):  # torchrun's
        return follow(arguments)
    bus = Bus(arguments.bus)
    bus.send(base.AttachTrainer(arguments.run, os.getpid()))
    messages = bus.messages()
    begun = time.perf_counter()
    first = next((message for message in messages if isinstance(message, base.Train)), None)
    if first is None:
        return 0
    spec, ranks = first.spec, None
    try:
        _before_torch()
        if spec.recipe.mesh.ranks > 1:
            ranks = _gathered(spec, arguments)
        _train(spec, messages, bus, begun, ranks)
    except errors.LLMasOSError as problem:
        print(f"trainer of {spec.name}: {problem}", file=sys.stderr)
        bus.fail(problem)
        return 1
    except Exception as problem:
        import traceback

        traceback.print_exc()
        explained = _explained(problem)
        if ranks is not None and isinstance(explained, errors.DeviceFault):
            end(f"rank 0: {type(problem).__name__}")  # most often another one died: goes on from a checkpoint
        bus.fail(explained)
        return 1
    return 0


def follow(arguments: argparse.Namespace) -> int:
    """The life of a rank that is not the first one: it does what rank 0 does."""
    _before_torch()
    place = launcher(arguments.rank, arguments.rendezvous).join(arguments.ranks, [])
    try:
        with garbage.importing():
            from .gate import Left, SharedGate
            from .run import Run

            ranks = _ranks(arguments.device, place)
            spec = msgspec.msgpack.decode(ranks.tell(), type=base.TrainSpec)
            run = Run(spec, SharedGate(ranks), lambda event: None, ranks)
        try:
            run.train()
        except Left:
            run.save()
        ranks.close()
        return 0
    except errors.LLMasOSError:
        signal.pause()  # rank 0 has the same, tells it, and ends
    except Exception as problem:
        import traceback

        traceback.print_exc()
        end(f"rank {place.rank}: {type(problem).__name__}")
    return 1


def _before_torch() -> None:
    # Read when torch loads its OpenMP: threads that spin would take what serving is to have.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _gathered(spec: base.TrainSpec, arguments: argparse.Namespace) -> Ranks:
    """All ranks that the recipe wants, who know what is trained."""
    size, kind = spec.recipe.mesh.ranks, spec.device.partition(":")[0].partition("*")[0]
    most = most_ranks(kind)
    starts = launcher(0, "")
    if isinstance(starts, Local) and size > most:
        raise errors.InvalidArgument(
            f"the mesh has {size} ranks, this machine takes {most}", hint="a smaller mesh", field="mesh"
        )
    command = ["llmasos.drivers.trainer", "--run", str(arguments.run), "--bus", arguments.bus]
    place = starts.join(size, [*command, "--device", kind, "--ranks", str(size)])
    ranks = _ranks(kind, place)
    ranks.tell(msgspec.msgpack.encode(spec))
    return ranks


def most_ranks(kind: str) -> int:
    """Ranks that may be started on this machine: one for each CUDA device, two for each core."""
    if kind == "cuda":
        import torch

        return torch.cuda.device_count()
    return max(4, 2 * (os.cpu_count() or 1))


def _ranks(kind: str, place: Place) -> Ranks:
    with garbage.importing():
        import torch

        from ..torch.host import device_of
        from ..torch.ranks import Ranks

    device = device_of(f"cuda:{place.local}" if kind == "cuda" else "cpu")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, host.physical_cores() // place.here))
    return Ranks(place, device)


def _train(
    spec: base.TrainSpec, messages: Iterator[base.ToWorker], bus: Bus, begun: float, ranks: Ranks | None
) -> None:
    with garbage.importing():
        import torch

        from .gate import Gate, Left, SharedGate
        from .run import Run

        if ranks is None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(host.physical_cores())
        gate = Gate() if ranks is None else SharedGate(ranks)
        ear = Ear(messages, bus, gate)
        run = Run(spec, gate, lambda event: bus.send(base.Trained(event)), ranks)
    trim_heap()
    ear.start()
    took = time.perf_counter() - begun
    bus.send(
        base.Note("info", f"trainer of {spec.name} loaded in {took:.1f} s, step {run.step} of {run.steps}")
    )
    bus.send(base.TrainReady(run.step, run.steps, run.memory, run.eval_step))
    try:
        result = run.train()
    except Left:
        run.save()
        ear.end_grant()
    else:
        ear.end_grant()
        bus.send(base.TrainDone(result))
    if ranks is not None:
        ranks.close()


def _explained(problem: Exception) -> errors.LLMasOSError:
    """What an exception means. Its text may quote what is trained on, so only its type travels."""
    if isinstance(problem, ImportError):
        return errors.UnsupportedModel(
            f"training needs {problem.name or 'a package'}, which is not installed",
            hint="pip install 'llmasos[train]'",
        )
    import torch

    text = str(problem)
    # The last two are what oneDNN says when it gets none.
    memory = ["allocate memory", "not enough memory", "out of memory"]
    memory += ["could not create a primitive", "could not create a memory"]
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(part in text for part in memory):
        return errors.NeverFits(
            "memory ran out while training",
            hint="use a smaller max_length or per_device_train_batch_size, gradient_checkpointing, or lora",
        )
    return errors.DeviceFault(
        f"{type(problem).__name__} in the trainer", hint="this is a bug of it; the daemon's log says where"
    )
