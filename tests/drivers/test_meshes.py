"""Runs on many ranks beside runs on one: the same losses, the same result; and what happens when one is lost.

tests/bench/meshes.py has every mix on 2 and on 4 ranks; here are those that cover what there is."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
import transformers
from llmasos.drivers import base, launcher
from llmasos.drivers.model_config import Config
from llmasos.drivers.trainer.parallel import check
from llmasos.syscalls import errors
from llmasos.syscalls.training import Lora, Mesh, Method, Pipeline, Recipe, Shard
from msgspec.structs import replace

from .conftest import _SMALL, files_of, index_of
from .mesh_ranks import Group
from .test_trainer import Trainer, curve, examples, told, train, trainer, write_data

__all__ = ["trainer"]

# peft and torch ask by names that will go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS, ROWS = 6, 16
Specs = Callable[..., base.TrainSpec]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, four KV heads, a tied head."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    small = {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).save_pretrained(folder)
    (folder / "tensors.json").write_text(json.dumps(index_of(folder / "model.safetensors")))
    return folder


@pytest.fixture
def specs(model: Path, tmp_path: Path) -> Specs:
    data = write_data(tmp_path / "data", examples(60))

    def make(name: str, mesh: Mesh, method: Method = Method.FULL, **fields: Any) -> base.TrainSpec:
        """A step learns from ROWS rows, whatever the mesh."""
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        rows = ROWS // (mesh.data * mesh.replicas)
        recipe = Recipe(
            method=method,
            lora=Lora(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=rows // 4,
            max_length=40,
            learning_rate=5e-4,
            weight_decay=0.1,
            validation_split=0.2,
            eval_steps=3,
            bf16=False,
            dtype="float32" if method is Method.LORA else "",
            mesh=mesh,
        )
        return base.TrainSpec(
            name="tiny+added",
            device="cpu",
            files=files_of(model),
            derived=str(tmp_path / "derived"),
            recipe=replace(recipe, **fields),
            data=str(data),
            folder=str(folder),
        )

    return make


@pytest.fixture(scope="module")
def group_of() -> Iterator[Callable[[int], Group]]:
    """The group of so many ranks; one is there at a time."""
    groups: dict[int, Group] = {}
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    patch.setenv("OMP_NUM_THREADS", "1")

    def end() -> None:
        for size in list(groups):
            groups.pop(size).close()

    def make(size: int) -> Group:
        if size not in groups:
            end()
            groups[size] = Group(size)
        return groups[size]

    yield make
    end()
    patch.undo()


def measured(events: list[Any]) -> list[float]:
    return [event.eval_loss for event in events if event.phase == "eval"]


def norms(events: list[Any]) -> list[float]:
    return [event.grad_norm for event in events if event.phase == "train"]


def weights(folder: Path, base_folder: Path, method: Method) -> dict[str, torch.Tensor]:
    """Of the result, as transformers or peft read it."""
    result = folder / "result"
    if method is Method.FULL:
        read = transformers.AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)
    else:
        plain = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        read = peft.PeftModel.from_pretrained(plain, result)
    return dict(read.state_dict())


MESHES = {
    "ddp": Mesh(data=2),
    "optimizer": Mesh(data=2, shard=Shard.OPTIMIZER, offload=True),
    "tensor": Mesh(tensor=2),
    "sequence": Mesh(tensor=2, sequence=True),
    "interleaved": Mesh(stages=2, micro_batches=4, pipeline=Pipeline.INTERLEAVED),
    "zero-bubble": Mesh(stages=2, micro_batches=4, pipeline=Pipeline.ZERO_BUBBLE),
    "full, replicated": Mesh(data=2, replicas=2, shard=Shard.FULL),
    "full and tensor": Mesh(data=2, tensor=2, shard=Shard.FULL),
    "ddp and 1f1b": Mesh(data=2, stages=2, micro_batches=4),
}
MIXES = [(name, Method.FULL) for name in MESHES] + [
    ("ddp", Method.LORA),
    ("optimizer", Method.LORA),
    ("tensor", Method.LORA),
    ("ddp and 1f1b", Method.LORA),
]
MIXES.sort(key=lambda mix: MESHES[mix[0]].ranks)


# A group is started once as long as tests want one of its size: first those of 2 ranks, then of 4.


def test_a_damaged_part_makes_the_whole_checkpoint_void(
    specs: Specs, group_of: Callable[[int], Group]
) -> None:
    spec = specs("damaged", MESHES["optimizer"], save_steps=1)
    group_of(2).train(spec, stop_after=4)
    part = max((Path(spec.folder) / "checkpoints" / "00000004").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    _, _, run = group_of(2).train(spec, stop_after=3)
    assert run._begun.step == 3


def test_what_one_rank_refuses_all_refuse_and_the_group_goes_on(
    specs: Specs, group_of: Callable[[int], Group]
) -> None:
    lora = specs("refused", MESHES["sequence"], Method.LORA)
    for spec in (specs("refused", MESHES["ddp"], max_length=2000), lora):
        with pytest.raises(errors.InvalidArgument):
            group_of(2).train(spec)
    group_of(2).train(specs("fine", MESHES["ddp"]), stop_after=1)


@pytest.mark.parametrize(("name", "method"), MIXES, ids=[f"{name}-{method}" for name, method in MIXES])
def test_a_group_learns_what_one_rank_learns(
    name: str, method: Method, specs: Specs, group_of: Callable[[int], Group], model: Path
) -> None:
    mesh = MESHES[name]
    alone, shared = specs("alone", Mesh(), method), specs("shared", mesh, method)
    expected, one, _ = train(alone)
    events, result, _ = group_of(mesh.ranks).train(shared)
    assert curve(events) == pytest.approx(curve(expected), rel=1e-5)
    assert norms(events) == pytest.approx(norms(expected), rel=1e-4)
    assert measured(events) == pytest.approx(measured(expected), rel=1e-5)
    assert result is not None
    assert (result.tokens, result.trained_parameters) == (one.tokens, one.trained_parameters)
    whole = weights(Path(alone.folder), model, method)
    divided = weights(Path(shared.folder), model, method)
    assert divided.keys() == whole.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(divided[key], tensor, rtol=0, atol=2e-5)


def test_a_run_goes_on_with_other_ranks_where_it_was(specs: Specs, group_of: Callable[[int], Group]) -> None:
    """4 ranks, then 2, then one: the steps and rows are those of an undisturbed run."""
    expected, _, _ = train(specs("alone", Mesh()))
    four = specs("moved", MESHES["full and tensor"])
    events, _, _ = group_of(4).train(four, stop_after=2)
    two = specs("moved", MESHES["interleaved"])
    more, _, run = group_of(2).train(two, stop_after=4)
    assert run.step == 4
    rest, _, _ = train(specs("moved", Mesh()))
    found = curve(events) + curve(more) + curve(rest)
    assert found == pytest.approx(curve(expected), rel=1e-5)
    assert [event.step for event in told(Path(four.folder)) if event.phase == "train"] == [1, 2, 3, 4, 5, 6]


LLAMA = Config({"model_type": "llama", "num_attention_heads": 9, "intermediate_size": 64})
GPT2 = Config({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("fields", "config", "kind", "says"),
    [
        ({"mesh": Mesh(data=2, stages=2, shard=Shard.FULL)}, LLAMA, errors.InvalidArgument, "stages"),
        ({"mesh": Mesh(tensor=3, stages=2)}, LLAMA, errors.InvalidArgument, "stages"),
        ({"mesh": Mesh(data=2, replicas=2)}, LLAMA, errors.InvalidArgument, "replicas"),
        ({"mesh": Mesh(data=2, sequence=True)}, LLAMA, errors.InvalidArgument, "sequence"),
        ({"mesh": Mesh(stages=2, micro_batches=2)}, LLAMA, errors.InvalidArgument, "micro-batches"),
        ({"mesh": Mesh(stages=2)}, LLAMA, errors.InvalidArgument, "micro-batches"),
        ({"mesh": Mesh(tensor=2)}, LLAMA, errors.UnsupportedModel, "num_attention_heads is 9"),
        ({"mesh": Mesh(tensor=2)}, GPT2, errors.UnsupportedModel, "gpt2"),
    ],
)
def test_meshes_that_cannot_be_are_refused_by_name(
    fields: dict[str, Any], config: Config, kind: type[errors.LLMasOSError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        check(Recipe(**fields), config, "cpu")
    assert caught.value.hint


# Processes


def ranks_of(one: Trainer) -> list[psutil.Process]:
    return psutil.Process(one.process.pid).children()


def after_steps(one: Trainer, count: int) -> None:
    while one.next(base.Trained).event.step < count:
        pass


def test_a_killed_rank_takes_all_with_it_and_the_run_goes_on(
    specs: Specs, trainer: Callable[..., Trainer], group_of: Callable[[int], Group]
) -> None:
    """Killed at rank 1, then at rank 0; the curve is that of an undisturbed run."""
    expected, _, _ = train(specs("alone", Mesh(), max_steps=12))
    spec = specs("killed", MESHES["optimizer"], max_steps=12, save_steps=2)
    for victim in (1, 0):
        one = trainer(spec)
        one.next(base.TrainReady)
        one.send(base.Grant(1))
        after_steps(one, 3 if victim else 7)
        others = ranks_of(one)
        begun = time.monotonic()
        (others[0] if victim else one.process).send_signal(signal.SIGKILL)
        assert one.status() == (launcher.BROKEN if victim else -signal.SIGKILL)
        psutil.wait_procs(others, 5)
        assert not [other for other in others if other.is_running()]
        assert time.monotonic() - begun < 5
    _, result, _ = group_of(2).train(spec)
    assert result is not None
    assert result.steps == 12
    events = told(Path(spec.folder))
    assert curve(events) == pytest.approx(curve(expected), rel=1e-5)


def test_ranks_wait_for_a_grant_and_leave_together(specs: Specs, trainer: Callable[..., Trainer]) -> None:
    spec = specs("held", MESHES["tensor"], max_steps=100_000)
    one = trainer(spec)
    assert one.next(base.TrainReady).step == 0
    others = ranks_of(one)
    for ticket in (1, 2):
        one.send(base.Grant(ticket))
        while one.next(base.Trained).event.phase != "train":
            pass
        one.send(base.CallIn(ticket))
        assert one.next(base.Granted).seconds > 0
        busy = [sum(rank.cpu_times()[:2]) for rank in others]
        time.sleep(0.4)
        for rank, before in zip(others, busy, strict=True):
            assert sum(rank.cpu_times()[:2]) - before < 0.15
    one.send(base.Leave())
    assert one.status() == 0
    psutil.wait_procs(others, 5)
    steps = told(Path(spec.folder))[-1].step
    assert (Path(spec.folder) / "checkpoints" / f"{steps:08d}").is_dir()


def test_a_frozen_rank_is_found(specs: Specs, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    hurried = "from llmasos.drivers import launcher; launcher.TIMEOUT_S = 3; launcher.BEAT_S = 0.5"
    (tmp_path / "sitecustomize.py").write_text(hurried)
    spec = specs("frozen", MESHES["ddp"], max_steps=100_000)
    one = trainer(spec, {"PYTHONPATH": str(tmp_path)})
    one.next(base.TrainReady)
    one.send(base.Grant(1))
    after_steps(one, 2)
    [other] = ranks_of(one)
    other.suspend()
    assert one.status() == launcher.BROKEN
    other.wait(5)


def test_more_ranks_than_the_machine_takes_are_refused(specs: Specs, trainer: Callable[..., Trainer]) -> None:
    one = trainer(specs("many", Mesh(data=1024), gradient_accumulation_steps=1))
    failed = next(message for message in one if isinstance(message, base.Failed))
    assert isinstance(errors.from_wire(dict(failed.error)), errors.InvalidArgument)
    assert one.status() == 1
