"""GPT-2: learned positions, LayerNorm, one matrix for queries, keys and values, and a plain MLP.

The checkpoint's matrices are [in, out] (Hugging Face's Conv1D) and are turned at load.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..attention import Plan
from ..config import Config, Shape
from ..linear import Linear
from ..weights import Checkpoint

# Causal masks that old checkpoints carry, and the head, which is the embedding.
_IGNORED = (r"h\.\d+\.attn\.bias", r"h\.\d+\.attn\.masked_bias", r"lm_head\.weight")


def shape_of(config: Config) -> Shape:
    heads, hidden = config.integer("n_head"), config.integer("n_embd")
    config.check(hidden % heads == 0, "n_head", "a divisor of n_embd")
    return Shape(
        layers=config.integer("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        context_length=config.integer("n_positions"),
        vocab_size=config.integer("vocab_size"),
    )


def _expected(config: Config, shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden = config.integer("n_embd")
    inner = config.integer("n_inner", 4 * hidden)
    expected: dict[str, tuple[int, ...]] = {
        "wte.weight": (shape.vocab_size, hidden),
        "wpe.weight": (shape.context_length, hidden),
        "ln_f.weight": (hidden,),
        "ln_f.bias": (hidden,),
    }
    matrices = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    for i in range(shape.layers):
        for name, (rows, columns) in matrices.items():
            expected[f"h.{i}.{name}.weight"] = (rows, columns)
            expected[f"h.{i}.{name}.bias"] = (columns,)
        for norm in ("ln_1", "ln_2"):
            expected[f"h.{i}.{norm}.weight"] = (hidden,)
            expected[f"h.{i}.{norm}.bias"] = (hidden,)
    return expected


class _Norm:
    """LayerNorm of the last dimension."""

    def __init__(self, model: Gpt2Model, name: str) -> None:
        self._weight, self._bias = model.vector(f"{name}.weight"), model.vector(f"{name}.bias")
        self._epsilon = model.epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (x.shape[-1],), self._weight, self._bias, self._epsilon)


class _Layer:
    def __init__(self, model: Gpt2Model, index: int, scale: float) -> None:
        self._model, self._index, self._scale = model, index, scale
        name = f"h.{index}."
        self._attention_norm = _Norm(model, f"{name}ln_1")
        self._mlp_norm = _Norm(model, f"{name}ln_2")
        self._qkv = model.linear(f"{name}attn.c_attn")
        self._out = model.linear(f"{name}attn.c_proj")
        self._up = model.linear(f"{name}mlp.c_fc")
        self._down = model.linear(f"{name}mlp.c_proj")

    def __call__(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        shape = self._model.shape
        rows = self._qkv(self._attention_norm(x)).view(len(x), 3 * shape.heads, shape.head_dim)
        found = plan.attend(self._index, rows[:, : shape.heads], rows[:, shape.heads :], self._scale)
        x = x + self._out(found)
        return x + self._down(self._model.activation(self._up(self._mlp_norm(x))))


class Gpt2Model:
    """See models.Model."""

    windows = {0}

    def __init__(
        self, config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape = shape_of(config)
        self.activation = config.activation("activation_function", "gelu_new")
        self.epsilon = config.number("layer_norm_epsilon", 1e-5)
        self.weights_bytes = 0
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._embedding, self._positions = self.vector("wte.weight"), self.vector("wpe.weight")
        self._layers = [_Layer(self, i, _scale(config, self.shape, i)) for i in range(self.shape.layers)]
        self._final_norm = _Norm(self, "ln_f")
        self._head = Linear(self._embedding, None, device)
        self.weights_bytes += self._head.nbytes if self._head.packed else 0

    def vector(self, name: str) -> torch.Tensor:
        tensor = self._checkpoint.read(name, self._dtype).to(self._device)
        self.weights_bytes += tensor.nbytes
        return tensor

    def linear(self, name: str) -> Linear:
        weight = self._checkpoint.read(f"{name}.weight", self._dtype).t().contiguous()
        layer = Linear(weight, self._checkpoint.read(f"{name}.bias", self._dtype), self._device)
        self.weights_bytes += layer.nbytes
        return layer

    def forward(self, plan: Plan) -> torch.Tensor:
        x = functional.embedding(plan.tokens, self._embedding)
        x = x + functional.embedding(plan.positions, self._positions)
        for layer in self._layers:
            x = layer(x, plan)
        return self._final_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def _scale(config: Config, shape: Shape, layer: int) -> float:
    scale = shape.head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if config.flag("scale_attn_by_inverse_layer_idx", False) else scale


def build(config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Gpt2Model:
    config.refuse_unless(add_cross_attention=False, tie_word_embeddings=True, quantization_config=None)
    checkpoint.drop_prefix("transformer.")
    checkpoint.expect(_expected(config, shape_of(config)), _IGNORED)
    return Gpt2Model(config, checkpoint, device, dtype)
