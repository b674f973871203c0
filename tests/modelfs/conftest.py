"""Small models on disk, made without torch, and ways to import them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmasos.kernel.modelfs.importer import pull
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.progress import Progress
from llmasos.kernel.modelfs.store import Manifest, ModelFS
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def byte_tokens() -> list[str]:
    """Two special tokens and every byte as byte-level BPE writes it."""
    return ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


@pytest.fixture
def store(tmp_path: Path) -> ModelFS:
    return ModelFS(tmp_path / "home")


@pytest.fixture
def bring(store: ModelFS) -> Callable[..., Manifest]:
    """Imports in this process: bring(source, model="tiny")."""

    def bring(source: str | Path, model: str = "tiny") -> Manifest:
        return pull(store, parse_name(model), str(source), Progress())

    return bring


@pytest.fixture
def importer(tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Runs the importer as the kernel does: importer(model, source, **environment) -> exit code, lines."""

    def run(model: str, source: str = "", **environment: str) -> tuple[int, list[dict[str, Any]]]:
        command = [sys.executable, "-m", "llmasos.kernel.modelfs.importer"]
        command += ["--home", str(tmp_path / "home"), "--model", model, "--source", source]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=300)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in Hugging Face's layout."""
    path = tmp_path / "tiny"
    write_model(path)
    return path


def write_model(path: Path, **config: Any) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    tensors = {"model.embed_tokens.weight": np.arange(258 * 32, dtype=np.float32).reshape(258, 32)}
    tensors["model.norm.weight"] = np.ones(32, dtype=np.float32)
    save_file(tensors, path / "model.safetensors")
    vocab = {token: number for number, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="session")
def smollm2(smollm2_home: Path) -> ModelFS:
    return ModelFS(smollm2_home)
