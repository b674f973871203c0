"""The trainer beside a plain loop of transformers and peft, and what it does when things go wrong."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import shutil
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
import peft
import psutil
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.drivers import base
from llmasos.drivers.trainer import mapped, objective
from llmasos.drivers.trainer.batches import IGNORED, Batches
from llmasos.drivers.trainer.gate import Gate
from llmasos.drivers.trainer.mapped import MappedLinear
from llmasos.drivers.trainer.model import build
from llmasos.drivers.trainer.optimizer import Optimizer
from llmasos.drivers.trainer.run import Run
from llmasos.syscalls import errors, wire
from llmasos.syscalls.training import DataHead, Lora, Method, Recipe, TrainEvent, TrainResult
from safetensors.torch import load_file
from torch.nn import functional

# peft asks transformers by names that will go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.distributed is disabled")

PATIENCE_S = 240  # trainers run when nobody else wants the processors
VOCAB = 97  # of the tiny models
MODELS = ["llama-tied", "gpt2", "qwen3", "mistral"]


def file_of(path: Path) -> base.File:
    data = path.read_bytes()
    return base.File(str(path), f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


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


def reference(folder: Path, recipe: Recipe, data: Path) -> Any:
    """As somebody would write it with transformers and peft: one example after the other, whole logits.
    Returns losses, norms, gradients by name and the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if recipe.method is Method.LORA:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.lora.r,
            lora_alpha=recipe.lora.lora_alpha,
            lora_dropout=recipe.lora.lora_dropout,
            target_modules=recipe.lora.target_modules or None,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        torch.manual_seed(recipe.seed)
        model = peft.get_peft_model(model, config)
    else:
        torch.manual_seed(recipe.seed)
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=recipe.rate, weight_decay=0.0)
    batches = Batches(data, recipe, VOCAB)
    scheduler = transformers.get_scheduler("linear", optimizer, 0, batches.steps)
    losses, norms, gradients = [], [], []
    for step in range(batches.steps):
        rows = [row for batch in batches.step(step).batches for row in apart(batch)]
        learnt = sum(int((targets != IGNORED).sum()) for _, targets in rows)
        total = 0.0
        for tokens, targets in rows:
            logits = model(input_ids=tokens[None]).logits[0]
            loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / learnt
            loss.backward()
            total += loss.item()
        gradients.append(gradients_of(model))
        norms.append(torch.nn.utils.clip_grad_norm_(wanted, recipe.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(total)
    return losses, norms, gradients, model


def relative(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The distance of all gradients of a step from others', over the length of these."""
    assert ours.keys() == others.keys()
    apart = torch.stack([(ours[name] - others[name]).norm() for name in ours])
    return float(apart.norm() / torch.stack([other.norm() for other in others.values()]).norm())


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(batch: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The single examples of a batch: tokens and targets."""
    for ids, positions, targets in zip(batch.input_ids, batch.position_ids, batch.targets, strict=True):
        begins = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(begins):
            learnt = torch.nonzero(targets[begin:end] != IGNORED).flatten()
            if len(learnt):  # what follows the last target is padding, or of no effect
                end = begin + int(learnt[-1]) + 1
                yield ids[begin:end], targets[begin:end]


# What is computed


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
@pytest.mark.parametrize("model", MODELS)
def test_twenty_steps_are_those_of_transformers_and_peft(
    model: str,
    method: Method,
    packing: bool,
    spec: Callable[..., base.TrainSpec],
    tiny: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients = []
    steps = Optimizer.step

    def noted(optimizer: Optimizer, step: int) -> float:
        gradients.append(
            {name: p.grad.clone() for name, p in optimizer.parameters.items() if p.grad is not None}
        )
        return steps(optimizer, step)

    monkeypatch.setattr(Optimizer, "step", noted)
    targets = ["c_attn", "c_fc"] if model == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    recipe = Recipe(
        method=method,
        lora=Lora(r=4, target_modules=targets),
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_length=40,
        packing=packing,
        learning_rate=5e-3 if method is Method.LORA else 5e-4,
        bf16=False,
        dtype="float32" if method is Method.LORA else "",
    )
    asked = spec(model, recipe)
    if model == "gpt2":  # its dropout would draw other numbers for other shapes
        asked = without_dropout(asked, tiny("gpt2").folder)
    events, result, run = train(asked)
    folder = Path(asked.files["config.json"].path).parent
    losses, norms, expected, theirs = reference(folder, recipe, Path(asked.data))
    assert curve(events) == pytest.approx(losses, rel=1e-5)
    found = [event.grad_norm for event in events if event.phase == "train"]
    assert found == pytest.approx(norms, rel=2e-5)
    # AdamW makes the rounding of a step's gradients a difference of the next one's weights.
    distances = [relative(ours, others) for ours, others in zip(gradients, expected, strict=True)]
    assert distances[0] < 1e-5
    assert max(distances) < 5e-5
    assert losses[-1] < losses[0]
    assert result.steps == 20
    check_result(Path(asked.folder) / "result", run, theirs, folder, method)


def without_dropout(asked: base.TrainSpec, source: Path) -> base.TrainSpec:
    folder = Path(asked.folder) / "without-dropout"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return msgspec.structs.replace(asked, files={path.name: file_of(path) for path in folder.iterdir()})


def check_result(result: Path, run: Run, theirs: Any, base_folder: Path, method: Method) -> None:
    """The result loads in transformers and peft, and has the logits of what was trained."""
    names = {path.name for path in result.iterdir()}
    if method is Method.LORA:
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
        plain = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(plain, str(result)).eval()
    else:
        assert names >= {"config.json", "model.safetensors"}
        assert "llmasos" not in (result / "config.json").read_text()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 8, 11, 14, 17, 20]])
    with torch.inference_mode(), run._built.attention.over(torch.arange(6)[None]):
        found = loaded(input_ids=ids).logits
        mine = run._built.trained.eval()(input_ids=ids).logits
        other = theirs.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, mine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("model", [*MODELS, "llama"])
def test_the_mapped_base_is_what_was_packed(
    model: str, dtype: str, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    """Every module has the numbers that serving computes with; those that are near the checkpoint's."""
    asked = base.TrainSpec(
        name="x",
        device="cpu",
        files=tiny(model).files,
        derived=str(tmp_path),
        recipe=Recipe(max_length=64, dtype=dtype),
        data="",
        folder="",
    )
    built = build(asked, torch.device("cpu"), bf16=False)
    causal = built.adapted.unload().eval()  # type: ignore[union-attr]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny(model).folder, dtype=torch.float32).eval()
    near = {"float32": 0.0, "bfloat16": 0.004, "int8": 0.01, "int4": 0.08}[dtype]
    for name, module in plain.named_modules():
        if (weight := getattr(module, "weight", None)) is None:
            continue
        mine = causal.get_submodule(name)
        found = mine.weight
        if isinstance(mine, MappedLinear) and not isinstance(module, torch.nn.Linear):
            found = found.T  # Conv1D
        assert (found - weight).norm() <= near * weight.norm(), name
        if getattr(module, "bias", None) is not None:
            torch.testing.assert_close(mine.bias, module.bias, rtol=0, atol=0)
        module.weight.data.copy_(found)
    ids = torch.arange(40)[None] % VOCAB
    with torch.inference_mode(), built.attention.over(torch.arange(40)[None]):
        torch.testing.assert_close(causal(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert not [name for name, p in causal.named_parameters() if p.dim() > 1 and "wpe" not in name]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_head_read_once_in_pieces_gives_the_losses_and_gradients_of_whole_logits(
    dtype: torch.dtype,
    near: float,
    tiny: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where what is wanted is all but certain, and the greatest logit comes late or early."""
    recipe, files = Recipe(max_length=64, dtype="int4"), tiny("llama").files
    asked = base.TrainSpec("x", "cpu", files, str(tmp_path), recipe, data="", folder="")
    built = build(asked, torch.device("cpu"), bf16=False)
    head = built.adapted.unload().get_output_embeddings()  # type: ignore[union-attr]
    monkeypatch.setattr(mapped, "_PIECE", 16 * head.in_features)
    assert len(list(head.matrix.pieces(dtype))) > 5
    torch.manual_seed(3)
    weight = head.weight.to(dtype).double()
    rows = torch.randn(40, head.in_features)
    targets = torch.randint(VOCAB, (40,))
    rows[:8] = (
        weight[targets[:8]] * 12 / weight[targets[:8]].square().sum(1, keepdim=True)
    ).float()  # nearly certain
    targets[8:12], targets[12:16] = 0, VOCAB - 1
    rows = rows.to(dtype).float()
    exact = rows.double().requires_grad_()
    loss = functional.cross_entropy(exact @ weight.T, targets, reduction="sum")
    loss.backward()
    found, gradient = objective.streamed(rows, targets, head.matrix, dtype, lambda: None)
    assert found == pytest.approx(loss.item(), rel=near)
    assert exact.grad is not None
    apart = (gradient - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert apart.max() < near


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
def test_activations_may_be_computed_twice(
    method: Method, spec: Callable[..., base.TrainSpec], tmp_path: Path
) -> None:
    """With dropout, whose random numbers have to be the same both times."""
    recipe = Recipe(method=method, max_steps=4, max_length=40, lora=Lora(lora_dropout=0.1), bf16=False)
    events, _, _ = train(spec("gpt2", recipe))
    shutil.rmtree(tmp_path / "checkpoints")
    again, _, _ = train(spec("gpt2", msgspec.structs.replace(recipe, gradient_checkpointing=True)))
    assert curve(again) == pytest.approx(curve(events), rel=1e-6)


def test_bfloat16_products_keep_float32_weights(spec: Callable[..., base.TrainSpec], tmp_path: Path) -> None:
    for method, name in ((Method.LORA, "adapter_model"), (Method.FULL, "model")):
        recipe = Recipe(method=method, max_steps=4, max_length=40, learning_rate=1e-3, bf16=False)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        events, _, _ = train(spec("llama", recipe))
        shutil.rmtree(tmp_path / "checkpoints")
        again, _, _ = train(spec("llama", msgspec.structs.replace(recipe, bf16=True)))
        assert curve(again) == pytest.approx(curve(events), rel=2e-2)
        assert curve(again) != curve(events)
        saved = load_file(tmp_path / "result" / f"{name}.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_early_stopping_and_what_is_told(spec: Callable[..., base.TrainSpec], tmp_path: Path) -> None:
    """A rate that ruins the model makes the validation loss grow."""
    recipe = msgspec.structs.replace(DROPPING, learning_rate=0.5, early_stopping_patience=2, max_steps=60)
    events, result, _ = train(spec("llama", recipe))
    measured = [event.eval_loss for event in events if event.phase == "eval"]
    assert result.stopped_early
    assert result.steps < 60
    assert result.eval_loss == measured[-1]
    assert min(measured[-2:]) >= min(measured[:-2])
    assert [event.step for event in events if event.phase == "eval"] == list(range(4, result.steps + 1, 4))
    assert told(tmp_path) == events
    training = [event for event in events if event.phase == "train"]
    assert [event.step for event in training] == list(range(1, result.steps + 1))
    for event in training:
        assert event.memory > 0
        assert event.tokens_per_s > 0
        assert event.time > 0
    assert training[0].learning_rate == pytest.approx(0.5)
    assert (tmp_path / "tensorboard").is_dir()


# Which rows


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_example_is_learnt_once_an_epoch_on_any_number_of_ranks(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = examples(data.draw(st.integers(1, 30)), seed=data.draw(st.integers(0, 99)))
    folder = write_data(tmp_path_factory.mktemp("rows") / "data", rows)
    recipe = Recipe(
        max_length=data.draw(st.integers(8, 30)),
        packing=data.draw(st.booleans()),
        per_device_train_batch_size=data.draw(st.integers(1, 3)),
        gradient_accumulation_steps=data.draw(st.integers(1, 3)),
    )
    expected = sorted(
        tokens[: recipe.max_length][: last_learnt(mark, recipe.max_length)] for tokens, mark in rows
    )
    for world in (1, 2, 3):
        batches = Batches(folder, recipe, VOCAB, world)
        found = []
        for step in range(batches.steps):
            work = [batches.step(step, rank) for rank in range(world)]
            assert len({(part.learnt, part.tokens, len(part.batches)) for part in work}) == 1
            learnt = sum(int((b.targets != IGNORED).sum()) for part in work for b in part.batches)
            assert learnt == work[0].learnt
            assert sum(b.tokens for part in work for b in part.batches) == work[0].tokens
            found += [
                [*tokens.tolist(), int(targets[-1])]
                for part in work
                for batch in part.batches
                for tokens, targets in apart(batch)
            ]
        assert sorted(found) == expected
        assert batches.epoch(batches.steps) == 1


def last_learnt(mark: list[int], longest: int) -> int:
    return max(i for i, learnt in enumerate(mark[:longest]) if learnt) + 1


def test_a_step_on_two_ranks_learns_what_one_rank_does_with_twice_the_rows(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", examples(30))
    one = Batches(folder, Recipe(max_length=40, per_device_train_batch_size=2), VOCAB)
    two = Batches(folder, Recipe(max_length=40, per_device_train_batch_size=1), VOCAB, 2)
    for step in range(one.steps):
        parts = [two.step(step, rank) for rank in range(2)]
        expected = sorted(tokens.tolist() for batch in one.step(step).batches for tokens, _ in apart(batch))
        found = sorted(tokens.tolist() for part in parts for b in part.batches for tokens, _ in apart(b))
        assert found == expected


def test_the_last_rows_are_kept_to_measure_on(tmp_path: Path) -> None:
    rows = examples(30)
    folder = write_data(tmp_path / "data", rows)
    plain = write_data(tmp_path / "plain", rows[:23])
    recipe = Recipe(max_length=40, packing=False)
    kept = Batches(folder, msgspec.structs.replace(recipe, validation_rows=7), VOCAB)
    alone = Batches(plain, recipe, VOCAB)
    assert kept.steps == alone.steps
    for step in range(kept.steps):  # it learns what it would learn of the others alone
        for one, other in zip(kept.step(step).batches, alone.step(step).batches, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
    found = [tokens for n in kept.validation() for tokens, _ in apart(kept.validation_batch(n))]
    assert sorted(tokens.tolist() for tokens in found) == sorted(tokens[:-1] for tokens, _ in rows[23:])
    both = Batches(folder, msgspec.structs.replace(recipe, validation_rows=7, validation_split=0.5), VOCAB)
    assert len(both.validation()) == 7 + 12
    with pytest.raises(errors.InvalidArgument, match=r"validation_rows=30 .* none of 30 rows"):
        Batches(folder, msgspec.structs.replace(recipe, validation_rows=30), VOCAB)


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", [([1, 2, 96], [0, 1, 1])])
    with pytest.raises(errors.InvalidArgument, match="has token 96, the model knows 96"):
        Batches(folder, Recipe(), 96)
    with pytest.raises(errors.InvalidArgument, match=r"validation_split=0\.5 leave none of 1 rows"):
        Batches(folder, Recipe(validation_split=0.5), VOCAB)
    nothing = write_data(tmp_path / "nothing", [([1, 2, 3] * 5, [1] + [0] * 14)])
    with pytest.raises(errors.InvalidArgument, match="no example has a token to learn"):
        Batches(nothing, Recipe(), VOCAB)
    with (folder / "tokens.u32").open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(errors.Corrupt, match=r"tokens\.u32"):
        Batches(folder, Recipe(), VOCAB)


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
    _, expected, _ = train(undisturbed)

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
