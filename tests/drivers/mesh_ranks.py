"""Ranks that train one run after another, so tests start them once: `python -m mesh_ranks --ranks 2 …` is
a rank that is not the first. Each is told a TrainSpec, or nothing: then it ends."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import msgspec
import torch
from llmasos.drivers import base
from llmasos.drivers.launcher import Local, Place, launcher
from llmasos.drivers.torch.ranks import Ranks
from llmasos.drivers.trainer.gate import Left, SharedGate
from llmasos.drivers.trainer.run import Run
from llmasos.syscalls import errors
from llmasos.syscalls.training import TrainEvent, TrainResult


class Group:
    """Rank 0's side. `PYTHONPATH` leads to this file."""

    def __init__(self, size: int) -> None:
        self.place = Local().join(size, ["mesh_ranks", "--ranks", str(size)])
        self.ranks = ranks_at(self.place)

    def train(
        self, spec: base.TrainSpec, stop_after: int = 0
    ) -> tuple[list[TrainEvent], TrainResult | None, Run]:
        """A whole run, or its first steps: then there is no result."""
        events: list[TrainEvent] = []
        self.ranks.tell(msgspec.msgpack.encode(spec))
        gate = SharedGate(self.ranks)

        def tell(event: TrainEvent) -> None:
            events.append(event)
            if event.phase == "train" and event.step == stop_after:
                gate.leave()

        result, run = go(spec, self.ranks, gate, tell)
        return events, result, run

    def close(self) -> None:
        self.ranks.tell(b"")
        self.ranks.close()
        self.place.leave()


def ranks_at(place: Place) -> Ranks:
    torch.set_num_threads(1)
    return Ranks(place, torch.device("cpu"))


def go(
    spec: base.TrainSpec, ranks: Ranks, gate: SharedGate, tell: Callable[[TrainEvent], None]
) -> tuple[TrainResult | None, Run]:
    gate.open()
    run = Run(spec, gate, tell, ranks)
    try:
        return run.train(), run
    except Left:
        run.save()
        return None, run


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("ranks", "rank", "parent"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rendezvous")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    ranks = ranks_at(launcher(arguments.rank, arguments.rendezvous).join(arguments.ranks, []))
    while said := ranks.tell():
        try:
            spec = msgspec.msgpack.decode(said, type=base.TrainSpec)
            go(spec, ranks, SharedGate(ranks), lambda event: None)
        except errors.LLMasOSError:
            continue  # rank 0 has the same
    ranks.close()


if __name__ == "__main__":
    main()
