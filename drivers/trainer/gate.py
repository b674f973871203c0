"""When the run may compute: between a grant and its being called in.

The computing thread passes the gate before each product, forward and backward; closed, it waits there.
Another thread opens and closes it. A gate also tells how long was computed, and is how the run is told to
leave.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..launcher import BEAT_S, WORK_S
from ..torch.ranks import Ranks

PAUSE_S = WORK_S / 10


class Left(Exception):
    """Raised in the computing thread: it shall end."""


class Gate:
    """Closed at first. `seconds` of computing have passed in all."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = self._leaving = False
        self._since: float | None = None  # computing since then; None: it waits, or does what needs no grant
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        since = self._since
        return self._seconds + (time.perf_counter() - since if since is not None else 0.0)

    @property
    def agreed(self) -> float:
        """Seconds by which decisions are made: the same on all ranks of a group."""
        return self.seconds

    # The computing thread

    def wait(self) -> None:
        """Passes the gate, or waits until it is opened. Raises Left."""
        if self._open and self._since is not None:
            return
        with self._changed:
            self._park()
            while not self._open:
                if self._leaving:
                    raise Left
                self._changed.wait()
            self._since = time.perf_counter()

    def park(self) -> None:
        """Computing is over until the next `wait`."""
        with self._changed:
            self._park()

    def _park(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None
        self._changed.notify_all()

    # The other one

    def open(self) -> None:
        """Lets the computing thread pass."""
        with self._changed:
            self._open = not self._leaving
            self._changed.notify_all()

    def close(self) -> None:
        """Returns when nothing is computed any more."""
        with self._changed:
            self._open = False
            while self._since is not None:
                self._changed.wait()

    def leave(self) -> None:
        """Closes it for good."""
        with self._changed:
            self._leaving, self._open = True, False
            self._changed.notify_all()

    # In the model

    def guard(self, model: nn.Module) -> None:
        """Puts the gate before every product of a model of transformers, forward and backward: what is
        computed in one piece takes some milliseconds."""
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._behind)

    def _before(self, *_: Any) -> None:
        self.wait()

    def _behind(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            # Called when the gradient of the output is known: before the way back through the module.
            output.register_hook(self._before)  # type: ignore[no-untyped-call]


class SharedGate(Gate):
    """One gate for all ranks of a group: rank 0's. All pass it together between micro-batches, and are told
    what rank 0 has decided and its clock, by which they decide alike. Within a micro-batch rank 0 stops at
    each product, and the others when they need something from it; for PAUSE_S at most, for they do not wait
    forever. What is left of the micro-batch is then computed without a grant, and not counted."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self._said = 0.0
        self._late = False

    @property
    def agreed(self) -> float:
        return self._said

    def wait(self) -> None:
        if self._ranks.rank == 0:
            while not self._passes():
                self._tell("hold")  # nobody waits forever
            self._tell("leave" if self._leaving else "go")
        else:
            while self._told() == "hold":
                pass
        if self._leaving:
            self.park()
            raise Left

    def _passes(self) -> bool:
        """Whether there is news within BEAT_S."""
        with self._changed:
            self._late = False
            if not self._open:
                self._park()
                self._changed.wait_for(self._decided, BEAT_S)
            self._begin()
            return self._decided()

    def _before(self, *_: Any) -> None:
        if self._late or (self._open and self._since is not None):
            return
        with self._changed:
            self._park()
            self._late = not self._changed.wait_for(self._decided, PAUSE_S)
            self._begin()

    def _decided(self) -> bool:
        return self._open or self._leaving

    def _begin(self) -> None:
        if self._open and self._since is None:
            self._since = time.perf_counter()

    def _tell(self, word: str) -> None:
        self._said = self.seconds
        self._ranks.tell(msgspec.msgpack.encode((word, self._said)))

    def _told(self) -> str:
        word, self._said = msgspec.msgpack.decode(self._ranks.tell(), type=tuple[str, float])
        self._leaving = word == "leave"
        return word
