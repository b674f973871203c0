"""Recipes of options, sending of data sets, and the bar, without a daemon behind them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.syscalls.training import Lora, Mesh, Method, Recipe, Schedule, Shard, TrainEvent
from llmasos.userland import training
from llmasos.userland.models import full_name, reference


class Datasets:
    """A client of a kernel that keeps data sets."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.writes: list[table.Write] = []

    def call(self, call: Any) -> Any:
        if isinstance(call, table.Stat):
            if call.path not in self.kept:
                raise errors.NoSuchFile("none")
            data = self.kept[call.path]
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            return t.FileInfo(call.path, t.FileKind.DATASET, len(data), digest)
        assert isinstance(call, table.Write)
        self.writes.append(call)
        part = self.kept.get("unfinished", b"")
        assert call.offset == len(part)
        self.kept["unfinished"] = part + call.data
        if call.last:
            self.kept[call.path] = self.kept.pop("unfinished")
        return None


# Recipes


def test_a_recipe_of_flat_options() -> None:
    made = training.make_recipe(
        {
            "method": "full",
            "r": 16,
            "target_modules": "q_proj, v_proj",
            "learning_rate": "1e-3",
            "lr_scheduler_type": "cosine",
            "packing": "false",
            "bf16": None,
            "mesh.data": "2",
            "mesh": {"shard": "full"},
        }
    )
    assert made == Recipe(
        method=Method.FULL,
        lora=Lora(r=16, target_modules=["q_proj", "v_proj"]),
        learning_rate=1e-3,
        lr_scheduler_type=Schedule.COSINE,
        packing=False,
        mesh=Mesh(data=2, shard=Shard.FULL),
    )


def test_no_options_are_the_defaults() -> None:
    assert training.make_recipe({}) == Recipe()


def test_a_list_of_modules_and_a_word_are_both_taken() -> None:
    assert training.make_recipe({"target_modules": "all-linear"}).lora.target_modules == ["all-linear"]
    assert training.make_recipe({"target_modules": ["q_proj"]}).lora.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("learning_rat", "learning_rate"), ("lora_aplha", "lora_alpha"), ("mesh.dat", "mesh.data")],
)
def test_an_unknown_option_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=name) as caught:
        training.make_recipe({name: 1})
    assert caught.value.hint == f"did you mean {near}?"


def test_what_is_like_no_option_is_refused_with_all_of_them() -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        training.make_recipe({"zzz": 1})
    assert all(name in caught.value.hint for name in ("num_train_epochs", "lora_dropout", "mesh.stages"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magic"},
        {"r": 0},
        {"learning_rate": -1},
        {"max_steps": "many"},
        {"validation_split": 0.9},
        {"mesh": {"datas": 2}},
        {"mesh": 2},
        {"target_modules": ["a b"]},
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        training.make_recipe(options)


# Data sets


@pytest.mark.parametrize("size", [0, 1, training.CHUNK - 1, training.CHUNK, training.CHUNK * 2 + 5])
def test_a_file_is_sent_in_pieces_and_not_again(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(bytes(n % 251 for n in range(size)))
    client: Any = Datasets()
    shown: list[tuple[int, int]] = []
    assert training.send_dataset(client, path, show=lambda *how_far: shown.append(how_far)) == "data.jsonl"
    assert client.kept == {"/datasets/data.jsonl": path.read_bytes()}
    assert all(len(call.data) <= training.CHUNK for call in client.writes)
    assert [call.last for call in client.writes] == [False] * (len(client.writes) - 1) + [True]
    assert shown[-1] == (size, size)
    client.writes.clear()
    training.send_dataset(client, path)
    assert client.writes == []
    path.write_bytes(bytes(size) + b"new")
    training.send_dataset(client, path)
    assert client.kept == {"/datasets/data.jsonl": path.read_bytes()}


@pytest.mark.parametrize(
    ("file", "name"),
    [("my data.jsonl", "my-data.jsonl"), ("_.hidden", "hidden"), ("ä", "data"), ("x" * 90, "x" * 64)],
)
def test_a_data_set_is_called_as_its_file(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_text("a")
    client: Any = Datasets()
    assert training.send_dataset(client, tmp_path / file) == name
    assert training.send_dataset(client, tmp_path / file, "other") == "other"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    client: Any = Datasets()
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(errors.NoSuchFile, match=str(path)):
            training.send_dataset(client, path)
    assert client.kept == {}


# The bar


def test_the_bar_shows_how_a_run_goes(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with training.TrainBar("tiny+x") as bar:
        bar.sent(1_000_000, 2_000_000)
        bar.show(TrainEvent("prepare", 10, 20, tokens=5))
        bar.show(TrainEvent("train", 3, 10, loss=2.5, tokens_per_s=123.4, eta_s=75))
        bar.show(TrainEvent("eval", 3, 10, eval_loss=2.25))
        bar.show(TrainEvent("save", 3, 10))
        bar.show(TrainEvent("train", 4, 10, loss=1.5, tokens_per_s=100, eta_s=3700))
        bar.show(TrainEvent("eval", 4, 10, eval_loss=1.75))
    shown = capsys.readouterr().err
    for part in ("1.0 of 2.0 MB", "5 tokens", "train tiny+x", "4/10", "loss 1.5000, eval 1.7500"):
        assert part in shown
    assert "100 tokens/s" in shown
    assert "1:01:40 left" in shown


# Names


def test_names_of_adapters_are_not_pulled_from_anywhere() -> None:
    assert full_name("smollm2+mine") == "smollm2:latest+mine"
    assert full_name("smollm2:v2+mine") == "smollm2:v2+mine"
    assert reference("smollm2+mine").name == "smollm2:latest+mine"
    assert reference("smollm2+mine").source == reference("smollm2").source
    assert reference("owner/model+mine").source == ""
