"""LLMasOS against transformers' `generate` on the same weights (SmolLM2-135M, fp32) in one run.

    python tests/bench/against_transformers.py [ROUNDS]

Prints one JSON line a figure: medians of ROUNDS (default 3) paired rounds, and their ratio. Also the time to
first token of an interactive request while batch work saturates the device, against an idle one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import transformers
from llmasos import LLM
from llmasos.syscalls import table
from llmasos.syscalls import types as t

NEW = 48
PROMPTS = [f"Write a short story about {n} friends who travel to the sea and find" for n in range(2, 18)]


def reference(llm: LLM) -> torch.nn.Module:
    """transformers' own reading of the model's GGUF file."""
    from pathlib import Path

    digest = next(f.digest for f in llm.client.ls(f"/models/{llm.model}") if f.path.endswith(".gguf"))
    home = Path(llm.client.call(table.Df()).home)
    folder = home / "blobs"
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=digest.replace(":", "-"), dtype=torch.float32
    ).eval()


def ours(llm: LLM, prompts: list[list[int]], new: int) -> float:
    """Seconds for `new` tokens after each prompt, all at once, through the client."""
    sampling = t.Sampling(min_new_tokens=new)
    calls = [
        table.Infer(
            model=llm.model, tokens=t.pack_tokens(p), max_tokens=new, dtype="float32", sampling=sampling
        )
        for p in prompts
    ]
    begun = time.perf_counter()
    count = sum(len(event.tokens) for _, event in llm.client.gather(calls))
    assert count == new * len(prompts)
    return time.perf_counter() - begun


def theirs(model: torch.nn.Module, prompts: list[list[int]], new: int) -> float:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    begun = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
    return time.perf_counter() - begun


def first_token(llm: LLM, prompt: list[int]) -> float:
    """Seconds to the first token of an interactive request."""
    call = table.Infer(model=llm.model, tokens=t.pack_tokens(prompt), max_tokens=4, dtype="float32")
    begun = time.perf_counter()
    with llm.client.stream(call) as stream:
        next(stream)
        seconds = time.perf_counter() - begun
        stream.result()
    return seconds


def saturated(llm: LLM, prompts: list[list[int]], rounds: int) -> list[float]:
    """Times to first token while 24 batch requests run."""
    load = [
        table.Infer(
            model=llm.model,
            tokens=t.pack_tokens(prompts[n % len(prompts)] + [n + 5]),
            max_tokens=400,
            sampling=t.Sampling(min_new_tokens=400),
            sched_class=t.SchedClass.BATCH,
            dtype="float32",
        )
        for n in range(24)
    ]
    streams = [llm.client.stream(call, window=1024) for call in load]
    time.sleep(4)
    times = [first_token(llm, [*prompts[n % len(prompts)][::-1], n]) for n in range(rounds * 3)]
    for stream in streams:
        stream.close()
    return times


def report(figure: str, ours_s: list[float], theirs_s: list[float], tokens: int) -> None:
    a, b = statistics.median(ours_s), statistics.median(theirs_s)
    print(
        json.dumps(
            {
                "figure": figure,
                "llmasos_tokens_per_s": round(tokens / a, 1),
                "transformers_tokens_per_s": round(tokens / b, 1),
                "ratio": round(b / a, 2),
            }
        ),
        flush=True,
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with LLM.from_pretrained("smollm2", dtype="float32") as llm:
        model = reference(llm)
        prompts = [llm.tokenizer.encode(p) for p in PROMPTS]
        for count in (1, 4, 16):
            some = prompts[:count]
            ours(llm, some, 4)
            theirs(model, some, 4)
            pairs = [(ours(llm, some, NEW), theirs(model, some, NEW)) for _ in range(rounds)]
            report(f"decode, {count} at once", [p[0] for p in pairs], [p[1] for p in pairs], NEW * count)
        idle = statistics.median(first_token(llm, prompts[n][::-1]) for n in range(rounds * 3))
        busy = saturated(llm, prompts, rounds)
        step = next(d.step_ms for d in llm.client.call(table.Lsdev()).devices if d.step_ms)
        print(
            json.dumps(
                {
                    "figure": "first token, idle and beside 24 batch requests",
                    "idle_ms": round(1000 * idle, 1),
                    "busy_median_ms": round(1000 * statistics.median(busy), 1),
                    "busy_worst_ms": round(1000 * max(busy), 1),
                    "step_ms": step,
                }
            )
        )


if __name__ == "__main__":
    main()
