"""How well many contexts share a memory that holds a fraction of them.

    python tests/bench/overcommit.py --fraction 0.00415 [--streams 90] [--prompt 256] [--tokens 128]

All streams at once, first with room for all, then with a memory that holds
a fraction of what they need, swapping and (swap_*_bytes=0) recomputing. Prints a JSON line each: generated
tokens a second from the first request to the last answer, milliseconds of a later turn (16 tokens in, 8 out)
of a context whose KV had to give way meanwhile, the most preemptions of a process, and what was
copied.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import daemon
import peers


def measure(arguments: argparse.Namespace, fraction: float, *overrides: str) -> dict[str, Any]:
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t
    from llmasos.userland.client import Client

    chance = random.Random(5)
    prompts = [
        [chance.randrange(1000, 40000) for _ in range(arguments.prompt)] for _ in range(arguments.streams)
    ]
    with daemon.running(arguments.home, f"kv_fraction={fraction}", "draft_tokens=0", *overrides):
        client = Client()
        pids = [client.call(table.SpawnModel(peers.MODEL)).pid for _ in prompts]
        warm = table.Infer(model=peers.MODEL, tokens=t.pack_tokens(prompts[0][:64]), max_tokens=8)
        client.stream(warm).result()
        pool = next(p for p in client.call(table.Df()).pools if p.model.startswith(peers.MODEL))
        calls = [
            table.Infer(pid, tokens=t.pack_tokens(prompt), max_tokens=arguments.tokens)
            for pid, prompt in zip(pids, prompts, strict=True)
        ]
        begun = time.perf_counter()
        count = sum(len(event.tokens) for _, event in client.gather(calls))
        seconds = time.perf_counter() - begun
        begun_turns = time.perf_counter()
        turn = t.pack_tokens(prompts[0][:16])
        for _ in range(2):
            for pid in pids:
                client.stream(table.Infer(pid, tokens=turn, max_tokens=8)).result()
        turn_s = (time.perf_counter() - begun_turns) / (2 * len(pids))
        rows = client.ps()
        client.close()
    needed = arguments.streams * -(-(arguments.prompt + arguments.tokens) // t.BLOCK_TOKENS)
    return {
        "blocks": pool.blocks_total,
        "needed": needed,
        "overcommitted": round(needed / pool.blocks_total, 2),
        "block_bytes": pool.block_bytes,
        "tokens": count,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(count / seconds, 1),
        "preemptions": max(row.preemptions for row in rows),
        "turn_ms": round(1000 * turn_s, 1),
        "preemptions_all": sum(row.preemptions for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=peers.CACHE / "home")
    parser.add_argument("--streams", type=int, default=90)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--fraction", type=float, required=True, help="kv_fraction of the small memory")
    arguments = parser.parse_args()
    peers.pull(arguments.home, sys.executable)
    for name, fraction, overrides in (
        ("room for all", 0.4, []),
        ("swap", arguments.fraction, []),
        ("recompute", arguments.fraction, ["swap_host_bytes=0", "swap_disk_bytes=0"]),
    ):
        print(json.dumps({"memory": name} | measure(arguments, fraction, *overrides)), flush=True)


if __name__ == "__main__":
    main()
