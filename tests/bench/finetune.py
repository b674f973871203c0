"""Training in a daemon: does it survive, and does anybody notice it?

    python tests/bench/finetune.py [kills] [beside] [--kills 50] [--callers 200] [--model smollm2]

  kills    the same LoRA run first undisturbed, then again and again while kernel, worker and trainer are
           killed (SIGKILL) at random; every loss of every step has to be the undisturbed run's
  beside   times to the first token of a caller of class interactive, 24 tokens in and 8 out, alone and while
           a LoRA run of class idle goes on; and the run's pace meanwhile
A JSON line each; exit code 1 if a curve differs or a run fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import daemon
import neighbours
import psutil

STEPS, SAVE_STEPS = 40, 4
ROUNDS = 3


def write_data(client: Any) -> None:
    """A data set of questions and answers that are made up."""
    from llmasos.syscalls import table

    dice = random.Random(5)
    rows = [
        {"prompt": f"What is the code of room {n}?", "completion": f" It is {dice.randrange(10**6)}."}
        for n in range(400)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    client.call(table.Write("/datasets/codes", 0, data, True))


def start(client: Any, model: str, target: str, steps: int, kind: str, length: int) -> int:
    """Returns the pid of a LoRA run."""
    from llmasos.syscalls import table, training
    from llmasos.syscalls import types as t

    recipe = training.Recipe(
        max_steps=steps,
        max_length=length,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        save_steps=SAVE_STEPS,
        lora=training.Lora(lora_dropout=0.1),
    )
    call = table.Train(model, "codes", target, recipe, t.SchedClass(kind), detached=True)
    return int(client.call(call).pid)


def curve(client: Any, pid: int) -> dict[int, float]:
    """Losses by step, as they are on the disk."""
    lines = client.read_file(f"/proc/{pid}/metrics").splitlines()
    events = [json.loads(line) for line in lines]
    return {event["step"]: event["loss"] for event in events if event["phase"] == "train"}


def last_step(client: Any, pid: int) -> int:
    from llmasos.syscalls import table

    return int(client.call(table.StatProcess(pid)).computed)


def victims(supervisor: psutil.Process) -> dict[str, list[psutil.Process]]:
    parts = daemon.parts(supervisor)
    found = {"kernel": [parts["kernel"]], "worker": [p for n, p in parts.items() if n.startswith("worker")]}
    found["trainer"] = [
        p for p in parts["kernel"].children(recursive=True) if "llmasos.drivers.trainer" in p.cmdline()
    ]
    return found


def kills(supervisor: psutil.Process, model: str, count: int, seed: int) -> bool:
    from llmasos.userland.client import Client

    dice, done, runs = random.Random(seed), 0, 0
    killed = {"kernel": 0, "worker": 0, "trainer": 0}
    lost, different, failed = [], 0, 0
    with Client(timeout_s=120) as client:
        write_data(client)
        pid = start(client, model, "reference", STEPS, "batch", 128)
        begun = time.monotonic()
        while not _ended(client, pid):
            time.sleep(0.1)
        undisturbed = time.monotonic() - begun
        reference = curve(client, pid)
        assert len(reference) == STEPS, f"the undisturbed run made {len(reference)} steps"
        client.wait(pid)
    begun = time.monotonic()
    while done < count:
        runs += 1
        with Client(timeout_s=120) as client:
            pid = start(client, model, f"run{runs}", STEPS, "batch", 128)
        while True:
            time.sleep(dice.uniform(1, 9))
            with Client(timeout_s=120) as client:
                if _ended(client, pid):
                    break
                before = last_step(client, pid)
            if done >= count:
                continue
            what = dice.choice(list(killed))
            some = victims(supervisor)[what]
            if not some:
                continue
            dice.choice(some).kill()
            done += 1
            killed[what] += 1
            if what != "worker":
                lost.append(before - _goes_on_at(pid, before))
        with Client(timeout_s=120) as client:
            different += curve(client, pid) != reference
            failed += client.wait(pid).exit_code != 0
    say = {"kills": done, **killed, "runs": runs, "different": different, "failed": failed}
    say |= {"most_steps_lost": max(lost, default=0), "mean_steps_lost": round(statistics.mean(lost), 2)}
    say |= {"save_steps": SAVE_STEPS, "undisturbed_s": round(undisturbed, 1)}
    print(json.dumps({"finetune": "kills", "seconds": round(time.monotonic() - begun)} | say), flush=True)
    return not different and not failed and max(lost, default=0) <= SAVE_STEPS + 1


def _goes_on_at(pid: int, before: int) -> int:
    """The step from which a run goes on after a kill."""
    from llmasos.userland.client import Client

    deadline = time.monotonic() + 60
    lowest = before
    with Client(timeout_s=120) as client:
        while time.monotonic() < deadline:
            info = client.call(_stat(pid))
            lowest = min(lowest, info.computed)
            if info.state in ("ready", "running", "zombie"):
                break
            time.sleep(0.05)
    return lowest


def _stat(pid: int) -> Any:
    from llmasos.syscalls import table

    return table.StatProcess(pid)


def _ended(client: Any, pid: int) -> bool:
    return str(client.call(_stat(pid)).state) == "zombie"


def beside(home: Path, model: str, callers: int) -> bool:
    from llmasos.syscalls import table
    from llmasos.syscalls import types as t
    from llmasos.userland.client import Client

    whose = (str(home), "")
    neighbours.peers.MODEL = model
    neighbours.callers(whose, 20)  # loads the model, and learns what a step takes
    ratios: list[dict[str, float]] = []
    with Client(timeout_s=120) as client:
        write_data(client)
        pid = start(client, model, "beside", 100_000, "idle", 256)
        while client.call(_stat(pid)).computed < 2:
            time.sleep(0.2)
        for _ in range(ROUNDS):
            client.call(table.Kill(pid, t.Signal.STOP))
            alone = neighbours.callers(whose, callers)
            client.call(table.Kill(pid, t.Signal.CONT))
            first, begun = client.call(_stat(pid)), time.monotonic()
            time.sleep(1)
            with_run = neighbours.callers(whose, callers)
            rate = (client.call(_stat(pid)).generated - first.generated) / (time.monotonic() - begun)
            figures = {f"alone_{k.removeprefix('wait_')}": v for k, v in alone.items()}
            figures |= {f"beside_{k.removeprefix('wait_')}": v for k, v in with_run.items()}
            figures["p99_ratio"] = round(with_run["wait_p99"] / alone["wait_p99"], 3)
            ratios.append(figures)
            say = {"finetune": "beside", **figures, "trained_tokens_per_s": round(rate)}
            print(json.dumps(say), flush=True)
        client.call(table.Kill(pid))
        client.wait(pid)
    median = statistics.median(one["p99_ratio"] for one in ratios)
    print(json.dumps({"finetune": "beside", "p99_ratio_median": median}), flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["kills", "beside"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--source", default="", help="where to pull the model from, as `llsh pull --source`")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    good = True
    with tempfile.TemporaryDirectory(prefix="lt", dir="/tmp") as folder:
        home = Path(folder)
        importer = [sys.executable, "-m", "llmasos.kernel.modelfs.importer", "--home", str(home)]
        importer += ["--model", arguments.model]
        importer += ["--source", arguments.source] if arguments.source else []
        subprocess.run(importer, check=True, stdout=subprocess.DEVNULL)
        os.environ["LLMASOS_HOME"] = str(home)
        with daemon.running(home, "draft_tokens=0") as supervisor:
            if "kills" in arguments.what:
                good &= kills(supervisor, arguments.model, arguments.kills, arguments.seed)
            if "beside" in arguments.what:
                good &= beside(home, arguments.model, arguments.callers)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
