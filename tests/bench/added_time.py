"""What kernel, sockets and client add to a token: from when the kernel hears that a step landed to when a
client has the token in its hands.

    python tests/bench/added_time.py [--streams 64] [--tokens 400]

A real daemon with the null driver, whose steps sleep 15 ms, and one client with all streams. Steps' ends
come from the flight recorder. Its clock began with the kernel: when, is known from calls, which cannot have
led to a step before they were sent; so the times are too long by the way of the quickest of these calls.
Prints a JSON line, times in microseconds.
"""

from __future__ import annotations

import argparse
import bisect
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import daemon
import simulation
from workloads import percentile

STEP_S = 0.015
CALLS = 60


def steps(client: Any) -> list[dict[str, Any]]:
    """The steps that are over, oldest first."""
    told = [json.loads(line) for line in client.read_file("/proc/flight").splitlines()]
    return [step for step in told if step["landed"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    from llmasos.kernel.modelfs.store import ModelFS
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t
    from llmasos.userland.client import Client

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        simulation.add_model(ModelFS(home), 4096, llmasos_null_step_seconds=STEP_S)
        with daemon.running(home, 'devices=["null"]', "draft_tokens=0"), Client() as client:
            sent = []
            for _ in range(CALLS):
                sent.append(time.monotonic())
                call = table.Infer(model=simulation.MODEL, tokens=t.pack_tokens([1]), max_tokens=1)
                client.stream(call).result()
            flight = steps(client)[-CALLS:]
            born = max(at - step["time"] for at, step in zip(sent, flight, strict=True))
            calls = [
                table.Infer(
                    model=simulation.MODEL, tokens=t.pack_tokens([n + 1]), max_tokens=arguments.tokens
                )
                for n in range(arguments.streams)
            ]
            came = []
            for _, event in client.gather(calls):
                came += [time.monotonic()] * len(event.tokens)
            flight = [step for step in steps(client) if step["ticket"] > flight[-1]["ticket"]]
    landed = sorted(born + step["landed"] for step in flight if step["rows"] == arguments.streams)
    added = [
        1e6 * (at - landed[place - 1])
        for at in came
        if (place := bisect.bisect(landed, at)) and place < len(landed)
    ]
    figures = {name: round(percentile(added, share)) for name, share in (("p50", 0.5), ("p99", 0.99))}
    print(json.dumps({"streams": arguments.streams, "tokens": len(added), "added_us": figures}))


if __name__ == "__main__":
    main()
