"""Training through Python on a real daemon: what is made is served and is what peft and transformers make of
its files; a trainer that is killed learns the same; bad data, interrupts, signals."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
import transformers
from llmasos import LLM
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland import training
from llmasos.userland.client import Client
from llmasos.userland.llsh.main import dispatch
from llmasos.userland.llsh.shell import Shell
from llmasos.userland.llsh.terminal import Terminal

from .test_real import TINY_CONFIGS, answers, check_greedy, infers
from .tiny import counting, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

STEPS = 24
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "learning_rate": 1e-2,
    "r": 16,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "save_steps": 4,
    "bf16": False,
}
PROMPTS = [[3 + n, 4 + n, 5 + n, 6 + n] for n in range(0, 500, 50)]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny(made, TINY_CONFIGS["llama"])
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "counting.jsonl"
    path.write_text(counting())
    return path


@pytest.fixture(scope="module")
def daemon(daemons: Callable, folder: Path) -> Any:
    running = daemons('devices=["cpu"]')
    with running.client() as client:
        client.call(table.Pull(model="tiny", source=f"file:{folder}"), timeout_s=60)
    return running


@pytest.fixture(scope="module")
def llm(daemon: Any) -> Iterator[LLM]:
    with LLM.from_pretrained("tiny", address=daemon.address, dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def learnt(llm: LLM, data: Path) -> tuple[str, list[float]]:
    """The name of an adapter that has learnt to count, and the losses on the way."""
    run = llm.train(data, "counts", progress=False, **OPTIONS)
    losses = curve(run)
    result = run.wait()
    assert result.model == run.model == "tiny:latest+counts"
    assert result.steps == STEPS
    assert result.loss == losses[-1]
    return result.model, losses


def curve(run: training.TrainingRun) -> list[float]:
    """Losses by step; a step that was computed again is told again."""
    found = {event.step: event.loss for event in run.events() if event.phase == "train"}
    assert list(found) == list(range(1, STEPS + 1))
    return list(found.values())


def reached(run: training.TrainingRun, step: int) -> None:
    """Waits until the run has made so many steps."""
    assert any(event.phase == "train" and event.step >= step for event in run.events())


def written(client: Client, model: str, folder: Path) -> Path:
    """The files of a model that is there."""
    for entry in client.ls(f"/models/{model}"):
        (folder / Path(entry.path).name).write_bytes(client.read_file(entry.path))
    return folder


def trainers(daemon: Any) -> list[psutil.Process]:
    found = daemon.kernel().children(recursive=True)
    return [process for process in found if "llmasos.drivers.trainer" in process.cmdline()]


def test_an_adapter_is_served_as_peft_serves_it(
    llm: LLM, learnt: tuple[str, list[float]], folder: Path, tmp_path: Path
) -> None:
    name, losses = learnt
    assert losses[-1] < losses[0] - 1
    adapted = answers(llm.client, infers(PROMPTS, name, NEW))
    assert adapted != answers(llm.client, infers(PROMPTS, "tiny", NEW))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, written(llm.client, name, tmp_path)).eval()
    for prompt, answer in zip(PROMPTS, adapted, strict=True):
        check_greedy(model, prompt, answer)


def test_it_is_opened_by_its_name_and_merged(daemon: Any, llm: LLM, learnt: tuple[str, list[float]]) -> None:
    expected = answers(llm.client, infers(PROMPTS, learnt[0], NEW))
    with LLM.from_pretrained("tiny+counts", address=daemon.address, dtype="float32") as named:
        text = str(named.generate("w3 w4 w5 w6", max_new_tokens=NEW, do_sample=False))
        assert named.tokenizer.encode(text) == PROMPTS[0] + expected[0]
    llm.client.call(table.Pull("merged", f"merge:{learnt[0]}"), timeout_s=60)
    assert answers(llm.client, infers(PROMPTS, "merged", NEW)) == expected


def test_trainer_and_kernel_are_killed_and_the_run_is_stopped_and_it_learns_the_same(
    daemon: Any, llm: LLM, learnt: tuple[str, list[float]], data: Path
) -> None:
    run = llm.train(data, "again", progress=False, **OPTIONS)
    reached(run, 10)
    [trainer] = trainers(daemon)
    trainer.kill()
    reached(run, 12)
    run.stop()
    run.cont()
    reached(run, 16)
    daemon.kernel().kill()
    assert curve(run) == learnt[1]
    assert run.wait().model == "tiny:latest+again"
    psutil.wait_procs([trainer], 5)


def test_full_training_makes_a_model_that_transformers_loads(
    daemon: Any, llm: LLM, data: Path, tmp_path: Path
) -> None:
    taught = llm.fine_tune(
        data, "whole", progress=False, method="full", max_steps=4, max_length=64, learning_rate=1e-3
    )
    assert taught.model == "whole:latest"
    found = answers(llm.client, infers(PROMPTS, taught.model, NEW))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        written(llm.client, taught.model, tmp_path), dtype=torch.float32
    ).eval()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        check_greedy(model, prompt, answer)
    with LLM.from_pretrained("whole", address=daemon.address, dtype="float32") as named:
        assert named.generate("w3 w4 w5 w6", max_new_tokens=NEW, do_sample=False) == taught.tokenizer.decode(
            PROMPTS[0] + found[0]
        )


def test_a_bad_row_is_named_and_nothing_is_left(daemon: Any, llm: LLM, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w1"}\n{"text": 3}\n')
    models = [entry.path for entry in llm.client.ls("/models")]
    with pytest.raises(errors.InvalidArgument, match="line 2: text is no string") as caught:
        llm.fine_tune(bad, progress=False)
    assert caught.value.details["line"] == 2
    assert [entry.path for entry in llm.client.ls("/models")] == models
    assert trainers(daemon) == []
    assert llm.generate("w3 w4", max_new_tokens=2)


def test_an_interrupt_kills_a_run_unless_it_is_detached(daemon: Any, llm: LLM, data: Path) -> None:
    class Impatient(training.TrainBar):
        def show(self, event: Any) -> None:
            raise KeyboardInterrupt

    for detached in (False, True):
        run = llm.train(data, "never", progress=False, detached=detached, **OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            training.follow(run, Impatient("never"))
        if detached:
            assert llm.client.call(table.StatProcess(run.pid)).state is not t.State.ZOMBIE
            run.kill()
            with pytest.raises(errors.ProcessEnded):
                run.wait()
        with pytest.raises(errors.NoSuchProcess):
            llm.client.call(table.StatProcess(run.pid))
    assert trainers(daemon) == []


def test_what_is_there_is_not_sent_again_and_what_cannot_be_is_refused_at_once(
    llm: LLM, data: Path, learnt: tuple[str, list[float]]
) -> None:
    sent: list[int] = []
    training.send_dataset(llm.client, data, show=lambda done, _: sent.append(done))
    assert sent == []  # the daemon has it
    with pytest.raises(errors.AlreadyExists):
        llm.train(data, "counts", progress=False)
    with pytest.raises(errors.NoSuchFile):
        llm.train("nothing-of-that-name", progress=False)
    with pytest.raises(errors.InvalidArgument, match="learning_rat"):
        llm.train(data, "no", progress=False, learning_rat=1)


def test_the_shell_trains_shows_and_draws(daemon: Any, data: Path, tmp_path: Path) -> None:
    def llsh(*words: str) -> str:
        out, err = io.StringIO(), io.StringIO()
        with daemon.client() as client:
            code = dispatch(list(words), Shell(Terminal(out, err), kernel=client, stdin=io.StringIO()))
        assert code == 0, err.getvalue()
        return out.getvalue()

    options = ("--max-steps", "6", "--max-length", "64", "--lr", "1e-2", "--rank", "4")
    told = llsh("train", "tiny", str(data), "--name", "shell", *options)
    assert told.startswith("tiny+shell: 6 steps")
    assert "tiny:latest+shell" in llsh("list")
    assert "loss" in llsh("plot", "tiny+shell")
    assert llsh("plot", "tiny+shell", "--json").count('"phase":"train"') == 6
    picture = tmp_path / "curve.svg"
    llsh("plot", "tiny+shell", "--out", str(picture))
    assert b"<svg" in picture.read_bytes()
    pid = llsh("train", "tiny", str(data), "--name", "later", *options, "--detach").strip()
    assert llsh("train", "--follow", pid).startswith("tiny+later: 6 steps")
    llsh("merge", "tiny+shell", "plain")
    assert "tiny:latest+shell" not in llsh("rm", "tiny+shell", "tiny+later", "plain") + llsh("list")


def test_a_data_set_arrives_whole_though_the_kernel_is_killed_on_the_way(daemon: Any, tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_bytes(bytes(97 + n % 26 for n in range(3 * training.CHUNK + 7)))
    killed: list[int] = []

    def show(done: int, size: int) -> None:
        if not killed and done == 2 * training.CHUNK:
            killed.append(daemon.kernel().pid)
            daemon.kernel().kill()

    with daemon.client() as client:
        assert training.send_dataset(client, path, show=show) == "big.txt"
        assert killed
        assert client.read_file("/datasets/big.txt") == path.read_bytes()
