"""Adapters in the kernel's tables: loaded beside their model when somebody wants them, each a model of its
own to those who use it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest
from llmasos.drivers import base
from llmasos.kernel import adapters
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import Manifest, ManifestFile
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from .conftest import World, infer

ALICE = Subject("alice", 1, 1, False, frozenset(t.Capability) - {t.Capability.ADMIN})
BOB = Subject("bob", 2, 2, False, ALICE.rights)


def adapter(world: World, name: str, owner: str = "", **config: object) -> None:
    """Commits an adapter of tiny; the null driver makes its tokens depend on the files."""
    data = json.dumps({"peft_type": "LORA", "name": name, **config}).encode()
    digest, size = world.store.put_bytes(data)
    files = [ManifestFile("adapter_config.json", digest, size)]
    base_digest, _ = world.store.put_bytes(world.store.resolve("tiny").content)
    manifest = Manifest(1, "test", "null", 0, "", 4096, "", time.time(), files, base=base_digest, owner=owner)
    world.store.commit(parse_name(f"tiny+{name}"), manifest)


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.model("tiny")
    for name in ("a", "b"):
        adapter(made, name)
    made.attach()
    made.flush()
    return made


def generate(world: World, model: str, tokens: list[int] | None = None) -> list[int]:
    id_ = world.send(infer(tokens or [1, 2, 3], model=model, max_tokens=4))
    world.turn(12)
    assert world.result(id_).kind == wire.Kind.REPLY, world.result(id_).body
    return world.tokens(id_)


def test_each_adapter_answers_for_itself_beside_the_others_in_one_step(world: World) -> None:
    alone = {model: generate(world, model) for model in ("tiny", "tiny+a", "tiny+b")}
    assert len({tuple(tokens) for tokens in alone.values()}) == 3
    ids = {model: world.send(infer([1, 2, 3], model=model, max_tokens=4)) for model in alone}
    world.turn(12)
    assert {model: world.tokens(id_) for model, id_ in ids.items()} == alone
    assert any(len(batch.work) == 3 for batch in world.sent)
    assert len(world.loaded[1]) == 1, "the model is loaded once"


def test_a_process_is_of_the_adapter_it_was_spawned_with(world: World) -> None:
    id_ = world.send(table.SpawnModel("tiny+a"))
    world.turn(4)
    body = world.result(id_).body
    assert body["model"] == "tiny:latest+a"
    assert body["digest"] == world.store.resolve("tiny+a").digest
    info = world.send(table.StatProcess(body["pid"]))
    world.flush()
    assert world.result(info).body["model"] == "tiny:latest+a"


def test_prefixes_are_not_shared_between_adapters(world: World) -> None:
    prompt = list(range(1, 65))
    first = generate(world, "tiny+a", prompt)
    assert generate(world, "tiny+b", prompt) != first
    id_ = world.send(infer(prompt, model="tiny+a", max_tokens=4))
    world.turn(12)
    assert world.tokens(id_) == first
    assert world.result(id_).body["cached_tokens"] > 0


def test_a_worker_that_dies_gets_model_and_adapter_again(world: World) -> None:
    id_ = world.send(infer([1, 2, 3], model="tiny+a", max_tokens=8))
    world.turn(5)
    told = world.tokens(id_)
    world.die()
    world.attach(2)
    world.turn(20)
    tokens = world.tokens(id_)
    assert len(tokens) == 8
    assert tokens[: len(told)] == told
    assert tokens[:4] == generate(world, "tiny+a")


def test_an_adapter_that_cannot_be_loaded_fails_only_its_own(world: World) -> None:
    adapter(world, "broken")
    load = world.drivers[1].load_adapter
    broken = world.store.driver_files(world.store.resolve("tiny+broken"))

    def refuse(handle: int, number: int, files: dict[str, base.File]) -> int:
        if files == broken:
            raise errors.UnsupportedModel("told to refuse")
        return load(handle, number, files)

    world.drivers[1].load_adapter = refuse  # type: ignore[method-assign]
    id_ = world.send(infer([1, 2, 3], model="tiny+broken", max_tokens=4))
    other = world.send(infer([1, 2, 3], model="tiny+a", max_tokens=4))
    world.turn(12)
    assert world.error(id_) is errors.UnsupportedModel
    assert len(world.tokens(other)) == 4


def test_idle_adapters_are_unloaded_oldest_first(world: World) -> None:
    names = [f"n{n}" for n in range(adapters.MOST_IDLE + 3)]
    for name in names:
        adapter(world, name)
        generate(world, f"tiny+{name}")
    gone = [message for message in world.adapters if isinstance(message, base.UnloadAdapter)]
    assert 1 <= len(gone) <= 3
    assert len(world.kernel.devices["null"].pools[0].adapters) <= adapters.MOST_IDLE + 2
    assert len(generate(world, f"tiny+{names[0]}")) == 4


def test_a_cancelled_wait_for_an_adapter_leaves_nothing(world: World) -> None:
    id_ = world.send(infer([1], model="tiny+a", max_tokens=4))
    world.kernel.message(b"\0a", Subject("root", 0, 1, True), wire.encode_cancel(id_))
    world.turn(4)
    assert not any(one.waiters for one in world.kernel.devices["null"].pools[0].adapters)


def test_somebody_elses_adapter_does_not_exist(world: World) -> None:
    adapter(world, "mine", owner="bob")
    id_ = world.send(infer([1], model="tiny+mine", max_tokens=4), b"\0b", subject=ALICE)
    listed = world.send(table.Ls("/models"), b"\0b", subject=ALICE)
    missing = world.send(infer([1], model="tiny+none", max_tokens=4), b"\0b", subject=ALICE)
    world.turn(4)
    assert world.error(id_, b"\0b") is errors.NoSuchModel
    assert world.error(missing, b"\0b") is errors.NoSuchModel
    assert not any("mine" in entry["path"] for entry in world.result(listed, b"\0b").body["entries"])


def test_a_merge_replaces_nothing(world: World) -> None:
    adapter(world, "a")
    refused = world.send(table.Pull("tiny", "merge:tiny+a"))
    world.turn()
    assert world.error(refused) is errors.AlreadyExists
    assert not world.kernel.programs.to_start


@pytest.mark.parametrize(
    ("model", "source", "owned"),
    [
        ("merged", "merge:tiny+a", False),
        ("merged", "merge:tiny+mine", True),
        ("private+b", "hf:o/r", True),
        ("tiny+new", "hf:o/r", False),
    ],
)
def test_what_is_made_of_somebodys_is_theirs_and_not_to_be_had_by_others(
    world: World, model: str, source: str, owned: bool
) -> None:
    adapter(world, "mine", owner="alice")
    private = world.store.resolve("tiny")
    world.store.commit(parse_name("private"), msgspec.structs.replace(private, owner="alice"))
    refused = world.send(table.Pull(model, source), b"\0b", subject=BOB)
    world.send(table.Pull(model, source), b"\0c", subject=ALICE)
    world.turn()
    started = [program.arguments for program in world.kernel.programs.to_start]
    if owned:
        assert world.error(refused, b"\0b") is errors.NoSuchModel
        (arguments,) = started
        assert arguments[-2:] == ["--owner", "alice"]
    else:
        (arguments,) = started  # both watch one import
        assert "--owner" not in arguments
