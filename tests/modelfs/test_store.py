"""The store: complete or not there, never losing what is needed, never keeping what is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from llmasos.kernel.modelfs.store import Manifest, ModelFS
from llmasos.syscalls.errors import Corrupt, InvalidArgument, NoSuchFile, NoSuchModel

Bring = Callable[..., Manifest]


def blobs(store: ModelFS) -> set[str]:
    return {path.name for path in store.blobs.iterdir()}


def test_what_was_imported_can_be_listed_and_read(store: ModelFS, bring: Bring, folder: Path) -> None:
    manifest = bring(folder)
    assert store.resolve("tiny") == manifest == store.resolve("tiny:latest")
    [model] = store.ls("/models")
    assert (model.path, model.kind, model.digest) == ("/models/tiny:latest", "model", manifest.digest)
    assert model.size == sum(f.size for f in store.ls(model.path))
    assert model.details["architecture"] == "llama"
    assert model.details["parameters"] == 258 * 32 + 32
    assert {f.path.rpartition("/")[2] for f in store.ls("/models/tiny")} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tensors.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = (folder / "config.json").read_bytes()
    assert store.read("/models/tiny/config.json", 0, 1 << 20) == (len(config), config)
    assert store.read("/models/tiny:latest/config.json", 5, 7) == (len(config), config[5:12])
    assert store.read("/models/tiny/config.json", 10**9, 7) == (len(config), b"")
    assert store.stat("/models/tiny/config.json").size == len(config)
    assert store.usage() == (model.size, 6)
    assert store.fsck() == store.garbage() == []


def test_errors_tell_what_to_do(store: ModelFS, bring: Bring, folder: Path) -> None:
    bring(folder)
    for name, hint in {
        "tinny": "did you mean tiny?",
        "gpt2": "llsh pull gpt2",
        "a/b:v1": "llsh pull a/b:v1",
    }.items():
        with pytest.raises(NoSuchModel) as caught:
            store.resolve(name)
        assert hint in caught.value.hint
    with pytest.raises(NoSuchFile, match=r"did you mean config\.json"):
        store.stat("/models/tiny/confg.json")
    with pytest.raises(NoSuchFile):
        store.read("/models/tiny", 0, 1)
    with pytest.raises(NoSuchFile):
        store.ls("/etc")
    with pytest.raises(InvalidArgument):
        store.read("/models/tiny/config.json", 0, (1 << 20) + 1)


def test_a_second_name_keeps_the_blobs(store: ModelFS, bring: Bring, folder: Path) -> None:
    manifest = bring(folder)
    before = blobs(store)
    assert store.link("tiny", "my/copy:v2").digest == manifest.digest
    assert store.unlink("tiny", set()) == 0
    assert blobs(store) == before
    assert [m.path for m in store.ls("/models")] == ["/models/my/copy:v2"]
    assert store.unlink("my/copy:v2", set()) == manifest.size
    assert blobs(store) == set()
    assert list(store.manifests.iterdir()) == []
    with pytest.raises(NoSuchModel):
        store.unlink("tiny", set())


def test_a_loaded_model_keeps_its_blobs_until_it_is_unloaded(
    store: ModelFS, bring: Bring, folder: Path
) -> None:
    manifest = bring(folder)
    assert store.unlink("tiny", manifest.digests) == 0
    files = store.driver_files(manifest)
    assert all(Path(file.path).stat().st_size == file.size for file in files.values())
    assert store.gc(set()) == manifest.size
    assert not Path(files["config.json"].path).exists()


def test_what_was_derived_goes_with_its_blob(store: ModelFS, bring: Bring, folder: Path) -> None:
    assert store.derived.stat().st_mode & 0o777 == 0o700
    manifest = bring(folder)
    [weights] = [f.digest for f in manifest.files if f.path == "model.safetensors"]
    stem = weights.removeprefix("sha256:")[:32]
    kept, orphan = store.derived / f"{stem}-avx2-int8", store.derived / f"{'0' * 32}-avx2-int8"
    begun, stale = store.derived / f"{stem}-x.1.tmp", store.derived / f"{stem}-y.2.tmp"
    for path in (kept, orphan, begun, stale):
        path.write_bytes(bytes(1000))
    os.utime(stale, (0, 0))
    assert store.usage() == (manifest.size + 4000, 6)
    assert store.fsck() == store.garbage() == []
    assert store.gc(set()) == 2000
    assert set(store.derived.iterdir()) == {kept, begun}
    assert store.unlink("tiny", {weights}) == manifest.size - len((folder / "model.safetensors").read_bytes())
    assert kept.exists(), "a resident model is made of it"
    store.gc(set())
    assert list(store.derived.iterdir()) == []


def test_gc_waits_for_imports(store: ModelFS) -> None:
    with store.importing():
        digest, size = store.put_bytes(b"not yet in a manifest")
        assert store.gc(set()) == 0
        assert store.blob(digest).exists()
    assert store.gc(set()) == size


def test_fsck_finds_what_is_wrong(store: ModelFS, bring: Bring, folder: Path) -> None:
    manifest = bring(folder)
    blob = store.blob(next(f.digest for f in manifest.files if f.path == "model.safetensors"))
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    store.blob(next(f.digest for f in manifest.files if f.path == "config.json")).unlink()
    (store.blobs / ("sha256-" + "0" * 64)).write_bytes(b"orphan")
    (store.tmp / "import-dead").mkdir()
    problems = "\n".join(store.fsck())
    assert "model.safetensors: its content is not what its digest says" in problems
    assert "config.json: its blob is missing" in problems
    assert len(problems.splitlines()) == 2
    leftover, orphan = store.garbage()
    assert leftover == "tmp/import-dead: left over from an import"
    assert orphan == f"blob sha256-{'0' * 64}: no model needs it"
    with pytest.raises(Corrupt, match="llsh pull tiny"):
        store.read("/models/tiny/config.json", 0, 1)
    bring(folder)  # importing again mends it
    store.gc(set())
    assert store.fsck() == store.garbage() == []


def test_a_damaged_manifest_is_shown_and_nothing_is_thrown_away(
    store: ModelFS, bring: Bring, folder: Path
) -> None:
    bring(folder)
    bring(folder, "other")
    before = blobs(store)
    (store.manifests / "tiny" / "latest.json").write_text('{"schema":1,')
    assert "damaged" in str(next(m for m in store.ls("/models") if "tiny" in m.path).details["problem"])
    with pytest.raises(Corrupt):
        store.resolve("tiny")
    assert store.unlink("other", set()) == 0
    assert blobs(store) == before
    assert any("damaged" in problem for problem in store.fsck())
    assert store.unlink("tiny", set()) > 0
    assert blobs(store) == set()


def test_a_manifest_cannot_point_outside(store: ModelFS, bring: Bring, folder: Path) -> None:
    bring(folder)
    path = store.manifests / "tiny" / "latest.json"
    good = path.read_text()
    for old, new in (("config.json", "../config"), ("sha256:", "sha256:/"), ('"size":', '"size":-')):
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(Corrupt):
            store.resolve("tiny")


@pytest.mark.parametrize("phase", ["copy", "index", "store"])
def test_an_importer_killed_in_the_middle_leaves_nothing(
    store: ModelFS, folder: Path, tmp_path: Path, phase: str
) -> None:
    big = folder / "model.safetensors"
    header = b'{"w":{"dtype":"F32","shape":[67108864],"data_offsets":[0,268435456]}}'
    with big.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 268435456)
    command = [sys.executable, "-m", "llmasos.kernel.modelfs.importer"]
    command += ["--home", str(tmp_path / "home"), "--model", "tiny", "--source", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as importer:
        assert importer.stdout is not None
        for line in importer.stdout:
            if f'"phase":"{phase}"'.encode() in line:
                assert store.gc(set()) == 0
                importer.send_signal(signal.SIGKILL)
                break
    assert importer.returncode == -signal.SIGKILL
    assert store.ls("/models") == []
    assert store.garbage() != []
    assert store.gc(set()) > 0
    assert store.fsck() == store.garbage() == []
    assert store.usage() == (0, 0)


def test_an_importer_dies_with_its_parent(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    endless = (
        "from llmasos.kernel.modelfs import importer; importer.limit_self()\n"
        f"print(1, flush=True); open({str(fifo)!r})"
    )
    script = (
        "import subprocess, sys\n"
        f"command = [sys.executable, '-c', {endless!r}]\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    child = Path(f"/proc/{int(done.stdout)}")
    for _ in range(100):
        if not child.exists() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the importer outlived its parent")


def test_old_wheels_are_swept_and_fresh_ones_kept(store: ModelFS) -> None:
    fresh, old = store.wheels / "fresh.whl", store.wheels / "old.whl"
    for wheel in (fresh, old):
        wheel.write_bytes(b"x")
    os.utime(old, (0, 0))
    store.gc(set())
    assert fresh.exists()
    assert not old.exists()


def test_the_kernel_side_imports_nothing_heavy() -> None:
    script = (
        "import sys, llmasos.kernel.modelfs.store, llmasos.kernel.modelfs.catalogue as c; c.load()\n"
        "print([m for m in ('torch', 'numpy', 'gguf', 'huggingface_hub', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
