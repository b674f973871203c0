"""Whose a training run, its data and what it makes are: who sees, pays for and removes them."""

from __future__ import annotations

import pytest
from llmasos.kernel.files import disk_used
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from msgspec.structs import replace

from .test_training import ALICE, BOB, Runs, world

__all__ = ["world"]


def test_runs_data_sets_and_models_are_their_owners(world: Runs) -> None:
    world.dataset(session=b"\0b", subject=BOB)
    pid = world.train(b"\0b", BOB)
    stolen = world.send(table.Train("tiny", "facts", "mine"), b"\0c", subject=ALICE)
    watched = world.send(table.Follow(pid), b"\0c", subject=ALICE)
    listed = world.send(table.Ls("/datasets"), b"\0c", subject=ALICE)
    world.flush()
    assert world.error(stolen, b"\0c") is errors.NoSuchFile
    assert world.error(watched, b"\0c") is errors.NoSuchProcess
    assert world.reply(listed, b"\0c")["entries"] == []
    again = world.send(table.Train("tiny", "facts", "facts"), b"\0b", subject=BOB)
    world.flush()
    assert world.error(again, b"\0b") is errors.AlreadyExists


def test_models_that_were_made_count_as_their_owners_disk(world: Runs) -> None:
    world.dataset()
    world.send(table.SetQuota("root", t.Quota(disk_bytes=10_000)))
    world.train(target="fits")
    made = replace(world.store.resolve("tiny"), owner="root")
    digest, size = world.store.put_bytes(bytes(20_000))
    large = replace(made, files=[*made.files, replace(made.files[0], path="large", digest=digest, size=size)])
    world.store.commit(parse_name("large"), large)
    refused = world.send(table.Train("tiny", "facts", "more"))
    written = world.send(table.Write("/datasets/more", 0, b"x", True))
    world.flush()
    assert world.error(refused) is world.error(written) is errors.QuotaExceeded


@pytest.mark.parametrize("trains", [False, True], ids=["prepares", "trains"])
def test_a_run_that_grows_over_its_owners_disk_ends(world: Runs, trains: bool) -> None:
    world.dataset()
    alone = disk_used(world.kernel, "root")
    world.send(table.SetQuota("root", t.Quota(disk_bytes=10_000)))
    pid = world.train()
    if trains:
        world.prepared(pid)
        connection, program = world.attached()
    else:
        program = world.program()
    folder = world.store.runs.folder(pid)
    before = disk_used(world.kernel, "root")
    for size in (5_000, 10_000):
        assert world.kernel.programs.to_stop == []
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "tokens.u32").write_bytes(bytes(size))
        world.now += 2
        if trains:
            world.event(connection, 1, "save")
        else:
            world.kernel.programs.line(program.number, {"phase": "prepare", "step": 1, "steps": 2})
        world.flush()
        assert disk_used(world.kernel, "root") >= before + size
    assert world.kernel.programs.to_stop == [program.number]
    assert "QuotaExceeded" in world.reply(world.send(table.Wait(pid)))["reason"]
    if trains:
        world.trainer_dies(connection, program)
    else:
        world.kernel.programs.over(program.number)
    world.flush()
    assert disk_used(world.kernel, "root") == alone


def test_a_data_set_counts_as_long_as_something_keeps_it(world: Runs) -> None:
    world.dataset()
    pid = world.train()
    with_name = disk_used(world.kernel, "root")
    world.reply(world.send(table.Unlink("/datasets/facts")))
    in_run = disk_used(world.kernel, "root")
    assert with_name - in_run < 100, "the run keeps it; its name has gone"
    world.reply(world.send(table.Snapshot(pid, "half")))
    preparer = world.program()
    world.reply(world.send(table.Kill(pid)))
    world.kernel.programs.over(preparer.number)
    world.reply(world.send(table.Wait(pid)))
    world.flush()
    assert disk_used(world.kernel, "root") == world.store.sessions.usage() > in_run


def test_what_is_ones_own_is_removed_and_what_is_everybodys_is_an_administrators(world: Runs) -> None:
    world.dataset(session=b"\0b", subject=BOB)
    refused = world.send(table.Unlink("/models/tiny"), b"\0b", subject=BOB)
    file = world.send(table.Unlink("/models/tiny:latest/config.json"))
    world.reply(world.send(table.Unlink("/datasets/facts"), b"\0b", subject=BOB), b"\0b")
    gone = world.send(table.Unlink("/datasets/facts"), b"\0b", subject=BOB)
    world.flush()
    assert world.error(refused, b"\0b") is errors.PermissionDenied
    assert world.error(file) is errors.InvalidArgument
    assert world.error(gone, b"\0b") is errors.NoSuchFile
    world.store._manifest_path(parse_name("tiny")).write_text("damaged")
    world.reply(world.send(table.Unlink("/models/tiny")))
    world.flush()
    assert b'"unlink"' in world.kernel.audit.read(0, 1 << 20)[1]


def test_who_may_not_train_is_told(world: Runs) -> None:
    rights = frozenset({t.Capability.CONNECT, t.Capability.INFER, t.Capability.PROCESS})
    guest = Subject("guest", 3, 1, False, rights)
    id_ = world.send(table.Train("tiny", "facts", "x"), b"\0g", subject=guest)
    world.flush()
    assert world.error(id_, b"\0g") is errors.PermissionDenied
