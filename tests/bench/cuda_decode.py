"""The torch driver's decode steps against the device's memory and against transformers' continuous batching,
in one run, on models of real shapes with random weights.

    python tests/bench/cuda_decode.py                             # on a GPU: everything
    python tests/bench/cuda_decode.py --shapes 8b --dtypes int4 --batches 1,64 --peer none
    python tests/bench/cuda_decode.py --device cpu --shapes tiny  # does it run? its figures mean nothing

Prints one JSON line a figure:

    copy     what the device's memory does at best: bytes read and written by a copy
    decode   milliseconds a step at a batch size, one step under way and two; the bytes that a step has to
             read (weights and KV once) as a share of the nominal bandwidth and of the copy's
    batch    prompts continued together, from a sequence's first token to its last: milliseconds a step here
             (two under way) and by `generate_batch`, and their ratio; setup and prefill do not count
    kernels  (--profile) microseconds a step that the device spends in each kernel, the longest first
    failed   what could not be measured, and why; the others are

Only verbs of the driver are called, as the kernel calls them, in this process. (A file named cuda.py would be
imported by torch instead of NVIDIA's package.)
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from llmasos.drivers import base
from llmasos.drivers.families import describe
from llmasos.drivers.torch import executor
from llmasos.drivers.torch.config import Config
from llmasos.syscalls import types as t
from torch.profiler import ProfilerActivity, profile

_BEGUN = time.perf_counter()

# Llama 3.2 1B and 3B, Llama 3.1 8B.
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 5e5}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


class RandomCheckpoint:
    """Stands in for weights.Checkpoint: every tensor that the config's family wants, made on the device."""

    stored = "BF16"

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.config, self._device = config, device
        self._shapes = describe(Config(config)).expected
        self.numel = sum(torch.Size(shape).numel() for shape in self._shapes.values())

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def drop_prefix(self, prefix: str) -> None:
        pass

    def expect(self, shapes: dict[str, tuple[int, ...]], ignored: Any) -> None:
        pass

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        made = torch.randn(self._shapes[name], dtype=dtype, device=self._device)
        return made.mul_(0.02) if made.dim() > 1 else made.mul_(0.02).add_(1)


class Sender:
    """Sends steps of `batch` sequences and numbers tickets and blocks; every sequence has the blocks of
    `length` positions from the start."""

    def __init__(self, driver: Any, loaded: base.Loaded, batch: int, length: int) -> None:
        self._driver, self._loaded = driver, loaded
        self._ticket, self._each = 0, -(-length // base.BLOCK_TOKENS)
        self._ids = range(1, batch + 1)
        assert batch * self._each <= loaded.blocks, "the KV pool is too small for this batch"

    def open(self, tokens: list[list[int]], computed: int) -> None:
        opens = [
            base.SeqOpen(
                seq,
                t.pack_tokens(known),
                len(known),
                computed,
                1 << 20,
                list(range((seq - 1) * self._each, seq * self._each)),
                t.Sampling(seed=seq),
            )
            for seq, known in zip(self._ids, tokens, strict=True)
        ]
        self._send(opens, [])

    def decode(self) -> int:
        return self._submit([], [base.Work(seq, 1, [], [], True) for seq in self._ids])

    def prefill(self, length: int, step_tokens: int) -> None:
        """Chunks of as many sequences as a step carries; the last of each chooses a token."""
        left = dict.fromkeys(self._ids, length)
        while left:
            room, works = step_tokens, []
            for seq in list(left):
                count = min(left[seq], room)
                if not count:
                    break
                works.append(base.Work(seq, count, [], [], True))
                room, left[seq] = room - count, left[seq] - count
                if not left[seq]:
                    del left[seq]
            self._send([], works)

    def _submit(self, opens: list[base.SeqOpen], works: list[base.Work]) -> int:
        self._ticket += 1
        batch = base.Batch(self._ticket, self._loaded.handle, [], opens, [], works)
        return int(self._driver.submit(batch))

    def _send(self, opens: list[base.SeqOpen], works: list[base.Work]) -> None:
        self.collect(self._submit(opens, works))

    def collect(self, ticket: int) -> None:
        outputs = self._driver.collect(ticket).outputs
        assert not any(out.error for out in outputs), [out.error for out in outputs if out.error]

    def run(self, steps: int, depth: int) -> list[float]:
        """Seconds between the ends of decode steps, `depth` under way."""
        waiting, ends = [self.decode() for _ in range(depth)], []
        for left in range(steps - 1, -1, -1):
            self.collect(waiting.pop(0))
            ends.append(time.perf_counter())
            if left >= depth:
                waiting.append(self.decode())
        return [b - a for a, b in itertools.pairwise(ends)]


def load(shape: str, dtype: str, device: str) -> tuple[Any, base.Loaded, float]:
    """A driver with a random model, and the bytes of weights that a decode step reads."""
    config = {**_LLAMA, **SHAPES[shape], "architectures": ["LlamaForCausalLM"]}
    checkpoint = RandomCheckpoint(config, device)
    executor.Checkpoint = lambda files: checkpoint  # type: ignore[assignment,misc]
    driver = executor.TorchDriver(device)
    loaded = driver.load(base.LoadSpec(1, {}, dtype, 0.8))
    values = config["vocab_size"] * config["hidden_size"]
    shared = config["tie_word_embeddings"] and dtype in ("float32", "bfloat16")
    table = 0 if shared else values * (4 if dtype == "float32" else 2)  # of which a step reads a few rows
    return driver, loaded, loaded.weights_bytes - table


def release(driver: Any) -> None:
    driver.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copied(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(1 << 30 if device != "cpu" else 1 << 25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        synchronize(device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2 * source.numel() / statistics.median(times)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def nominal(device: str) -> float | None:
    """Bytes a second that the memory's clock and width make, if the device tells them."""
    if device == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    if not hasattr(found, "memory_clock_rate"):
        return None
    return 2 * found.memory_clock_rate * 1000 * found.memory_bus_width / 8


def kernels(options: argparse.Namespace, shape: str, dtype: str, sender: Sender, batch: int) -> None:
    steps = 8
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        sender.run(steps, 1)
    spent = {event.key[:48]: event.self_device_time_total / steps for event in found.key_averages()}
    longest = sorted(spent, key=lambda name: -spent[name])[:12]
    us = {name: round(spent[name], 1) for name in longest}
    report("kernels", options, shape=shape, dtype=dtype, batch=batch, us=us)


def decode(options: argparse.Namespace, shape: str, dtype: str, limits: dict[str, float]) -> None:
    driver, loaded, weights = load(shape, dtype, options.device)
    for batch in options.batches:
        length = options.context + 2 * options.steps + 16
        sender = Sender(driver, loaded, batch, length)
        sender.open([list(range(options.context + 1))] * batch, options.context)
        sender.run(4, 1)  # captures the graph
        alone, ahead = (statistics.median(sender.run(options.steps, depth)) for depth in (1, 2))
        position = loaded.block_bytes / base.BLOCK_TOKENS
        read = weights + batch * position * (options.context + options.steps)
        report(
            "decode",
            options,
            shape=shape,
            dtype=dtype,
            engine=loaded.engine,
            batch=batch,
            context=options.context,
            ms_per_step=round(1000 * alone, 4),
            ms_per_step_two_under_way=round(1000 * ahead, 4),
            tokens_per_s=round(batch / ahead, 1),
            gb_per_step=round(read / 1e9, 4),
            **{f"of_{name}": round(read / ahead / limit, 3) for name, limit in limits.items()},
        )
        if options.profile:
            attempt(options, "kernels", partial(kernels, options, shape, dtype, sender, batch))
    release(driver)


def ours(options: argparse.Namespace, shape: str, prompts: list[list[int]]) -> float:
    """Seconds a decode step, from a sequence's first token to its last."""
    driver, loaded, _ = load(shape, options.peer_dtype, options.device)
    sender = Sender(driver, loaded, len(prompts), len(prompts[0]) + options.steps + 2)
    seconds = 0.0
    for _ in range(2):  # the first captures the graph
        sender.open(prompts, 0)
        sender.prefill(len(prompts[0]), driver.describe().step_tokens)
        seconds = statistics.mean(sender.run(options.steps - 1, 2))
    release(driver)
    return seconds


def theirs(options: argparse.Namespace, shape: str, prompts: list[list[int]]) -> float:
    """The same by transformers' continuous batching."""
    import transformers

    transformers.logging.set_verbosity_error()
    values = {k: v for k, v in {**_LLAMA, **SHAPES[shape]}.items() if k not in ("model_type", "rope_theta")}
    config = transformers.LlamaConfig(**values, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.peer_dtype), attn_implementation="sdpa"
        ).eval()
    generation = transformers.GenerationConfig(
        max_new_tokens=options.steps, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    seconds = 0.0
    for _ in range(2):
        made = model.generate_batch(
            prompts, generation_config=generation, record_timestamps=True, progress_bar=False
        )
        outputs = list(made.values())
        assert [len(out.generated_tokens) for out in outputs] == [options.steps] * len(prompts)
        spans = [out.timestamps[-1] - out.timestamps[0] for out in outputs]
        seconds = statistics.median(spans) / (options.steps - 1)
    del model
    gc.collect()
    if options.device != "cpu":
        torch.cuda.empty_cache()
    return seconds


def against(options: argparse.Namespace, shape: str) -> None:
    vocabulary = SHAPES[shape]["vocab_size"]
    for batch in options.peer_batches:
        prompts = [
            [(7 * place + 13 * seq) % vocabulary for place in range(options.prompt)] for seq in range(batch)
        ]
        mine, other = ours(options, shape, prompts), theirs(options, shape, prompts)
        report(
            "batch",
            options,
            shape=shape,
            dtype=options.peer_dtype,
            batch=batch,
            prompt=options.prompt,
            new=options.steps,
            llmasos_ms_per_step=round(1000 * mine, 4),
            transformers_ms_per_step=round(1000 * other, 4),
            llmasos_tokens_per_s=round(batch / mine, 1),
            transformers_tokens_per_s=round(batch / other, 1),
            ratio=round(other / mine, 2),
        )


def report(figure: str, options: argparse.Namespace, **values: Any) -> None:
    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    head = {"figure": figure, "device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({**head, **values}), flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="1b,3b,8b")
    parser.add_argument("--dtypes", default="", help="of weights; all that the device takes but float32")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--peer", default="transformers", choices=["transformers", "none"])
    parser.add_argument("--peer-batches", type=numbers, default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--profile", action="store_true", help="say where a step's time goes")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing more after so long")
    found = parser.parse_args()
    if found.device == "cpu":
        found.batches, found.peer_batches = [1, 4], [2]
        found.context, found.prompt, found.steps = 64, 20, 8
    found.peer_dtype = "float32" if found.device == "cpu" else "bfloat16"
    return found


def figures(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    known = executor.TorchDriver(options.device).describe().dtypes
    chosen = options.dtypes.split(",") if options.dtypes else known
    for shape in options.shapes.split(","):
        for dtype in chosen:
            if options.dtypes or options.device == "cpu" or dtype != "float32":
                yield shape, dtype


def attempt(options: argparse.Namespace, what: str, measure: Callable[[], None]) -> bool:
    """Measures, if there is time; tells what failed. Whether it did not fail."""
    if time.perf_counter() - _BEGUN > options.seconds:
        report("failed", options, what=what, why="there was no time left")
        return False
    try:
        measure()
    except Exception as problem:  # the other figures are still wanted
        traceback.print_exc()
        report("failed", options, what=what, why=f"{type(problem).__name__}: {str(problem)[:300]}")
        return False
    finally:
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    return True


def main() -> int:
    options = arguments()
    limits = {"copy": copied(options.device)}
    if (peak := nominal(options.device)) is not None:
        limits["nominal"] = peak
    report("copy", options, **{f"{name}_gb_per_s": round(limit / 1e9, 1) for name, limit in limits.items()})
    fine = [
        attempt(options, f"decode {shape} {dtype}", partial(decode, options, shape, dtype, limits))
        for shape, dtype in figures(options)
    ]
    if options.peer == "transformers":
        fine += [
            attempt(options, f"batch {shape}", partial(against, options, shape))
            for shape in options.shapes.split(",")
        ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
