"""GPT-2 in torch; see families/gpt2.py.

The checkpoint's matrices are [in, out] (Hugging Face's Conv1D) and are turned at load.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ...families.decoder import Decoder, Layer
from ...families.gpt2 import describe, shape_of
from ..attention import StepRows
from ..config import ACTIVATIONS, Config
from ..linear import Linear
from ..loader import Loader
from ..quantised import QuantisedLinear
from ..weights import Checkpoint

__all__ = ["build", "shape_of"]


class _Norm:
    """LayerNorm of the last dimension."""

    def __init__(self, decoder: Decoder, load: Loader, name: str) -> None:
        self._weight, self._bias = load.tensor(f"{name}.weight"), load.tensor(f"{name}.bias")
        self._epsilon = decoder.epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (x.shape[-1],), self._weight, self._bias, self._epsilon)


def _linear(load: Loader, name: str) -> Linear | QuantisedLinear:
    def turn(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t() if tensor.dim() == 2 else tensor

    return load.linear(name, edit={name: turn})


class _Layer:
    def __init__(self, decoder: Decoder, load: Loader, layer: Layer, index: int) -> None:
        self._shape, self._index, self._scale = decoder.shape, index, layer.scale
        self._activation = ACTIVATIONS[decoder.activation]
        self._attention_norm = _Norm(decoder, load, layer.norm1)
        self._mlp_norm = _Norm(decoder, load, layer.norm2)
        self._qkv = _linear(load, *layer.qkv)
        self._out = _linear(load, layer.out)
        self._up = _linear(load, *layer.up)
        self._down = _linear(load, layer.down)

    def __call__(self, x: torch.Tensor, plan: StepRows) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        shape = self._shape
        rows = self._qkv(self._attention_norm(x)).view(len(x), 3 * shape.heads, shape.head_dim)
        x = x + self._out(plan.attend_heads(self._index, rows, self._scale))
        return x + self._down(self._activation(self._up(self._mlp_norm(x))))


class Gpt2Model:
    """See models.Model."""

    def __init__(self, decoder: Decoder, load: Loader) -> None:
        self.shape = decoder.shape
        self.windows = {0}
        self._embedding = load.tensor(f"{decoder.embedding}.weight")
        self._positions = load.tensor(f"{decoder.positions}.weight")
        self._layers = [_Layer(decoder, load, layer, i) for i, layer in enumerate(decoder.layers)]
        self._final_norm = _Norm(decoder, load, decoder.final_norm)
        self._head = load.tied(self._embedding)
        self.weights_bytes = load.nbytes

    def forward(self, plan: StepRows) -> torch.Tensor:
        x = functional.embedding(plan.tokens, self._embedding)
        x = x + functional.embedding(plan.positions, self._positions)
        for layer in self._layers:
            x = layer(x, plan)
        return self._final_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def build(
    config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, format_: str = ""
) -> Gpt2Model:
    decoder = describe(config)
    decoder.expect(checkpoint)
    return Gpt2Model(decoder, Loader(checkpoint, device, dtype, format_))
