"""A tensor-parallel group of CPU ranks beside one device that computes alone (torch, the same threads in
all): are the tokens the same, and what does a decode step take?

    python tests/bench/groups.py [--home FOLDER] [--ranks 2] [--batches 1,8] [--tokens 32]

SmolLM2, fp32, greedy. A JSON line a batch size: milliseconds of a decode step of each, medians, and whether
all tokens are equal. FOLDER is a home that has the model (it is pulled there else). On one machine a group
shares the cores and the memory's bandwidth: it is for models that are too big for a device, not for speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class Sequences:
    """Some sequences on a driver, stepped together."""

    def __init__(self, driver: Any, files: dict[str, Any], count: int) -> None:
        from llmasos.drivers import base
        from llmasos.syscalls import types as t

        self._driver, self._base, self._ticket = driver, base, 0
        driver.load(base.LoadSpec(1, files, "float32", 0.05))
        dice = random.Random(1)
        prompts = [[dice.randrange(1000, 40_000) for _ in range(48)] for _ in range(count)]
        blocks = iter(range(10_000))
        opens = [
            base.SeqOpen(
                seq, t.pack_tokens(prompt), 48, 0, 400, [next(blocks) for _ in range(20)], t.Sampling(seed=0)
            )
            for seq, prompt in enumerate(prompts, 1)
        ]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.step(opens, 48)

    def step(self, opens: list[Any], count: int) -> float:
        """Seconds of a step."""
        self._ticket += 1
        work = [self._base.Work(seq, count, [], [], True) for seq in range(1, len(self.tokens) + 1)]
        begun = time.perf_counter()
        batch = self._base.Batch(self._ticket, 1, [], opens, [], work)
        result = self._driver.collect(self._driver.submit(batch))
        seconds = time.perf_counter() - begun
        for made, out in zip(self.tokens, result.outputs, strict=True):
            assert not out.error, out.error
            made += out.tokens
        return seconds


def model_files(home: Path) -> dict[str, Any]:
    from llmasos.kernel.modelfs.store import ModelFS

    command = [sys.executable, "-m", "llmasos.kernel.modelfs.importer", "--home", str(home)]
    subprocess.run([*command, "--model", "smollm2"], check=True, capture_output=True)
    store = ModelFS(home)
    return store.driver_files(store.resolve("smollm2"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    from llmasos.drivers.launcher import Local
    from llmasos.drivers.torch.executor import TorchDriver
    from llmasos.drivers.torch.group import GroupDriver

    fine = True
    with tempfile.TemporaryDirectory() as folder:
        files = model_files(options.home or Path(folder))
        command = ["llmasos.drivers.worker", "--device", f"cpu*{options.ranks}", "--bus", "none"]
        group = GroupDriver("cpu", Local().join(options.ranks, command))
        alone = TorchDriver("cpu")
        for count in map(int, options.batches.split(",")):
            both = {"alone": Sequences(alone, files, count), "group": Sequences(group, files, count)}
            times: dict[str, list[float]] = {name: [] for name in both}
            for _ in range(options.tokens):
                for name, sequences in both.items():
                    times[name].append(1e3 * sequences.step([], 1))
            same = both["alone"].tokens == both["group"].tokens
            fine &= same
            medians = {name: round(statistics.median(found), 1) for name, found in times.items()}
            print(
                json.dumps({"ranks": options.ranks, "batch": count, "ms": medians, "same": same}), flush=True
            )
        group.close()
    return not fine


if __name__ == "__main__":
    sys.exit(main())
