"""The journal on a disk that drops, tears and reorders what was not synced, and that flips bits."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from llmasos.kernel import journal as journals
from llmasos.kernel.journal import RESERVE_BYTES, Journal
from llmasos.syscalls import errors

SECTOR = 512
State = dict[str, bytes]


def read(folder: Path) -> State:
    journal = Journal(folder)
    rows = dict(journal.rows)
    journal.close()
    return rows


def changes(dice: random.Random, rows: State) -> dict[str, bytes | None]:
    """What a turn may change: rows of all sizes set, replaced and removed."""
    made: dict[str, bytes | None] = {}
    for _ in range(dice.randint(1, 4)):
        made[f"process {dice.randrange(12)}"] = dice.randbytes(dice.choice([0, 40, 700, 9000]))
    if rows and dice.random() < 0.4:
        made[dice.choice(sorted(rows))] = None
    return made


def applied(rows: State, made: dict[str, bytes | None]) -> State:
    after = {**rows, **made}
    return {name: data for name, data in after.items() if data is not None}


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks are copied hundreds of times here."""
    monkeypatch.setattr(journals, "RESERVE_BYTES", 64 << 10)


@pytest.fixture
def life(tmp_path: Path) -> Iterator[tuple[Path, list[State], list[dict[str, bytes]]]]:
    """A journal after 25 commits: its folder, the state after each, and its files' bytes after each."""
    folder, dice = tmp_path / "journal", random.Random(5)
    journal = Journal(folder)
    states: list[State] = [{}]
    disks = [files(folder)]
    for _ in range(25):
        made = changes(dice, states[-1])
        journal.commit(made)
        states.append(applied(states[-1], made))
        disks.append(files(folder))
    yield folder, states, disks
    journal.close()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, disk: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in disk.items():
        (folder / name).write_bytes(data)
    return folder


def test_what_was_committed_is_there_and_removed_rows_are_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit({"a": b"1", "b": b"2"})
    journal.commit({"a": None, "b": b"3", "c": b""})
    journal.close()
    assert read(tmp_path) == {"b": b"3", "c": b""}


def test_after_a_kill_every_commit_is_there(
    life: tuple[Path, list[State], list[dict[str, bytes]]], tmp_path: Path
) -> None:
    _, states, disks = life
    for state, disk in zip(states, disks, strict=True):
        assert read(put(tmp_path / "copy", disk)) == state


def torn(disk: dict[str, bytes], synced: dict[str, bytes], dice: random.Random) -> Iterator[dict[str, bytes]]:
    """What a power cut may leave of a commit that was being written: of the log behind what was synced
    before, any number of first sectors, and any choice of sectors in any order."""
    name = "kernel.db-wal"
    log, before = disk[name], synced.get(name, b"")
    changed = [at for at in range(0, len(log), SECTOR) if log[at : at + SECTOR] != before[at : at + SECTOR]]
    for keep in range(len(changed) + 1):
        yield with_sectors(disk, before, log, changed[:keep])
    for _ in range(8):
        yield with_sectors(disk, before, log, dice.sample(changed, dice.randint(0, len(changed))))


def with_sectors(disk: dict[str, bytes], before: bytes, log: bytes, kept: list[int]) -> dict[str, bytes]:
    end = max([len(before), *(min(at + SECTOR, len(log)) for at in kept)])
    made = bytearray(before.ljust(end, b"\0"))
    for at in kept:
        made[at : at + SECTOR] = log[at : at + SECTOR]
    return {**disk, "kernel.db-wal": bytes(made)}


def test_a_power_cut_at_any_point_of_a_commit_leaves_the_state_before_or_after_it(
    life: tuple[Path, list[State], list[dict[str, bytes]]], tmp_path: Path
) -> None:
    _, states, disks = life
    dice, points = random.Random(1), 0
    for number in range(1, len(disks)):
        witness = disks[number - 1]["witness"]  # written after the commit, so never ahead of it
        for disk in torn(disks[number], disks[number - 1], dice):
            found = read(put(tmp_path / "copy", {**disk, "witness": witness}))
            assert found in (states[number - 1], states[number])
            points += 1
    assert points > 500


def test_a_power_cut_while_the_log_is_moved_into_the_database_loses_nothing(
    life: tuple[Path, list[State], list[dict[str, bytes]]], tmp_path: Path
) -> None:
    _, states, disks = life
    before, dice = disks[-1], random.Random(2)
    read(put(tmp_path / "copy", before))  # which moves it all, and empties the log
    moved = (tmp_path / "copy" / "kernel.db").read_bytes()
    for _ in range(50):
        database = bytearray(before["kernel.db"].ljust(len(moved), b"\0"))
        for at in range(0, len(moved), SECTOR):
            if dice.random() < 0.5:
                database[at : at + SECTOR] = moved[at : at + SECTOR]
        assert read(put(tmp_path / "copy", {**before, "kernel.db": bytes(database)})) == states[-1]


def test_a_witness_that_a_power_cut_kept_from_the_disk_is_no_damage(
    life: tuple[Path, list[State], list[dict[str, bytes]]], tmp_path: Path
) -> None:
    _, states, disks = life
    for witness in (b"", disks[3]["witness"]):
        assert read(put(tmp_path / "copy", {**disks[-1], "witness": witness})) == states[-1]


@pytest.fixture
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is on the disk counts, and there is no more of it."""
    monkeypatch.setattr(journals, "RESERVE_BYTES", 0)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.usefixtures("no_reserve")
def test_a_thousand_flipped_bits_are_found_or_change_nothing(
    closed: bool, life: tuple[Path, list[State], list[dict[str, bytes]]], tmp_path: Path
) -> None:
    """Open: as a killed kernel leaves it, most of it in the log. Closed: all in the database."""
    _, states, disks = life
    disk, dice, found = disks[-1], random.Random(7), 0
    if closed:
        read(put(tmp_path / "copy", disk))
        disk = files(tmp_path / "copy")
    places = [(name, at) for name, data in disk.items() for at in range(len(data))]
    for name, at in dice.sample(places, 500):
        data = bytearray(disk[name])
        data[at] ^= 1 << dice.randrange(8)
        put(tmp_path / "copy", {**disk, name: bytes(data)})
        try:
            rows = read(tmp_path / "copy")
        except (errors.Corrupt, errors.Unavailable):
            found += 1
        else:
            assert rows == states[-1], (name, at)
    assert found > 100


@pytest.mark.parametrize("query", ["DELETE FROM rows WHERE name = 'b'", "UPDATE rows SET data = x'00'"])
def test_rows_that_were_changed_behind_its_back_are_found(query: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit({"a": b"1", "b": b"2"})
    journal.close()
    with sqlite3.connect(tmp_path / "kernel.db") as db:
        db.execute(query)
    db.close()
    with pytest.raises(errors.Corrupt, match="mv"):
        Journal(tmp_path)


def test_rows_of_another_version_are_refused_and_left_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, schema=1)
    journal.commit({"a": b"1"})
    journal.close()
    with pytest.raises(errors.Corrupt, match=r"another version.*mv"):
        Journal(tmp_path, schema=2)
    journal = Journal(tmp_path, schema=1)
    assert journal.rows == {"a": b"1"}
    journal.commit({"a": None})
    journal.close()
    Journal(tmp_path, schema=2).close()  # nothing in it that could be misread


@pytest.mark.usefixtures("no_reserve")
def test_a_full_disk_refuses_a_commit_and_keeps_what_was_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit({"a": b"1"})
    journal._db.execute("PRAGMA max_page_count = 8")
    with pytest.raises(errors.Unavailable, match="full"):
        journal.commit({"a": b"2", "big": bytes(1 << 20)})
    journal.commit({"b": b"3"})
    journal.close()
    assert read(tmp_path) == {"a": b"1", "b": b"3"}


def test_room_is_kept_for_what_is_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither file grows for changes that fit the reserve, of an old journal as of a new one."""
    monkeypatch.setattr(journals, "RESERVE_BYTES", RESERVE_BYTES)
    for _ in range(2):
        journal = Journal(tmp_path)
        sizes = {name: (tmp_path / name).stat().st_size for name in ("kernel.db", "kernel.db-wal")}
        assert all((tmp_path / name).stat().st_blocks * 512 >= RESERVE_BYTES for name in sizes)
        for number in range(3000):  # far more than the log holds before it begins anew
            journal.commit({f"row {number % 200}": bytes(4000)})
        assert {name: (tmp_path / name).stat().st_size for name in sizes} == sizes
        journal.commit({f"row {number}": None for number in range(200)})
        journal.close()
