"""The trainer as a process: when it computes, how it goes on after any end, and what it does when things go
wrong. What it computes is in test_training_steps.py, of which rows in test_batches.py."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import transformers
from llmasos.drivers import base
from llmasos.drivers.trainer.gate import Gate
from llmasos.drivers.trainer.run import Run
from llmasos.syscalls import errors, wire
from llmasos.syscalls.training import DataHead, Lora, Method, Recipe, TrainEvent, TrainResult

from .conftest import VOCAB, file_of

# peft asks transformers by names that will go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.distributed is disabled")

PATIENCE_S = 240  # trainers run when nobody else wants the processors

Example = tuple[list[int], list[int]]  # tokens; 1 where learnt


DROPPING = Recipe(
    method=Method.FULL,
    max_steps=16,
    max_length=40,
    learning_rate=1e-3,
    gradient_accumulation_steps=2,
    save_steps=3,
    validation_split=0.2,
    eval_steps=4,
)


def pretraining(config: str) -> Recipe:
    return Recipe(method=Method.PRETRAIN, max_length=64, config=config)


def examples(count: int, longest: int = 24, seed: int = 3) -> list[Example]:
    """Sequences with a rule in them, so that there is something to learn."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        length, first, pace = draw.randint(5, longest), draw.randrange(VOCAB), draw.randint(1, 3)
        tokens = [(first + pace * i) % VOCAB for i in range(length)]
        made.append((tokens, [0] * 2 + [1] * (length - 2)))
    return made


def write_data(folder: Path, rows: list[Example]) -> Path:
    folder.mkdir(parents=True)
    tokens = np.concatenate([np.array(t, "<u4") for t, _ in rows])
    learnt = np.concatenate([np.array(mark, "u1") for _, mark in rows])
    ends = np.cumsum([len(t) for t, _ in rows]).astype("<u8")
    for name, array in (("tokens.u32", tokens), ("learnt.u8", learnt), ("ends.u64", ends)):
        array.tofile(folder / name)
    longest = max(len(t) for t, _ in rows)
    head = DataHead(1, len(rows), len(tokens), int(learnt.sum()), longest, "d", "t", "")
    (folder / "head.json").write_bytes(msgspec.json.encode(head))
    return folder


@pytest.fixture
def spec(tiny: Callable[[str], Any], tmp_path: Path) -> Callable[..., base.TrainSpec]:
    def make(model: str, recipe: Recipe, rows: list[Example] | None = None) -> base.TrainSpec:
        data = tmp_path / "data"
        if not data.exists():
            write_data(data, rows or examples(30))
        return base.TrainSpec(
            name="tiny+added",
            device="cpu",
            files=tiny(model).files,
            derived=str(tmp_path / "derived"),
            recipe=recipe,
            data=str(data),
            folder=str(tmp_path),
        )

    return make


def train(spec: base.TrainSpec) -> tuple[list[TrainEvent], TrainResult, Run]:
    """A whole run in this process."""
    events: list[TrainEvent] = []
    gate = Gate()
    gate.open()
    run = Run(spec, gate, events.append)
    return events, run.train(), run


def curve(events: list[TrainEvent]) -> list[float]:
    return [event.loss for event in events if event.phase == "train" and event.loss is not None]


# The process


class Trainer:
    """A trainer's process and the kernel's end of its bus."""

    def __init__(self, spec: base.TrainSpec, environment: dict[str, str] | None = None) -> None:
        path = Path(spec.folder) / "bus"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            command = [sys.executable, "-m", "llmasos.drivers.trainer", "--run", "7", "--bus", str(path)]
            self.process = subprocess.Popen(
                [*command, "--parent", str(os.getpid())], env=os.environ | (environment or {})
            )
            self.bus, _ = listener.accept()
        self.bus.settimeout(PATIENCE_S)
        self._reader = wire.FrameReader()
        self._early: list[Any] = []
        hello = self.next(base.AttachTrainer)
        assert (hello.run, hello.pid) == (7, self.process.pid)
        self.send(base.Train(spec))

    def send(self, message: base.ToWorker) -> None:
        self.bus.sendall(wire.frame(msgspec.msgpack.encode(message)))

    def __iter__(self) -> Iterator[Any]:
        """Messages, until it is gone."""
        while True:
            while self._early:
                yield self._early.pop(0)
            try:
                data = self.bus.recv(1 << 16)
            except ConnectionError:
                return
            if not data:
                return
            self._early += map(base.from_worker.decode, self._reader.feed(data))

    def next(self, kind: type) -> Any:
        found = next((message for message in self if isinstance(message, (kind, base.Failed))), None)
        assert isinstance(found, kind), found
        return found

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.bus.close()

    def status(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self.bus.close()
        return status


@pytest.fixture
def trainer() -> Iterator[Callable[..., Trainer]]:
    started: list[Trainer] = []

    def start(spec: base.TrainSpec, environment: dict[str, str] | None = None) -> Trainer:
        started.append(Trainer(spec, {"OMP_NUM_THREADS": "1"} | (environment or {})))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()
        one.bus.close()


def told(folder: Path) -> list[TrainEvent]:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=TrainEvent) for line in lines]


def test_it_computes_only_while_it_has_a_grant_with_the_lowest_priority(
    spec: Callable[..., base.TrainSpec], trainer: Callable[..., Trainer]
) -> None:
    one = trainer(spec("gpt2", msgspec.structs.replace(DROPPING, max_steps=100_000)))
    ready = one.next(base.TrainReady)
    assert (ready.step, ready.steps) == (0, 100_000)
    assert ready.memory > 0
    assert os.sched_getscheduler(one.process.pid) == os.SCHED_IDLE
    assert psutil.Process(one.process.pid).nice() == 19
    assert Path(f"/proc/{one.process.pid}/oom_score_adj").read_text().strip() == "1000"
    idle = cpu_seconds(one.process.pid)
    time.sleep(0.4)
    assert cpu_seconds(one.process.pid) - idle < 0.1
    for ticket in (11, 12, 13):
        one.send(base.Grant(ticket))
        while one.next(base.Trained).event.phase != "train":
            pass
        one.send(base.CallIn(ticket))
        granted = one.next(base.Granted)
        assert granted.ticket == ticket
        assert granted.seconds > 0
        busy = cpu_seconds(one.process.pid)
        time.sleep(0.4)
        assert cpu_seconds(one.process.pid) - busy < 0.1
    one.send(base.Leave())
    assert one.status() == 0


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_killed_or_sent_away_at_any_moment_it_learns_the_same(
    spec: Callable[..., base.TrainSpec], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """gpt2 has dropout, so the random numbers go on too."""
    asked = spec("gpt2", DROPPING)
    undisturbed = msgspec.structs.replace(asked, folder=str(tmp_path / "undisturbed"))
    Path(undisturbed.folder).mkdir()
    one = trainer(
        undisturbed
    )  # in a process as well: sums to the last bit depend on how many threads there are
    one.send(base.Grant(1))
    expected = one.next(base.TrainDone).result
    assert one.status() == 0

    draw = random.Random()
    for killed in (True, False, True):
        one = trainer(asked)
        one.next(base.TrainReady)
        one.send(base.Grant(1))
        for _ in range(draw.randint(1, 5)):
            one.next(base.Trained)
        time.sleep(draw.random() * 0.02)
        if killed:
            one.kill()
        else:
            one.send(base.Leave())
            assert any(isinstance(message, base.Granted) for message in one)
            assert one.status() == 0
    one = trainer(asked)
    ready = one.next(base.TrainReady)
    assert ready.step >= 1
    one.send(base.Grant(1))
    found = one.next(base.TrainDone).result
    assert one.status() == 0
    assert told_of(tmp_path) == told_of(Path(undisturbed.folder))
    assert (found.loss, found.eval_loss, found.tokens) == (expected.loss, expected.eval_loss, expected.tokens)
    weights = [folder / "result" / "model.safetensors" for folder in (tmp_path, Path(undisturbed.folder))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_evaluation_that_no_checkpoint_knows_is_not_told_twice(
    spec: Callable[..., base.TrainSpec], tmp_path: Path
) -> None:
    """The checkpoint of step 12 is written before the evaluation after step 12."""
    asked = spec("gpt2", DROPPING)
    undisturbed = msgspec.structs.replace(asked, folder=str(tmp_path / "undisturbed"))
    Path(undisturbed.folder).mkdir()
    train(undisturbed)

    def dies(event: TrainEvent) -> None:
        if event.phase == "eval" and event.step == 12:
            raise InterruptedError

    gate = Gate()
    gate.open()
    with pytest.raises(InterruptedError):
        Run(asked, gate, dies).train()
    _, _, again = train(asked)
    assert (again.step, again.eval_step) == (16, 16)
    assert told_of(tmp_path) == told_of(Path(undisturbed.folder))


def told_of(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (event.phase, event.step, event.loss, event.grad_norm, event.learning_rate, event.eval_loss)
        for event in told(folder)
        if event.phase != "save"
    ]


def test_it_ends_when_the_kernel_is_gone(
    spec: Callable[..., base.TrainSpec], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    asked = spec("gpt2", msgspec.structs.replace(DROPPING, max_steps=100_000, save_steps=0))
    one = trainer(asked)
    one.send(base.Grant(1))
    while one.next(base.Trained).event.step < 5:
        pass
    one.bus.close()
    assert one.process.wait(PATIENCE_S) == 0
    assert Run(asked, Gate(), lambda _: None).step >= 5


def test_a_damaged_checkpoint_is_passed_over(spec: Callable[..., base.TrainSpec], tmp_path: Path) -> None:
    asked = spec("gpt2", DROPPING)
    train(asked)
    state = tmp_path / "checkpoints" / "00000016" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert Run(asked, Gate(), lambda _: None).step == 15


# What goes wrong


@pytest.mark.parametrize(
    ("recipe", "kind", "text"),
    [
        (Recipe(max_length=512), errors.InvalidArgument, "context has 256 tokens"),
        (Recipe(max_length=64, lora=Lora(target_modules=["nowhere"])), errors.InvalidArgument, "nowhere"),
        (Recipe(max_length=64, lora=Lora(target_modules=["norm"])), errors.InvalidArgument, "norm"),
        (
            Recipe(max_length=64, lora=Lora(target_modules=["q_proj", "lm_head"])),
            errors.InvalidArgument,
            "lm_head",
        ),
        (Recipe(max_length=64, dtype="float8"), errors.UnsupportedModel, "float8"),
        (Recipe(max_length=64, config='{"num_hidden_layers": 1}'), errors.InvalidArgument, "pre-training"),
        (pretraining('{"model_type": "gpt2"}'), errors.InvalidArgument, "model_type"),
        (pretraining('{"auto_map": {}}'), errors.InvalidArgument, "auto_map"),
        (pretraining("[1]"), errors.InvalidArgument, "no JSON object"),
        (pretraining('{"hidden_size": 63}'), errors.UnsupportedModel, "llama"),
        (pretraining('{"num_hidden_layers": 100000}'), errors.UnsupportedModel, "100000 layers"),
        (pretraining('{"intermediate_size": 1000000000}'), errors.NeverFits, "MB for weights"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(
    recipe: Recipe,
    kind: type[errors.LLMasOSError],
    text: str,
    spec: Callable[..., base.TrainSpec],
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=text) as found:
        Run(spec("llama-tied", recipe), Gate(), lambda _: None)
    assert found.value.hint
    assert not (tmp_path / "result").exists()


def test_an_encoder_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    files = {"config.json": file_of(tmp_path / "config.json")}
    asked = base.TrainSpec("x", "cpu", files, "", Recipe(), str(tmp_path), str(tmp_path))
    with pytest.raises(errors.UnsupportedModel, match="bert is an encoder: it cannot be trained"):
        Run(asked, Gate(), lambda _: None)


def test_pretraining_begins_from_the_config(spec: Callable[..., base.TrainSpec], tmp_path: Path) -> None:
    recipe = pretraining('{"num_hidden_layers": 1, "intermediate_size": 40}')
    _, result, _ = train(spec("llama-tied", msgspec.structs.replace(recipe, max_steps=3)))
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert made.config.num_hidden_layers == 1
    assert made.model.layers[0].mlp.up_proj.weight.shape == (40, 64)
    assert result.trained_parameters == made.num_parameters()
    assert result.loss is not None
    assert result.loss > math.log(VOCAB)  # it has not learnt anything yet


def test_what_is_not_finite_is_told(spec: Callable[..., base.TrainSpec]) -> None:
    recipe = Recipe(method=Method.FULL, max_steps=50, max_length=40, learning_rate=10.0, max_grad_norm=0.0)
    asked = spec("gpt2", msgspec.structs.replace(recipe, adam_epsilon=1e-30, weight_decay=10.0))
    with pytest.raises(errors.DeviceFault, match="not finite at step") as found:
        train(asked)
    assert "learning_rate" in found.value.hint


def test_a_full_disk_is_told_and_leaves_what_was_there(
    spec: Callable[..., base.TrainSpec], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    asked = spec("gpt2", DROPPING)
    script = "import resource,sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    one = trainer(asked, {"PYTHONPATH": str(sitecustomised(tmp_path, script))})
    one.send(base.Grant(1))
    failed = next(message for message in one if isinstance(message, base.Failed))
    problem = errors.from_wire(dict(failed.error))
    assert isinstance(problem, errors.StorageFailed), problem
    assert one.status() == 1
    assert not list((tmp_path / "checkpoints").glob("0*"))
    assert not (tmp_path / "result").exists()


def test_memory_that_runs_out_is_told(
    spec: Callable[..., base.TrainSpec], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    recipe = Recipe(method=Method.FULL, max_steps=2, max_length=40, per_device_train_batch_size=512)
    one = trainer(spec("llama", recipe))
    one.next(base.TrainReady)
    process = psutil.Process(one.process.pid)
    most = process.memory_info().vms + (64 << 20)
    process.rlimit(psutil.RLIMIT_AS, (most, most))
    one.send(base.Grant(1))
    failed = next(message for message in one if isinstance(message, base.Failed))
    problem = errors.from_wire(dict(failed.error))
    assert isinstance(problem, errors.NeverFits), problem
    assert "per_device_train_batch_size" in problem.hint
    assert one.status() == 1
    assert not (tmp_path / "result").exists()


def test_a_package_that_is_missing_is_named(
    spec: Callable[..., base.TrainSpec], trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    hidden = "import sys; sys.modules['peft'] = None"
    one = trainer(spec("llama", Recipe()), {"PYTHONPATH": str(sitecustomised(tmp_path, hidden))})
    failed = next(message for message in one if isinstance(message, base.Failed))
    problem = errors.from_wire(dict(failed.error))
    assert isinstance(problem, errors.UnsupportedModel)
    assert "peft" in problem.message
    assert "llmasos[train]" in problem.hint


def sitecustomised(folder: Path, script: str) -> Path:
    """A folder from which Python runs `script` before anything else."""
    place = folder / "customised"
    place.mkdir()
    (place / "sitecustomize.py").write_text(script)
    return place
