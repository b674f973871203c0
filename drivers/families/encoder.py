"""Encoders of the BERT family as data: BERT, and RoBERTa and DistilBERT, which are BERT with other names of
its tensors. What is made of a text's vectors is read from the files of sentence-transformers beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmasos.syscalls import errors
from llmasos.syscalls.types import Encodes

from ..base import File
from ..checkpoint import Checkpoint, read_json
from ..model_config import Config

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")

POOLINGS = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len")
"""What may stand for a text: its first vector, its last, the largest of each component, the mean, the sum
over the root of the length."""

# Class names in config.json's `architectures`, by their ends.
_TASKS = (
    ("ForSequenceClassification", Encodes.CLASSIFY),
    ("ForTokenClassification", Encodes.TOKENS),
    ("Model", Encodes.EMBED),
    ("ForMaskedLM", Encodes.EMBED),
    ("ForPreTraining", Encodes.EMBED),
)

# What other families and old checkpoints call BERT's tensors.
_NAMES = (
    (r"^(bert|roberta|distilbert)\.", ""),
    (r"^transformer\.", "encoder."),
    (r"\battention\.q_lin\b", "attention.self.query"),
    (r"\battention\.k_lin\b", "attention.self.key"),
    (r"\battention\.v_lin\b", "attention.self.value"),
    (r"\battention\.out_lin\b", "attention.output.dense"),
    (r"\bsa_layer_norm\b", "attention.output.LayerNorm"),
    (r"\bffn\.lin1\b", "intermediate.dense"),
    (r"\bffn\.lin2\b", "output.dense"),
    (r"\boutput_layer_norm\b", "output.LayerNorm"),
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    (r"^(classifier\.dense|pre_classifier)\b", "pooler.dense"),
    (r"^classifier\.out_proj\b", "classifier"),
)

# The heads of pre-training, and a pooler that nothing is made of.
_IGNORED = (r"cls\..*", r"lm_head\..*", r"vocab_.*", r"pooler\..*", r".*position_ids")


@dataclass(frozen=True, slots=True)
class Encoder:
    """`positions` of which the first `offset` stand for no token; `segments`: 0 for none. A text's vectors
    are pooled as `poolings` say, one behind the other, and have length 1 if `normalised`. `head_activation`
    is that of the layer between the first vector and the labels. `width` numbers are made of a text, or of a
    token."""

    encodes: Encodes
    layers: int
    heads: int
    hidden: int
    inner: int
    activation: str
    epsilon: float
    vocab_size: int
    positions: int
    offset: int
    segments: int
    context_length: int
    poolings: tuple[str, ...]
    normalised: bool
    head_activation: str
    width: int


def is_encoder(config: Config) -> bool:
    generates = _class_name(config).endswith(("ForCausalLM", "LMHeadModel"))
    return config.text("model_type") in FAMILIES and not generates


def describe(config: Config, files: Mapping[str, File], checkpoint: Checkpoint) -> Encoder:
    """What the encoder in `checkpoint` is; its tensors have BERT's names afterwards. Raises Corrupt,
    UnsupportedModel."""
    config.refuse_unless(is_decoder=False, add_cross_attention=False, quantization_config=None)
    config.refuse_unless(position_embedding_type="absolute", embedding_size=None, sinusoidal_pos_embds=False)
    checkpoint.rename(_renamed)
    family, encodes = config.text("model_type"), _task(config)
    distil = family == "distilbert"
    hidden = config.integer("dim" if distil else "hidden_size")
    heads = config.integer("n_heads" if distil else "num_attention_heads")
    config.check(hidden % heads == 0, "num_attention_heads", "a divisor of the hidden size")
    # RoBERTa's positions begin behind the one of padding.
    offset = config.integer("pad_token_id", 1, least=-1) + 1 if family not in ("bert", "distilbert") else 0
    positions = config.integer("max_position_embeddings")
    config.check(offset < positions, "pad_token_id", "a position")
    poolings, normalised = _pooling(files) if encodes is Encodes.EMBED else ((), False)
    encoder = Encoder(
        encodes=encodes,
        layers=config.integer("n_layers" if distil else "num_hidden_layers"),
        heads=heads,
        hidden=hidden,
        inner=config.integer("hidden_dim" if distil else "intermediate_size"),
        activation=config.activation("activation" if distil else "hidden_act", "gelu"),
        epsilon=1e-12 if distil else config.epsilon("layer_norm_eps", 1e-12),
        vocab_size=config.integer("vocab_size"),
        positions=positions,
        offset=offset,
        segments=0 if distil else config.integer("type_vocab_size", 2),
        context_length=min(positions - offset, _most_tokens(files)),
        poolings=poolings,
        normalised=normalised,
        head_activation="relu" if distil else "tanh",
        width=hidden * len(poolings) if poolings else _labels(checkpoint),
    )
    checkpoint.expect(_expected(encoder), _IGNORED)
    return encoder


def _class_name(config: Config) -> str:
    return next(iter(config.texts("architectures")), "Model")


def _task(config: Config) -> Encodes:
    name = _class_name(config)
    for end, encodes in _TASKS:
        if name.endswith(end):
            return encodes
    raise errors.UnsupportedModel(
        f"{name[:64]!r} is not computed", hint=f"encoders are {', '.join(f'…{end}' for end, _ in _TASKS)}"
    )


def _renamed(name: str) -> str:
    for pattern, by in _NAMES:
        name = re.sub(pattern, by, name)
    return name


def _labels(checkpoint: Checkpoint) -> int:
    if "classifier.weight" not in checkpoint:
        raise errors.Corrupt("the model has no tensor 'classifier.weight'", hint="its config names it")
    return checkpoint.entry("classifier.weight").shape[0]


def _most_tokens(files: Mapping[str, File]) -> int:
    """How long sentence-transformers lets a text be: what the model was trained for."""
    name = "sentence_bert_config.json"
    most = read_json(files[name], name, dict[str, Any]).get("max_seq_length") if name in files else None
    return most if isinstance(most, int) and most > 0 else 2**31 - 1


def _pooling(files: Mapping[str, File]) -> tuple[tuple[str, ...], bool]:
    """The poolings that modules.json names, and whether a vector is normalised; without one what
    sentence-transformers does then: the mean. Raises UnsupportedModel for modules that are not computed."""
    if "modules.json" not in files:
        return ("mean",), False
    poolings: tuple[str, ...] = ()
    normalised = False
    modules = read_json(files["modules.json"], "modules.json", list[dict[str, Any]])
    for kind, module in ((str(module.get("type")).rpartition(".")[2], module) for module in modules):
        if kind == "Transformer":
            continue
        if kind == "Pooling" and not poolings:
            poolings = _poolings_of(files, str(module.get("path")))
        elif kind == "Normalize" and poolings:
            normalised = True
        else:
            raise errors.UnsupportedModel(
                f"the model's module {kind[:64]!r} is not computed",
                hint="one Pooling and Normalize are, behind a Transformer",
            )
    return poolings or ("mean",), normalised


def _poolings_of(files: Mapping[str, File], path: str) -> tuple[str, ...]:
    name = f"{path}.config.json"  # as the importer calls what lies in a folder
    if name not in files:
        raise errors.Corrupt(f"the model has no {path[:64]}/config.json", hint="pull the model again")
    said = Config(read_json(files[name], name, dict[str, Any]))
    new = said.get("pooling_mode")
    modes = [new] if isinstance(new, str) else said.texts("pooling_mode")
    for key, value in said.values.items():
        if key.startswith("pooling_mode_") and value is True:
            modes.append(key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens"))
    poolings = tuple(modes)
    if not poolings or not set(poolings) <= set(POOLINGS):
        raise errors.UnsupportedModel(
            f"pooling by {', '.join(poolings)[:64] or 'nothing'} is not computed",
            hint=f"known: {', '.join(POOLINGS)}",
        )
    return poolings


def _expected(e: Encoder) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (e.vocab_size, e.hidden),
        "embeddings.position_embeddings.weight": (e.positions, e.hidden),
    }
    if e.segments:
        shapes["embeddings.token_type_embeddings.weight"] = (e.segments, e.hidden)
    matrices: dict[str, tuple[int, int]] = {}
    norms = ["embeddings.LayerNorm"]
    for i in range(e.layers):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            matrices[f"{layer}.attention.{name}"] = (e.hidden, e.hidden)
        matrices[f"{layer}.intermediate.dense"] = (e.inner, e.hidden)
        matrices[f"{layer}.output.dense"] = (e.hidden, e.inner)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    if e.encodes is Encodes.CLASSIFY:
        matrices["pooler.dense"] = (e.hidden, e.hidden)
    if e.encodes is not Encodes.EMBED:
        matrices["classifier"] = (e.width, e.hidden)
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (e.hidden,), f"{name}.bias": (e.hidden,)}
    return shapes
