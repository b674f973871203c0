"""GGUF files become models as the Hugging Face world knows them: names, shapes, configs, tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, quants
from llmasos.kernel.modelfs import gguf_import
from llmasos.kernel.modelfs.store import Manifest, ModelFS
from llmasos.syscalls.errors import Corrupt, UnsupportedModel
from tokenizers import Tokenizer, pre_tokenizers

Bring = Callable[..., Manifest]
Edit = Callable[[GGUFWriter], None]

TEXTS = [
    "Hello world",
    "  leading and   double  spaces ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "x = 1234567 + 3.14",
    "naïve café 你好 😀 Привет",
    "if (a[i] != b) { return -1; }  // it's we'll",
    "",
    " ",
    "\n",
]
WIDTH, HEADS, KV_HEADS, VOCAB = 64, 4, 2, 259


def byte_level(writer: GGUFWriter, pre: str = "smollm") -> None:
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "it"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["i t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def sentencepiece(writer: GGUFWriter) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = ["▁", "H", "e", "l", "o", "w", "r", "d", "▁w", "He", "llo", "ll", "Hello", "or", "ld", "orld"]
    words += ["▁Hello", "▁world"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + words)
    writer.add_token_scores([0.0] * len(pieces) + [-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)
    writer.add_unk_token_id(0)


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a q or k projection as llama.cpp's rotary embedding wants them."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def restored(weights: np.ndarray, heads: int) -> np.ndarray:
    """The contract's rule for `heads`."""
    pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def llama_weights(vocab: int) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(1)

    def some(*shape: int) -> np.ndarray:
        return dice.standard_normal(shape).astype(np.float32)

    layer = {
        "attn_norm": some(WIDTH),
        "attn_q": permuted(some(WIDTH, WIDTH), HEADS),
        "attn_k": permuted(some(WIDTH // 2, WIDTH), KV_HEADS),
        "attn_v": some(WIDTH // 2, WIDTH),
        "attn_output": some(WIDTH, WIDTH),
        "ffn_norm": some(WIDTH),
        "ffn_gate": some(96, WIDTH),
        "ffn_up": some(96, WIDTH),
        "ffn_down": some(WIDTH, 96),
    }
    named = {f"blk.0.{name}.weight": value for name, value in layer.items()}
    return {"token_embd.weight": some(vocab, WIDTH), **named, "output_norm.weight": some(WIDTH)}


def write_llama(
    path: Path, tokenizer: Edit = byte_level, edit: Edit | None = None, arch: str = "llama"
) -> Path:
    writer = GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokenizer(writer)
    if edit:
        edit(writer)
    vocab = VOCAB if tokenizer is not sentencepiece else 277
    for name, value in llama_weights(vocab).items():
        if name.endswith("attn_q.weight"):
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    return close(writer, path)


def close(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(store: ModelFS, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(f"/models/tiny/{file}", 0, 1 << 20)[1])
    return found


def tensor(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """A tensor as the contract tells a loader to read it."""
    kind = GGMLQuantizationType[entry["type"]]
    raw = np.fromfile(path, np.uint8, entry["nbytes"], offset=entry["offset"])
    weights = quants.dequantize(raw.reshape(*entry["shape"][:-1], -1), kind)
    weights = weights.reshape(entry["shape"])
    if entry.get("transpose"):
        weights = weights.T
    return restored(weights, entry["heads"]) if "heads" in entry else weights


def test_a_llama_file_becomes_a_model(store: ModelFS, bring: Bring, tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_license("apache-2.0")
        writer.add_file_type(7)
        writer.add_chat_template("{{ messages }}")

    manifest = bring(write_llama(tmp_path / "any-name.gguf", edit=edit))
    assert (manifest.architecture, manifest.quantization, manifest.license) == ("llama", "Q8_0", "apache-2.0")
    assert manifest.context_length == 128
    assert manifest.parameters == sum(w.size for w in llama_weights(VOCAB).values())
    config = text(store, "config.json")
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_key_value_heads"], config["head_dim"], config["vocab_size"]) == (KV_HEADS, 16, VOCAB)
    assert config["tie_word_embeddings"] is True
    assert text(store, "generation_config.json") == {"bos_token_id": 0, "eos_token_id": 1}
    assert text(store, "tokenizer_config.json")["eos_token"] == "</s>"
    assert store.read("/models/tiny/chat_template.jinja", 0, 99)[1] == b"{{ messages }}"
    index = text(store, "tensors.json")["tensors"]
    assert index["model.layers.0.self_attn.q_proj.weight"]["heads"] == HEADS
    assert index["model.layers.0.self_attn.k_proj.weight"]["heads"] == KV_HEADS
    assert "heads" not in index["model.layers.0.self_attn.v_proj.weight"]
    blob = Path(store.driver_files(manifest)["model.gguf"].path)
    weights = llama_weights(VOCAB)
    down = tensor(blob, index["model.layers.0.mlp.down_proj.weight"])
    assert (down == weights["blk.0.ffn_down.weight"]).all()
    key = tensor(blob, index["model.layers.0.self_attn.k_proj.weight"])
    assert (permuted(key, KV_HEADS) == weights["blk.0.attn_k.weight"]).all()
    query = tensor(blob, index["model.layers.0.self_attn.q_proj.weight"])
    assert np.abs(permuted(query, HEADS) - weights["blk.0.attn_q.weight"]).max() < 0.02


def test_qwen_rows_are_not_permuted(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "q.gguf", lambda w: byte_level(w, "qwen2"), arch="qwen2")
    found = gguf_import.assemble(path, "model.gguf")
    index = json.loads(found.texts["tensors.json"])["tensors"]
    assert "heads" not in index["model.layers.0.self_attn.q_proj.weight"]
    assert json.loads(found.texts["config.json"])["model_type"] == "qwen2"


def test_gpt2_linears_are_marked_as_transposed(store: ModelFS, bring: Bring, tmp_path: Path) -> None:
    path = tmp_path / "g.gguf"
    writer = GGUFWriter(path, "gpt2")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    byte_level(writer, "gpt-2")
    attention = np.arange(8 * 24, dtype=np.float32).reshape(8, 24)  # a Conv1D: (in, out)
    writer.add_tensor("token_embd.weight", np.ones((VOCAB, 8), np.float32))
    writer.add_tensor("position_embd.weight", np.ones((32, 8), np.float16))
    writer.add_tensor("blk.0.attn_qkv.weight", np.ascontiguousarray(attention.T))
    writer.add_tensor("blk.0.attn_qkv.bias", np.ones(24, np.float32))
    manifest = bring(close(writer, path))
    index = text(store, "tensors.json")["tensors"]
    entry = index["transformer.h.0.attn.c_attn.weight"]
    assert (entry["transpose"], entry["shape"]) == (True, [24, 8])
    blob = Path(store.driver_files(manifest)["model.gguf"].path)
    assert (tensor(blob, entry) == attention).all()
    assert "transpose" not in index["transformer.wte.weight"]
    assert (manifest.architecture, manifest.context_length) == ("gpt2", 32)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokens_give_the_text_back(tmp_path: Path, pre: str) -> None:
    found = gguf_import.assemble(write_llama(tmp_path / "t.gguf", lambda w: byte_level(w, pre)), "model.gguf")
    tokenizer = Tokenizer.from_str(found.texts["tokenizer.json"].decode())
    adds_bos = json.loads(found.texts["tokenizer_config.json"])["add_bos_token"]
    assert adds_bos == (pre in ("llama-bpe", "tekken"))
    for sample in TEXTS:
        ids = tokenizer.encode(sample).ids
        assert (ids[:1] == [0]) == adds_bos
        assert tokenizer.decode(ids) == sample
    assert tokenizer.encode("a</s>b", add_special_tokens=False).ids[1] == 1


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["Ġit", "'s", "Ġ", "1", "2", "3", "4"]),
        ("gpt-2", ["Ġit", "'s", "Ġ1234"]),
        ("llama-bpe", ["Ġit", "'s", "Ġ", "123", "4"]),
        ("qwen2", ["Ġit", "'s", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_numbers_are_cut_as_the_model_learnt_it(tmp_path: Path, pre: str, words: list[str]) -> None:
    found = gguf_import.assemble(write_llama(tmp_path / "t.gguf", lambda w: byte_level(w, pre)), "model.gguf")
    tokenizer = Tokenizer.from_str(found.texts["tokenizer.json"].decode())
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(" it's 1234")] == words


def test_sentencepiece_with_byte_fallback(tmp_path: Path) -> None:
    found = gguf_import.assemble(write_llama(tmp_path / "s.gguf", sentencepiece), "model.gguf")
    tokenizer = Tokenizer.from_str(found.texts["tokenizer.json"].decode())
    assert tokenizer.encode("Hello world").tokens == ["<s>", "▁Hello", "▁world"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for sample in TEXTS:
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert json.loads(found.texts["generation_config.json"])["eos_token_id"] == [2, 1]
    assert json.loads(found.texts["tokenizer_config.json"])["add_bos_token"] is True


def test_llama3_rotary_factors_are_recognised(tmp_path: Path) -> None:
    def factors(factor: float) -> np.ndarray:
        freqs = 10000.0 ** (-np.arange(0, 16, 2) / 16)
        turns = 8192 * freqs / (2 * np.pi)
        smooth = np.clip((turns - 1) / 3, 0, 1)
        return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

    path = write_llama(tmp_path / "r.gguf", edit=lambda w: w.add_tensor("rope_freqs.weight", factors(32.0)))
    scaling = json.loads(gguf_import.assemble(path, "model.gguf").texts["config.json"])["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    odd = np.linspace(1, 7, 8, dtype=np.float32)
    path = write_llama(tmp_path / "odd.gguf", edit=lambda w: w.add_tensor("rope_freqs.weight", odd))
    with pytest.raises(UnsupportedModel):
        gguf_import.assemble(path, "model.gguf")


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda w: w.add_expert_count(8), UnsupportedModel),
        (lambda w: w.add_rope_scaling_type(RopeScalingType.YARN), UnsupportedModel),
        (lambda w: w.add_tensor("blk.0.ssm.weight", np.ones(4, np.float32)), UnsupportedModel),
        (lambda w: w.add_tensor("blk.1.attn_q.weight", np.ones((16, 4), np.float32)), UnsupportedModel),
        (lambda w: w.add_tensor("blk.0.attn_k_norm.weight", np.ones(4, np.int32)), UnsupportedModel),
        (lambda w: w.add_key_length(0), UnsupportedModel),
    ],
)
def test_what_nothing_computes_is_refused(tmp_path: Path, edit: Edit, error: type) -> None:
    def with_rope(writer: GGUFWriter) -> None:
        writer.add_rope_dimension_count(16)
        edit(writer)

    with pytest.raises(error):
        gguf_import.assemble(write_llama(tmp_path / "x.gguf", edit=with_rope), "model.gguf")


def test_unknown_architectures_and_tokenizers(tmp_path: Path) -> None:
    def unigram(writer: GGUFWriter) -> None:
        byte_level(writer)
        writer.kv_data[0]["tokenizer.ggml.model"].value = "t5"

    def twice(writer: GGUFWriter) -> None:
        byte_level(writer)
        writer.kv_data[0]["tokenizer.ggml.tokens"].value[5] = "<s>"

    def merges(writer: GGUFWriter) -> None:
        byte_level(writer)
        writer.kv_data[0]["tokenizer.ggml.model"].value = "gpt2"
        writer.add_array("tokenizer.ggml.extra", ["x"])
        writer.kv_data[0]["tokenizer.ggml.merges"] = writer.kv_data[0].pop("tokenizer.ggml.extra")

    for number, (tokenizer, arch, error) in enumerate(
        [
            (byte_level, "mamba", UnsupportedModel),
            (lambda w: byte_level(w, "brand-new"), "llama", UnsupportedModel),
            (unigram, "llama", UnsupportedModel),
            (twice, "llama", Corrupt),
            (merges, "llama", Corrupt),
        ]
    ):
        with pytest.raises(error):
            gguf_import.assemble(write_llama(tmp_path / f"{number}.gguf", tokenizer, arch=arch), "model.gguf")
