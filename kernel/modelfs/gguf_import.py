"""Turns a GGUF file into a model as the Hugging Face world knows it: config.json, tensors.json and the
tokenizer's files, built from the metadata. The weights stay in the file as they are.

Two things differ from a checkpoint and are noted in tensors.json for the loader. llama.cpp stores the rows of
q and k projections of llama models in the order of its own rotary embedding ("heads"; the inverse is
w.view(heads, 2 halves swapped with pairs), see `llmasos.drivers.torch`), and GPT-2's linear weights
transposed ("transpose").
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import msgspec
from gguf import LlamaFileType
from llmasos.drivers.base import check_sizes
from llmasos.syscalls.errors import Corrupt, UnsupportedModel

from . import gguf_header, gguf_tokenizer
from .gguf_header import Header, Tensor, Value
from .layout import Assembled, check_template, check_tokenizer, most_of

# Types that the `gguf` package turns back into numbers.
_TYPES = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
_TYPES |= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_PERMUTED = ("llama", "smollm3")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_ROPE_FACTORS = "rope_freqs.weight"
_NAME = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)\.(weight|bias)")


def assemble(path: Path, name: str) -> Assembled:
    """The files that belong to the GGUF file at `path`, which the model calls `name`.

    Raises UnsupportedModel and Corrupt.
    """
    header = gguf_header.read(path)
    architecture = header.pairs.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _CLASSES:
        raise UnsupportedModel(
            f"no support for the architecture {str(architecture)[:40]!r}",
            hint=f"known: {', '.join(_CLASSES)}",
        )
    config = _config(_Pairs(header.pairs, architecture), header.tensors, path)
    check_sizes(config, len(header.tensors), sum(math.prod(one.shape) for one in header.tensors.values()))
    context_length = int(config.get("max_position_embeddings", config.get("n_positions", 0)))
    tokenizer = gguf_tokenizer.build(header.pairs, architecture, context_length)
    check_tokenizer(tokenizer.tokenizer_json)
    config |= tokenizer.generation_config
    index = _index(header.tensors, architecture, config, name)
    texts = {
        "config.json": config,
        "generation_config.json": tokenizer.generation_config,
        "tokenizer_config.json": tokenizer.tokenizer_config,
        "tensors.json": {"tensors": index},
    }
    encoded = {file: msgspec.json.encode(body) for file, body in texts.items()}
    encoded["tokenizer.json"] = tokenizer.tokenizer_json
    if tokenizer.chat_template:
        encoded["chat_template.jinja"] = check_template(tokenizer.chat_template)
    sizes = {tensor: (entry["type"], math.prod(entry["shape"])) for tensor, entry in index.items()}
    license_ = header.pairs.get("general.license", "")
    return Assembled(
        texts=encoded,
        architecture=architecture,
        parameters=sum(size for _, size in sizes.values()),
        quantization=_quantization(header) or most_of(sizes.values()),
        context_length=context_length,
        license=license_[:64] if isinstance(license_, str) else "",
    )


class _Pairs:
    """The metadata of one architecture, with the types that were asked for."""

    def __init__(self, pairs: dict[str, Value], architecture: str) -> None:
        self.pairs = pairs
        self.architecture = architecture

    def count(self, key: str, default: int | None = None) -> int:
        found = self.pairs.get(f"{self.architecture}.{key}", default)
        if isinstance(found, list) and found and len(set(found)) == 1:
            found = found[0]  # one number a layer, all the same
        if isinstance(found, list):
            raise UnsupportedModel(f"{key} differs between layers")
        if not isinstance(found, int) or found < 0:
            raise Corrupt(f"the GGUF file has no number for {self.architecture}.{key}")
        return found

    def real(self, key: str, default: float) -> float:
        found = self.pairs.get(f"{self.architecture}.{key}", default)
        if not isinstance(found, (int, float)) or not math.isfinite(found):
            raise Corrupt(f"the GGUF file has no number for {self.architecture}.{key}")
        # The file has 32 bits: 9.999999747378752e-06 was written as 1e-05.
        return float(f"{found:.7g}")

    def text(self, key: str) -> str:
        found = self.pairs.get(f"{self.architecture}.{key}", "")
        return found if isinstance(found, str) else ""


def _config(pairs: _Pairs, tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    embeddings = tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise Corrupt("the GGUF file has no token embeddings")
    config: dict[str, Any] = {
        "architectures": [_CLASSES[pairs.architecture]],
        "model_type": pairs.architecture,
        "vocab_size": embeddings.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if pairs.architecture == "gpt2":
        return config | _gpt2_config(pairs)
    return config | _llama_config(pairs, tensors, path)


def _gpt2_config(pairs: _Pairs) -> dict[str, Any]:
    width, context = pairs.count("embedding_length"), pairs.count("context_length")
    return {
        "n_embd": width,
        "n_layer": pairs.count("block_count"),
        "n_head": pairs.count("attention.head_count"),
        "n_inner": pairs.count("feed_forward_length", 4 * width),
        "n_positions": context,
        "n_ctx": context,
        "layer_norm_epsilon": pairs.real("attention.layer_norm_epsilon", 1e-5),
        "activation_function": "gelu_new",
    }


def _llama_config(pairs: _Pairs, tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    if pairs.count("expert_count", 0):
        raise UnsupportedModel("a mixture of experts", hint="only dense models are supported")
    width, heads = pairs.count("embedding_length"), pairs.count("attention.head_count")
    head_dim = pairs.count("attention.key_length", width // heads if heads else 0)
    if pairs.count("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel("rotary positions on a part of each head")
    config: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": pairs.count("feed_forward_length"),
        "num_hidden_layers": pairs.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": pairs.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": pairs.count("context_length"),
        "rms_norm_eps": pairs.real("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": pairs.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(pairs, tensors, path, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if pairs.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if pairs.architecture == "smollm3":
        config["no_rope_layer_interval"] = 4  # fixed in llama.cpp too: no key says otherwise
    if pairs.architecture in ("qwen2", "qwen3", "smollm3"):
        config["use_sliding_window"] = False
    return config


def _rope_scaling(
    pairs: _Pairs, tensors: dict[str, Tensor], path: Path, head_dim: int
) -> dict[str, Any] | None:
    if (factors := tensors.get(_ROPE_FACTORS)) is not None:
        return _llama3_scaling(_floats(path, factors), pairs.real("rope.freq_base", 10000.0), head_dim)
    kind = pairs.text("rope.scaling.type")
    if kind in ("", "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": pairs.real("rope.scaling.factor", 1.0)}
    raise UnsupportedModel(
        f"rotary positions scaled by {kind[:40]!r}", hint="try the model's safetensors files"
    )


def _floats(path: Path, tensor: Tensor) -> list[float]:
    if tensor.type != "F32" or tensor.nbytes > 65536:
        raise Corrupt("the GGUF file's rope factors are no short list of F32")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return list(struct.unpack(f"<{tensor.nbytes // 4}f", file.read(tensor.nbytes)))


def _llama3_scaling(found: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's parameters, of which the file holds only the outcome (one factor a frequency). They are the
    published ones but for `factor`; that they give these factors is checked."""
    low, high, original = 1.0, 4.0, 8192
    factor = max(found, default=1.0)
    expected = []
    for i in range(0, head_dim, 2) if head_dim <= 2 * len(found) else ():
        turns = original / (2 * math.pi * theta ** (i / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth) if factor > 0 else 0.0)
    if len(found) != len(expected) or any(
        not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(found, expected, strict=True)
    ):
        raise UnsupportedModel(
            "rotary factors that are not Llama 3's", hint="try the model's safetensors files"
        )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _index(
    tensors: dict[str, Tensor], architecture: str, config: dict[str, Any], file: str
) -> dict[str, dict[str, Any]]:
    layers = config["n_layer"] if architecture == "gpt2" else config["num_hidden_layers"]
    index = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue
        if tensor.type not in _TYPES:
            raise UnsupportedModel(
                f"{name[:80]} is quantised as {tensor.type}", hint="try a Q8_0 or Q4_K_M file"
            )
        entry: dict[str, Any] = {
            "file": file,
            "type": tensor.type,
            "shape": tensor.shape,
            "offset": tensor.offset,
            "nbytes": tensor.nbytes,
        }
        if architecture == "gpt2" and name.endswith(_GPT2_TRANSPOSED):
            entry["transpose"] = True
        if heads := _permuted_heads(name, tensor, architecture, config):
            entry["heads"] = heads
        index[_hf_name(name, architecture, layers)] = entry
    return index


def _permuted_heads(name: str, tensor: Tensor, architecture: str, config: dict[str, Any]) -> int:
    if architecture not in _PERMUTED or not name.endswith(
        ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
    ):
        return 0
    heads = int(config["num_attention_heads" if "attn_q." in name else "num_key_value_heads"])
    if heads < 1 or tensor.shape[0] % (2 * heads):
        raise Corrupt(f"{name} has {tensor.shape[0]} rows for {heads} heads")
    return heads


def _hf_name(name: str, architecture: str, layers: int) -> str:
    names, layer_prefix = (
        (_GPT2_NAMES, "transformer.h") if architecture == "gpt2" else (_LLAMA_NAMES, "model.layers")
    )
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in names or (match[1] is not None and int(match[1]) >= layers):
        raise UnsupportedModel(f"an unknown tensor for {architecture}: {name[:80]!r}")
    in_layer = f"{layer_prefix}.{int(match[1])}." if match[1] is not None else ""
    return f"{in_layer}{names[match[2]]}.{match[3]}"


def _quantization(header: Header) -> str:
    """What the whole file is called ("Q4_K_M"), if it says so."""
    number = header.pairs.get("general.file_type")
    if not isinstance(number, int) or number not in {int(kind) for kind in LlamaFileType}:
        return ""
    return str(LlamaFileType(number).name).removeprefix("MOSTLY_").removeprefix("ALL_")
