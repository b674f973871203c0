"""Places the tensors of a checkpoint on a device, in one dtype, and counts what they take."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .linear import Linear
from .weights import Checkpoint

Edit = Callable[[torch.Tensor], torch.Tensor]


class Loader:
    """`nbytes` is the sum of what was loaded so far."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.nbytes = 0

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.tensor(name, self.dtype).to(self.device)
        self.nbytes += tensor.nbytes
        return tensor

    def linear(self, *names: str, edit: dict[str, Edit] | None = None) -> Linear:
        """Layers of one input as one matrix [out, in]; `edit` changes weight and bias of single ones."""

        def read(name: str, part: str) -> torch.Tensor:
            tensor = self.checkpoint.tensor(f"{name}.{part}", self.dtype)
            return edit[name](tensor) if edit and name in edit else tensor

        weight = torch.cat([read(name, "weight") for name in names])
        biased = f"{names[0]}.bias" in self.checkpoint
        bias = torch.cat([read(name, "bias") for name in names]) if biased else None
        layer = Linear(weight, bias, self.device)
        self.nbytes += layer.nbytes
        return layer

    def tied(self, embedding: torch.Tensor) -> Linear:
        """A head that is the embedding: shared where the layout allows it."""
        layer = Linear(embedding, None, self.device)
        self.nbytes += layer.nbytes if layer.packed else 0
        return layer
