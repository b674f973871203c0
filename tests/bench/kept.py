"""What it costs to keep what is answered, and to have it done while nobody waits: in turns, on one daemon.

    python tests/bench/kept.py [--rounds 5] [--lines 64] [--tokens 24] [--model smollm2]

`responses`: milliseconds of a response of one token that is stored, of one that is not, of a chat. `batch`:
seconds of a batch of that many chats, from its creation to its output file, and of the same chats by sixteen
clients that wait. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import daemon
import gateway
import peers

AT_ONCE = 16
ASKED = 20


def chat(model: str, number: int, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": gateway.PROMPT.format(number)}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}


async def one_by_one(ask: Callable[[int], Awaitable[Any]]) -> float:
    """Milliseconds of each."""
    begun = time.perf_counter()
    for number in range(ASKED):
        await ask(number)
    return 1000 * (time.perf_counter() - begun) / ASKED


async def as_batch(ai: Any, bodies: list[dict[str, Any]]) -> float:
    lines = [
        json.dumps({"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body})
        for n, body in enumerate(bodies)
    ]
    file = await ai.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    begun = time.perf_counter()
    batch = await ai.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status != "completed":
        assert batch.status in ("validating", "in_progress", "finalizing"), batch
        await asyncio.sleep(0.05)
        batch = await ai.batches.retrieve(batch.id)
    assert batch.request_counts.completed == len(bodies)
    return time.perf_counter() - begun


async def as_clients(ai: Any, bodies: list[dict[str, Any]]) -> float:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(body: dict[str, Any]) -> None:
        async with gate:
            await ai.chat.completions.create(**body)

    begun = time.perf_counter()
    await asyncio.gather(*map(one, bodies))
    return time.perf_counter() - begun


async def measure(arguments: argparse.Namespace) -> None:
    import openai

    model = arguments.model
    short = {"model": model, "max_output_tokens": 1, "temperature": 0}
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.PORT}/v1", api_key="none") as ai:
        told: dict[str, list[float]] = {
            name: [] for name in ("stored", "not_stored", "chat", "batch", "clients")
        }
        for turn in range(arguments.rounds + 1):
            numbers = range(2 * arguments.lines * turn, 2 * arguments.lines * (turn + 1))
            bodies = [chat(model, number, arguments.tokens) for number in numbers]  # nobody's are cached
            found = {
                "stored": await one_by_one(lambda n: ai.responses.create(**short, input=str(n))),
                "not_stored": await one_by_one(
                    lambda n: ai.responses.create(**short, input=str(n), store=False)
                ),
                "chat": await one_by_one(lambda n: ai.chat.completions.create(**chat(model, n, 1))),
                "batch": await as_batch(ai, bodies[::2]),
                "clients": await as_clients(ai, bodies[1::2]),
            }
            if turn:  # the first one warms up
                for name, value in found.items():
                    told[name].append(value)
    print(
        json.dumps(
            {
                "responses_ms": {
                    name: round(median(told[name]), 2) for name in ("stored", "not_stored", "chat")
                }
            }
        )
    )
    ratios = [batch / clients for batch, clients in zip(told["batch"], told["clients"], strict=True)]
    print(
        json.dumps(
            {
                "batch_s": round(median(told["batch"]), 2),
                "clients_s": round(median(told["clients"]), 2),
                "ratio": round(median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--model", default=peers.MODEL)
    parser.add_argument("--home", type=Path, default=peers.CACHE / "gateway" / "real")
    arguments = parser.parse_args()
    peers.pull(arguments.home, sys.executable)
    with daemon.running(arguments.home), gateway.serving(arguments.home):
        asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
