"""Llama and the families that are settings of it, in torch; see families/llama.py. Checked against Hugging
Face transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from ...families.decoder import Decoder, Layer
from ...families.llama import describe, shape_of
from ..attention import Plan
from ..config import ACTIVATIONS, Activation, Config, Shape
from ..loader import Edit, Loader
from ..rope import Rotary, interleave, rotate
from ..weights import Checkpoint

__all__ = ["build", "shape_of"]


@dataclass(frozen=True, slots=True)
class _Settings:
    """What all layers share."""

    shape: Shape
    epsilon: float
    activation: Activation

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.epsilon)


class _Layer:
    """One decoder layer."""

    def __init__(self, settings: _Settings, load: Loader, layer: Layer, index: int) -> None:
        self._settings, self._index = settings, index
        self._turned, self._window, self._scale = layer.rotated, layer.window, layer.scale
        q, k, v = layer.qkv
        counts = {q: settings.shape.heads, k: settings.shape.kv_heads}
        edit: dict[str, Edit] = {part: partial(interleave, heads=n) for part, n in counts.items()}
        self._qkv = load.linear(q, k, v, edit=edit if layer.rotated else None)
        self._out = load.linear(layer.out)
        self._gate_up = load.linear(*layer.up)
        self._down = load.linear(layer.down)
        self._attention_norm = load.tensor(f"{layer.norm1}.weight")
        self._mlp_norm = load.tensor(f"{layer.norm2}.weight")
        self._head_norm: torch.Tensor | None = None
        if layer.head_norms:
            pair = [load.tensor(f"{name}.weight") for name in layer.head_norms]
            pair = [interleave(norm, 1) for norm in pair] if layer.rotated else pair
            wide = [norm.expand(n, -1) for norm, n in zip(pair, counts.values(), strict=True)]
            self._head_norm = torch.cat(wide)

    def __call__(self, x: torch.Tensor, turns: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        settings, shape = self._settings, self._settings.shape
        rows = self._qkv(settings.norm(x, self._attention_norm))
        rows = rows.view(len(x), shape.heads + 2 * shape.kv_heads, shape.head_dim)
        turning = rows[:, : shape.heads + shape.kv_heads]
        if self._head_norm is not None:
            turning.copy_(settings.norm(turning, None) * self._head_norm)
        if self._turned:
            rotate(turning, turns)
        query, kv = rows[:, : shape.heads], rows[:, shape.heads :]
        found = plan.attend(self._index, query, kv, self._scale, self._window)
        x = x + self._out(found)
        gate, up = self._gate_up(settings.norm(x, self._mlp_norm)).chunk(2, dim=-1)
        return x + self._down(settings.activation(gate).mul_(up))


class LlamaModel:
    """See models.Model."""

    def __init__(self, decoder: Decoder, load: Loader) -> None:
        assert decoder.rotation is not None
        self.shape = decoder.shape
        self.windows = {layer.window for layer in decoder.layers}
        self._settings = _Settings(self.shape, decoder.epsilon, ACTIVATIONS[decoder.activation])
        self._rotary = Rotary(decoder.rotation, load.device)
        self._embedding = load.tensor(f"{decoder.embedding}.weight")
        self._layers = [_Layer(self._settings, load, layer, i) for i, layer in enumerate(decoder.layers)]
        self._final_norm = load.tensor(f"{decoder.final_norm}.weight")
        self._head = load.linear(decoder.head) if decoder.head else load.tied(self._embedding)
        self.weights_bytes = load.nbytes

    def forward(self, plan: Plan) -> torch.Tensor:
        x = functional.embedding(plan.tokens, self._embedding)
        turns = self._rotary.turns(plan.positions)
        for layer in self._layers:
            x = layer(x, turns, plan)
        return self._settings.norm(x, self._final_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def build(config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> LlamaModel:
    decoder = describe(config)
    decoder.expect(checkpoint)
    return LlamaModel(decoder, Loader(checkpoint, device, dtype))
