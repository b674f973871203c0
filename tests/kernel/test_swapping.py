"""Contexts that are pushed out of a device's memory come back from a file, or are computed again; the text is
the same either way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from llmasos.drivers import base
from llmasos.drivers.simulated import StepTime
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .conftest import Machine, infer, reference

LONG = [list(range(n, n + 700)) for n in range(1, 10)]


class Small(Machine):
    """Room for 64 blocks: one long context and a bit. Infers are made and awaited by number."""

    def __init__(self, home: Path, **settings: object) -> None:
        super().__init__(home, StepTime(), **settings)
        self.model("tiny", llmasos_null_blocks=64, max_position_embeddings=1024)
        self.attach()
        self.spawn_first()

    def spawn_first(self) -> None:
        id_ = self.send(table.SpawnModel(model="tiny"))
        self.flush()
        self.send(table.Kill(int(self.result(id_).body["pid"]), t.Signal.KILL))

    def do(self, pid: int, tokens: list[int], count: int) -> list[int]:
        id_ = self.send(infer(tokens, pid=pid, max_tokens=count))
        self.run(lambda: self.ended(id_))
        return self.tokens(id_)

    def row(self, pid: int) -> t.ProcessInfo:
        return next(p for p in self.kernel.processes if p.pid == pid).info(self.now, 0)

    def exports(self) -> list[base.Export]:
        return [order for order in self.moves if isinstance(order, base.Export)]

    def imports(self) -> list[base.Import]:
        return [order for order in self.moves if isinstance(order, base.Import)]

    def files(self) -> list[Path]:
        return list(self.store.swap.iterdir()) if self.store.swap.exists() else []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    made = Small(tmp_path)
    yield made
    for process in list(made.kernel.processes):
        made.send(table.Kill(process.pid, t.Signal.KILL))
    made.run(made.now + 1.0)
    for pool in made.kernel.devices["null"].pools:
        pool.memory.check([p.table for p in pool.processes])
    assert not made.files(), "files of contexts that are gone"
    assert not any(tier.used for tier in made.kernel.tiers.tiers)


def test_a_context_comes_back_without_being_computed_again(small: Small) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0], 8)
    assert small.do(b, LONG[1], 4) == reference(LONG[1], 4)
    assert small.row(a).state is t.State.SWAPPED
    assert (small.row(a).waiting_for, small.row(a).blocks, small.row(a).computed) == ("owner", 0, 0)
    assert len(small.exports()) == 1
    small.sent.clear()
    assert small.do(a, [5], 6) == reference([*LONG[0], *first, 5], 6)
    assert sum(work.count for batch in small.sent for work in batch.work) < 32
    assert len(small.imports()) == 1
    assert small.row(b).state is t.State.SWAPPED


def test_what_is_cheap_to_compute_is_not_written(small: Small) -> None:
    small.kernel.devices["null"].transfer.write = 1.0
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0], 8)
    small.do(b, LONG[1], 4)
    assert not small.moves
    assert small.row(a).state is t.State.WAITING
    assert small.do(a, [5], 6) == reference([*LONG[0], *first, 5], 6)


def test_full_tiers_mean_recomputing(tmp_path: Path) -> None:
    small = Small(tmp_path, swap_disk_bytes=0)
    a, b = small.spawn_now(), small.spawn_now()
    small.do(a, LONG[0], 8)
    small.do(b, LONG[1], 4)
    assert not small.moves
    assert small.row(a).computed == 0


def test_the_host_is_filled_before_the_disk(tmp_path: Path) -> None:
    host = tmp_path / "host"
    small = Small(tmp_path, swap_host_bytes=20_000)
    small.kernel.tiers.tiers.insert(0, type(small.kernel.tiers.tiers[0])(host, 20_000))
    host.mkdir(mode=0o700)
    pids = [small.spawn_now() for _ in range(3)]
    made = [small.do(pid, LONG[n], 4) for n, pid in enumerate(pids)]
    assert [Path(order.path).parent for order in small.exports()] == [host, small.store.swap]
    counted = {f.name: f.samples for f in small.kernel.metrics.families(small.kernel)}
    assert [s.labels for s in counted["swapped_bytes"]] == [["memory"], ["disk"]]
    assert all(s.value > 0 for s in counted["swapped_bytes"])
    for n, pid in enumerate(pids):
        assert small.do(pid, [5], 4) == reference([*LONG[n], *made[n], 5], 4)


def test_a_swapped_context_is_cut_and_forked(small: Small) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    small.do(a, LONG[0], 8)
    small.do(b, LONG[1], 4)
    small.send(table.Truncate(a, 300))
    id_ = small.send(table.Fork(a))
    small.flush()
    child = small.result(id_).body["pids"][0]
    assert small.row(child).state is t.State.SWAPPED
    small.sent.clear()
    assert small.do(child, [5], 4) == reference([*LONG[0][:300], 5], 4)
    assert small.do(a, [6], 4) == reference([*LONG[0][:300], 6], 4)
    assert sum(work.count for batch in small.sent for work in batch.work) < 32
    assert small.imports()[0].skip + len(small.imports()[0].blocks) == 19
    small.send(table.Truncate(b, 0))
    assert small.do(b, [7], 4) == reference([7], 4)


def test_a_prefix_that_is_still_there_is_not_read(small: Small) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    small.do(a, LONG[0], 8)
    id_ = small.send(table.Fork(a))
    small.flush()
    small.send(table.Truncate(small.result(id_).body["pids"][0], 320))
    made = small.do(b, LONG[1][:500], 4)
    assert small.row(a).state is t.State.SWAPPED
    small.send(table.Kill(b, t.Signal.KILL))
    assert made == reference(LONG[1][:500], 4)
    first = reference(LONG[0], 8)
    assert small.do(a, [5], 4) == reference([*LONG[0], *first, 5], 4)
    assert small.imports()[-1].skip >= 20


@pytest.mark.parametrize("when", ["out", "in", "both"])
def test_a_failing_disk_means_recomputing(small: Small, when: str) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0], 8)
    small.fail_moves = when != "in"
    small.do(b, LONG[1], 4)
    small.fail_moves = when != "out"
    assert small.do(a, [5], 20) == reference([*LONG[0], *first, 5], 20)
    assert small.row(a).state is t.State.WAITING


def test_a_damaged_file_means_recomputing(small: Small) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0], 8)
    small.do(b, LONG[1], 4)
    file = small.files()[0]
    damaged = bytearray(file.read_bytes())
    damaged[3000] ^= 4
    file.write_bytes(damaged)
    assert small.do(a, [5], 20) == reference([*LONG[0], *first, 5], 20)


def test_files_outlive_the_worker(small: Small) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0], 8)
    small.do(b, LONG[1], 4)
    small.die()
    small.attach()
    assert small.row(a).state is t.State.NEW or small.row(a).state is t.State.SWAPPED
    small.sent.clear()
    assert small.do(a, [5], 6) == reference([*LONG[0], *first, 5], 6)
    assert sum(work.count for batch in small.sent for work in batch.work) < 32


def test_many_share_a_small_memory(small: Small) -> None:
    """Four times more contexts than there is room for: all end with the right text."""
    ids = [small.send(infer(LONG[n][:220], model="tiny", max_tokens=40)) for n in range(9)]
    small.run(lambda: all(small.ended(id_) for id_ in ids))
    for n, id_ in enumerate(ids):
        assert small.tokens(id_) == reference(LONG[n][:220], 40)


def test_a_dead_worker_has_written_nothing(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0], 8)
    id_ = small.send(infer(LONG[1], pid=b, max_tokens=4))
    monkeypatch.setattr(small, "move", lambda *_: None)
    small.run(lambda: small.exports())
    small.die()
    monkeypatch.undo()
    small.attach()
    small.run(lambda: small.ended(id_))
    assert small.tokens(id_) == reference(LONG[1], 4)
    assert small.do(a, [5], 6) == reference([*LONG[0], *first, 5], 6)


def test_a_folder_that_others_can_reach_is_not_used(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.store.swap.mkdir(mode=0o755)
    a, b = small.spawn_now(), small.spawn_now()
    small.do(a, LONG[0], 8)
    small.do(b, LONG[1], 4)
    assert not small.moves


def test_what_an_earlier_kernel_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "modelfs" / "swap" / "17.kv"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"old")
    Small(tmp_path)
    assert not left.exists()


def test_copies_that_wait_are_made_before_blocks_are_filled(small: Small) -> None:
    """Who forks copies a block with the next step; whoever comes back meanwhile may get the block it is
    copied from."""
    a, b = small.spawn_now(), small.spawn_now()
    first = small.do(a, LONG[0][:100], 4)
    small.do(b, LONG[1] + list(range(100, 320)), 4)
    assert small.row(a).state is t.State.SWAPPED
    small.send(table.Truncate(b, 600))
    id_ = small.send(table.Fork(b))
    small.flush()
    child = small.result(id_).body["pids"][0]
    small.send(table.SetPriority(child, sched_class=t.SchedClass.REALTIME))
    ids = [small.send(infer([5], pid=pid, max_tokens=9)) for pid in (child, a)]
    small.run(lambda: all(small.ended(id_) for id_ in ids))
    assert small.imports()[0].copies
    assert small.tokens(ids[0]) == reference([*LONG[1][:600], 5], 9)
    assert small.tokens(ids[1]) == reference([*LONG[0][:100], *first, 5], 9)
