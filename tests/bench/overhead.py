"""How much of a token's time is kernel, wire and Python, and how much the device.

    python tests/bench/overhead.py [--streams 1 16] [--tokens 128] [--dtype int4]

For each number of streams, without guesses, medians of 3 runs: what the client saw from token to token, the
device's own time of a step as `lsdev` tells it (the median of recent steps), the rest, and the processor
seconds that kernel and client spent a token. JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import daemon
import peers
import psutil
from tokenizers import Tokenizer
from workloads import Prompts

ROUNDS = 3


def processor_s(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return float(spent.user + spent.system)


def measure(
    client: Any, processes: dict[str, psutil.Process], calls: list[Any], new: int
) -> dict[str, float]:
    from llmasos.syscalls import table

    events: dict[int, list[tuple[float, int]]] = {}  # when, and how many tokens, one a round
    watched = processes | {"client": psutil.Process()}
    before = {name: processor_s(process) for name, process in watched.items()}
    for index, event in client.gather(calls):
        events.setdefault(index, []).append((time.perf_counter(), len(event.tokens)))
    spent = {name: processor_s(process) - before[name] for name, process in watched.items()}
    counts = [sum(count for _, count in stream) for stream in events.values()]
    assert counts == [new] * len(counts), counts
    gaps = [
        (b - a) / count for stream in events.values() for (a, _), (b, count) in itertools.pairwise(stream)
    ]
    step_ms = next(d.step_ms for d in client.call(table.Lsdev()).devices if d.step_ms)
    observed = 1000 * statistics.median(gaps)
    total = sum(counts)
    return {
        "observed_ms": observed,
        "device_ms": step_ms,
        "rest_ms": observed - step_ms,
        "rest_share": (observed - step_ms) / observed,
    } | {f"{name}_ms_a_token": 1000 * seconds / total for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--home", type=Path, default=peers.CACHE / "home")
    arguments = parser.parse_args()
    peers.pull(arguments.home, sys.executable)
    tokenizer = Tokenizer.from_file(peers.files(arguments.home)["tokenizer.json"]["path"])
    prompts = Prompts(lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids))
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t

    def call() -> table.Infer:
        return table.Infer(
            model=peers.MODEL,
            tokens=t.pack_tokens(prompts.take(32)),
            max_tokens=arguments.tokens,
            dtype=arguments.dtype,
        )

    with daemon.running(arguments.home, "draft_tokens=0") as supervisor:
        from llmasos.userland.client import Client

        with Client() as client:
            for streams in arguments.streams:
                for _, _ in client.gather([call() for _ in range(streams)]):
                    pass
                processes = daemon.parts(supervisor)
                runs = [
                    measure(client, processes, [call() for _ in range(streams)], arguments.tokens)
                    for _ in range(ROUNDS)
                ]
                figures = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
                print(json.dumps({"streams": streams, "tokens": arguments.tokens} | figures), flush=True)


if __name__ == "__main__":
    main()
