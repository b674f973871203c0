"""Llama and the families that are settings of it, in torch; see families/llama.py. Checked against Hugging
Face transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from ...families.decoder import Decoder, Layer
from ...families.llama import describe, shape_of
from ..attention import StepRows
from ..config import ACTIVATIONS, Activation, Config, Shape
from ..loader import Edit, Loader
from ..ops import Ops, Turn
from ..rope import Rotary, interleave
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

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None, turns: torch.Tensor, plan: StepRows
    ) -> torch.Tensor:
        """x [T, hidden], to which `delta` has still to be added; adds in place, returns the next delta."""
        settings, shape, ops = self._settings, self._settings.shape, self._settings.ops
        rows = self._qkv(ops.add_norm(x, delta, self._attention_norm, settings.epsilon))
        rows = rows.view(len(x), shape.heads + 2 * shape.kv_heads, shape.head_dim)
        turn = Turn(turns if self._turned else None, self._head_norm, settings.epsilon)
        found = plan.attend_heads(self._index, rows, self._scale, self._window, turn)
        normed = ops.add_norm(x, self._out(found), self._mlp_norm, settings.epsilon)
        return self._down(ops.gate(self._gate_up(normed), settings.activation))


class LlamaModel:
    """See models.Model."""

    def __init__(self, decoder: Decoder, load: Loader) -> None:
        assert decoder.rotation is not None
        self.shape = decoder.shape
        self.windows = {layer.window for layer in decoder.layers}
        self._settings = _Settings(self.shape, decoder.epsilon, ACTIVATIONS[decoder.activation], load.ops)
        self._rotary = Rotary(decoder.rotation, load.device)
        self._embedding = load.tensor(f"{decoder.embedding}.weight")
        self._layers = [_Layer(self._settings, load, layer, i) for i, layer in enumerate(decoder.layers)]
        self._final_norm = load.tensor(f"{decoder.final_norm}.weight")
        self._head = load.head(decoder.head) if decoder.head else load.tied(self._embedding)
        self.weights_bytes = load.nbytes

    def forward(self, plan: StepRows) -> torch.Tensor:
        x = functional.embedding(plan.tokens, self._embedding)
        turns = self._rotary.turns(plan.positions)
        delta: torch.Tensor | None = None
        for layer in self._layers:
            delta = layer(x, delta, turns, plan)
        return self._settings.ops.add_norm(x, delta, self._final_norm, self._settings.epsilon)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def build(
    config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, format_: str = ""
) -> LlamaModel:
    decoder = describe(config)
    decoder.expect(checkpoint)
    return LlamaModel(decoder, Loader(checkpoint, device, dtype, format_))
