"""Models without a family file of ours, computed by transformers' own code on the paged cache: the same
tokens as transformers' generate, or a refusal that says why."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llmasos.drivers import base
from llmasos.drivers.torch.config import Config
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.drivers.torch.models import family_of
from llmasos.drivers.torch.weights import Checkpoint
from llmasos.kernel.modelfs.importer import pull
from llmasos.kernel.modelfs.layout import check_config
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.progress import Progress
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls import errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from .conftest import DEVICES, Tiny, files_of, index_of, start

VOCAB = 199
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_SMALL = {**_PLAIN, "num_key_value_heads": 2}
_GEMMA = {**_SMALL, "head_dim": 16, "tie_word_embeddings": False}
_FALCON = {name: value for name, value in _PLAIN.items() if name != "intermediate_size"}
_OLD = {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 4}
_OLD |= {"initializer_range": 0.25, "bos_token_id": None, "eos_token_id": None}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}

# A window of 30 is longer than what the check at load runs, so it must be known from the mask.
CONFIGS: dict[str, Callable[[], Any]] = {
    "codegen": lambda: transformers.CodeGenConfig(**_OLD, n_ctx=128, rotary_dim=8),
    "cohere": lambda: transformers.CohereConfig(**_SMALL, use_qk_norm=True, logit_scale=0.5),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_PLAIN,
        **_LATENT,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "diffllama": lambda: transformers.DiffLlamaConfig(**_SMALL),
    "falcon": lambda: transformers.FalconConfig(**_FALCON, multi_query=True, new_decoder_architecture=False),
    "falcon-grouped": lambda: transformers.FalconConfig(
        **_FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "gemma": lambda: transformers.GemmaConfig(**_GEMMA),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GEMMA,
        sliding_window=30,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **_GEMMA,
        sliding_window=6,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm4": lambda: transformers.Glm4Config(**_SMALL, head_dim=16),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**_OLD),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_PLAIN),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SMALL, head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=6
    ),
    "gptj": lambda: transformers.GPTJConfig(**_OLD, rotary_dim=8),
    "granite": lambda: transformers.GraniteConfig(
        **_SMALL,
        logits_scaling=3.0,
        residual_multiplier=0.7,
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_SMALL, num_local_experts=4),
    "nemotron": lambda: transformers.NemotronConfig(**_SMALL, head_dim=12),
    "olmo2": lambda: transformers.Olmo2Config(**_SMALL),
    "olmoe": lambda: transformers.OlmoeConfig(**_SMALL, **_EXPERTS),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        init_std=0.25,
        eos_token_id=None,
    ),
    "persimmon": lambda: transformers.PersimmonConfig(**_PLAIN),
    "phi": lambda: transformers.PhiConfig(**_PLAIN, partial_rotary_factor=0.5),
    "phi3": lambda: transformers.Phi3Config(**_SMALL, sliding_window=9),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SMALL, **_EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "stablelm": lambda: transformers.StableLmConfig(
        **_SMALL, partial_rotary_factor=0.5, use_parallel_residual=True
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**_SMALL, sliding_window=30),
}


def prompts() -> list[list[int]]:
    return [random.Random(length).choices(range(3, VOCAB), k=length) for length in (3, 16, 47)]


def write(folder: Path, config: Any) -> Tiny:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # zero biases and unit norms would hide a forgotten one
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    index(folder)
    return Tiny(folder, model)


def index(folder: Path) -> None:
    (folder / "tensors.json").write_text(json.dumps(index_of(folder / "model.safetensors")))


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def load(folder: Path, dtype: str = "float32") -> base.Loaded:
    return TorchDriver("cpu").load(base.LoadSpec(1, files_of(folder), dtype, 0.05))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_equals_generate(name: str, device: str, tmp_path: Path) -> None:
    """Prefill in chunks, decoding of sequences of other lengths, and both in one step."""
    model = write(tmp_path, CONFIGS[name]())
    kernel = start(TorchDriver(device), model.files)
    made = kernel.generate([kernel.open(tokens) for tokens in prompts()], 12, chunk=9)
    for tokens, continuation in zip(prompts(), made, strict=True):
        with torch.inference_mode():
            whole = model.reference.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        assert whole[0, len(tokens) :].tolist() == continuation
    assert len({token for continuation in made for token in continuation}) > 5


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "phi"])
def test_bfloat16_is_close(name: str, tmp_path: Path) -> None:
    model = write(tmp_path, CONFIGS[name]())
    kernel = start(TorchDriver("cpu"), model.files, "bfloat16")
    tokens = prompts()[2]
    [out] = kernel.step([(kernel.open(tokens), len(tokens))], beams=VOCAB)
    found = torch.tensor([beam.logprob for beam in sorted(out.beams, key=lambda beam: beam.token)])
    expected = model.logits(tokens)[-1].log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum()) < 0.05


def test_rotation_that_grows_with_the_batch_ends_where_it_would(tmp_path: Path) -> None:
    model = write(
        tmp_path,
        transformers.Phi3Config(
            **_SMALL, original_max_position_embeddings=64, rope_parameters=_LONGROPE | {"rope_theta": 1e4}
        ),
    )
    kernel = start(TorchDriver("cpu"), model.files)
    assert kernel.loaded.context_length == 64
    tokens = prompts()[2]
    assert kernel.generate([kernel.open(tokens)], 12) == [model.greedy(tokens, 12)]


def test_the_engine_says_so(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, CONFIGS["phi"]()).files)
    config = Config(checkpoint.config)
    with torch.inference_mode():
        model = family_of(config).build(config, checkpoint, torch.device("cpu"), torch.float32)
    assert model.engine.startswith("transformers' own code of phi")  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=4),
        "bloom",
    ),
    "falcon-alibi": (lambda: transformers.FalconConfig(**_FALCON, alibi=True), "masks itself"),
    "gpt_neo": (
        lambda: transformers.GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=128,
        ),
        "attention interface",
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"]),
        "layers of type conv",
    ),
    "llama4": (
        lambda: transformers.Llama4TextConfig(
            **_SMALL, head_dim=12, num_local_experts=4, intermediate_size_mlp=64, attention_chunk_size=8
        ),
        "mask",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "state between tokens",
    ),
    "rwkv": (
        lambda: transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "state between tokens",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_right_is_refused_before_its_weights_are_read(name: str) -> None:
    config, reason = REFUSED[name]
    values = json.loads(config().to_json_string(use_diff=False))
    with pytest.raises(errors.UnsupportedModel, match=reason) as caught:
        family_of(Config(values)).shape_of(Config(values))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "t5"}, "'t5' is computed neither here nor by transformers"),
        ({"model_type": "bart"}, "more than a decoder"),
        ({"model_type": "gemma3"}, "more than a language model"),
        ({"model_type": "no-such"}, "computed neither here"),
        ({"model_type": "phi", "auto_map": {"AutoModelForCausalLM": "x.Phi"}}, "auto_map"),
        ({"model_type": "phi", "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "phi", "num_hidden_layers": 10**9}, "layers"),
        ({"model_type": "phi", "hidden_size": "wide"}, "config"),
        ({"model_type": "phi", "max_position_embeddings": 2**40}, "how long a context"),
        ({"model_type": "starcoder2", "sliding_window": 0}, "neither all that came before nor a window"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts"),
        ({"model_type": "phi", "architectures": ["PhiForTokenClassification"]}, "does not generate text"),
    ],
)
def test_configs_that_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.UnsupportedModel, match=reason):
        family_of(Config(values)).shape_of(Config(values))


def test_a_config_cannot_choose_code(tmp_path: Path) -> None:
    model = write(tmp_path, CONFIGS["phi"]())
    change(
        tmp_path, _attn_implementation="evil/kernel", attn_implementation="evil/kernel", _name_or_path="/x"
    )
    change(tmp_path, return_dict=False, output_hidden_states=True, use_cache=True, dtype="float64")
    tokens = prompts()[1]
    kernel = start(TorchDriver("cpu"), files_of(tmp_path))
    assert kernel.generate([kernel.open(tokens)], 5) == [model.greedy(tokens, 5)]


def test_weights_that_do_not_fit_the_code(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["phi"]())
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    name = "model.layers.1.mlp.fc1.weight"

    def fails(tensors: dict[str, torch.Tensor], error: type[errors.LLMasOSError], match: str) -> None:
        save_file(tensors, path)
        index(tmp_path)
        with pytest.raises(error, match=match):
            load(tmp_path)

    more = good | {"model.layers.1.mlp.fc9.weight": torch.ones(200, 200)}
    fails(more, errors.UnsupportedModel, r"fc9.weight' has no place")
    del more[name]
    fails(more, errors.Corrupt, r"has no tensor 'model.layers.1.mlp.fc1.weight'")
    fails(more | {name: torch.ones(5, 48)}, errors.Corrupt, r"fc1.weight' is \(5, 48\)")
    fails({n: good[n] for n in list(good)[:4]}, errors.Corrupt, "weights")
    save_file(good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, path)
    index(tmp_path)
    assert load(tmp_path).vocab_size == VOCAB


def test_code_whose_rows_mix_outside_of_attention_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survey sees nothing of a convolution over time. The check at load does."""
    from transformers.models.phi.modeling_phi import PhiMLP

    write(tmp_path, CONFIGS["phi"]())
    plain = PhiMLP.forward
    monkeypatch.setattr(PhiMLP, "forward", lambda self, x: plain(self, x) + 0.1 * x.roll(1, dims=1))
    with pytest.raises(errors.UnsupportedModel, match="other logits"):
        load(tmp_path)


def test_tables_shorter_than_the_context_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding as Table

    write(tmp_path, CONFIGS["opt"]())
    plain = Table.forward
    monkeypatch.setattr(
        Table,
        "forward",
        lambda self, mask, cache_length=0, position_ids=None: plain(
            self, mask, cache_length, position_ids + 5 * (position_ids > 100)
        ),
    )
    with pytest.raises(errors.UnsupportedModel, match="out of range"):
        load(tmp_path)


def test_a_folder_of_such_a_model_is_pulled_and_runs(tmp_path: Path) -> None:
    store, folder = ModelFS(tmp_path / "home"), tmp_path / "saved"
    model = write(folder, CONFIGS["gpt_neox"]())
    path = folder / "model.safetensors"
    # A mask that old checkpoints of this architecture carry.
    save_file(load_file(path) | {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8).bool()}, path)
    (folder / "tensors.json").unlink()
    vocab = {token: number for number, token in enumerate(["<s>", *map(chr, range(33, 126))])}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(folder / "tokenizer.json"))
    manifest = pull(store, parse_name("tiny"), str(folder), Progress())
    assert (manifest.architecture, manifest.context_length) == ("gpt_neox", 128)
    assert manifest.parameters == model.reference.num_parameters()
    tokens = prompts()[1]
    kernel = start(TorchDriver("cpu"), store.driver_files(manifest))
    assert kernel.generate([kernel.open(tokens)], 5) == [model.greedy(tokens, 5)]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"model_type": "phi", "architectures": None}, errors.UnsupportedModel),
        ({"model_type": "../phi"}, errors.UnsupportedModel),
        ({"model_type": "jamba"}, errors.UnsupportedModel),
        ({"is_encoder_decoder": True}, errors.UnsupportedModel),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Phi"}}, errors.RefusedFile),
        ({"hidden_size": [48, "many"]}, errors.Corrupt),
    ],
)
def test_such_models_are_not_pulled(values: dict[str, Any], error: type[errors.LLMasOSError]) -> None:
    config = {"model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_size": 48} | values
    with pytest.raises(error):
        check_config(json.dumps(config).encode())


def test_without_transformers_the_hint_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    values = {"model_type": "phi"}
    with pytest.raises(errors.UnsupportedModel, match="'phi' is not computed here") as caught:
        family_of(Config(values)).shape_of(Config(values))
    assert "pip install 'llmasos[transformers]'" in caught.value.hint
