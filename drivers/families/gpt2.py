"""GPT-2: learned positions, LayerNorm, one matrix for queries, keys and values, and a plain MLP."""

from __future__ import annotations

from ..model_config import Config, Shape
from .decoder import Decoder, Layer

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


def describe(config: Config) -> Decoder:
    """Raises UnsupportedModel."""
    config.refuse_unless(add_cross_attention=False, tie_word_embeddings=True, quantization_config=None)
    shape, hidden = shape_of(config), config.integer("n_embd")
    inner = config.integer("n_inner", 4 * hidden)
    return Decoder(
        family="gpt2",
        shape=shape,
        hidden=hidden,
        inner=inner,
        norm="layer",
        epsilon=config.epsilon("layer_norm_epsilon", 1e-5),
        activation=config.activation("activation_function", "gelu_new"),
        gated=False,
        rotation=None,
        layers=tuple(_layer(config, shape, i) for i in range(shape.layers)),
        embedding="wte",
        positions="wpe",
        final_norm="ln_f",
        head="",
        turned=True,  # Hugging Face's Conv1D
        prefix="transformer.",
        expected=_expected(shape, hidden, inner),
        ignored=_IGNORED,
    )


def _layer(config: Config, shape: Shape, i: int) -> Layer:
    scale = shape.head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    if config.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= i + 1
    name = f"h.{i}."
    return Layer(
        norm1=f"{name}ln_1",
        qkv=(f"{name}attn.c_attn",),
        out=f"{name}attn.c_proj",
        norm2=f"{name}ln_2",
        up=(f"{name}mlp.c_fc",),
        down=f"{name}mlp.c_proj",
        scale=scale,
        rotated=False,
    )


def _expected(shape: Shape, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
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
