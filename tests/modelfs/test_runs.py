"""What training runs have in work: kept while they need it, and whose the models are that they made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from llmasos.kernel.modelfs.manifest import Lineage, Manifest
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.runs import lineage_of, run_of
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls.errors import (
    AlreadyExists,
    Corrupt,
    InvalidArgument,
    NoSuchFile,
    NoSuchModel,
    StorageFailed,
)

Bring = Callable[..., Manifest]


def alice(owner: str) -> bool:
    return owner == "alice"


def bob(owner: str) -> bool:
    return owner == "bob"


def data(store: ModelFS) -> Path:
    store.datasets.write("alice", "facts.jsonl", 0, b"{}", True, 1 << 20, 0.0)
    return store.datasets.path("alice", "facts.jsonl")


def test_a_run_keeps_its_data_and_its_base(store: ModelFS, bring: Bring, folder: Path) -> None:
    base = bring(folder)
    store.runs.make(7, "alice", base, data(store), "facts.jsonl")
    store.datasets.remove("alice", "facts.jsonl")
    assert store.unlink("tiny", set()) == 0
    assert store.runs.dataset(7).name == "facts.jsonl"
    assert store.runs.dataset(7).read_bytes() == b"{}"
    run = run_of(store.runs.folder(7))
    assert (run.owner, run.base) == ("alice", base)
    assert all(store.blob(digest).exists() for digest in base.digests)
    store.runs.remove(7)
    assert store.gc(set()) == base.size
    with pytest.raises(NoSuchFile):
        store.runs.dataset(7)


def test_runs_without_a_process_are_swept(store: ModelFS, bring: Bring, folder: Path) -> None:
    base = bring(folder)
    for pid in (7, 8, 77):
        store.runs.make(pid, "alice", base, data(store), "facts.jsonl")
    store.runs.sweep({7})
    assert [pid for pid in (7, 8, 77) if store.runs.folder(pid).exists()] == [7]


def test_metrics_are_read_in_pieces(store: ModelFS, bring: Bring, folder: Path) -> None:
    path = store.runs.make(7, "alice", bring(folder), data(store), "facts.jsonl")
    assert store.runs.metrics(7, 0, 10) == store.runs.metrics(8, 0, 10) == (0, b"")
    (path / "metrics.jsonl").write_bytes(b"0123456789")
    assert store.runs.metrics(7, 0, 4) == (10, b"0123")
    assert store.runs.metrics(7, 8, 4) == (10, b"89")
    store.runs.trim(7)
    assert store.runs.metrics(7, 0, 4) == (10, b"0123")


def test_what_is_missing_or_damaged_is_told(
    store: ModelFS, bring: Bring, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, facts = bring(folder), data(store)
    path = store.runs.make(7, "alice", base, facts, "facts.jsonl")
    with pytest.raises(Corrupt, match=r"lineage\.json"):
        lineage_of(path)
    lineage = Lineage(base.digest, "id", loss=0.5)
    assert store.runs.trained(7, lineage) == f"run:{path}"
    assert lineage_of(path) == lineage
    (path / "run.json").write_bytes(b"{")
    with pytest.raises(Corrupt, match=r"run\.json"):
        run_of(path)
    assert store.runs.bases() == []

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageFailed, match="No space left"):
        store.runs.make(9, "alice", base, facts, "facts.jsonl")
    assert not store.runs.folder(9).exists()


def test_somebodys_model_is_as_a_missing_one_to_others(store: ModelFS, bring: Bring, folder: Path) -> None:
    mine = msgspec.structs.replace(bring(folder), owner="alice", lineage=Lineage("sha256:b", loss=0.25))
    made = store.commit(parse_name("secret"), mine, replace=False)
    assert store.resolve("secret", alice) == made
    assert [info.path for info in store.ls("/models", bob)] == ["/models/tiny:latest"]
    assert [info.path for info in store.ls("/models", alice)] == [
        "/models/secret:latest",
        "/models/tiny:latest",
    ]
    details = store.stat("/models/secret", alice).details
    assert (details["owner"], details["lineage.loss"]) == ("alice", 0.25)
    for name in ("secret", "secrets"):
        for call in (
            lambda name: store.resolve(name, bob),
            lambda name: store.stat(f"/models/{name}", bob),
            lambda name: store.ls(f"/models/{name}", bob),
            lambda name: store.read(f"/models/{name}/config.json", 0, 1, bob),
            lambda name: store.link(name, "stolen", bob),
            lambda name: store.unlink(name, set(), bob),
        ):
            with pytest.raises(NoSuchModel) as caught:
                call(name)
            assert "did you mean secret" not in caught.value.hint
    assert store.resolve("secret") == made
    store.commit(parse_name("again"), msgspec.structs.replace(mine, owner="alice/label"))
    assert (store.used("alice"), store.used("alice/label"), store.used("bob")) == (made.size, made.size, 0)


def test_what_training_commits_replaces_nothing(store: ModelFS, bring: Bring, folder: Path) -> None:
    tiny = bring(folder)
    other = msgspec.structs.replace(tiny, owner="alice")
    with pytest.raises(AlreadyExists, match="tiny"):
        store.commit(parse_name("tiny"), other, replace=False)
    assert store.resolve("tiny") == tiny
    assert store.commit(parse_name("tiny"), msgspec.structs.replace(tiny, created=1.0), replace=False) == tiny
    assert list(store.tmp.glob("file-*")) == []


def test_an_adapters_name_is_an_adapters(store: ModelFS, bring: Bring, folder: Path) -> None:
    tiny = bring(folder)
    bring(folder, "other")
    adapter = msgspec.structs.replace(tiny, base=store.put_bytes(tiny.content)[0])
    for name, manifest in (("tiny+x", tiny), ("x", adapter)):
        with pytest.raises(InvalidArgument):
            store.commit(parse_name(name), manifest)
    made = store.commit(parse_name("tiny+x"), adapter)
    assert store.base_of(made) == msgspec.structs.replace(tiny, created=0.0)
    assert store.link("tiny+x", "tiny+y").digest == made.digest
    for target in ("x", "other+x"):
        with pytest.raises(InvalidArgument):
            store.link("tiny+x", target)
    store.blob(made.base).unlink()
    with pytest.raises(Corrupt, match="the base of"):
        store.base_of(made)
    assert any("the base of" in problem for problem in store.fsck())
    assert store.unlink("other", set()) == 0, "nobody can tell what the adapter needs"


def test_manifests_of_before_are_read_as_they_were(store: ModelFS, bring: Bring, folder: Path) -> None:
    manifest = bring(folder)
    text = (store.manifests / "tiny" / "latest.json").read_text()
    assert not any(f'"{field}"' in text for field in ("base", "owner", "lineage"))
    assert (manifest.base, manifest.owner, manifest.lineage) == ("", "", None)
