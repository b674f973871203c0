"""The tensors of a checkpoint as torch tensors."""

from __future__ import annotations

import torch

from .. import checkpoint
from ..checkpoint import PLAIN, values_of

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(checkpoint.Checkpoint):
    """A checkpoint that gives torch tensors too."""

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in `dtype` on the host, in Hugging Face's row order; owns its memory. What is stored in 16
        bits never becomes float32 on the way to 16 bits."""
        raw = self.raw(name)
        if raw.type in PLAIN:
            owned = raw.rows if raw.rows.flags.writeable else raw.rows.copy()
            tensor = torch.from_numpy(owned).view(_TYPES[raw.type])
        else:
            tensor = torch.from_numpy(values_of(raw.type, raw.rows))
        tensor = tensor.view(raw.shape).to(dtype)
        return tensor.t().contiguous() if raw.transposed else tensor
