"""GPT-2: learned positions, LayerNorm, one matrix for queries, keys and values, and a plain MLP.

The checkpoint's matrices are [in, out] (Hugging Face's Conv1D) and are turned at load.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..attention import Plan
from ..config import Config, Shape
from ..linear import Linear
from ..loader import Loader
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

    def __init__(self, config: Config, load: Loader, name: str) -> None:
        self._weight, self._bias = load.tensor(f"{name}.weight"), load.tensor(f"{name}.bias")
        self._epsilon = config.number("layer_norm_epsilon", 1e-5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (x.shape[-1],), self._weight, self._bias, self._epsilon)


def _linear(load: Loader, name: str) -> Linear:
    def turn(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t() if tensor.dim() == 2 else tensor

    return load.linear(name, edit={name: turn})


class _Layer:
    def __init__(self, config: Config, shape: Shape, load: Loader, index: int) -> None:
        self._shape, self._index, self._scale = shape, index, _scale(config, shape, index)
        self._activation = config.activation("activation_function", "gelu_new")
        name = f"h.{index}."
        self._attention_norm = _Norm(config, load, f"{name}ln_1")
        self._mlp_norm = _Norm(config, load, f"{name}ln_2")
        self._qkv = _linear(load, f"{name}attn.c_attn")
        self._out = _linear(load, f"{name}attn.c_proj")
        self._up = _linear(load, f"{name}mlp.c_fc")
        self._down = _linear(load, f"{name}mlp.c_proj")

    def __call__(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        shape = self._shape
        rows = self._qkv(self._attention_norm(x)).view(len(x), 3 * shape.heads, shape.head_dim)
        found = plan.attend(self._index, rows[:, : shape.heads], rows[:, shape.heads :], self._scale)
        x = x + self._out(found)
        return x + self._down(self._activation(self._up(self._mlp_norm(x))))


class Gpt2Model:
    """See models.Model."""

    def __init__(self, config: Config, load: Loader) -> None:
        self.shape = shape_of(config)
        self.windows = {0}
        self._embedding, self._positions = load.tensor("wte.weight"), load.tensor("wpe.weight")
        self._layers = [_Layer(config, self.shape, load, index) for index in range(self.shape.layers)]
        self._final_norm = _Norm(config, load, "ln_f")
        self._head = load.tied(self._embedding)
        self.weights_bytes = load.nbytes

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
    return Gpt2Model(config, Loader(checkpoint, device, dtype))
