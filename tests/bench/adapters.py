"""What adapters cost: decode steps of rows that all have one of several LoRA adapters, and steps of as many
rows of the plain model, in turns, on the device itself (no daemon).

    python tests/bench/adapters.py native:int4 native:float32 torch:float32 --rows 8 16 32

A line for each system, choice of modules and number of rows: tokens a second without and with adapters, and
the median of the pairs' ratios. The weights of the adapters are random: what they are costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import peers
from llmasos.drivers import base
from llmasos.drivers.adapter import CONFIG, WEIGHTS
from llmasos.drivers.families import describe
from llmasos.drivers.model_config import Config
from llmasos.syscalls import types as t
from safetensors.numpy import save_file

CONTEXT = 64  # tokens before the first step that is measured
TARGETS = {
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "q,v": ("q_proj", "v_proj"),
}


def file_of(path: Path) -> base.File:
    data = path.read_bytes()
    return base.File(str(path), f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def make_adapter(
    folder: Path, config: Path, targets: tuple[str, ...], rank: int, seed: int
) -> dict[str, base.File]:
    """A random adapter for the model of a config.json, as peft would write it."""
    decoder = describe(Config(json.loads(config.read_text())))
    noise = numpy.random.default_rng(seed)
    tensors = {}
    for name, shape in decoder.expected.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            for half, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                values = noise.standard_normal(size, numpy.float32) * numpy.float32(0.02)
                tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    options = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / CONFIG).write_text(json.dumps(options))
    return {name: file_of(folder / name) for name in (CONFIG, WEIGHTS)}


class Rows:
    """Sequences that decode together, sequence i with adapter `adapters[i]`."""

    def __init__(self, driver: base.Driver, first: int, adapters: list[int], steps: int) -> None:
        self._driver, self._ticket = driver, first * 1_000_000
        self._ids = range(first, first + len(adapters))
        blocks = -(-(CONTEXT + steps + 2) // base.BLOCK_TOKENS)
        length = CONTEXT + steps + 2
        tokens = [t.pack_tokens((i * 31 + p * 7) % 40_000 + 100 for p in range(CONTEXT)) for i in self._ids]
        sampling = t.Sampling(seed=0)
        for i, packed, adapter in zip(self._ids, tokens, adapters, strict=True):
            own = list(range(i * blocks, (i + 1) * blocks))
            opened = base.SeqOpen(i, packed, CONTEXT, 0, length, own, sampling, adapter)
            self._run([opened], [base.Work(i, CONTEXT, [], [], True)])

    def step(self) -> float:
        """Seconds of a step that makes a token for each."""
        return self._run([], [base.Work(i, 1, [], [], True) for i in self._ids])

    def close(self) -> None:
        self._ticket += 1
        self._driver.collect(self._driver.submit(base.Batch(self._ticket, 1, list(self._ids), [], [], [])))

    def _run(self, opens: list[base.SeqOpen], work: list[base.Work]) -> float:
        self._ticket += 1
        done = self._driver.collect(self._driver.submit(base.Batch(self._ticket, 1, [], opens, [], work)))
        if problem := next((out.error for out in done.outputs if out.error), ""):
            raise RuntimeError(problem)
        return done.seconds


def measure(driver: base.Driver, rows: int, adapters: int, steps: int) -> dict[str, float]:
    plain = Rows(driver, 1, [0] * rows, steps)
    adapted = Rows(driver, 1 + rows, [i % adapters + 1 for i in range(rows)], steps)
    pairs = [(plain.step(), adapted.step()) for _ in range(steps)][3:]
    plain.close()
    adapted.close()
    return {
        "plain_tokens_per_s": round(rows / statistics.median(a for a, _ in pairs), 1),
        "adapted_tokens_per_s": round(rows / statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }


def driver_of(kind: str) -> base.Driver:
    if kind == "native":
        from llmasos.drivers.native.executor import NativeDriver

        return NativeDriver(lambda level, text: None)
    from llmasos.drivers.torch.executor import TorchDriver

    return TorchDriver("cpu" if kind == "torch" else kind)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", metavar="native|torch|cuda:DTYPE")
    parser.add_argument("--home", type=Path, default=peers.CACHE / "home")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    peers.pull(arguments.home, sys.executable)
    found: dict[str, dict[str, Any]] = peers.files(arguments.home)
    files = {name: base.File(file["path"], file["digest"], file["size"]) for name, file in found.items()}
    for system in arguments.systems:
        kind, _, dtype = system.partition(":")
        driver = driver_of(kind)
        loaded = driver.load(base.LoadSpec(1, files, dtype, 0.2))
        for targets, modules in TARGETS.items():
            with tempfile.TemporaryDirectory() as scratch:
                size = 0
                for number in range(1, arguments.adapters + 1):
                    folder, config = Path(scratch) / str(number), Path(files["config.json"].path)
                    adapter = make_adapter(folder, config, modules, arguments.rank, number)
                    size = driver.load_adapter(1, number, adapter)
            for rows in arguments.rows:
                figures = measure(driver, rows, arguments.adapters, arguments.steps)
                said = {"system": system, "engine": loaded.engine, "targets": targets, "rank": arguments.rank}
                counts = {"adapters": arguments.adapters, "adapter_bytes": size, "rows": rows}
                print(json.dumps(said | counts | figures), flush=True)
        driver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
