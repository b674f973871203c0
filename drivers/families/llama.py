"""Llama and the families that are settings of it: mistral, qwen2, qwen3, smollm3. SmolLM2 is a llama.

    settings    mistral   a sliding window in every layer
                qwen2     biases on q, k, v; sliding windows in the upper layers when switched on
                qwen3     RMS norm of each query and key head before the rotation
                smollm3   layers without rotation

Queries, keys and values are one matrix, gate and up another.
"""

from __future__ import annotations

from typing import NamedTuple

from ..model_config import Config, Shape
from ..rope import rotation
from .decoder import Decoder, Layer

_THETA = {"smollm3": 2_000_000.0}
_IGNORED = (r".*rotary_emb\.inv_freq",)


class _Biases(NamedTuple):
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


def describe(config: Config) -> Decoder:
    """Raises UnsupportedModel."""
    _refuse_variants(config)
    kind, shape = config.text("model_type"), shape_of(config)
    rotated = _rotated(config, shape.layers)
    windows = _windows(config, rotated)
    tied = config.flag("tie_word_embeddings", kind == "smollm3")
    return Decoder(
        family=kind,
        shape=shape,
        hidden=config.integer("hidden_size"),
        inner=config.integer("intermediate_size"),
        norm="rms",
        epsilon=config.epsilon("rms_norm_eps", 1e-6),
        activation=config.activation("hidden_act", "silu"),
        gated=True,
        rotation=rotation(config.rope(_THETA.get(kind, 10_000.0)), shape.head_dim),
        layers=tuple(
            _layer(i, shape, turned, window, kind == "qwen3")
            for i, (turned, window) in enumerate(zip(rotated, windows, strict=True))
        ),
        embedding="model.embed_tokens",
        positions="",
        final_norm="model.norm",
        head="" if tied else "lm_head",
        turned=False,
        prefix="",
        expected=_expected(config, shape, tied),
        # Hugging Face does not use the head of a tied checkpoint either.
        ignored=(*_IGNORED, r"lm_head\.weight") if tied else _IGNORED,
    )


def _layer(i: int, shape: Shape, turned: bool, window: int, head_norms: bool) -> Layer:
    name = f"model.layers.{i}."
    attention, mlp = f"{name}self_attn.", f"{name}mlp."
    return Layer(
        norm1=f"{name}input_layernorm",
        qkv=(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
        out=f"{attention}o_proj",
        norm2=f"{name}post_attention_layernorm",
        up=(f"{mlp}gate_proj", f"{mlp}up_proj"),
        down=f"{mlp}down_proj",
        scale=shape.head_dim**-0.5,
        window=window,
        rotated=turned,
        head_norms=(f"{attention}q_norm", f"{attention}k_norm") if head_norms else None,
    )


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
    for kind in config.texts("layer_types"):
        known = kind in ("full_attention", "sliding_attention")
        config.check(known, "layer_types", "full_attention and sliding_attention")


def _expected(config: Config, shape: Shape, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of the checkpoint."""
    biases = _biases(config)
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
    if not tied:
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
