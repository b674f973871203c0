"""The events of a run: appended to metrics.jsonl, and to TensorBoard where it is installed.

A trainer that goes on from a checkpoint drops what was told of later steps and evaluations: they are computed
again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from llmasos.syscalls.training import TrainEvent

from .checkpoints import storing

_SCALARS = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "train/tokens_per_s": "tokens_per_s",
    "eval/loss": "eval_loss",
}


class Metrics:
    """Writes the events of a run that goes on after `step`, with the evaluation of `eval_step` as its last
    one. Raises StorageFailed."""

    def __init__(self, folder: Path, step: int, eval_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        with storing(folder):
            self._file = self._path.open("ab")
            self._file.truncate(_length_until(self._path, step, eval_step))
        self._board = _tensorboard(folder / "tensorboard", step)

    def add(self, event: TrainEvent) -> None:
        """Raises StorageFailed."""
        with storing(self._path):
            self._file.write(msgspec.json.encode(event) + b"\n")
            self._file.flush()
        if self._board is not None:
            for name, field in _SCALARS.items():
                if (value := getattr(event, field)) is not None:
                    self._board.add_scalar(name, value, event.step)

    def sync(self) -> None:
        """Makes what was added durable. Raises StorageFailed."""
        with storing(self._path):
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _length_until(path: Path, step: int, eval_step: int) -> int:
    """Bytes of the whole lines before the first that will be told again."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            try:
                event = msgspec.json.decode(line, type=TrainEvent)
            except msgspec.DecodeError:
                break  # not finished
            if not line.endswith(b"\n") or not event.is_behind(step, eval_step):
                break
            length += len(line)
    return length


def _tensorboard(folder: Path, step: int) -> Any:
    """A SummaryWriter; None: TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
