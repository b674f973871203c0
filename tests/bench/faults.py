"""kill -9 at random moments under load: is anything that was acknowledged lost, done twice or left over?

    python tests/bench/faults.py [--kernel 30] [--worker 10] [--both 5] [--clients 4] [--model smollm2]

Clients are processes of their own; each works through the same script of deeds again and again (one-shot
infers, greedy and with noise; processes that are spoken to, forked, cut, stopped, ended; names of models) and
writes down all that it was told. Meanwhile kernel, worker or both are killed. Then everything is compared
with what the same script gave before the first kill. One JSON line with the figures; exit code 1 if one of
them is not as it must be."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daemon
import psutil

PROMPTS = 6
PROMPT_TOKENS, NEW = 24, 40
KERNEL_READY_S = 2.0


def prompt(number: int) -> list[int]:
    dice = random.Random(number)
    return [dice.randrange(300, 20_000) for _ in range(PROMPT_TOKENS)]


def deeds(model: str, client: Any, lap: int, whose: str) -> Iterator[tuple[str, Any]]:
    """What a client does in a lap, as (name, what it was told), the same for equal laps modulo PROMPTS."""
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t

    number = lap % PROMPTS

    def infer(tokens: list[int], new: int, temperature: float, **to: Any) -> list[Any]:
        call = table.Infer(
            tokens=t.pack_tokens(tokens),
            max_tokens=new,
            sampling=t.Sampling(temperature=temperature, seed=number, presence_penalty=0.5),
            **to,
        )
        with client.stream(call) as stream:
            made = [token for event in stream for token in event.tokens]
        reply = stream.reply
        return [made, reply.generated_tokens, reply.prompt_tokens, reply.context, str(reply.finish)]

    def context(pid: int) -> list[int]:
        return t.unpack_tokens(client.read_file(f"/proc/{pid}/tokens"))

    yield "greedy", infer(prompt(number), NEW, 0.0, model=model)
    yield "noisy", infer(prompt(number), NEW, 0.8, model=model)
    pid = client.call(table.SpawnModel(model=model, label=whose)).pid
    for turn in range(3):
        yield f"turn {turn}", infer(prompt(number + turn)[:8], NEW // 2, 0.8 * (turn % 2), pid=pid)
    (child,) = client.call(table.Fork(pid)).pids
    client.call(table.Truncate(child, PROMPT_TOKENS))
    client.kill(child, "STOP")
    yield "contexts", [context(pid), context(child)]
    client.kill(child, "CONT")
    yield "child", infer([7], NEW // 4, 0.0, pid=child, exit=True)
    ended = client.wait(child)
    yield "end", [ended.exit_code, ended.reason, ended.generated_tokens]
    client.kill(pid)
    yield "killed", client.wait(pid).exit_code
    name = f"{whose}-{lap}"
    client.call(table.Link(model, name))
    yield "file", client.call(table.Stat(f"/models/{name}")).size > 0
    client.call(table.Unlink(f"/models/{name}"))
    yield "left", [row.pid for row in client.ps() if row.name == whose]


def work(model: str, out: Path, laps: int) -> None:
    """A client process: laps until the file `stop` is there, all of them written to `out`."""
    from llmasos.syscalls import errors
    from llmasos.userland.client import Client

    with Client(timeout_s=120) as client, out.open("w") as file:
        lap = 0
        while lap < laps or (not laps and not (out.parent / "stop").exists()):
            told: dict[str, Any] = {}
            try:
                told.update(deeds(model, client, lap, out.stem))
            except errors.LLMasOSError as problem:
                after = list(told)[-1] if told else "the start"
                told["error"] = f"{type(problem).__name__} after {after}: {problem.message.split()[0]}"
            file.write(json.dumps([lap % PROMPTS, told]) + "\n")
            file.flush()
            lap += 1


def client_process(model: str, out: Path, laps: int = 0) -> subprocess.Popen[bytes]:
    words = ["--client", str(out), "--laps", str(laps), "--model", model]
    return subprocess.Popen([sys.executable, __file__, *words])


def laps_in(out: Path) -> list[tuple[int, dict[str, Any]]]:
    return [tuple(json.loads(line)) for line in out.read_text().splitlines()]


def differences(reference: dict[int, dict[str, Any]], number: int, told: dict[str, Any]) -> list[str]:
    if "error" in told:
        return [told["error"]]
    wrong = []
    for name, value in reference[number].items():
        if told[name] == value:
            continue
        kind = "differs"
        if isinstance(value, list) and value and isinstance(value[0], list):
            kind = {1: "duplicated", -1: "lost"}.get(
                (len(told[name][0]) > len(value[0])) - (len(told[name][0]) < len(value[0])), "differs"
            )
        wrong.append(f"{name}: {kind}")
    return wrong


def loads(client: Any) -> int:
    from llmasos.syscalls import table

    return sum("loading model" in line.text for line in client.stream(table.Dmesg()))


def torment(supervisor: psutil.Process, kills: list[str], dice: random.Random) -> dict[str, Any]:
    """Kills what `kills` says, one after another. Returns what it cost."""
    from llmasos.syscalls import table
    from llmasos.userland.client import Client

    ready, reloads = [], 0
    for what in kills:
        time.sleep(dice.uniform(0.2, 2.0))
        with Client(timeout_s=60) as client:
            (device,) = client.call(table.Lsdev()).devices
        resident = any(pool.blocks_total for pool in device.pools)
        parts = daemon.parts(supervisor)
        victims = [p for name, p in parts.items() if what == "both" or name.startswith(what)]
        for victim in victims:
            if victim != supervisor:
                victim.kill()
        begun = time.monotonic()
        with Client(timeout_s=60) as client:
            if what == "worker":
                continue
            client.call(table.Whoami())
            ready.append(time.monotonic() - begun)
            if what == "kernel":
                while client.call(table.Lsdev()).devices[0].state in ("starting", "down"):
                    time.sleep(0.01)
                reloads += loads(client) if resident else 0
    return {
        "ready_s_median": round(statistics.median(ready), 3) if ready else 0.0,
        "ready_s_p95": round(sorted(ready)[len(ready) * 95 // 100], 3) if ready else 0.0,
        "ready_s_max": round(max(ready), 3) if ready else 0.0,
        "reloads": reloads,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", type=int, default=30)
    parser.add_argument("--worker", type=int, default=10)
    parser.add_argument("--both", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--source", default="", help="where to pull the model from, as `llsh pull --source`")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--laps", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        work(arguments.model, arguments.client, arguments.laps)
        return 0
    with tempfile.TemporaryDirectory(prefix="lf", dir="/tmp") as folder:
        figures = measure(arguments, Path(folder))
    print(json.dumps(figures))
    bad = ("errors", "lost", "duplicated", "different", "processes_left", "orphans", "reloads")
    return 1 if any(figures[name] for name in bad) or figures["ready_s_max"] > KERNEL_READY_S else 0


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    importer = [sys.executable, "-m", "llmasos.kernel.modelfs.importer", "--home", str(home)]
    importer += ["--model", arguments.model]
    importer += ["--source", arguments.source] if arguments.source else []
    subprocess.run(importer, check=True, stdout=subprocess.DEVNULL)
    dice = random.Random(arguments.seed)
    kinds = {"kernel": arguments.kernel, "worker": arguments.worker, "both": arguments.both}
    kills = [kind for kind, count in kinds.items() for _ in range(count)]
    dice.shuffle(kills)
    with daemon.running(home, "crash_limit=1000000") as supervisor:
        from llmasos.userland.client import Client

        client_process(arguments.model, home / "reference.out", PROMPTS).wait()
        reference = dict(laps_in(home / "reference.out"))
        outs = [home / f"client{n}.out" for n in range(arguments.clients)]
        clients = [client_process(arguments.model, out) for out in outs]
        time.sleep(1)
        begun = time.monotonic()
        figures = torment(supervisor, kills, dice)
        seconds = time.monotonic() - begun
        (home / "stop").touch()
        failed = sum(client.wait(300) != 0 for client in clients)
        with Client(timeout_s=60) as client:
            left = len(client.ps())
        known = {supervisor.pid, *(p.pid for p in daemon.parts(supervisor).values())}
        ours = [p for p in psutil.process_iter() if str(home) in " ".join(_words(p))]
        orphans = [p for p in ours if p.pid not in known and p.pid != psutil.Process().pid]
    laps = [lap for out in outs for lap in laps_in(out)]
    wrong = [text for number, told in laps for text in differences(reference, number, told)]
    for text in sorted(set(wrong)):
        print(f"{wrong.count(text)} x {text}", file=sys.stderr)
    tokens = sum(len(v[0]) for _, told in laps for v in told.values() if isinstance(v, list) and len(v) == 5)
    return {
        "kills": kinds,
        "seconds": round(seconds),
        "laps": len(laps),
        "tokens": tokens,
        "errors": failed + sum(": " in text and text[0].isupper() for text in wrong),
        "lost": sum(text.endswith(": lost") for text in wrong),
        "duplicated": sum(text.endswith(": duplicated") for text in wrong),
        "different": sum(text.endswith(": differs") for text in wrong),
        "processes_left": left,
        "orphans": len(orphans),
        **figures,
    }


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    sys.exit(main())
