"""Llama and the families that are settings of it, in torch; see families/llama.py. Checked against Hugging
Face transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...families.decoder import Decoder, Layer
from ...families.llama import describe, shape_of
from ..attention import StepRows
from ..config import ACTIVATIONS, Activation, Config, Shape
from ..loader import Loader
from ..ops import Ops, Turn
from ..ranks import Ranks
from ..rope import Rotary, interleave, interleaved
from ..shards import Part, Shard
from ..weights import Checkpoint

__all__ = ["build", "shape_of"]


@dataclass(frozen=True, slots=True)
class _Settings:
    """What all layers share."""

    shape: Shape
    epsilon: float
    activation: Activation
    ops: Ops


class _Layer:
    """One decoder layer."""

    def __init__(self, settings: _Settings, load: Loader, layer: Layer, index: int) -> None:
        self._settings, self._index = settings, index
        self._turned, self._window, self._scale = layer.rotated, layer.window, layer.scale
        self._qkv = load.linear(*layer.qkv, edit=interleaved(layer, settings.shape))
        self._out = load.linear(layer.out)
        self._gate_up = load.linear(*layer.up)
        self._down = load.linear(layer.down)
        self._sum = load.sum
        self._attention_norm = load.tensor(f"{layer.norm1}.weight")
        self._mlp_norm = load.tensor(f"{layer.norm2}.weight")
        self._head_norm: torch.Tensor | None = None
        if layer.head_norms:
            pair = [load.tensor(f"{name}.weight") for name in layer.head_norms]
            pair = [interleave(norm, 1) for norm in pair] if layer.rotated else pair
            counts = settings.shape.heads, settings.shape.kv_heads
            wide = [norm.expand(n, -1) for norm, n in zip(pair, counts, strict=True)]
            self._head_norm = torch.cat(wide)

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None, turns: torch.Tensor, plan: StepRows
    ) -> torch.Tensor:
        """x [T, hidden], to which `delta` has still to be added; adds in place, returns the next delta."""
        settings, shape, ops = self._settings, self._settings.shape, self._settings.ops
        index = self._index
        normed = ops.add_norm(x, delta, self._attention_norm, settings.epsilon)
        rows = plan.adapt((index, "qkv"), normed, self._qkv(normed))
        rows = rows.view(len(x), shape.heads + 2 * shape.kv_heads, shape.head_dim)
        turn = Turn(turns if self._turned else None, self._head_norm, settings.epsilon)
        found = plan.attend_heads(index, rows, self._scale, self._window, turn)
        delta = self._sum(plan.adapt((index, "out"), found, self._out(found)))
        normed = ops.add_norm(x, delta, self._mlp_norm, settings.epsilon)
        inner = ops.gate(plan.adapt((index, "up"), normed, self._gate_up(normed)), settings.activation)
        return self._sum(plan.adapt((index, "down"), inner, self._down(inner)))


class LlamaModel:
    """See models.Model."""

    def __init__(self, decoder: Decoder, load: Loader) -> None:
        assert decoder.rotation is not None
        self.shape = decoder.shape
        self.windows = {layer.window for layer in decoder.layers}
        self._settings = _Settings(self.shape, decoder.epsilon, ACTIVATIONS[decoder.activation], load.ops)
        self._rotary = Rotary(decoder.rotation, load.device)
        self._embed = load.lookup()
        self._embedding = load.tensor(f"{decoder.embedding}.weight")
        self._layers = [_Layer(self._settings, load, layer, i) for i, layer in enumerate(decoder.layers)]
        self._final_norm = load.tensor(f"{decoder.final_norm}.weight")
        self._head = load.head(decoder.head) if decoder.head else load.tied(self._embedding)
        self.weights_bytes = load.nbytes

    def forward(self, plan: StepRows) -> torch.Tensor:
        x = self._embed(plan.tokens, self._embedding)
        turns = self._rotary.turns(plan.positions)
        delta: torch.Tensor | None = None
        for layer in self._layers:
            delta = layer(x, delta, turns, plan)
        return self._settings.ops.add_norm(x, delta, self._final_norm, self._settings.epsilon)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def build(
    config: Config,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    format_: str = "",
    ranks: Ranks | None = None,
) -> LlamaModel:
    decoder = describe(config)
    decoder.expect(checkpoint)
    if ranks is None:
        return LlamaModel(decoder, Loader(checkpoint, device, dtype, format_))
    part = Part(Shard(decoder, ranks), checkpoint)
    return LlamaModel(part.decoder, Loader(part, device, dtype, format_))
