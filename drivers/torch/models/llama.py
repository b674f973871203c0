"""Llama and the families that are settings of it: mistral, qwen2, qwen3, smollm3. SmolLM2 is a llama.

    settings    mistral   a sliding window in every layer
                qwen2     biases on q, k, v; sliding windows in the upper layers when switched on
                qwen3     RMS norm of each query and key head before the rotation
                smollm3   layers without rotation

Queries, keys and values are one matrix, gate and up another. Checked against Hugging Face transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from ..attention import Plan
from ..config import Activation, Config, Shape
from ..loader import Edit, Loader
from ..rope import Rotary, interleave, rotate
from ..weights import Checkpoint

_THETA = {"smollm3": 2_000_000.0}
_IGNORED = (r".*rotary_emb\.inv_freq",)


@dataclass(frozen=True, slots=True)
class _Biases:
    qkv: bool
    out: bool
    mlp: bool


def shape_of(config: Config) -> Shape:
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", _kv_heads(config, heads))
    config.check(heads % kv_heads == 0, "num_key_value_heads", "a divisor of num_attention_heads")
    return Shape(
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.integer("head_dim", _head_dim(config, heads)),
        context_length=config.integer("max_position_embeddings"),
        vocab_size=config.integer("vocab_size"),
    )


def _kv_heads(config: Config, heads: int) -> int:
    return 8 if config.get("model_type") == "mistral" else heads


def _head_dim(config: Config, heads: int) -> int:
    return 128 if config.get("model_type") == "qwen3" else config.integer("hidden_size") // heads


def _biases(config: Config) -> _Biases:
    match config.get("model_type"):
        case "qwen2":
            return _Biases(qkv=True, out=False, mlp=False)
        case "mistral":
            return _Biases(qkv=False, out=False, mlp=False)
        case "qwen3":
            attention = config.flag("attention_bias", False)
            return _Biases(attention, attention, mlp=False)
        case _:
            attention = config.flag("attention_bias", False)
            return _Biases(attention, attention, config.flag("mlp_bias", False))


def _rotated(config: Config, layers: int) -> list[bool]:
    """Which layers rotate their queries and keys."""
    if config.get("model_type") != "smollm3":
        return [True] * layers
    interval = config.integer("no_rope_layer_interval", 4)
    marks = config.per_layer("no_rope_layers", layers)
    return [bool(marks[i]) if marks else (i + 1) % interval != 0 for i in range(layers)]


def _windows(config: Config, rotated: list[bool]) -> list[int]:
    """The sliding window of each layer, 0 for none."""
    layers, kind = len(rotated), config.get("model_type")
    if config.get("sliding_window") is None or kind == "llama":
        return [0] * layers
    window = config.integer("sliding_window")
    if kind == "mistral":
        return [window] * layers
    if not config.flag("use_sliding_window", False):
        return [0] * layers
    if types := config.per_layer("layer_types", layers):
        return [window if types[i] == "sliding_attention" else 0 for i in range(layers)]
    if kind == "smollm3":
        return [0 if turned else window for turned in rotated]
    return [window if i >= config.integer("max_window_layers", 28) else 0 for i in range(layers)]


def _refuse_variants(config: Config) -> None:
    config.refuse_unless(
        quantization_config=None,
        partial_rotary_factor=1.0,
        rope_interleaved=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        logit_scale=None,
        num_experts=None,
        num_local_experts=None,
        add_cross_attention=False,
    )
    for kind in config.get("layer_types", []):
        known = kind in ("full_attention", "sliding_attention")
        config.check(known, "layer_types", "full_attention and sliding_attention")


def _expected(config: Config, shape: Shape, biases: _Biases) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of the checkpoint."""
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = {
        "self_attn.q_proj": (wide, hidden, biases.qkv),
        "self_attn.k_proj": (narrow, hidden, biases.qkv),
        "self_attn.v_proj": (narrow, hidden, biases.qkv),
        "self_attn.o_proj": (hidden, wide, biases.out),
        "mlp.gate_proj": (inner, hidden, biases.mlp),
        "mlp.up_proj": (inner, hidden, biases.mlp),
        "mlp.down_proj": (hidden, inner, biases.mlp),
    }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.flag("tie_word_embeddings", _tied(config)):
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        for name, (rows, columns, biased) in matrices.items():
            expected[f"{layer}{name}.weight"] = (rows, columns)
            if biased:
                expected[f"{layer}{name}.bias"] = (rows,)
        expected[f"{layer}input_layernorm.weight"] = (hidden,)
        expected[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        if config.get("model_type") == "qwen3":
            expected[f"{layer}self_attn.q_norm.weight"] = (shape.head_dim,)
            expected[f"{layer}self_attn.k_norm.weight"] = (shape.head_dim,)
    return expected


def _tied(config: Config) -> bool:
    return bool(config.get("model_type") == "smollm3")


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

    def __init__(self, settings: _Settings, load: Loader, index: int, turned: bool, window: int) -> None:
        self._settings, self._index, self._turned, self._window = settings, index, turned, window
        shape, name = settings.shape, f"model.layers.{index}."
        attention, mlp = f"{name}self_attn.", f"{name}mlp."
        q, k = f"{attention}q_proj", f"{attention}k_proj"
        counts = {q: shape.heads, k: shape.kv_heads}
        edit: dict[str, Edit] = {part: partial(interleave, heads=n) for part, n in counts.items()}
        self._qkv = load.linear(q, k, f"{attention}v_proj", edit=edit if turned else None)
        self._out = load.linear(f"{attention}o_proj")
        self._gate_up = load.linear(f"{mlp}gate_proj", f"{mlp}up_proj")
        self._down = load.linear(f"{mlp}down_proj")
        self._attention_norm = load.tensor(f"{name}input_layernorm.weight")
        self._mlp_norm = load.tensor(f"{name}post_attention_layernorm.weight")
        self._head_norm: torch.Tensor | None = None
        if f"{attention}q_norm.weight" in load.checkpoint:
            pair = [load.tensor(f"{attention}{part}_norm.weight") for part in "qk"]
            pair = [interleave(norm, 1) for norm in pair] if turned else pair
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
        found = plan.attend(self._index, query, kv, shape.head_dim**-0.5, self._window)
        x = x + self._out(found)
        gate, up = self._gate_up(settings.norm(x, self._mlp_norm)).chunk(2, dim=-1)
        return x + self._down(settings.activation(gate).mul_(up))


class LlamaModel:
    """See models.Model."""

    def __init__(self, config: Config, load: Loader) -> None:
        self.shape = shape_of(config)
        activation, epsilon = config.activation("hidden_act", "silu"), config.number("rms_norm_eps", 1e-6)
        self._settings = _Settings(self.shape, epsilon, activation)
        self._rotary = Rotary(
            config.rope(_THETA.get(config.get("model_type"), 10_000.0)), self.shape.head_dim, load.device
        )
        rotated = _rotated(config, self.shape.layers)
        windows = _windows(config, rotated)
        self.windows = set(windows)
        load.checkpoint.expect(_expected(config, self.shape, _biases(config)), _ignored(config))
        self._embedding = load.tensor("model.embed_tokens.weight")
        self._layers = [
            _Layer(self._settings, load, i, turned, window)
            for i, (turned, window) in enumerate(zip(rotated, windows, strict=True))
        ]
        self._final_norm = load.tensor("model.norm.weight")
        if config.flag("tie_word_embeddings", _tied(config)):
            self._head = load.tied(self._embedding)
        else:
            self._head = load.linear("lm_head")
        self.weights_bytes = load.nbytes

    def forward(self, plan: Plan) -> torch.Tensor:
        x = functional.embedding(plan.tokens, self._embedding)
        turns = self._rotary.turns(plan.positions)
        for layer in self._layers:
            x = layer(x, turns, plan)
        return self._settings.norm(x, self._final_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()


def _ignored(config: Config) -> tuple[str, ...]:
    """Tensors that checkpoints carry and Hugging Face does not use either."""
    tied = config.flag("tie_word_embeddings", _tied(config))
    return (*_IGNORED, r"lm_head\.weight") if tied else _IGNORED


def build(config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> LlamaModel:
    _refuse_variants(config)
    return LlamaModel(config, Loader(checkpoint, device, dtype))
