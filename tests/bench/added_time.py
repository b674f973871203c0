"""What kernel, sockets and client add to a token: from when the kernel hears that a step landed to when a
client has the token in its hands.

    python tests/bench/added_time.py [--streams 64] [--tokens 400]

A real daemon with the null driver, whose steps sleep 15 ms, and one client with all streams. Steps' ends
come from the flight recorder; where its clock stands is asked as clocks on a network are (/proc/uptime, the
middle of the quickest answer). Prints a JSON line, times in microseconds.
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


def kernel_born(client: Any) -> float:
    """When the kernel's clock began, by ours."""
    answers = []
    for _ in range(CALLS):
        asked = time.monotonic()
        uptime = float(client.read_file("/proc/uptime"))
        now = time.monotonic()
        answers.append((now - asked, (asked + now) / 2 - uptime))
    return min(answers)[1]


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
            client.stream(
                table.Infer(model=simulation.MODEL, tokens=t.pack_tokens([1]), max_tokens=1)
            ).result()
            born = kernel_born(client)
            calls = [
                table.Infer(
                    model=simulation.MODEL, tokens=t.pack_tokens([n + 1]), max_tokens=arguments.tokens
                )
                for n in range(arguments.streams)
            ]
            came = []
            for _, event in client.gather(calls):
                came += [time.monotonic()] * len(event.tokens)
            flight = [json.loads(line) for line in client.read_file("/proc/flight").splitlines()]
    landed = sorted(
        born + step["landed"] for step in flight if step["rows"] == arguments.streams and step["landed"]
    )
    added = [
        1e6 * (at - landed[place - 1])
        for at in came
        if (place := bisect.bisect(landed, at)) and place < len(landed)
    ]
    figures = {name: round(percentile(added, share)) for name, share in (("p50", 0.5), ("p99", 0.99))}
    print(json.dumps({"streams": arguments.streams, "tokens": len(added), "added_us": figures}))


if __name__ == "__main__":
    main()
