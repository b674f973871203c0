"""A random model of words, and rows that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers


def write_tiny(folder: Path, config: transformers.PretrainedConfig) -> None:
    """Files of a model of `config` whose tokens are the words w0 to w511."""
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def counting(rows: int = 200) -> str:
    """JSON lines: words that count on by ones, twos or threes."""
    dice = random.Random(2)
    found = []
    for _ in range(rows):
        first, pace = dice.randrange(3, 512), dice.randrange(1, 4)
        words = [f"w{3 + (first + pace * i) % 509}" for i in range(dice.randrange(8, 30))]
        found.append(json.dumps({"text": " ".join(words)}) + "\n")
    return "".join(found)
