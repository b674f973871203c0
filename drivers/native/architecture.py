"""A model as the engine sees it: numbers, and the sizes of its padded arrays (engine/engine.h)."""

from __future__ import annotations

from llmasos.syscalls import errors
from msgspec import Struct

from ..families import describe
from ..families.decoder import Decoder
from ..model_config import Config

# The engine counts columns, rows and positions in 32 bits, with room for products of a few of them.
_MOST = 1 << 24
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")

ROWS = 16  # of a block of a packed matrix
GROUP = 32  # columns that share a scale


class Layer(Struct, frozen=True):
    """`scale` is that of the scores; `window` 0 for none."""

    scale: float
    window: int
    rotated: bool


class Architecture(Struct, frozen=True):
    """`inner` and `hidden` count real columns, as do `head_size` and `vocab_size`. `rotary`: pairs of a head
    that are rotated, 0 with learned positions. `*_biased`: which matrices have biases."""

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab_size: int
    context_length: int
    norm: str
    epsilon: float
    activation: str
    gated: bool
    rotary: int
    rope_scale: float
    tied: bool
    head_norms: bool
    qkv_biased: bool
    out_biased: bool
    mlp_biased: bool
    layers: list[Layer]

    @property
    def hidden_padded(self) -> int:
        return up_to(self.hidden, GROUP)

    @property
    def inner_padded(self) -> int:
        return up_to(self.inner, GROUP)

    @property
    def head_dim(self) -> int:
        return up_to(self.head_size, ROWS)

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def out_cols(self) -> int:
        return up_to(self.heads * self.head_dim, GROUP)

    @property
    def up_rows(self) -> int:
        # Whole groups, not just blocks: the product's rows are the columns of `down`, and all are written.
        return self.inner_padded * (2 if self.gated else 1)

    def consistent(self) -> bool:
        """Whether the engine can compute with these numbers at all. They may come from a file."""
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_size, self.inner)
        lengths = (self.vocab_size, self.context_length, len(self.layers))
        return (
            all(0 < count <= _MOST for count in (*sizes, *lengths))
            and self.heads % self.kv_heads == 0
            and self.rotary in (0, self.head_size // 2)
            and self.activation in _ACTIVATIONS
            and self.norm in ("rms", "layer")
            and all(layer.window >= 0 for layer in self.layers)
        )

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Padded rows and columns of every packed matrix."""
        hidden_rows, vocab = up_to(self.hidden, ROWS), up_to(self.vocab_size, ROWS)
        found = {"head": (vocab, self.hidden_padded)}
        if not self.tied:
            found["embedding"] = (vocab, self.hidden_padded)
        for i in range(len(self.layers)):
            found[f"layer.{i}.qkv"] = (self.qkv_rows, self.hidden_padded)
            found[f"layer.{i}.out"] = (hidden_rows, self.out_cols)
            found[f"layer.{i}.up"] = (self.up_rows, self.hidden_padded)
            found[f"layer.{i}.down"] = (hidden_rows, self.inner_padded)
        return found

    def arrays(self) -> dict[str, tuple[int, int]]:
        """Rows and padded columns of every plain float32 array: norms, biases, positions, frequencies."""
        hidden, rows = (1, self.hidden_padded), (1, up_to(self.hidden, ROWS))
        found = {"final_norm": hidden}
        if self.norm == "layer":
            found["final_norm.bias"] = hidden
        if self.rotary:
            found["frequencies"] = (1, self.rotary)
        else:
            found["positions"] = (self.context_length, self.hidden_padded)
        for i in range(len(self.layers)):
            name = f"layer.{i}."
            for norm in ("norm1", "norm2"):
                found[f"{name}{norm}"] = hidden
                if self.norm == "layer":
                    found[f"{name}{norm}.bias"] = hidden
            if self.head_norms:
                found[f"{name}q_norm"] = found[f"{name}k_norm"] = (1, self.head_dim)
            if self.qkv_biased:
                found[f"{name}qkv.bias"] = (1, self.qkv_rows)
            if self.out_biased:
                found[f"{name}out.bias"] = rows
            if self.mlp_biased:
                found[f"{name}up.bias"] = (1, self.up_rows)
                found[f"{name}down.bias"] = rows
        return found


def up_to(count: int, multiple: int) -> int:
    """`count` rounded up."""
    return -(-count // multiple) * multiple


def architecture_of(decoder: Decoder) -> Architecture:
    """Raises UnsupportedModel for what the engine does not compute."""
    shape, first, expected = decoder.shape, decoder.layers[0], decoder.expected
    if decoder.activation not in _ACTIVATIONS:
        raise errors.UnsupportedModel(f"the native engine does not compute {decoder.activation[:32]!r}")
    wide = shape.heads * shape.head_dim
    if max(decoder.hidden, decoder.inner, wide, shape.vocab_size, shape.context_length) > _MOST:
        raise errors.UnsupportedModel("the model has sizes that the native engine does not count to")
    return Architecture(
        family=decoder.family,
        hidden=decoder.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_dim,
        inner=decoder.inner,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        norm=decoder.norm,
        epsilon=decoder.epsilon,
        activation=decoder.activation,
        gated=decoder.gated,
        rotary=len(decoder.rotation.frequencies) if decoder.rotation else 0,
        rope_scale=decoder.rotation.scale if decoder.rotation else 1.0,
        tied=not decoder.head,
        head_norms=first.head_norms is not None,
        qkv_biased=f"{first.qkv[0]}.bias" in expected,
        out_biased=f"{first.out}.bias" in expected,
        mlp_biased=f"{first.down}.bias" in expected,
        layers=[Layer(layer.scale, layer.window, layer.rotated) for layer in decoder.layers],
    )


def refusal(config: Config) -> str:
    """Why the native engine does not compute a model; empty if it does."""
    try:
        architecture_of(describe(config))
    except errors.UnsupportedModel as problem:
        return problem.message
    return ""
