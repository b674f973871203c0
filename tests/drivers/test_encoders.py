"""Encoders equal transformers, whatever lengths come together: three families, every pooling, the heads."""

from __future__ import annotations

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
from llmasos.drivers.cpu import CpuDriver
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.syscalls import errors
from llmasos.syscalls import types as t

from .conftest import DEVICES, NONSENSE, files_of, index_of, nonsense

VOCAB = 97
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "num_labels": 3,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**_SMALL, layer_norm_eps=1e-5, hidden_act="gelu_new"),
    "roberta": lambda: transformers.RobertaConfig(**_SMALL, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCAB,
        dim=48,
        hidden_dim=80,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        initializer_range=0.25,
        num_labels=3,
    ),
}
CLASSES = {
    t.Encodes.EMBED: transformers.AutoModel,
    t.Encodes.CLASSIFY: transformers.AutoModelForSequenceClassification,
    t.Encodes.TOKENS: transformers.AutoModelForTokenClassification,
}
LENGTHS = [5, 1, 61, 5, 30, 12, 12, 5]
TEXTS = [[random.Random(n).randrange(5, VOCAB) for _ in range(length)] for n, length in enumerate(LENGTHS)]


def made(folder: Path, family: str, encodes: t.Encodes = t.Encodes.EMBED) -> Any:
    """A random model on disk; returns the one of transformers that wrote it."""
    torch.manual_seed(7)
    model = CLASSES[encodes].from_config(CONFIGS[family]()).eval()
    with torch.no_grad():  # zero biases and unit norms would hide a forgotten one
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "tensors.json").write_text(json.dumps(index_of(folder / "model.safetensors")))
    return model


def pooling(folder: Path, said: dict[str, Any], *more: str) -> None:
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": n, "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling.config.json").write_text(json.dumps(said))


def encoded(
    driver: base.Driver, texts: list[list[int]], width: int, pairs: list[int] | None = None
) -> np.ndarray:
    tokens = t.pack_tokens([token for text in texts for token in text])
    order = base.Encode(5, 1, tokens, [len(text) for text in texts], pairs or [0] * len(texts))
    answer = driver.encode(order)
    assert answer.ticket == 5
    return np.frombuffer(answer.data, "<f4").reshape(-1, width)


def load(folder: Path, dtype: str = "", device: str = "cpu") -> tuple[TorchDriver, base.Loaded]:
    driver = TorchDriver(device)
    return driver, driver.load(base.LoadSpec(1, files_of(folder), dtype, 0.1))


def hidden(model: Any, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([text])).last_hidden_state[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_equals_transformers(tmp_path: Path, family: str, device: str) -> None:
    model = made(tmp_path, family)
    driver, loaded = load(tmp_path, device=device)
    assert (loaded.encodes, loaded.width, loaded.blocks) == (t.Encodes.EMBED, 48, 0)
    assert loaded.context_length == (62 if family == "roberta" else 64)
    want = torch.stack([hidden(model, text).mean(0) for text in TEXTS]).numpy()
    np.testing.assert_allclose(encoded(driver, TEXTS, 48), want, atol=2e-5)
    np.testing.assert_allclose(encoded(driver, TEXTS[3:4], 48), want[3:4], atol=2e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("encodes", [t.Encodes.CLASSIFY, t.Encodes.TOKENS])
def test_heads_give_transformers_logits(tmp_path: Path, family: str, encodes: t.Encodes) -> None:
    model = made(tmp_path, family, encodes)
    driver, loaded = load(tmp_path)
    assert (loaded.encodes, loaded.width) == (encodes, 3)
    with torch.inference_mode():
        want = torch.cat([model(torch.tensor([text])).logits.reshape(-1, 3) for text in TEXTS])
    np.testing.assert_allclose(encoded(driver, TEXTS, 3), want.numpy(), atol=2e-5)


def test_the_second_text_of_a_pair_is_told_apart(tmp_path: Path) -> None:
    model = made(tmp_path, "bert", t.Encodes.CLASSIFY)
    driver, _ = load(tmp_path)
    pairs = [0, 0, 20, 3, 0, 1, 0, 4]
    want = []
    for text, second in zip(TEXTS, pairs, strict=True):
        kinds = [int(0 < second <= place) for place in range(len(text))]
        with torch.inference_mode():
            want.append(model(torch.tensor([text]), token_type_ids=torch.tensor([kinds])).logits[0])
    found = encoded(driver, TEXTS, 3, pairs)
    np.testing.assert_allclose(found, torch.stack(want).numpy(), atol=2e-5)
    assert not np.allclose(found[2], encoded(driver, TEXTS, 3)[2], atol=1e-3)


@pytest.mark.parametrize(
    ("said", "pooled"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda x: x.mean(0)),
        ({"pooling_mode_cls_token": True}, lambda x: x[0]),
        ({"pooling_mode_max_tokens": True}, lambda x: x.amax(0)),
        ({"pooling_mode_lasttoken": True}, lambda x: x[-1]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda x: x.sum(0) / len(x) ** 0.5),
        ({"pooling_mode": "mean"}, lambda x: x.mean(0)),
        ({"pooling_mode": ["cls", "max"]}, lambda x: torch.cat([x[0], x.amax(0)])),
    ],
)
def test_vectors_are_pooled_as_the_model_says(tmp_path: Path, said: Any, pooled: Any) -> None:
    model = made(tmp_path, "bert")
    pooling(tmp_path, said, "Normalize")
    driver, loaded = load(tmp_path)
    want = torch.stack([torch.nn.functional.normalize(pooled(hidden(model, x)), dim=0) for x in TEXTS])
    np.testing.assert_allclose(encoded(driver, TEXTS, loaded.width), want.numpy(), atol=1e-5)


def test_what_is_not_pooled_here_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "bert")
    for said, more in (
        ({"pooling_mode_weightedmean_tokens": True}, ()),
        ({"pooling_mode": "cls"}, ("Dense",)),
    ):
        pooling(tmp_path, said, *more)
        with pytest.raises(errors.UnsupportedModel):
            load(tmp_path)


def test_a_text_is_as_long_as_the_model_was_trained_for(tmp_path: Path) -> None:
    made(tmp_path, "bert")
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    assert load(tmp_path)[1].context_length == 40


def test_bfloat16_keeps_the_direction(tmp_path: Path) -> None:
    model = made(tmp_path, "bert")
    driver, loaded = load(tmp_path, "bfloat16")
    assert loaded.dtype == "bfloat16"
    want = torch.stack([hidden(model, text).mean(0) for text in TEXTS])
    cosines = torch.nn.functional.cosine_similarity(torch.tensor(encoded(driver, TEXTS, 48)), want)
    assert cosines.min() > 0.999


def test_old_names_of_norms_are_read(tmp_path: Path) -> None:
    model = made(tmp_path, "bert")
    index = json.loads((tmp_path / "tensors.json").read_text())["tensors"]
    words = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    old = {}
    for name, entry in index.items():
        for new, before in words:
            name = name.replace(new, before)
        old[f"bert.{name}"] = entry
    (tmp_path / "tensors.json").write_text(json.dumps({"tensors": old}))
    driver, _ = load(tmp_path)
    want = torch.stack([hidden(model, text).mean(0) for text in TEXTS]).numpy()
    np.testing.assert_allclose(encoded(driver, TEXTS, 48), want, atol=2e-5)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    made(tmp_path, "bert")
    index = json.loads((tmp_path / "tensors.json").read_text())["tensors"]
    del index["encoder.layer.1.output.dense.bias"]
    (tmp_path / "tensors.json").write_text(json.dumps({"tensors": index}))
    with pytest.raises(errors.Corrupt, match=r"layer\.1\.output\.dense\.bias"):
        load(tmp_path)


def test_the_cpu_device_computes_encoders(tmp_path: Path) -> None:
    model = made(tmp_path, "bert")
    driver = CpuDriver(lambda level, text: None)
    loaded = driver.load(base.LoadSpec(1, files_of(tmp_path), "", 0.1))
    assert loaded.encodes is t.Encodes.EMBED
    want = hidden(model, TEXTS[0]).mean(0).numpy()
    np.testing.assert_allclose(encoded(driver, TEXTS[:1], 48)[0], want, atol=2e-5)
    driver.unload(1)
    with pytest.raises(errors.DeviceFault):
        encoded(driver, TEXTS[:1], 48)
    driver.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_nonsense_in_any_field_is_refused_or_does_not_matter(
    tmp_path: Path, family: str, asked: set[str]
) -> None:
    made(tmp_path, family)
    driver, _ = load(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for bad in nonsense(config, set(asked)):
        path.write_text(json.dumps(bad))
        with suppress(errors.ModelError):
            driver.load(base.LoadSpec(1, files_of(tmp_path), "", 0.1))
    path.write_text(json.dumps(config))
    for file, good in {
        "1_Pooling.config.json": {"pooling_mode": "mean"},
        "sentence_bert_config.json": {"max_seq_length": 9},
    }.items():
        pooling(tmp_path, {"pooling_mode": "mean"})
        for bad in [*nonsense(good, good), *NONSENSE]:
            (tmp_path / file).write_text(json.dumps(bad))
            with suppress(errors.ModelError):
                driver.load(base.LoadSpec(1, files_of(tmp_path), "", 0.1))
