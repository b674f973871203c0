"""How far a format's distributions lie from those of the same weights in float32.

    python tests/bench/quality.py transformers:bfloat16 native:int4:int8 client:int4:int8 client:bfloat16

4 × 512 tokens of English, teacher forced. Of each system: mean and 99th percentile of the Kullback-Leibler
divergence from float32, how often the likeliest token is the same, and the perplexity beside float32's.

    transformers:DTYPE    transformers' forward pass
    native:DTYPE:KV       the native engine's own logits, without a daemon
    client:DTYPE[:KV]     through a daemon and the Python client, which shows the 20 likeliest tokens and the
                          true one: the divergence is that of these and the rest taken as one, a lower bound

The reference is transformers' forward pass in float32 over the model's GGUF file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import daemon
import numpy as np
import peers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from workloads import TEXT

WINDOWS, LENGTH, APART = 4, 512, 5000
TOP = 20

Array = NDArray[np.float32]
Logits = Callable[[list[int]], Array]
"""Token ids in, one row of logits a token out: [tokens, vocabulary]."""


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted, dtype=np.float64).sum(-1, keepdims=True)).astype(np.float32)


@dataclass
class Divergence:
    """What a system's distributions are like, position by position."""

    kl: list[float]
    same: list[bool]
    true_logprob: list[float]

    def figures(self, reference_logprob: list[float]) -> dict[str, float]:
        perplexity = math.exp(-float(np.mean(self.true_logprob)))
        reference = math.exp(-float(np.mean(reference_logprob)))
        return {
            "mean_kl": float(np.mean(self.kl)),
            "p99_kl": float(np.percentile(self.kl, 99)),
            "agreement": float(np.mean(self.same)),
            "perplexity": perplexity,
            "perplexity_fp32": reference,
            "perplexity_change": perplexity / reference - 1,
            "positions": len(self.kl),
        }


def exact(reference: list[Array], windows: list[list[int]], logits: Logits) -> Divergence:
    """From whole distributions. `reference` holds log-probabilities."""
    found = Divergence([], [], [])
    for p, tokens in zip(reference, windows, strict=True):
        q = log_softmax(np.asarray(logits(tokens), np.float32))
        kl = (np.exp(p, dtype=np.float64) * (p - q)).sum(-1)
        # The last row predicts what is not in the text.
        found.kl += kl[:-1].tolist()
        found.same += (p.argmax(-1) == q.argmax(-1))[:-1].tolist()
        found.true_logprob += [float(row[token]) for row, token in zip(q, tokens[1:], strict=False)]
    return found


def coarse(p: Array, seen: dict[int, float]) -> float:
    """The divergence when all tokens that are not in `seen` count as one. Never above the whole one."""
    ids = np.fromiter(seen, np.int64)
    q = np.fromiter(seen.values(), np.float64)
    inside = np.exp(p[ids], dtype=np.float64)
    rest_p, rest_q = max(1 - inside.sum(), 1e-12), max(1 - np.exp(q).sum(), 1e-12)
    return float((inside * (p[ids] - q)).sum() + rest_p * (math.log(rest_p) - math.log(rest_q)))


# Systems.


def transformers_logits(gguf: Path, dtype: str) -> Logits:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype)
    ).eval()

    def logits(tokens: list[int]) -> Array:
        with torch.inference_mode():
            rows: Array = model(torch.tensor([tokens])).logits[0].float().numpy()
        return rows

    return logits


def native_logits(files: dict[str, dict[str, Any]], dtype: str, kv_dtype: str) -> Logits:
    """Of the native engine, in this process."""
    from llmasos.drivers.base import File, LoadSpec
    from llmasos.drivers.native.executor import NativeDriver

    given = {name: File(file["path"], file["digest"], file["size"]) for name, file in files.items()}
    driver = NativeDriver(lambda level, text: None)
    driver.load(LoadSpec(1, given, dtype, 0.2, kv_dtype))

    def logits(tokens: list[int]) -> Array:
        return driver.all_logits(1, tokens)

    return logits


def through_client(
    home: Path, reference: list[Array], windows: list[list[int]], dtype: str, kv_dtype: str
) -> Divergence:
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t
    from llmasos.userland.client import Client

    overrides = [f'kv_dtype="{kv_dtype}"'] if kv_dtype else []
    found = Divergence([], [], [])
    with daemon.running(home, *overrides), Client() as client:
        for p, tokens in zip(reference, windows, strict=True):
            call = table.Infer(
                model=peers.MODEL,
                tokens=t.pack_tokens(tokens),
                max_tokens=0,
                sampling=t.Sampling(prompt_logprobs=True, logprobs=TOP),
                dtype=dtype,
            )
            with client.stream(call) as stream:
                scored = [chosen for event in stream for chosen in event.prompt_logprobs]
            if len(scored) != len(tokens):
                raise RuntimeError(f"{len(scored)} scores for {len(tokens)} tokens")
            # Entry n scores token n, so it is the distribution that row n - 1 of the reference is of.
            for row, token, chosen in zip(p, tokens[1:], scored[1:], strict=False):
                seen = {one.token: one.logprob for one in chosen.top} | {token: chosen.logprob}
                found.kl.append(coarse(row, seen))
                found.same.append(int(row.argmax()) == max(seen, key=lambda one: seen[one]))
                found.true_logprob.append(chosen.logprob)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", metavar="KIND:DTYPE[:KV]")
    parser.add_argument("--home", type=Path, default=peers.CACHE / "home")
    arguments = parser.parse_args()
    peers.pull(arguments.home, sys.executable)
    files = peers.files(arguments.home)
    ids = Tokenizer.from_file(files["tokenizer.json"]["path"]).encode(
        TEXT.read_text(), add_special_tokens=False
    )
    windows = [ids.ids[n * APART : n * APART + LENGTH] for n in range(WINDOWS)]
    gguf = Path(files["model.gguf"]["path"])
    reference = [log_softmax(transformers_logits(gguf, "float32")(tokens)) for tokens in windows]
    truth = [
        float(row[token])
        for p, tokens in zip(reference, windows, strict=True)
        for row, token in zip(p, tokens[1:], strict=False)
    ]
    failed = False
    for system in arguments.systems:
        what, dtype, kv_dtype = (*system.split(":"), "", "")[:3]
        try:
            match what:
                case "transformers":
                    found = exact(reference, windows, transformers_logits(gguf, dtype))
                case "native":
                    found = exact(reference, windows, native_logits(files, dtype, kv_dtype))
                case "client":
                    found = through_client(arguments.home, reference, windows, dtype, kv_dtype)
                case _:
                    parser.error(f"no kind {what!r}: transformers, native or client")
        except ImportError as problem:
            print(f"quality: {system} is skipped: {problem}", file=sys.stderr)
            failed = True
            continue
        figures = {key: round(value, 5) for key, value in found.figures(truth).items()}
        bound = {"lower_bound": True} if what == "client" else {}
        print(json.dumps({"system": system} | figures | bound), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
