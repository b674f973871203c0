"""Each model family against transformers: token for token, and score for score, in float32."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llmasos.drivers import base
from llmasos.drivers.native.executor import NativeDriver
from llmasos.drivers.rope import rotation
from llmasos.drivers.torch import rope
from llmasos.drivers.torch.config import Config
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.syscalls import errors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .conftest import Tiny, file_of, nonsense

FAMILIES = ["gpt2", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3"]
VOCAB = 97


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.mark.parametrize("device", ["native", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(
    family: str, device: str, tiny: Callable[..., Any], kernel_of: Callable[..., Any]
) -> None:
    kernel, model = kernel_of(family, device=device), tiny(family)
    prompts = [prompt(length, seed=length) for length in (3, 16, 47)]
    made = kernel.generate([kernel.open(tokens) for tokens in prompts], 20, chunk=9)
    for tokens, continuation in zip(prompts, made, strict=True):
        with torch.inference_mode():
            whole = model.reference.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=0,
            )
        assert whole[0, len(tokens) :].tolist() == continuation
        assert len(set(continuation)) > 3  # a model that repeats itself would prove little


@pytest.mark.parametrize("device", ["native", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_the_dense_model(
    family: str, device: str, tiny: Callable[..., Any], kernel_of: Callable[..., Any]
) -> None:
    kernel, model = kernel_of(family, device=device), tiny(family)
    tokens = prompt(50)
    seq = kernel.open(tokens, logprobs=5, prompt_logprobs=True)
    scores = [score for count in (20, 1, 29) for out in kernel.step([(seq, count)]) for score in out.prompt]
    expected = model.logits(tokens).log_softmax(-1)
    assert len(scores) == 49
    for position, score in enumerate(scores):
        best = expected[position].topk(5)
        assert score.logprob == pytest.approx(float(expected[position, tokens[position + 1]]), abs=2e-4)
        assert [top.token for top in score.top] == best.indices.tolist()
        assert [top.logprob for top in score.top] == pytest.approx(best.values.tolist(), abs=2e-4)
    [out] = kernel.step([(kernel.open(tokens), 50)], beams=10)
    best = expected[-1].topk(10)
    assert [beam.token for beam in out.beams] == best.indices.tolist()
    assert [beam.logprob for beam in out.beams] == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family: str, tiny: Callable[..., Any], kernel_of: Callable[..., Any]) -> None:
    kernel, model = kernel_of(family, "bfloat16"), tiny(family)
    tokens = prompt(40)
    [out] = kernel.step([(kernel.open(tokens), 40)], beams=VOCAB)
    found = torch.tensor([beam.logprob for beam in sorted(out.beams, key=lambda beam: beam.token)])
    expected = model.logits(tokens)[-1].log_softmax(-1)
    # The divergence that transformers' own bfloat16 has from its float32 is the yardstick.
    rounded = Tiny(model.folder, copy.deepcopy(model.reference).bfloat16())
    own = rounded.logits(tokens)[-1].log_softmax(-1)

    def divergence(other: torch.Tensor) -> float:
        return float((expected.exp() * (expected - other)).sum())

    assert divergence(found) < max(0.02, 3 * divergence(own))
    assert kernel.loaded.dtype == "bfloat16"


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16},
}


@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize("kind", list(ROPES))
def test_rotary_frequencies_are_those_of_transformers(kind: str, style: int) -> None:
    parameters = {"rope_type": kind, "rope_theta": 5000.0, **ROPES[kind]}
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(parameters)
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    places = torch.arange(300)
    cos, sin = embedding(torch.zeros(1), places[None])
    if style == 5:
        values = {"max_position_embeddings": 256, "rope_parameters": parameters}
    else:
        scaling = {"type" if k == "rope_type" else k: v for k, v in parameters.items() if k != "rope_theta"}
        values = {"max_position_embeddings": 256, "rope_theta": 5000.0, "rope_scaling": scaling}
    found = rotation(Config(values).rope(10_000.0), 32)
    turns = rope.Rotary(found, torch.device("cpu")).turns(places)[:, 0]
    torch.testing.assert_close(turns.real, cos[0, :, :16], atol=2e-5, rtol=0)
    torch.testing.assert_close(turns.imag, sin[0, :, :16], atol=2e-5, rtol=0)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 123_456.0])
@pytest.mark.parametrize("size", [12, 64, 80, 128])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_frequencies_are_those_of_transformers_to_the_last_bits(kind: str, size: int, theta: float) -> None:
    parameters = {"rope_type": kind, "rope_theta": theta, **ROPES[kind]}
    theirs = transformers.LlamaConfig(
        hidden_size=4 * size,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=dict(parameters),
    )
    expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    values = {"max_position_embeddings": 256, "rope_parameters": parameters}
    found = rotation(Config(values).rope(10_000.0), size)
    # torch's vectorised power is one unit in the last place off here and there, ours is rounded correctly;
    # the reciprocal and the blend of two bands each double that.
    np.testing.assert_array_max_ulp(found.frequencies, expected.numpy(), 2 if kind != "llama3" else 4)
    assert found.scale == scale


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 0.0},
        {"rope_theta": -1.0},
        {"rope_scaling": {"type": "linear", "factor": 0.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1.0}},
        {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    ],
)
def test_rotary_parameters_without_frequencies_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(errors.UnsupportedModel):
        rotation(Config({"max_position_embeddings": 64, **change}).rope(10_000.0), 16)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"model_type": "mamba"}, "mamba"),
        ("llama", {"model_type": None}, "architecture ''"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"hidden_size": "64"}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"model_type": "gpt_neox", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"vocab_size": 10**9}, "vocab_size"),
        ("gpt2", {"n_layer": 10**9}, "n_layer"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    family: str, change: dict[str, Any], named: str, tiny: Callable[..., Any], tmp_path: Any
) -> None:
    model = tiny(family)
    config = {**json.loads((model.folder / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = {**model.files, "config.json": file_of(tmp_path / "config.json")}
    with pytest.raises((errors.UnsupportedModel, errors.Corrupt), match=named):
        TorchDriver("cpu").load(base.LoadSpec(1, files, "float32", 0.05))


def refused_or_loaded(
    driver: base.Driver, files: dict[str, base.File], config: dict[str, Any], to: Any
) -> bool:
    """Whether a model is loaded with another config.json. What keeps it out has to be a ModelError."""
    (to / "config.json").write_text(json.dumps(config))
    try:
        driver.load(base.LoadSpec(1, {**files, "config.json": file_of(to / "config.json")}, "float32", 0.01))
    except errors.ModelError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_nonsense_in_any_field_is_refused_or_does_not_matter(
    family: str, tiny: Callable[..., Any], asked: set[str], tmp_path: Path
) -> None:
    model, driver = tiny(family), NativeDriver(lambda level, text: None)
    config = json.loads((model.folder / "config.json").read_text())
    assert refused_or_loaded(driver, model.files, config, tmp_path)
    loaded = [refused_or_loaded(driver, model.files, bad, tmp_path) for bad in nonsense(config, set(asked))]
    assert any(loaded)
    assert not all(loaded)
    driver.close()


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_nonsense_in_rotary_parameters_is_refused_or_does_not_matter(kind: str, asked: set[str]) -> None:
    good = {"rope_type": kind, **ROPES[kind]}
    rotation(Config({"max_position_embeddings": 64, "rope_scaling": good}).rope(10_000.0), 16)
    for bad in [*nonsense(good, {*asked, "type"}), *({**good, name: float("nan")} for name in set(asked))]:
        config = Config({"max_position_embeddings": 64, "rope_scaling": bad})
        with suppress(errors.UnsupportedModel):
            assert np.isfinite(rotation(config.rope(10_000.0), 16).frequencies).all()


def test_nonsense_for_transformers_code_is_refused_or_does_not_matter(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever its classes make of it."""
    config = json.loads((tiny("llama").folder / "config.json").read_text()) | {"model_type": "gemma"}
    names = ("architectures", "head_dim", "hidden_act", "layer_types", "rope_parameters", "vocab_size")
    for bad in nonsense(config, {*names, "max_position_embeddings", "num_hidden_layers", "rms_norm_eps"}):
        refused_or_loaded(TorchDriver("cpu"), tiny("llama").files, bad, tmp_path)
