"""KV files: what is written comes back, and what is not as it was written is found out."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llmasos.drivers import base, kv_file
from llmasos.drivers.null import NullDriver
from llmasos.syscalls import errors
from msgspec.structs import replace

STAMP = base.KvStamp("sha256:model", b"\1" * 32, 40)
HEADER = kv_file.Header(STAMP, "float32", "float32", "slots", 128, 3)
BLOCKS = [bytes([n]) * 128 for n in range(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "1.kv"
    assert kv_file.write(made, HEADER, BLOCKS, durable=True) == made.stat().st_size
    return made


def test_blocks_come_back_from_any_place(path: Path) -> None:
    assert list(kv_file.read(path, HEADER, 0, 3)) == BLOCKS
    assert list(kv_file.read(path, HEADER, 1, 2)) == BLOCKS[1:]
    with pytest.raises(errors.Corrupt):
        list(kv_file.read(path, HEADER, 1, 3))


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int8"}, {"kv_layout": "other"}, {"stamp": replace(STAMP, history=b"\2" * 32)}],
)
def test_kv_of_something_else_is_refused(path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(errors.Corrupt, match=next(iter(change))):
        list(kv_file.read(path, replace(HEADER, **change), 0, 3))


def test_every_changed_bit_is_found(path: Path) -> None:
    whole = path.read_bytes()
    chance = random.Random(4)
    for _ in range(1000):
        place = chance.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(errors.Corrupt):
            list(kv_file.read(path, HEADER, 0, 3))


def test_a_cut_and_a_longer_file_are_found(path: Path) -> None:
    whole = path.read_bytes()
    for data in [b"", whole[:5], whole[:60], whole[:-1], whole + b"\0"]:
        path.write_bytes(data)
        with pytest.raises(errors.Corrupt):
            list(kv_file.read(path, HEADER, 0, 3))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("site", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, code: int
) -> None:
    real: Callable[..., Any] = getattr(os, site)
    for place in range(20):
        calls = 0

        def fails(*arguments: Any, place: int = place) -> Any:
            nonlocal calls
            calls += 1
            if calls == place + 1:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        monkeypatch.setattr(kv_file.os, site, fails)  # type: ignore[attr-defined]
        driver, loaded = _resident()
        order = base.Export(7, 1, str(tmp_path / "7.kv"), STAMP, [0, 1, 2], durable=True)
        try:
            kv_file.carry_out(driver, loaded, order)
        except errors.StorageFailed:
            assert not list(tmp_path.iterdir())
        else:
            break  # the site has fewer calls than that
        finally:
            monkeypatch.setattr(kv_file.os, site, real)  # type: ignore[attr-defined]
    assert place > 0, "the site was never reached"


def test_export_import_and_relay_through_a_driver(tmp_path: Path) -> None:
    driver, loaded = _resident()
    driver.import_blocks(1, [4, 2, 9], b"".join(BLOCKS))
    first, second = str(tmp_path / "1.kv"), str(tmp_path / "2.kv")
    kv_file.carry_out(driver, loaded, base.Export(1, 1, first, STAMP, [4, 2, 9]))
    kv_file.carry_out(driver, loaded, base.Relay(2, first, second, durable=True))
    kv_file.carry_out(driver, loaded, base.Import(3, 1, second, STAMP, 1, [7, 8], [(4, 6)]))
    assert driver.export_blocks(1, [6, 7, 8]) == b"".join(BLOCKS)
    Path(first).write_bytes(b"something else")
    with pytest.raises(errors.Corrupt):
        kv_file.carry_out(driver, loaded, base.Relay(4, first, str(tmp_path / "3.kv")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.kv", "2.kv"]
    with pytest.raises(errors.StorageFailed):
        kv_file.carry_out(driver, loaded, base.Import(5, 1, str(tmp_path / "none.kv"), STAMP, 0, [7], []))


def _resident() -> tuple[NullDriver, dict[int, base.Loaded]]:
    driver = NullDriver()
    return driver, {1: driver.load(base.LoadSpec(1, {}, "", 0.5))}
