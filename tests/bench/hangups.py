"""Clients that hang up in the middle of a stream, and what is left of them.

    python tests/bench/hangups.py [--count 1000] [--at-once 16]

Streamed chats, completions and answers that do not stream, through a real gateway before a real daemon
(SmolLM2), each cut off after a random while by closing its socket, half of them by a reset. Prints how long
the kernel kept a process after that, and what gateway, kernel and worker hold before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import daemon
import gateway
import peers
import psutil
from workloads import percentile


async def cut_off(model: str, dice: random.Random) -> None:
    """One request that is hung up on."""
    stream = dice.random() < 0.8
    body: dict[str, Any] = {"model": model, "max_tokens": 2000, "stream": stream, "n": dice.choice((1, 1, 3))}
    path = dice.choice(("/v1/chat/completions", "/v1/completions"))
    text = f"Tell me story number {dice.random()}."
    body |= {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.PORT)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + data)
    until = time.monotonic() + dice.uniform(0.0, 0.6)
    try:
        while (left := until - time.monotonic()) > 0:
            async with asyncio.timeout(left):
                if not (part := await reader.read(4096)):
                    break
                assert not part.startswith(b"HTTP") or part.startswith(b"HTTP/1.1 200"), part
    except TimeoutError:
        pass
    if dice.random() < 0.5:  # the kernel of the machine sends a reset
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


def held(*processes: psutil.Process) -> dict[str, Any]:
    return {
        "descriptors": [process.num_fds() for process in processes],
        "megabytes": [round(process.memory_info().rss / 1e6) for process in processes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--model", default=peers.MODEL)
    parser.add_argument("--home", type=Path, default=peers.CACHE / "gateway" / "real")
    arguments = parser.parse_args()
    from llmasos.syscalls import table
    from llmasos.userland.client import Client

    dice = random.Random(11)

    async def run(count: int) -> None:
        gate = asyncio.Semaphore(arguments.at_once)

        async def one() -> None:
            async with gate:
                await cut_off(arguments.model, random.Random(dice.random()))

        await asyncio.gather(*(one() for _ in range(count)))

    peers.pull(arguments.home, sys.executable)
    with (
        daemon.running(arguments.home) as supervisor,
        gateway.serving(arguments.home) as served,
        Client() as kernel,
    ):
        asyncio.run(run(50))  # loads the model; what grows once has grown
        time.sleep(2)
        parts = daemon.parts(supervisor)
        watched = (served, parts["kernel"], parts["worker cpu"])
        before = held(*watched)
        took = []
        for _ in range(arguments.count // 50):
            asyncio.run(run(50))
            begun = time.perf_counter()
            while kernel.ps():
                time.sleep(0.0005)
                assert time.perf_counter() - begun < 10, kernel.ps()
            took.append(time.perf_counter() - begun)
        time.sleep(2)
        left = kernel.ps()
        (device,) = kernel.call(table.Lsdev()).devices
        pools = [(pool.blocks_total, pool.blocks_free, pool.processes) for pool in device.pools]
        figures = {
            "hang_ups": arguments.count,
            "processes_left": len(left),
            "last_freed_ms": {
                "p50": round(1e3 * percentile(took, 0.5), 1),
                "most": round(1e3 * max(took), 1),
            },
            "pools": pools,
            "before": before,
            "after": held(*watched),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
