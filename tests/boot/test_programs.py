"""Programs as users run them: the seed program exactly as written, the examples, the demo's parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
LLSH = [sys.executable, "-m", "llmasos.userland.llsh.main"]
SEED = """
from llmasos import LLM
model = LLM.from_pretrained("gpt2")
text = model.generate(prompt="The world is a beautiful place.", max_length=100, num_beams=5)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty home; the daemon that a program started in it is shut down."""
    folder = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))
    yield folder
    run([*LLSH, "shutdown"], environment(folder))
    shutil.rmtree(folder)


def run(command: list[str], env: dict[str, str], timeout: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, timeout=timeout, text=True)


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "LLMASOS_HOME": str(home), **more}


def hub_with_gpt2(cache: Path) -> None:
    """A Hugging Face cache that holds a tiny random gpt2 under the real one's name."""
    repo = cache / "hub" / "models--openai-community--gpt2"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["The world is a beautiful place."] * 3, 300, special_tokens=["<|endoftext|>"])
    bpe.save(str(snapshot / "tokenizer.json"))
    (snapshot / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=bpe.get_vocab_size(),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(snapshot)


def test_the_seed_program_runs_as_written(home: Path) -> None:
    hub_with_gpt2(home / "hf")
    env = environment(home, HF_HOME=str(home / "hf"), HF_HUB_OFFLINE="1")
    ran = run([sys.executable, "-c", SEED + "print(text)"], env)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("The world is a beautiful place.")
    assert len(ran.stdout) > 50


def test_a_model_that_cannot_be_fetched_is_a_clear_error(home: Path) -> None:
    env = environment(home, HF_HOME=str(home / "hf"), HF_HUB_OFFLINE="1")
    ran = run([sys.executable, "-c", SEED], env)
    assert ran.returncode == 1
    assert "PullFailed" in ran.stderr
    assert "HF_HUB_OFFLINE" in ran.stderr


def test_two_tenants_and_paris(home: Path, smollm2_home: Path) -> None:
    """The agents' example and the shell on the default model."""
    shutil.copytree(smollm2_home, home, dirs_exist_ok=True)
    env = environment(home)
    ran = run([sys.executable, str(ROOT / "examples" / "two_tenants.py")], env, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "alice" in ran.stdout
    assert "bob" in ran.stdout
    ran = run([*LLSH, "run", "smollm2", "What is the capital of France?"], env)
    assert (ran.returncode, "Paris" in ran.stdout) == (0, True)
    assert run([*LLSH, "ps", "--json"], env).stdout.strip() == "[]"


def test_the_demo(home: Path) -> None:
    """What `make demo` shows, on the default model, which it fetches."""
    ran = run([sys.executable, str(ROOT / "examples" / "demo.py")], environment(home), timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "killed" in ran.stdout
