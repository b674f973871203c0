"""Texts of mixed lengths to vectors: `LLM.embed` against the same model in plain transformers, side by side.

    python tests/bench/embeddings.py [--texts 512] [--rounds 5] [--dtype float32] [--home FOLDER]

Texts are pieces of a book, their lengths log-normal (median 30 tokens, at most the model's). Both sides
tokenise and compute; transformers in batches of 32 padded to their longest, as they come and sorted by
length, its threads asleep while they wait as ours are. Each round measures all three, one after the other;
ratios are medians over rounds. Also the least cosine between the two sides' vectors. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Without it transformers' threads spin, and whoever else wants the cores decides what is measured.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import daemon
import machine
import numpy as np
import peers
import torch
import transformers

BATCH = 32
BOOK = Path(__file__).with_name("opticks.txt")


def texts_of(count: int, seed: int = 1) -> list[str]:
    dice, words = random.Random(seed), BOOK.read_text().split()
    found = []
    for _ in range(count):
        length = max(1, min(180, int(dice.lognormvariate(3.2, 0.9))))  # words; tokens are a quarter more
        start = dice.randrange(len(words) - length)
        found.append(" ".join(words[start : start + length]))
    return found


class Plain:
    """The model as transformers' documentation shows it: padded batches, mean over the mask, normalised."""

    def __init__(self, folder: Path, most: int) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModel.from_pretrained(folder).eval()
        self._most = most

    def __call__(self, texts: list[str], sort: bool) -> np.ndarray[Any, Any]:
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n])) if sort else range(len(texts))
        rows = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        order = list(order)
        with torch.inference_mode():
            for first in range(0, len(order), BATCH):
                part = order[first : first + BATCH]
                batch = self._tokenizer(
                    [texts[n] for n in part],
                    padding=True,
                    truncation=True,
                    max_length=self._most,
                    return_tensors="pt",
                )
                hidden = self._model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None].float()
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                rows[part] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return rows


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--home", type=Path, default=peers.CACHE / "encoders")
    arguments = parser.parse_args()
    arguments.home.mkdir(parents=True, exist_ok=True)
    texts = texts_of(arguments.texts)
    with daemon.running(arguments.home):
        from llmasos.userland.llm import LLM

        with LLM.from_pretrained("all-minilm", dtype=arguments.dtype) as llm:
            folder = arguments.home / "plain"
            folder.mkdir(exist_ok=True)
            for entry in llm.client.ls("/models/all-minilm"):
                name = entry.path.rpartition("/")[2]
                if name.endswith((".json", ".safetensors")) and not (folder / name).exists():
                    (folder / name).write_bytes(llm.client.read_file(entry.path))
            plain = Plain(folder, llm.context_length)
            sides: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
                "llmasos": lambda: llm.embed(texts, truncate=True),
                "transformers": lambda: plain(texts, sort=False),
                "transformers_sorted": lambda: plain(texts, sort=True),
            }
            rows = {name: act() for name, act in sides.items()}  # all are warm now
            spent = [{name: seconds(act) for name, act in sides.items()} for _ in range(arguments.rounds)]
    cosines = (rows["llmasos"] * rows["transformers"]).sum(1)
    figures = {
        "machine": machine.describe(),
        "texts": len(texts),
        "texts_per_s": {
            name: round(len(texts) / statistics.median(one[name] for one in spent), 1) for name in sides
        },
        "ratio": round(statistics.median(one["transformers"] / one["llmasos"] for one in spent), 2),
        "ratio_sorted": round(
            statistics.median(one["transformers_sorted"] / one["llmasos"] for one in spent), 2
        ),
        "least_cosine": round(float(cosines.min()), 7),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
