"""What the console costs: the page itself, and an open one while a machine works.

    python tests/bench/console.py [--streams 16] [--seconds 15]

`page`: bytes as they are and as they travel, requests until the first picture, and how long that took.
`busy`: streams of the null driver (30 ms steps) run without HTTP, so all that the gateway does is for the
console: its processor time a second with no console open and with one, in turns, the bytes of the feed, and
what the page does with it in headless Chromium (its main thread, of that style and layout; changed nodes).
`idle`: the same with nothing running. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import daemon
import psutil
from gateway import PORT, STEP_S, serving

URL = f"http://127.0.0.1:{PORT}"
BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")


@contextmanager
def streams(count: int) -> Iterator[None]:
    """So many infers run meanwhile, as the tenant that HTTP callers without a key are."""
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t
    from llmasos.userland.client import Client

    over = threading.Event()

    def one(client: Client, number: int) -> None:
        while not over.is_set():
            tokens = t.pack_tokens([number] * 32)
            with client.stream(table.Infer(model="clock:latest", tokens=tokens, max_tokens=2000)) as stream:
                for _ in stream:
                    if over.is_set():
                        break

    with Client(label="http") as client:
        threads = [threading.Thread(target=one, args=(client, number)) for number in range(count)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        yield
        over.set()
        for thread in threads:
            thread.join()


def spent(process: psutil.Process, seconds: float) -> float:
    """Milliseconds of processor time that `process` takes a second."""
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return 1000 * (sum(process.cpu_times()[:2]) - before) / seconds


def watched(context: Any, gateway: psutil.Process, seconds: float) -> dict[str, float]:
    """An open console for so long."""
    page = context.new_page()
    page.goto(f"{URL}/console")
    page.wait_for_selector("#link.there")
    page.evaluate(
        """() => {
          window.changes = 0;
          new MutationObserver((found) => (window.changes += found.length)).observe(document.body,
            { subtree: true, childList: true, attributes: true, characterData: true });
        }"""
    )
    devtools = context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def metrics() -> dict[str, float]:
        return {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}

    before, changes = metrics(), page.evaluate("changes")
    cost = spent(gateway, seconds)
    after, changed = metrics(), page.evaluate("changes") - changes
    page.close()
    return {
        "gateway_ms": cost,
        "page_ms": 1000 * (after["TaskDuration"] - before["TaskDuration"]) / seconds,
        "style_layout_ms": 1000
        * sum(after[name] - before[name] for name in ("LayoutDuration", "RecalcStyleDuration"))
        / seconds,
        "changes": changed / seconds,
    }


def feed_bytes(seconds: float) -> float:
    """Bytes a second after the first event."""
    import httpx

    with httpx.stream("GET", f"{URL}/v1/console/events", timeout=30) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        begun, size = time.monotonic(), 0
        for chunk in chunks:
            size += len(chunk)
            if time.monotonic() - begun > seconds:
                return size / (time.monotonic() - begun)
    return 0.0


def first_picture(context: Any) -> dict[str, float]:
    sizes: list[int] = []
    page = context.new_page()
    page.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
    begun = time.monotonic()
    page.goto(f"{URL}/console")
    page.wait_for_selector("#link.there")
    took = time.monotonic() - begun
    page.close()
    return {"requests": len(sizes) + 1, "travelled_bytes": sum(sizes), "ms": round(1000 * took)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, default=Path("~/.cache/llmasos-bench/console").expanduser())
    arguments = parser.parse_args()

    from llmasos.kernel.modelfs.store import ModelFS
    from llmasos.userland.gateway.console.page import FILES
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.llsh.conftest import add_model

    arguments.home.mkdir(parents=True, exist_ok=True)
    ModelFS(arguments.home)
    add_model(arguments.home, "clock", max_position_embeddings=4096, llmasos_null_step_seconds=STEP_S)
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    settings = ('devices=["null"]', "draft_tokens=0")
    with (
        daemon.running(arguments.home, *settings),
        serving(arguments.home) as gateway,
        sync_playwright() as playwright,
    ):
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=sandbox)
        context = browser.new_context()
        weight = {
            "files": len(FILES),
            "bytes": sum(len(file.plain) for file in FILES.values()),
            "packed_bytes": sum(len(file.packed) for file in FILES.values()),
        }
        print(
            json.dumps({"page": {**weight, "cold": first_picture(context), "warm": first_picture(context)}})
        )

        def measured() -> dict[str, Any]:
            rounds = []
            for _ in range(arguments.rounds):
                closed = spent(gateway, arguments.seconds)
                rounds.append({"gateway_closed_ms": closed, **watched(context, gateway, arguments.seconds)})
            found = {name: round(median(one[name] for one in rounds), 2) for name in rounds[0]}
            return {**found, "feed_bytes": round(feed_bytes(arguments.seconds / 2))}

        print(json.dumps({"idle, a second": measured()}), flush=True)
        with streams(arguments.streams):
            print(json.dumps({f"{arguments.streams} streams, a second": measured()}), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
