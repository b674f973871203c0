"""What LLMasOS is, in six short parts: `make demo`, or `python examples/demo.py`.

Boots the user's daemon unless it runs already, and stops it again only if it was started here. The model is
fetched once; a second run needs no network.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmasos import LLM, Client, errors
from llmasos.syscalls import table
from llmasos.syscalls.address import socket_address
from llmasos.userland.daemon import ensure_daemon, is_listening
from llmasos.userland.models import ensure_model, has_model, reference
from llmasos.userland.text_stream import TextStream

MODEL = "smollm2"
TENANTS = {"alice": "interactive", "bob": "batch", "carol": "idle"}
STORY_TOKENS = 800
STORY = "Write a long story about a lighthouse keeper who finds a message in a bottle."
PATIENCE_S = 120.0


def main() -> int:
    ours = not is_listening(socket_address())
    stopped = False
    try:
        with ensure_daemon() as client:
            boot(client, ours)
            fetch(client)
            seed_program(client)
            conversation(client)
            tenants(client)
            forks(client)
            goodbye(client, ours)
            stopped = True
    except errors.LLMasOSError as problem:
        print(f"demo: {problem.message}", file=sys.stderr)
        print(f"hint: {problem.hint or 'see `llsh dmesg`'}", file=sys.stderr)
        return 1
    finally:
        if ours and not stopped and is_listening(socket_address()):
            llsh("shutdown")
    return 0


def boot(client: Client, ours: bool) -> None:
    heading(
        "1. A kernel for language models",
        "$ llmasosd    (`llsh run`, `llsh chat` and LLM start it by themselves)",
    )
    print("It was started just now." if ours else "It was running already, and will stay.")
    until = time.monotonic() + PATIENCE_S
    while not any(device.state == "ready" for device in client.call(table.Lsdev()).devices):
        if time.monotonic() > until:
            raise errors.DeviceUnavailable("no device is ready", hint="`llsh dmesg` tells why")
        time.sleep(0.1)
    llsh("lsdev")


def fetch(client: Client) -> None:
    heading("2. Models are files: content-addressed, verified, fetched once", f"$ llsh pull {MODEL}")
    if not has_model(client, reference(MODEL)):
        print("About 100 MB, once.")
    ensure_model(client, MODEL)
    llsh("list")


def seed_program(client: Client) -> None:
    heading(
        "3. One call from Python, with Hugging Face's words: here beam search",
        f'>>> LLM.from_pretrained("{MODEL}").generate(\n'
        '...     prompt="The world is a beautiful place.", max_length=100, num_beams=5)',
    )
    llm = LLM.from_pretrained(MODEL, client=client)
    text = llm.generate(prompt="The world is a beautiful place.", max_length=100, num_beams=5)
    if len(text) <= len("The world is a beautiful place."):
        raise errors.DeviceFault("the model had nothing to add")
    print(text)


def conversation(client: Client) -> None:
    question = "What is the capital of France, and what is it famous for?"
    heading("4. An answer as it comes", f"$ llsh run {MODEL} {shlex.quote(question)}")
    with LLM.from_pretrained(MODEL, client=client).chat(question, stream=True, max_new_tokens=80) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print(f"\n\n[{pieces.reply.generated_tokens} tokens, finish: {pieces.reply.finish}]")


def tenants(client: Client) -> None:
    heading(
        "5. Three tenants at once, each with a priority (here there is room for all three in every step)",
        "".join(
            f'>>> LLM.from_pretrained("{MODEL}", label="{name}", sched_class="{sched_class}").chat(…)\n'
            for name, sched_class in TENANTS.items()
        ).rstrip(),
    )
    running = {name: Tenant(name, sched_class) for name, sched_class in TENANTS.items()}
    try:
        wait_until(lambda: all(tenant.pieces or tenant.error for tenant in running.values()))
        time.sleep(0.3)
        print("While they write:\n")
        llsh("ps")
        print("\nCarol's process is killed; the others do not notice.\n")
        llsh("kill", str(running["carol"].pid))
        for tenant in running.values():
            tenant.thread.join(PATIENCE_S)
    finally:
        for tenant in running.values():
            tenant.close()
    for tenant in running.values():
        if tenant.error:
            raise tenant.error
        print(
            f"{tenant.name:<6} {TENANTS[tenant.name]:<12} {tenant.tokens:>3} tokens, finish: {tenant.finish}"
        )
    if running["carol"].finish != "killed":
        raise errors.KernelFault("carol's stream did not end with the kill")


class Tenant:
    """Somebody with a connection of their own, who lets the model write in the background."""

    def __init__(self, name: str, sched_class: str) -> None:
        self.name = name
        self.pieces = 0
        self.tokens = 0
        self.finish = ""
        self.error: errors.LLMasOSError | None = None
        self.client = Client(label=name)
        self.process = LLM.from_pretrained(MODEL, client=self.client, sched_class=sched_class).process(
            label="story"
        )
        self.pid = self.process.pid
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        try:
            # So long that there is something to watch and to kill on a quick machine too.
            length = {"min_new_tokens": STORY_TOKENS, "max_new_tokens": STORY_TOKENS}
            stream: TextStream = self.process.chat(STORY, **length, do_sample=True, seed=1)
            with stream:
                for _ in stream:
                    self.pieces += 1
            self.tokens, self.finish = stream.reply.generated_tokens, str(stream.reply.finish)
        except errors.LLMasOSError as problem:
            self.error = problem

    def close(self) -> None:
        self.client.close()


def forks(client: Client) -> None:
    heading(
        "6. Processes fork: one context, three ways to go on, its memory shared",
        '>>> LLM.from_pretrained("smollm2").process("The old sailor …").fork(3)',
    )
    llm = LLM.from_pretrained(MODEL, client=client)
    with llm.process("The old sailor opened the door, looked at the sea and said:") as parent:
        for seed, child in enumerate(parent.fork(3), start=1):
            with child:
                text = child.generate("", max_new_tokens=16, do_sample=True, temperature=0.8, seed=seed)
                print(f"pid {child.pid}: … {' '.join(text.text.split())}")


def goodbye(client: Client, ours: bool) -> None:
    heading("That was it", "$ llsh shutdown" if ours else "")
    if ours:
        llsh("shutdown")
    shell = "llsh" if shutil.which("llsh") else os.path.relpath(Path(sys.executable).parent / "llsh")
    print(f"Go on with `{shell} chat {MODEL}`, `{shell}` or `{shell} help`; examples/ has more.")


def heading(title: str, command: str) -> None:
    """What comes now, and the line that does it."""
    bold, dim, off = ("\033[1m", "\033[2m", "\033[0m") if colours() else ("", "", "")
    print(f"\n{bold}{title}{off}")
    if command:
        print(f"{dim}{command}{off}\n", flush=True)


def colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def llsh(*words: str) -> None:
    """Runs a command of the shell, as a user would. Its failure is the demo's."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "llmasos.userland.llsh.main", *words], check=False)
    if done.returncode:
        raise errors.LLMasOSError(f"`llsh {shlex.join(words)}` failed with exit code {done.returncode}")


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise errors.TimedOut(f"nothing came in {PATIENCE_S:g} s", hint="`llsh dmesg` tells why")
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
