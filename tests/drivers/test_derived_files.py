"""Derived files: which packed weights are used again, and what serves where none can be written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmasos.drivers import base
from llmasos.drivers.native import pack
from llmasos.syscalls import errors

from .test_pack import CONFIGS, expected_matrices, flip, load, mapped, write

__all__ = ["mapped"]


def test_a_derived_file_stands_in_for_the_originals(tmp_path: Path) -> None:
    files = write(tmp_path / "model", CONFIGS["qwen3"])
    derived, first = tmp_path / "kept" / "here", load(files, "int8", tmp_path / "kept" / "here")
    (kept,) = derived.iterdir()
    weights = files["model.gguf"].digest.removeprefix("sha256:")
    assert kept.name.startswith(weights[:32])
    assert kept.name.endswith(f"-int8-v{pack.VERSION}.pack")
    shutil.rmtree(tmp_path / "model")
    second = load(files, "int8", derived)
    assert (second.architecture, second.nbytes) == (first.architecture, first.nbytes)
    assert second.tensors.keys() == first.tensors.keys()
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(pack.unpack(second.tensors[name]), pack.unpack(tensor))
    second.close()
    with pytest.raises(errors.Corrupt):  # what suits it is float32, which nobody has packed
        load(files, "", derived)


def test_what_suits_the_model_is_found_too(tmp_path: Path) -> None:
    files = write(tmp_path / "model", CONFIGS["llama"], lambda name: "BF16")
    load(files, "int8", tmp_path / "derived")
    assert load(files, "", tmp_path / "derived").dtype == "bfloat16"
    shutil.rmtree(tmp_path / "model")
    assert load(files, "", tmp_path / "derived").dtype == "bfloat16"


def forge(path: Path, **change: Any) -> None:
    """Rewrites the header, digest and all."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[48 : 48 + length])
    start = -(-(48 + length) // 4096) * 4096
    for name, value in change.items():
        if name in header:
            header[name] = value
        elif name in header["architecture"]:
            header["architecture"][name] = value
        else:
            header["tensors"]["layer.0.qkv"][("offset", "nbytes", "format", "rows", "cols").index(name)] = (
                value
            )
    body = json.dumps(header).encode().ljust(length)
    fixed = data[:8] + len(body).to_bytes(8, "little") + hashlib.sha256(body).digest()
    path.write_bytes((fixed + body).ljust(start, b"\0") + data[start:])


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: flip(path, -1),
        lambda path: flip(path, 3),
        lambda path: flip(path, 60),
        lambda path: flip(path, 4096 * 3),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:30]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"LLMPACK\n" + b"\xff" * 8 + path.read_bytes()[16:]),
        lambda path: forge(path, offset=2**40),
        lambda path: forge(path, offset=-64),
        lambda path: forge(path, offset=1),
        lambda path: forge(path, rows=32),
        lambda path: forge(path, format="plain"),
        lambda path: forge(path, format="int4"),
        lambda path: forge(path, kv_heads=0),
        lambda path: forge(path, heads=2**30),
        lambda path: forge(path, rotary=11),
        lambda path: forge(path, sources={}),
        lambda path: forge(path, dtype="int4"),
        lambda path: forge(path, version=pack.VERSION + 1),
    ],
)
def test_a_derived_file_that_is_not_right_is_made_anew(harm: Callable[[Path], None], tmp_path: Path) -> None:
    files = write(tmp_path / "model", CONFIGS["llama"])
    expected = {name: pack.unpack(tensor) for name, tensor in load(files, "int8").tensors.items()}
    load(files, "int8", tmp_path / "derived").close()
    (kept,) = (tmp_path / "derived").iterdir()
    good = kept.read_bytes()
    harm(kept)
    assert kept.read_bytes() != good
    notes: list[str] = []
    spec = base.LoadSpec(1, files, "int8", 0.5, derived=str(tmp_path / "derived"))
    packed = pack.load(spec, notes.append)
    assert "not used" in notes[0]
    for name, tensor in packed.tensors.items():
        np.testing.assert_array_equal(pack.unpack(tensor), expected[name])
    assert kept.read_bytes() == good


def test_forging_nothing_leaves_a_usable_file(tmp_path: Path) -> None:
    """So the cases above fail for what they changed."""
    files = write(tmp_path / "model", CONFIGS["llama"])
    load(files, "int8", tmp_path / "derived")
    (kept,) = (tmp_path / "derived").iterdir()
    forge(kept)
    shutil.rmtree(tmp_path / "model")
    assert load(files, "int8", tmp_path / "derived").dtype == "int8"


def test_other_sources_have_their_own_file_and_do_not_use_each_others(tmp_path: Path) -> None:
    derived = tmp_path / "derived"
    files = write(tmp_path / "a", CONFIGS["llama"])
    others = [write(tmp_path / "b", CONFIGS["llama"], seed=4)]
    others.append(write(tmp_path / "c", {**CONFIGS["llama"], "rope_theta": 77.0}))
    load(files, "", derived)
    (kept,) = derived.iterdir()
    for count, other in enumerate(others, 2):
        packed = load(other, "", derived)
        assert len(list(derived.iterdir())) == count
        theirs = next(path for path in derived.iterdir() if path.stat().st_mtime_ns > kept.stat().st_mtime_ns)
        shutil.copy(kept, tmp_path / "copy")
        (tmp_path / "copy").replace(theirs)  # even if somebody puts the wrong one there
        again = load(other, "", derived)
        for name, tensor in packed.tensors.items():
            np.testing.assert_array_equal(pack.unpack(again.tensors[name]), pack.unpack(tensor))
        theirs.unlink()
        load(other, "", derived)


def test_another_version_packs_anew_and_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "model", CONFIGS["llama"])
    load(files, "", tmp_path / "derived")
    load(files, "int4", tmp_path / "derived")
    monkeypatch.setattr(pack, "VERSION", pack.VERSION + 1)
    load(files, "", tmp_path / "derived")
    names = sorted(path.name.partition("-")[2].partition("-")[2] for path in (tmp_path / "derived").iterdir())
    assert names == [f"float32-v{pack.VERSION}.pack", f"int4-v{pack.VERSION - 1}.pack"]


@pytest.mark.parametrize("room", [0, 1 << 14])
def test_a_full_disk_keeps_the_weights_in_memory(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "model", CONFIGS["llama"])
    written, real = 0, os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > room and "memfd" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    notes: list[str] = []
    spec = base.LoadSpec(1, files, "", 0.5, derived=str(tmp_path / "derived"))
    packed = pack.load(spec, notes.append)
    assert "No space left" in notes[0]
    assert "in memory" in notes[1]
    np.testing.assert_array_equal(
        pack.unpack(packed.tensors["layer.0.down"]), expected_matrices(files, 0)["down"]
    )
    assert not list((tmp_path / "derived").iterdir())


def test_what_a_disk_gives_back_otherwise_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path / "model", CONFIGS["llama"])
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        size = os.fstat(descriptor).st_size
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, size - 100)[0] ^ 1]), size - 100)

    monkeypatch.setattr(os, "fsync", fsync)
    notes: list[str] = []
    packed = pack.load(base.LoadSpec(1, files, "", 0.5, derived=str(tmp_path / "derived")), notes.append)
    assert "came back otherwise" in notes[0]
    assert "in memory" in notes[1]
    np.testing.assert_array_equal(
        pack.unpack(packed.tensors["layer.0.down"]), expected_matrices(files, 0)["down"]
    )
    assert not list((tmp_path / "derived").iterdir())


def test_without_memory_a_nameless_file_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "model", CONFIGS["llama"])
    monkeypatch.setattr(pack.host, "memory", lambda: (1 << 30, 100))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    packed = load(files)
    assert not list((tmp_path / "scratch").iterdir())
    np.testing.assert_array_equal(
        pack.unpack(packed.tensors["layer.0.down"]), expected_matrices(files, 0)["down"]
    )
    (tmp_path / "scratch").rmdir()
    with pytest.raises(errors.NeverFits, match="packed weights"):
        load(files)


def test_what_a_killed_worker_began_is_swept_and_what_another_writes_is_left(tmp_path: Path) -> None:
    import fcntl

    derived = tmp_path / "derived"
    derived.mkdir()
    (derived / "abc.tmp").write_bytes(b"half")
    with (derived / "def.tmp").open("wb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        load(write(tmp_path / "model", CONFIGS["llama"]), "", derived)
        assert {path.suffix for path in derived.iterdir()} == {".pack", ".tmp"}
        assert not (derived / "abc.tmp").exists()
