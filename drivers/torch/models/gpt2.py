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
from ..loader import Loader
from ..ranks import Ranks
from ..shards import Matrix, Part, Shard
from ..weights import Checkpoint

__all__ = ["build", "shape_of"]


class _Norm:
    """LayerNorm of the last dimension."""

    def __init__(self, decoder: Decoder, load: Loader, name: str) -> None:
        self._weight, self._bias = load.tensor(f"{name}.weight"), load.tensor(f"{name}.bias")
        self._epsilon = decoder.epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (x.shape[-1],), self._weight, self._bias, self._epsilon)


def _linear(load: Loader, name: str) -> Matrix:
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
        self._sum = load.sum

    def __call__(self, x: torch.Tensor, plan: StepRows) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        shape, index = self._shape, self._index
        normed = self._attention_norm(x)
        rows = plan.adapt((index, "qkv"), normed, self._qkv(normed))
        rows = rows.view(len(x), 3 * shape.heads, shape.head_dim)
        found = plan.attend_heads(index, rows, self._scale)
        x = x + self._sum(plan.adapt((index, "out"), found, self._out(found)))
        normed = self._mlp_norm(x)
        inner = self._activation(plan.adapt((index, "up"), normed, self._up(normed)))
        return x + self._sum(plan.adapt((index, "down"), inner, self._down(inner)))


class Gpt2Model:
    """See models.Model."""

    def __init__(self, decoder: Decoder, load: Loader) -> None:
        self.shape = decoder.shape
        self.windows = {0}
        self._embed = load.lookup()
        self._embedding = load.tensor(f"{decoder.embedding}.weight")
        self._positions = load.tensor(f"{decoder.positions}.weight")
        self._layers = [_Layer(decoder, load, layer, i) for i, layer in enumerate(decoder.layers)]
        self._final_norm = _Norm(decoder, load, decoder.final_norm)
        self._head = load.tied(self._embedding)
        self.weights_bytes = load.nbytes

    def forward(self, plan: StepRows) -> torch.Tensor:
        x = self._embed(plan.tokens, self._embedding)
        x = x + functional.embedding(plan.positions, self._positions)
        for layer in self._layers:
            x = layer(x, plan)
        return self._final_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def build(
    config: Config,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    format_: str = "",
    ranks: Ranks | None = None,
) -> Gpt2Model:
    decoder = describe(config)
    decoder.expect(checkpoint)
    if ranks is None:
        return Gpt2Model(decoder, Loader(checkpoint, device, dtype, format_))
    part = Part(Shard(decoder, ranks), checkpoint)
    return Gpt2Model(part.decoder, Loader(part, device, dtype, format_))
