"""The audit log: complete, chained, bounded, and in the way of nobody but the administrator."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from llmasos.kernel.audit import MOST_A_MINUTE, Audit
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import chain, errors, table, wire
from llmasos.syscalls.types import Capability, Signal

from .conftest import World, infer

MALLORY = Subject("mallory", 1000, 2, False, frozenset(Capability) - {Capability.ADMIN})


def records(world: World) -> list[chain.Record]:
    lines = world.kernel.audit.read(0, 1 << 20)[1].splitlines()
    chain.verify(lines)
    return [chain.unseal(line)[0] for line in lines]


def test_the_log_tells_who_did_what(world: World) -> None:
    world.attach()
    foreign = world.send(table.SpawnModel(model="tiny"), b"\0m", subject=MALLORY)
    world.turn(3)
    pid = world.result(foreign, b"\0m").body["pid"]
    world.send(table.Unlink("/models/tiny"), b"\0m", subject=MALLORY)
    world.send(table.Kill(pid, Signal.KILL))
    world.send(table.Link("tiny", "second"))
    world.send(table.Unlink("/models/second"))
    world.turn(2)
    told = [(r.event, r.subject, r.facts) for r in records(world)]
    assert [(event, who) for event, who, _ in told] == [
        ("refused", "mallory"),
        ("signal", "root"),
        ("unlink", "root"),
    ]
    assert told[1][2] == {"pid": str(pid), "owner": "mallory", "signal": "KILL"}
    assert told[2][2] == {"model": "second:latest"}


def test_with_a_full_disk_only_administration_waits(world: World) -> None:
    """/dev/full answers every write with ENOSPC."""
    world.attach()
    good, world.kernel.audit = world.kernel.audit, Audit(Path("/dev/full"))
    world.send(table.Shutdown(), b"\0m", subject=MALLORY)
    refused = world.send(table.Unlink("/models/tiny"))
    served = world.send(infer([1, 2], model="tiny", max_tokens=2))
    world.turn(6)
    assert world.error(refused) is errors.Unavailable
    assert world.result(served).body["generated_tokens"] == 2
    world.kernel.audit = good
    world.send(table.Unlink("/models/tiny"))
    world.turn(2)
    assert [r.event for r in records(world)] == ["unlink"]


def test_lost_records_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(tmp_path / "audit.log")
    real = audit._write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit, "_write", full)
    for _ in range(3):
        audit.note("refused", "mallory")
    monkeypatch.setattr(audit, "_write", real)
    audit.before("unlink", "root")
    first = chain.unseal(audit.read(0, 4096)[1].splitlines()[0])[0]
    assert (first.event, first.facts) == ("records lost", {"count": "3"})


def test_the_chain_goes_on_after_a_restart_and_a_torn_write(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    Audit(path).before("unlink", "root")
    with path.open("ab") as file:
        file.write(b'{"seq":2,"ti')
    audit = Audit(path)
    audit.before("shutdown", "root")
    lines = path.read_bytes().splitlines()
    assert chain.verify(lines)[0] == 3
    assert chain.unseal(lines[1])[0].facts == {"bytes": "12"}


def test_a_log_that_was_moved_away_goes_on_in_a_new_one_that_names_it(tmp_path: Path) -> None:
    path, rotated = tmp_path / "audit.log", tmp_path / "audit.log.1"
    audit = Audit(path)
    audit.before("unlink", "root")
    path.rename(rotated)
    audit.before("shutdown", "root")
    count, head = chain.verify(rotated.read_bytes().splitlines())
    first, second = (chain.unseal(line)[0] for line in path.read_bytes().splitlines())
    assert (first.event, first.facts) == ("log replaced", {"records": str(count), "head": head})
    assert second.event == "shutdown"
    assert chain.verify(audit.read(0, 4096)[1].splitlines())[0] == 2


def test_a_file_put_in_the_log_s_place_is_the_one_that_is_verified(tmp_path: Path) -> None:
    """As `sed -i` and editors do it."""
    path = tmp_path / "audit.log"
    audit = Audit(path)
    for _ in range(3):
        audit.before("unlink", "mallory")
    text = path.read_text()
    path.unlink()
    path.write_text(text.replace("mallory", "innocent", 1))
    with pytest.raises(errors.Corrupt, match="line 1:"):
        chain.verify(audit.read(0, 4096)[1].splitlines())


def drop(lines: list[bytes], dice: random.Random) -> list[bytes]:
    del lines[dice.randrange(len(lines) - 1)]
    return lines


def swap(lines: list[bytes], dice: random.Random) -> list[bytes]:
    at = dice.randrange(len(lines) - 1)
    lines[at : at + 2] = lines[at + 1], lines[at]
    return lines


def repeat(lines: list[bytes], dice: random.Random) -> list[bytes]:
    lines.insert(dice.randrange(len(lines)), dice.choice(lines))
    return lines


def flip(lines: list[bytes], dice: random.Random) -> list[bytes]:
    data = bytearray(b"\n".join(lines))
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data).split(b"\n")


@pytest.mark.parametrize("harm", [drop, swap, repeat, flip])
def test_every_change_is_found(
    tmp_path: Path, harm: Callable[[list[bytes], random.Random], list[bytes]]
) -> None:
    audit = Audit(tmp_path / "audit.log")
    for number in range(12):
        audit.note("signal", f"user{number}", pid=number)
    lines = audit.read(0, 1 << 20)[1].splitlines()
    dice = random.Random(3)
    for _ in range(250):
        with pytest.raises(errors.Corrupt):
            chain.verify(harm(list(lines), dice))


def test_who_is_refused_over_and_over_cannot_fill_the_disk(tmp_path: Path) -> None:
    wall = 0.0
    audit = Audit(tmp_path / "audit.log", lambda: wall)
    for number in range(1000):
        audit.note("refused", f"mallory/{number}", call="unlink")
    wall = 61.0
    audit.note("refused", "alice", call="unlink")
    lines = audit.read(0, 1 << 20)[1].splitlines()
    assert len(lines) == MOST_A_MINUTE + 2
    assert chain.unseal(lines[-2])[0].facts == {"event": "refused", "count": str(1000 - MOST_A_MINUTE)}


def test_the_log_is_read_with_the_right_to(world: World) -> None:
    id_ = world.send(table.ReadAudit(), b"\0m", subject=MALLORY.narrowed("label"))
    world.turn()
    assert world.error(id_, b"\0m") is errors.PermissionDenied
    read = world.send(table.ReadAudit())
    world.turn()
    answer = world.result(read)
    assert answer.kind == wire.Kind.REPLY
    assert chain.verify(answer.payload.splitlines())[0] == 1
