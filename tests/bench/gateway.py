"""What HTTP costs: the gateway beside the Python client, on the same daemon, in turns.

    python tests/bench/gateway.py [--streams 16] [--tokens 256] [--rounds 5] [--model smollm2]

`throughput`: streamed chats through `llsh serve`, read by a lean client over raw sockets in a process of its
own, and the same chats through LLM.astream; tokens a second, the ratio of each round, and processor time a
token of gateway and clients. `added`: the null driver's steps (30 ms) are the clock: when a streamed token is
in an HTTP client's hands, after the first Python client had one of that step. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import daemon
import psutil
from workloads import percentile

PORT = 8765
STEP_S = 0.03
PROMPT = "Tell me a long story about a lighthouse keeper, number {}."


@contextmanager
def serving(home: Path) -> Iterator[psutil.Process]:
    """A gateway before the daemon of `home`."""
    import httpx

    command = [sys.executable, "-m", "llmasos.userland.gateway.main", "--port", str(PORT)]
    environment = {**os.environ, "LLMASOS_HOME": str(home)}
    with (home / "gateway.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/livez").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.05)
                if process.poll() is not None:
                    raise RuntimeError(f"the gateway ended, see {home / 'gateway.log'}") from None
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


async def http_stream(model: str, number: int, tokens: int) -> list[float]:
    """One chat over a raw socket; returns when each event with text came."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT.format(number)}],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + data)
    came = []
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"content":"' in line and b'"role"' not in line:
            came.append(time.monotonic())
    writer.close()
    return came


async def python_stream(llm: Any, number: int, tokens: int) -> list[float]:
    from llmasos.userland.chat import encode_chat

    start = encode_chat(llm.tokenizer, PROMPT.format(number), model=llm.model)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    came = []
    async for _ in llm._astream(start, options):
        came.append(time.monotonic())
    return came


def client(kind: str, model: str, streams: int, tokens: int) -> None:
    """Runs all streams once, after one to get warm, and prints how long that took."""
    if kind == "python":
        from llmasos.userland.client import Client
        from llmasos.userland.llm import LLM

        llm = LLM.from_pretrained(model, client=Client())
        one = lambda number, n: python_stream(llm, number, n)  # noqa: E731
    else:
        one = lambda number, n: http_stream(model, number, n)  # noqa: E731

    async def run() -> tuple[float, float]:
        await one(0, 8)
        begun, spent = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one(number, tokens) for number in range(streams)))
        return time.perf_counter() - begun, time.process_time() - spent

    took, spent = asyncio.run(run())
    print(json.dumps({"seconds": took, "processor": spent}))


def throughput(home: Path, model: str, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"python": [], "http": []}
    spent: dict[str, list[float]] = {"python": [], "http": [], "gateway": []}
    with daemon.running(home), serving(home) as gateway:
        for number in range(rounds):
            for kind in ("python", "http") if number % 2 else ("http", "python"):
                words = [sys.executable, __file__, "--client", kind, "--model", model]
                words += ["--streams", str(streams), "--tokens", str(tokens)]
                before = sum(gateway.cpu_times()[:2])
                out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                after = sum(gateway.cpu_times()[:2])
                answer = json.loads(out)
                found[kind].append(streams * tokens / answer["seconds"])
                spent[kind].append(1e6 * answer["processor"] / streams / tokens)
                if kind == "http":
                    spent["gateway"].append(1e6 * (after - before) / streams / tokens)
    ratios = [http / python for http, python in zip(found["http"], found["python"], strict=True)]
    return {
        "streams": streams,
        "tokens_per_s": {kind: round(median(values)) for kind, values in found.items()},
        "http_of_python": [round(ratio, 3) for ratio in sorted(ratios)],
        "median": round(median(ratios), 3),
        "processor_us_a_token": {kind: round(median(values)) for kind, values in spent.items()},
    }


def added(home: Path, streams: int, tokens: int) -> dict[str, Any]:
    from llmasos.kernel.modelfs.store import ModelFS
    from llmasos.userland.client import Client
    from llmasos.userland.llm import LLM

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.llsh.conftest import add_model

    ModelFS(home)
    add_model(home, "clock", max_position_embeddings=4096, llmasos_null_step_seconds=STEP_S)
    with daemon.running(home, 'devices=["null"]', "draft_tokens=0"), serving(home), Client() as kernel:
        llm = LLM.from_pretrained("clock", client=kernel)

        async def run() -> list[list[float]]:
            await asyncio.gather(http_stream("clock", 0, 2), python_stream(llm, 0, 2))
            work = [http_stream("clock", number, tokens) for number in range(streams)]
            return await asyncio.gather(python_stream(llm, streams, tokens), *work)

        clock, *came = asyncio.run(run())
    times = [
        1e3 * (at - clock[place - 1])
        for one in came
        for at in one[5:-5]
        if 0 < (place := bisect.bisect(clock, at)) < len(clock)
    ]
    return {
        "streams": streams,
        "tokens": len(times),
        "added_ms": {"p50": round(percentile(times, 0.5), 3), "p99": round(percentile(times, 0.99), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("~/.cache/llmasos-bench/gateway").expanduser())
    parser.add_argument("--client", choices=("python", "http"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        client(arguments.client, arguments.model, arguments.streams, arguments.tokens)
        return
    null, real = arguments.home / "null", arguments.home / "real"
    for folder in (null, real):
        folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"added": added(null, arguments.streams, arguments.tokens)}), flush=True)
    with daemon.running(real):
        subprocess.run(
            [sys.executable, "-m", "llmasos.userland.llsh.main", "pull", arguments.model], check=True
        )
    figures = throughput(real, arguments.model, arguments.streams, arguments.tokens, arguments.rounds)
    print(json.dumps({"throughput": figures}), flush=True)


if __name__ == "__main__":
    main()
