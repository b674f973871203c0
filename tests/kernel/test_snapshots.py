"""A process is saved, restored and moved; its text goes on as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llmasos.drivers import base
from llmasos.kernel.modelfs import session_files
from llmasos.kernel.tenants import LABEL_RIGHTS, Subject
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from .conftest import World, infer, reference

PROMPT = list(range(1, 101))
OTHER = Subject("other", 1000, 2, False, LABEL_RIGHTS)


class Pair(World):
    """Two devices of one kind."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, devices=("null", "null:1"))
        self.model("tiny")
        self.attach(1, "null")
        self.attach(2, "null:1")

    def ask(self, call: table.Call, turns: int = 4, **arguments: Any) -> dict[str, Any]:
        id_ = self.send(call, **arguments)
        self.turn(turns)
        return dict(self.result(id_, arguments.get("session", b"\0a")).body)

    def refusal(self, call: table.Call, **arguments: Any) -> type[errors.LLMasOSError]:
        id_ = self.send(call, **arguments)
        self.turn(4)
        return self.error(id_, arguments.get("session", b"\0a"))

    def do(self, pid: int, tokens: list[int], count: int, **arguments: Any) -> list[int]:
        id_ = self.send(infer(tokens, pid=pid, max_tokens=count, **arguments))
        self.turn(count + 6)
        return self.tokens(id_)

    def start(self, device: str = "null") -> int:
        return int(self.ask(table.SpawnModel(model="tiny", device=device))["pid"])

    def computed(self) -> int:
        return sum(work.count for batch in self.sent for work in batch.work)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for device in made.kernel.devices.values():
        for pool in device.pools:
            pool.memory.check([p.table for p in pool.processes])
    assert not any(tier.used for tier in made.kernel.tiers.tiers)


def again(home: Path) -> Pair:
    """The machine after a reboot."""
    made = Pair(home)
    made.store.sessions.sweep()
    return made


def test_a_restored_process_goes_on_without_computing_again(pair: Pair, tmp_path: Path) -> None:
    pid = pair.start()
    first = pair.do(pid, PROMPT, 10)
    saved = pair.ask(table.Snapshot(pid, "one"))
    assert (saved["path"], saved["details"]["tokens"]) == ("/sessions/one", 110)
    for world in (pair, again(tmp_path)):
        for device in ("null", "null:1"):
            restored = world.ask(table.Restore("one", device=device), turns=6)
            assert (restored["context"], restored["kept"], restored["recomputed"]) == (110, 109, "")
            assert restored["device"] == device
            world.sent.clear()
            assert world.do(restored["pid"], [7], 5) == reference([*PROMPT, *first, 7], 5)
            assert world.computed() < 20
            world.ask(table.Kill(restored["pid"], t.Signal.KILL))


def test_an_interrupted_infer_is_gone_on_with(pair: Pair) -> None:
    sampling = t.Sampling(temperature=1.0, seed=42, min_new_tokens=12, stop_token_ids=[5])
    pair.holds_steps = False
    pid = pair.start()
    id_ = pair.send(infer(PROMPT, pid=pid, max_tokens=20, sampling=sampling))
    while len(pair.tokens(id_)) < 8:
        pair.turn()
    saved = pair.send(table.Snapshot(pid, "middle"))
    pair.turn(30)
    assert pair.result(saved).body["details"]["unfinished"] > 0
    whole = pair.tokens(id_)
    assert len(whole) == 20
    restored = pair.ask(table.Restore("middle", device="null:1"), turns=6)
    had = restored["context"] - 100
    assert restored["max_tokens"] == 20 - had
    call = infer([], pid=restored["pid"], max_tokens=restored["max_tokens"], sampling=sampling)
    next_ = pair.send(call)
    pair.turn(30)
    assert whole[:had] + pair.tokens(next_) == whole
    opened = [o for batch in pair.sent for o in batch.opens if o.seq == restored["pid"]]
    assert opened[-1].prompt_length == 100


def test_what_is_restored_and_not_gone_on_with_is_saved_with_what_is_left_to_do(
    pair: Pair, tmp_path: Path
) -> None:
    pair.holds_steps = False
    sampling = t.Sampling(temperature=1.0, seed=42, stop_token_ids=[5])
    pid = pair.start()
    id_ = pair.send(infer(PROMPT, pid=pid, max_tokens=20, sampling=sampling))
    while len(pair.tokens(id_)) < 8:
        pair.turn()
    pair.ask(table.Snapshot(pid, "first"))
    first = pair.ask(table.Restore("first", detached=True), turns=6)
    assert pair.ask(table.Snapshot(first["pid"], "second"))["details"]["unfinished"] == first["max_tokens"]
    rows = {name: row for name, row in pair.kernel.ledger.take().items() if row is not None}
    after = World(tmp_path, devices=("null", "null:1"), rows=rows)  # a kernel that was started again
    after.attach(1, "null")
    after.turn(6)
    saved = after.send(table.Snapshot(first["pid"], "third"))
    after.turn(6)
    assert after.result(saved).body["details"]["unfinished"] == first["max_tokens"]
    second = pair.ask(table.Restore("second"), turns=6)
    assert (second["max_tokens"], second["sampling"]) == (first["max_tokens"], first["sampling"])


def test_kv_of_another_kind_is_computed_anew(pair: Pair) -> None:
    pid = pair.start()
    first = pair.do(pid, PROMPT, 10)
    pair.ask(table.Snapshot(pid, "one"))
    for loaded in (d.pools[0] for d in pair.kernel.devices.values() if d.pools):
        assert loaded.loaded is not None
    spawned = pair.start("null:1")
    pool = pair.kernel.devices["null:1"].pools[0]
    assert pool.loaded is not None
    pool.loaded = base.Loaded(
        **{f: getattr(pool.loaded, f) for f in base.Loaded.__struct_fields__} | {"kv_dtype": "int8"}
    )
    restored = pair.ask(table.Restore("one", device="null:1"))
    assert restored["kept"] == 0
    assert "int8" in restored["recomputed"]
    assert pair.do(restored["pid"], [7], 5) == reference([*PROMPT, *first, 7], 5)
    moved = pair.ask(table.Migrate(pid, "null:1"))
    assert (moved["kept"], "int8" in moved["recomputed"]) == (0, True)
    pair.ask(table.Kill(spawned))


def test_snapshots_of_others_do_not_exist(pair: Pair) -> None:
    pid = pair.start()
    pair.do(pid, PROMPT, 2)
    pair.ask(table.Snapshot(pid, "one"))
    assert [e["path"] for e in pair.ask(table.Ls("/sessions"))["entries"]] == ["/sessions/one"]
    assert pair.ask(table.Stat("/sessions/one"))["details"]["model"] == "tiny:latest"
    stranger: dict[str, Any] = {"session": b"\0b", "subject": OTHER}
    assert pair.ask(table.Ls("/sessions"), **stranger)["entries"] == []
    for call in (table.Restore("one"), table.Stat("/sessions/one"), table.Discard("one")):
        assert pair.refusal(call, **stranger) is errors.NoSuchFile
    assert pair.refusal(table.Snapshot(pid, "mine"), **stranger) is errors.NoSuchProcess
    assert pair.ask(table.Df())["sessions_bytes"] > 400


def test_removed_and_replaced(pair: Pair, tmp_path: Path) -> None:
    pid = pair.start()
    pair.do(pid, PROMPT, 2)
    pair.ask(table.Snapshot(pid, "one"))
    pair.do(pid, [9], 2)
    pair.ask(table.Snapshot(pid, "one"))
    restored = pair.ask(table.Restore("one"))
    assert restored["context"] == 105
    pair.ask(table.Discard("one"))
    assert pair.refusal(table.Restore("one")) is errors.NoSuchFile
    assert pair.do(restored["pid"], [7], 3) == reference(
        [*PROMPT, *reference(PROMPT, 2), 9, *reference([*PROMPT, *reference(PROMPT, 2), 9], 2), 7], 3
    )
    pair.ask(table.Kill(restored["pid"], t.Signal.KILL))
    assert not list((tmp_path / "modelfs" / "sessions" / "kv").iterdir())


def test_lineage_is_told(pair: Pair) -> None:
    pid = pair.start()
    pair.do(pid, PROMPT, 2)
    pair.ask(table.Snapshot(pid, "one"))
    child = pair.ask(table.Restore("one"))["pid"]
    assert pair.ask(table.Snapshot(child, "two"))["details"]["lineage"] == "two < one"


def test_a_running_infer_moves_and_its_reader_notices_nothing(pair: Pair) -> None:
    pid = pair.start()
    id_ = pair.send(infer(PROMPT, pid=pid, max_tokens=60))
    while len(pair.tokens(id_)) < 8:
        pair.turn()
    moved = pair.send(table.Migrate(pid, "null:1"))
    pair.turn(80)
    reply = pair.result(moved).body
    assert reply["device"] == "null:1"
    assert reply["kept"] >= 100
    assert pair.tokens(id_) == reference(PROMPT, 60)
    assert pair.ask(table.StatProcess(pid))["device"] == "null:1"
    assert not pair.kernel.devices["null"].pools[0].processes
    pair.ask(table.Kill(pid, t.Signal.KILL))


def test_a_move_survives_a_full_disk_and_a_dead_worker(pair: Pair) -> None:
    pids = [pair.start() for _ in range(2)]
    ids = [pair.send(infer(PROMPT, pid=pid, max_tokens=40)) for pid in pids]
    pair.turn(4)
    pair.fail_moves = True
    moved = pair.send(table.Migrate(pids[0], "null:1"))
    pair.turn(60)
    assert pair.result(moved).body["recomputed"]
    pair.fail_moves = False
    pair.send(table.Migrate(pids[1], "null:1"))
    pair.die(1)
    pair.turn(60)
    pair.attach(3, "null")
    pair.turn(60)
    for id_ in ids:
        assert pair.tokens(id_) == reference(PROMPT, 40)


def test_what_cannot_be_saved_or_moved(pair: Pair) -> None:
    pid = pair.start()
    pair.holds_steps = True
    pair.send(infer(PROMPT, pid=pid, max_tokens=5, beams=t.Beams(num_beams=2)))
    assert pair.refusal(table.Snapshot(pid, "one")) is errors.ProcessBusy
    assert pair.refusal(table.Migrate(pid, "null:1")) is errors.ProcessBusy
    assert pair.refusal(table.Migrate(pair.start("null:1"), "null:7")) is errors.NoSuchDevice
    assert pair.refusal(table.Migrate(99, "null")) is errors.NoSuchProcess


def test_every_changed_bit_of_a_record_is_found(pair: Pair, tmp_path: Path) -> None:
    pid = pair.start()
    pair.do(pid, PROMPT, 2)
    pair.ask(table.Snapshot(pid, "one"))
    path = tmp_path / "modelfs" / "sessions" / "of-root" / "one"
    whole = path.read_bytes()
    chance = random.Random(7)
    for _ in range(1000):
        place = chance.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(errors.Corrupt):
            pair.store.sessions.load("root", "one")
    assert pair.refusal(table.Restore("one")) is errors.Corrupt
    assert "damaged" in pair.ask(table.Ls("/sessions"))["entries"][0]["details"]["problem"]
    assert any("damaged" in problem for problem in pair.store.fsck())
    pair.ask(table.Discard("one"))
    assert pair.ask(table.Ls("/sessions"))["entries"] == []


def test_damaged_kv_of_a_snapshot_is_computed_anew(pair: Pair, tmp_path: Path) -> None:
    pid = pair.start()
    first = pair.do(pid, PROMPT, 10)
    pair.ask(table.Snapshot(pid, "one"))
    (kv,) = (tmp_path / "modelfs" / "sessions" / "kv").glob("*.kv")
    damaged = bytearray(kv.read_bytes())
    damaged[500] ^= 1
    kv.write_bytes(damaged)
    restored = pair.ask(table.Restore("one", device="null:1"), turns=6)
    assert pair.do(restored["pid"], [7], 5) == reference([*PROMPT, *first, 7], 5)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("site", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_changes_nothing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, code: int
) -> None:
    pid = pair.start()
    first = pair.do(pid, PROMPT, 2)
    pair.ask(table.Snapshot(pid, "one"))
    second = pair.do(pid, [8], 2)
    real: Callable[..., Any] = getattr(os, site)
    for place in range(20):
        calls = 0

        def fails(*arguments: Any, place: int = place) -> Any:
            nonlocal calls
            calls += 1
            if calls == place + 1:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, site, fails)
            id_ = pair.send(table.Snapshot(pid, "one"))
            pair.turn(3)
        if calls <= place:
            break
        assert pair.error(id_) is errors.StorageFailed
        restored = pair.ask(table.Restore("one"))
        assert restored["context"] in (102, 105)
        context = [*PROMPT, *first, *([8, *second] if restored["context"] == 105 else [])]
        assert pair.do(restored["pid"], [7], 2) == reference([*context, 7], 2)
        pair.ask(table.Kill(restored["pid"], t.Signal.KILL))
    assert place > 0, "the site was never reached"
    again(tmp_path)
    assert len(list((tmp_path / "modelfs" / "sessions" / "kv").iterdir())) <= 1


def test_names() -> None:
    assert session_files.parse_path("/sessions/") == ""
    assert session_files.parse_path("/models/x") is None
    with pytest.raises(errors.InvalidArgument):
        session_files.parse_path("/sessions/../x")
