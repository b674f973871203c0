"""Runs on several ranks through a real daemon: as the same run on one, with ordinary calls beside it, a rank
killed on the way; and what it made is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from llmasos.syscalls import table
from llmasos.syscalls.training import Lora, Mesh, Method, Pipeline, Recipe, Shard
from msgspec.structs import replace

from .test_real import TINY_CONFIGS, answers, infers, random_prompts
from .tiny import counting, write_tiny

STEPS = 30
RECIPE = Recipe(
    method=Method.FULL,
    max_steps=STEPS,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_length=64,
    learning_rate=1e-3,
    bf16=False,
    save_steps=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny(made, TINY_CONFIGS["llama"])
    return made


@pytest.fixture(scope="module")
def daemon(daemons: Callable, folder: Path) -> Any:
    running = daemons('devices=["cpu"]')
    with running.client() as client:
        client.call(table.Pull(model="tiny", source=f"file:{folder}"), timeout_s=60)
        client.call(table.Write("/datasets/rows", 0, counting().encode(), True))
    return running


def run(client: Any, name: str, recipe: Recipe) -> int:
    return int(client.call(table.Train("tiny", "rows", name, recipe)).pid)


def curve(client: Any, pid: int) -> list[float]:
    """The losses that a run has told when it has ended; it has made something. A step that was computed again
    is told again."""
    events = list(client.stream(table.Follow(pid)))
    assert client.wait(pid).trained is not None
    return list({event.step: event.loss for event in events if event.phase == "train"}.values())


def ranks(daemon: Any) -> list[psutil.Process]:
    """Of all trainers, the one that talks to the kernel first."""
    found = daemon.kernel().children(recursive=True)
    return [process for process in found if "llmasos.drivers.trainer" in process.cmdline()]


def test_a_run_on_two_ranks_is_one_on_one_though_a_rank_dies(daemon: Any, folder: Path) -> None:
    one = replace(RECIPE, gradient_accumulation_steps=4)
    two = replace(RECIPE, mesh=Mesh(data=2, shard=Shard.FULL))
    with daemon.client() as client:
        expected = curve(client, run(client, "alone", one))
        pid = run(client, "shared", two)
        with client.stream(table.Follow(pid)) as events:
            next(event for event in events if event.phase == "train" and event.step == 12)
        rest = ranks(daemon)
        assert len(rest) == 2
        rest[1].kill()
        prompts = random_prompts(2, 30)
        answers(client, infers(prompts, "tiny", 16))  # meanwhile
        found = curve(client, pid)
        assert found == pytest.approx(expected, rel=1e-5)
        assert len(found) == STEPS
        [answer] = answers(client, infers(prompts[:1], "shared", 16))
        [same] = answers(client, infers(prompts[:1], "alone", 16))
        assert answer == same
    psutil.wait_procs(rest, 5)
    assert ranks(daemon) == []


def test_an_adapter_learnt_by_a_pipeline_is_served(daemon: Any) -> None:
    recipe = replace(
        RECIPE,
        method=Method.LORA,
        lora=Lora(target_modules=["q_proj", "v_proj"]),
        mesh=Mesh(stages=2, micro_batches=2, pipeline=Pipeline.ONE_F_ONE_B),
        max_steps=4,
    )
    with daemon.client() as client:
        curve(client, run(client, "piped", recipe))
        [answer] = answers(client, infers(random_prompts(1, 30), "tiny+piped", 8))
        assert len(answer) == 8


def test_a_mesh_that_cannot_be_ends_the_run_with_its_reason(daemon: Any) -> None:
    with daemon.client() as client:
        pid = run(client, "never", replace(RECIPE, mesh=Mesh(data=2, sequence=True)))
        begun = time.monotonic()
        with pytest.raises(Exception, match="sequence goes with tensor"):
            curve(client, pid)
        assert time.monotonic() - begun < 60
