"""How fast a run trains, beside the same loop in plain PyTorch, and what memory it takes beside serving.

    python tests/bench/training.py [pace] [memory] [--home FOLDER] [--dtype float32] [--length 512]
                                   [--rounds 5] [--steps 3] [--checkpointing]

  pace     SmolLM2, LoRA, packed rows: tokens a second of the trainer and of a loop that somebody would write
           with transformers and peft, in turns; the medians of the rounds' ratios, by the clock and by the
           processors' time (on a machine where others work too, only the latter says much); and how soon
           the trainer stops when it is called in
  memory   what the trainer holds beside a worker that serves the same model in the same dtype with 4096
           tokens of context, in MB: its tensors, and its process (which has 280 MB of torch, transformers
           and peft before it loads anything)
A JSON line each. Both loops run at an ordinary priority. FOLDER is a home that has the model (it is pulled
there else).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

SEED = 5


def write_data(folder: Path, vocabulary: int, examples: int = 600) -> None:
    """Examples of 20 to 200 tokens, all learnt: the heaviest case for the head."""
    from llmasos.syscalls.training import DataHead

    dice = random.Random(SEED)
    lengths = [dice.randint(20, 200) for _ in range(examples)]
    folder.mkdir()
    tokens = np.random.default_rng(SEED).integers(1000, vocabulary, sum(lengths)).astype("<u4")
    tokens.tofile(folder / "tokens.u32")
    np.ones(len(tokens), "u1").tofile(folder / "learnt.u8")
    np.cumsum(lengths).astype("<u8").tofile(folder / "ends.u64")
    head = DataHead(1, examples, len(tokens), len(tokens), max(lengths), "bench", "", "")
    (folder / "head.json").write_bytes(msgspec.json.encode(head))


class Ours:
    """The trainer, and the kernel's end of its bus. `settings` are those of the recipe."""

    def __init__(self, work: Path, files: dict[str, Any], derived: Path, settings: dict[str, Any]) -> None:
        from llmasos.drivers import base
        from llmasos.syscalls.training import Recipe

        spec = base.TrainSpec(
            name="smollm2+bench",
            device="cpu",
            files=files,
            derived=str(derived),
            recipe=Recipe(**settings),
            data=str(work / "data"),
            folder=str(work),
        )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(work / "bus"))
        listener.listen()
        command = [sys.executable, "-m", "llmasos.drivers.trainer", "--run", "1", "--bus", str(work / "bus")]
        self.process = subprocess.Popen([*command, "--parent", str(os.getpid())])
        self._bus, _ = listener.accept()
        from llmasos.syscalls import wire

        self._base, self._frame, self._reader = base, wire.frame, wire.FrameReader()
        self._inbox: list[Any] = []
        self._ticket = 0
        self._send(base.Train(spec))
        self.memory = self._next(base.TrainReady).memory

    def _send(self, message: Any) -> None:
        self._bus.sendall(self._frame(msgspec.msgpack.encode(message)))

    def _next(self, kind: type) -> Any:
        while True:
            while self._inbox:
                message = self._inbox.pop(0)
                assert not isinstance(message, self._base.Failed), message
                if isinstance(message, kind):
                    return message
            data = self._bus.recv(1 << 16)
            assert data, "the trainer died"
            self._inbox += map(self._base.from_worker.decode, self._reader.feed(data))

    def steps(self, count: int) -> tuple[int, float, float]:
        """Tokens, seconds and processor seconds of `count` steps, or a little more."""
        self._ticket += 1
        _promote(self.process.pid)  # again: threads are made when there is something to compute
        busy = _processor_s(self.process.pid)
        begun = time.perf_counter()
        self._send(self._base.Grant(self._ticket))
        events = []
        while len(events) < count:
            event = self._next(self._base.Trained).event
            if event.phase == "train":
                events.append(event)
        seconds, busy = time.perf_counter() - begun, _processor_s(self.process.pid) - busy
        self._call_in()
        tokens = events[-1].tokens - self._tokens
        self._tokens = events[-1].tokens
        return tokens, seconds, busy

    _tokens = 0

    def interrupted(self) -> float:
        """Milliseconds until it has stopped computing, called in somewhere in a step."""
        self._ticket += 1
        self._send(self._base.Grant(self._ticket))
        time.sleep(0.2 + random.random())
        called = time.perf_counter()
        self._call_in()
        return 1000 * (time.perf_counter() - called)

    def _call_in(self) -> None:
        self._send(self._base.CallIn(self._ticket))
        self._next(self._base.Granted)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _promote(pid: int) -> None:
    """To an ordinary priority, as the other side has."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)


def _said(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("dtype", "length", "steps", "checkpointing")}


def _processor_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def plain(work: Path, settings: dict[str, Any]) -> None:
    """The loop in plain PyTorch: reads numbers of steps, writes tokens, seconds and processor seconds."""
    import peft
    import torch
    import transformers
    from llmasos.drivers.host import physical_cores
    from llmasos.drivers.trainer.batches import Batches
    from llmasos.syscalls.training import Recipe

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(physical_cores())
    recipe = Recipe(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work / "plain", gguf_file="model.gguf", dtype=torch.float32
    )
    torch.manual_seed(recipe.seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)).train()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=recipe.rate, weight_decay=0.0)
    batches = Batches(work / "data", recipe, model.config.vocab_size)
    schedule = transformers.get_scheduler("linear", optimizer, 0, batches.steps)
    step = 0
    print("ready", flush=True)
    for line in sys.stdin:
        begun, busy, tokens = time.perf_counter(), time.process_time(), 0
        for _ in range(int(line)):
            work_ = batches.step(step)
            for batch in work_.batches:
                labels = torch.cat((torch.full_like(batch.targets[:, :1], -100), batch.targets[:, :-1]), 1)
                found = model(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    labels=labels,
                    num_items_in_batch=work_.learnt,
                    use_cache=False,
                ).loss
                found.backward()
                found.item()
            torch.nn.utils.clip_grad_norm_(wanted, recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + work_.tokens
        print(json.dumps((tokens, time.perf_counter() - begun, time.process_time() - busy)), flush=True)


def pace(work: Path, files: dict[str, Any], derived: Path, settings: dict[str, Any], options: Any) -> None:
    (work / "plain").mkdir()
    (work / "plain" / "model.gguf").symlink_to(files["model.gguf"].path)
    command = [sys.executable, __file__, "--plain", str(work), "--settings", json.dumps(settings)]
    # Threads that spin would count as busy wherever others take the processors from them.
    waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=waiting)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    ours = Ours(work, files, derived, settings)
    ratios, by_processor, rates = [], [], []
    for i in range(options.rounds + 1):
        mine = ours.steps(options.steps)
        print(options.steps, file=other.stdin, flush=True)
        tokens, seconds, busy = json.loads(other.stdout.readline())
        if i:  # the first round warms up
            rates.append((mine[0] / mine[1], tokens / seconds))
            ratios.append(rates[-1][0] / rates[-1][1])
            by_processor.append(mine[0] / mine[2] / (tokens / busy))
    other.kill()
    other.wait()
    stops = sorted(ours.interrupted() for _ in range(20))
    ours.close()
    line = {
        "bench": "training pace",
        "tokens_per_s": round(statistics.median(a for a, _ in rates), 1),
        "plain_tokens_per_s": round(statistics.median(b for _, b in rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_by_processor_time": round(statistics.median(by_processor), 3),
        "called_in_ms": {"median": round(stops[10], 1), "most": round(stops[-1], 1)},
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(json.dumps(line | _said(options)), flush=True)


def memory(work: Path, files: dict[str, Any], derived: Path, settings: dict[str, Any], options: Any) -> None:
    """Serving is a native driver in this process that has answered with 4096 tokens of context."""
    from llmasos.drivers import base
    from llmasos.drivers.native.executor import NativeDriver

    spec = base.LoadSpec(1, files, settings["dtype"], 0.5, derived=str(derived))
    driver = NativeDriver(lambda *_: None)
    loaded = driver.load(spec)
    driver.all_logits(1, list(range(1000, 1000 + min(4096, loaded.context_length))))
    kv = loaded.block_bytes * 4096 // base.BLOCK_TOKENS
    ours = Ours(work, files, derived, settings)
    process, most = psutil.Process(ours.process.pid), 0
    idle = process.memory_full_info()
    ours._send(base.Grant(1))
    begun = time.monotonic()
    while time.monotonic() - begun < options.rounds * 6:
        found = process.memory_full_info()
        most = max(most, found.uss)
        time.sleep(0.02)
    busy, alone = process.memory_full_info(), psutil.Process().memory_full_info()
    ours.close()
    megabytes = {
        "serving_tensors": loaded.weights_bytes + kv,
        "serving_pss_with_trainer": alone.pss,
        "trainer_tensors": ours.memory,
        "trainer_tensors_in_a_step": most_tensors(work, files, derived, settings),
        "trainer_uss_idle": idle.uss,
        "trainer_uss_most": most,
        "trainer_pss": busy.pss,
        "trainer_rss": busy.rss,
        "trainer_shared": busy.shared,
    }
    line = {"bench": "training memory"} | {key: round(value / 1e6, 1) for key, value in megabytes.items()}
    print(json.dumps(line | _said(options)), flush=True)


def most_tensors(work: Path, files: dict[str, Any], derived: Path, settings: dict[str, Any]) -> int:
    """Bytes of tensors that a step allocates and holds at once, at most: activations, gradients, logits."""
    from llmasos.drivers import base
    from llmasos.drivers.trainer.gate import Gate
    from llmasos.drivers.trainer.run import Run
    from llmasos.syscalls.training import Recipe
    from torch.profiler import ProfilerActivity, profile

    recipe = Recipe(**(settings | {"max_steps": 1}))
    spec = base.TrainSpec("x+y", "cpu", files, str(derived), recipe, str(work / "data"), str(work / "again"))
    (work / "again").mkdir()
    gate = Gate()
    gate.open()
    run = Run(spec, gate, lambda event: None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run._learn()
    found = profiled.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def model_files(home: Path) -> dict[str, Any]:
    from llmasos.kernel.modelfs.store import ModelFS

    command = [sys.executable, "-m", "llmasos.kernel.modelfs.importer", "--home", str(home)]
    subprocess.run([*command, "--model", "smollm2"], check=True, capture_output=True)
    store = ModelFS(home)
    return store.driver_files(store.resolve("smollm2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=[])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(options.plain, json.loads(options.settings))
        return
    settings = {
        "max_steps": 10_000,
        "max_length": options.length,
        "dtype": options.dtype,
        "gradient_checkpointing": options.checkpointing,
        "bf16": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder) / "home"
        files = model_files(home)
        for name, measure in (("pace", pace), ("memory", memory)):
            if name in options.what or not options.what:
                work = Path(folder) / name
                work.mkdir()
                write_data(work / "data", 49152)
                measure(work, files, home / "modelfs" / "derived", settings, options)


if __name__ == "__main__":
    main()
