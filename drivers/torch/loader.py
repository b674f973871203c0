"""Places the tensors of a checkpoint, or of a rank's part of one, on a device, in one dtype or quantised, and
counts what they take."""

from __future__ import annotations

import torch
from torch.nn import functional

from .linear import Linear
from .ops import ops_for
from .quantised import quantise
from .rope import Edit
from .shards import Lookup, Matrix, Part
from .weights import Checkpoint


class Loader:
    """`nbytes` is the sum of what was loaded so far. `format_`: one of quantised.FORMATS for the matrices, or
    none."""

    def __init__(
        self, checkpoint: Checkpoint | Part, device: torch.device, dtype: torch.dtype, format_: str = ""
    ) -> None:
        self.checkpoint, self.device, self.dtype, self._format = checkpoint, device, dtype, format_
        self._part = checkpoint if isinstance(checkpoint, Part) else None
        self.ops = ops_for(device)
        # What every rank adds up of a layer's two halves; alone it is the sum.
        self.sum: Matrix = self._part.ranks.sum if self._part else lambda x: x
        self.nbytes = 0

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.tensor(name, self.dtype).to(self.device)
        self.nbytes += tensor.nbytes
        return tensor

    def linear(self, *names: str, edit: dict[str, Edit] | None = None) -> Matrix:
        """Layers of one input as one matrix [out, in]; `edit` changes weight and bias of single ones."""

        def read(name: str, part: str) -> torch.Tensor:
            tensor = self.checkpoint.tensor(f"{name}.{part}", self.dtype)
            return edit[name](tensor) if edit and name in edit else tensor

        weight = torch.cat([read(name, "weight") for name in names])
        biased = f"{names[0]}.bias" in self.checkpoint
        bias = torch.cat([read(name, "bias") for name in names]) if biased else None
        return self._place(weight, bias, self._format)

    def lookup(self) -> Lookup:
        return self._part.lookup() if self._part else functional.embedding

    def head(self, name: str) -> Matrix:
        """The matrix that makes logits: never in 4 bits, which would hurt it most."""
        weight = self.checkpoint.tensor(f"{name}.weight", self.dtype)
        return self._whole(self._place(weight, None, self._head_format))

    def tied(self, embedding: torch.Tensor) -> Matrix:
        """A head that is the embedding: shared where the layout allows it."""
        if self._format:
            return self._whole(self._place(embedding, None, self._head_format))
        layer = Linear(embedding, None, self.device)
        self.nbytes += layer.nbytes if layer.packed else 0
        return self._whole(layer)

    def _whole(self, head: Matrix) -> Matrix:
        return self._part.head(head) if self._part else head

    @property
    def _head_format(self) -> str:
        return "int8" if self._format == "int4" else self._format

    def _place(self, weight: torch.Tensor, bias: torch.Tensor | None, format_: str) -> Matrix:
        if format_:
            bias = None if bias is None else bias.to(self.device)
            quantised = quantise(weight.to(self.device), bias, format_, self.ops)
            self.nbytes += quantised.nbytes
            return quantised
        layer = Linear(weight, bias, self.device)
        self.nbytes += layer.nbytes
        return layer
