"""What the ranks of a device group say to each other: bytes from rank 0 to all and from all to all, and sums
of tensors. gloo carries what lies on the host, NCCL what lies on CUDA devices.

Whatever ranks do together they do in the same order. A rank that is gone is found at once. A frozen one is
found by its pulse: a thread of each rank says in the store, where they have met, that it lives, and looks
whether the others do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import torch
from llmasos.syscalls import errors
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ..launcher import BEAT_S, TIMEOUT_S, WORK_S, Place, end

# A message up to this size is one broadcast; what is longer comes in a second one.
_FIRST = 4096
_LENGTH = 8

_Wire = dict[str, str | int | dict[str, str | int | float]]
_T = TypeVar("_T")


class Ranks:
    """This process in its group, `here` of which share its device's memory. Makes torch's default process
    group."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.rank, self.size, self.device = place.rank, place.size, device
        self.here = place.here if device.type == "cpu" else 1
        self._place, self._leaving = place, threading.Event()
        patience = timedelta(seconds=WORK_S)
        self._store, _, _ = next(rendezvous(place.url, place.rank, place.size, timeout=patience))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=self._store,
            rank=place.rank,
            world_size=place.size,
            timeout=patience,
        )
        self._store.set(_pulse(self.rank), "0")
        distributed.barrier()
        threading.Thread(target=self._beat, daemon=True, name="pulse").start()

    def close(self) -> None:
        """All ranks do: none is gone before the others know that it may."""
        self._leaving.set()
        self._place.leaving()
        distributed.barrier()
        distributed.destroy_process_group()

    def _beat(self) -> None:
        """Counts, and looks at the others' counts. Patience is a number of looks, not a time: a machine that
        has slept is no reason to end."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        seen, looks, count = dict.fromkeys(others, b""), dict.fromkeys(others, 0), 0
        while not self._leaving.wait(BEAT_S):
            count += 1
            self._store.set(_pulse(self.rank), str(count))
            for rank in others:
                said = self._store.get(_pulse(rank))
                looks[rank] = looks[rank] + 1 if said == seen[rank] else 0
                seen[rank] = said
                if looks[rank] >= TIMEOUT_S / BEAT_S and not self._leaving.is_set():
                    end(f"rank {rank} is frozen")

    def tell(self, data: bytes = b"") -> bytes:
        """What rank 0 says; `data` counts only there."""
        first = torch.zeros(_LENGTH + _FIRST, dtype=torch.uint8)
        if self.rank == 0:
            head = len(data).to_bytes(_LENGTH, "little") + data[:_FIRST]
            first[: len(head)] = _tensor(head)
        distributed.broadcast(first, 0)
        size = int.from_bytes(first[:_LENGTH].numpy().tobytes(), "little")
        rest = torch.empty(max(0, size - _FIRST), dtype=torch.uint8)
        if len(rest):
            if self.rank == 0:
                rest = _tensor(data[_FIRST:])
            distributed.broadcast(rest, 0)
        return (
            data if self.rank == 0 else bytes(first[_LENGTH : _LENGTH + size].numpy()) + bytes(rest.numpy())
        )

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank says, on all of them."""
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        distributed.all_reduce(sizes)
        longest = int(sizes.max())
        parts = torch.zeros(self.size, longest, dtype=torch.uint8)
        mine = torch.zeros(longest, dtype=torch.uint8)
        if data:
            mine[: len(data)] = _tensor(data)
        distributed.all_gather(list(parts), mine)
        return [bytes(part[:size].numpy()) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def agree(self, verb: Callable[[], _T], kind: type[_T]) -> list[_T]:
        """Runs `verb`, which talks to no other rank, on each; returns all results. If one raises, all raise
        its error; of what is no error of ours only the type travels."""
        problem: errors.LLMasOSError | None = None
        try:
            answer = msgspec.msgpack.encode((verb(), None))
        except errors.LLMasOSError as raised:
            problem = raised
        except Exception as raised:
            problem = errors.DeviceFault(f"rank {self.rank}: {type(raised).__name__}")
            problem.__cause__ = raised
        if problem is not None:
            answer = msgspec.msgpack.encode((None, errors.to_wire(problem)))
        results: list[_T] = []
        for said in self.gather(answer):
            result, failed = msgspec.msgpack.decode(said, type=tuple[Any, _Wire | None])
            if failed is not None:
                raise problem or errors.from_wire(dict(failed))
            results.append(msgspec.convert(result, kind))
        return results

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, in its place; the same bits on all of them."""
        distributed.all_reduce(x)
        return x

    def side_by_side(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Every rank's x [T, widths[rank]] as one [T, sum(widths)]."""
        widest = max(widths)
        mine = x.new_zeros(widest, len(x))
        mine[: x.shape[1]] = x.t()
        parts = x.new_empty(self.size, widest, len(x))
        distributed.all_gather(list(parts), mine)
        return torch.cat([part[:width] for part, width in zip(parts, widths, strict=True)]).t().contiguous()


def _pulse(rank: int) -> str:
    return f"pulse {rank}"


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
