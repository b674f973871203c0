"""A decoder as data: sizes, settings, and the names of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..model_config import Shape
from ..rope import Rotation


@dataclass(frozen=True, slots=True)
class Layer:
    """x += out(attention(qkv(norm1(x)))); x += down(act(up(norm2(x)))). Tensors are named without `.weight`
    and `.bias`; a matrix of several names is theirs one below the other.

    `scale` is that of the scores. `window`: 0 for none, else a token sees itself and the window-1 before it.
    `head_norms` names the RMS norms of each query and each key head before the rotation, if there are any."""

    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    up: tuple[str, ...]
    down: str
    scale: float
    window: int = 0
    rotated: bool = True
    head_norms: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Decoder:
    """`norm` is "rms" or "layer" (with biases); `activation` one of model_config's; `gated`: `up` is a gate
    and a matrix, down(act(gate) * up). Without `rotation` there are learned `positions`. `head` is empty when
    the embedding is the head too. `turned`: matrices of layers are stored [in, out]. `prefix` is one that
    checkpoints may have before all names, `expected` the shapes of all tensors without it, `ignored` patterns
    of tensors that checkpoints carry and nobody computes with."""

    family: str
    shape: Shape
    hidden: int
    inner: int
    norm: str
    epsilon: float
    activation: str
    gated: bool
    rotation: Rotation | None
    layers: tuple[Layer, ...]
    embedding: str
    positions: str
    final_norm: str
    head: str
    turned: bool
    prefix: str
    expected: dict[str, tuple[int, ...]]
    ignored: tuple[str, ...]

    def expect(self, checkpoint: Checkpoint) -> None:
        """Drops the prefix from the checkpoint's names. Raises Corrupt or UnsupportedModel unless its tensors
        are exactly the decoder's."""
        checkpoint.drop_prefix(self.prefix)
        checkpoint.expect(self.expected, self.ignored)
