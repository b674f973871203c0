"""Who may do what: every call declares a right, and none is granted by accident."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from llmasos.kernel.modelfs.manifest import Manifest, ManifestFile
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls.types import Capability, SchedClass

from .conftest import World, infer

MALLORY = Subject("mallory", 1000, 2, False, frozenset({Capability.CONNECT, Capability.PROCESS}))


def calls() -> list[table.Call]:
    """One of every call that needs more than to be let in, with the least arguments that it takes."""
    return [made(kind) for kind in table.BY_NAME.values() if kind.needs is not Capability.CONNECT]


def made(kind: type[table.Call]) -> table.Call:
    return kind(**{f.name: some(f.type) for f in msgspec.structs.fields(kind) if f.required})


def some(type_: Any) -> Any:
    """A value that a field of this type takes."""
    for value in (7, "tiny", "tcp://x:1", "0" * 64, b"", [], {}, {"tenant": "a", "public": "0" * 64}):
        try:
            return msgspec.convert(value, type_)
        except msgspec.ValidationError:
            continue
    raise AssertionError(f"no example for {type_}")


@pytest.mark.parametrize("kind", table.BY_NAME.values(), ids=lambda kind: kind.name)
def test_every_call_declares_what_it_needs(kind: type[table.Call]) -> None:
    assert isinstance(vars(kind).get("needs"), Capability), f"{kind.name} declares no capability"


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name)
def test_a_right_that_is_not_held_is_refused(world: World, call: table.Call) -> None:
    world.attach()
    without = frozenset(Capability) - {call.needs, Capability.ADMIN}
    id_ = world.send(call, b"\0m", subject=Subject("mallory", 1000, 2, False, without))
    world.turn(3)
    assert world.error(id_, b"\0m") is errors.PermissionDenied


def test_a_label_never_has_more_than_its_parent() -> None:
    root = Subject("root", 0, 1, True)
    assert not root.narrowed("a").admin
    assert not root.narrowed("a").holds(Capability.AUDIT)
    assert root.narrowed("a").holds(Capability.MODELS)
    assert MALLORY.narrowed("a").rights == MALLORY.rights
    assert not MALLORY.narrowed("a").holds(Capability.INFER)
    assert MALLORY.narrowed("a", (*Capability,)).rights == MALLORY.rights


def test_a_label_holds_no_more_than_it_asked_for(world: World) -> None:
    world.attach()
    root = Subject("root", 0, 1, True)
    hello = table.Hello(table.VERSION, table.table_hash(), label="http", rights=(Capability.SEE,))
    world.send(hello, b"\0h", subject=root)
    world.turn()
    sees = world.send(table.Ls("/models"), b"\0h", subject=root)
    links = world.send(table.Link("m", "n"), b"\0h", subject=root)
    world.turn()
    assert world.result(sees, b"\0h").body["entries"]
    assert world.error(links, b"\0h") is errors.PermissionDenied


def test_an_administrator_speaks_on_behalf_of_a_tenant_and_nobody_else_does(world: World) -> None:
    world.attach()
    hello = table.Hello(table.VERSION, table.table_hash(), tenant="alice", rights=(*Capability,))
    root, stranger = Subject("root", 0, 1, True), Subject("bob", 1000, 2, False, frozenset(Capability))
    became = world.send(hello, b"\0r", subject=root)
    refused = world.send(hello, b"\0b", subject=stranger)
    world.turn()
    assert world.result(became, b"\0r").body["subject"] == "alice"
    assert world.error(refused, b"\0b") is errors.PermissionDenied
    who = world.send(table.Whoami(), b"\0r", subject=root)
    administers = world.send(table.SetQuota("bob", None), b"\0r", subject=root)
    world.turn()
    assert not world.result(who, b"\0r").body["admin"]
    assert world.error(administers, b"\0r") is errors.PermissionDenied


@pytest.mark.parametrize("source", ["file:/root/secret.gguf", "/root/secret.gguf", "./secret"])
def test_files_of_the_daemon_are_not_everybodys(world: World, source: str) -> None:
    rights = frozenset(Capability) - {Capability.ADMIN, Capability.FILES}
    stranger = Subject("mallory", -1, -1, False, rights, "")
    refused = world.send(table.Pull("mine", source), b"\0m", subject=stranger)
    taken = world.send(table.Pull("mine", source))
    world.turn()
    assert world.error(refused, b"\0m") is errors.PermissionDenied
    assert not world.answers(taken)
    assert [program.arguments[-1] for program in world.kernel.programs.to_start] == [source]


def test_priority_is_a_right_of_its_own(world: World) -> None:
    world.attach()
    id_ = world.send(table.SpawnModel(model="tiny", sched_class=SchedClass.REALTIME), b"\0m", subject=MALLORY)
    assert world.turn() is None
    assert world.error(id_, b"\0m") is errors.PermissionDenied
    pid = world.spawn()
    own = world.send(table.SetPriority(pid, nice=-1))
    world.turn()
    assert world.result(own).kind == wire.Kind.REPLY


@pytest.mark.parametrize(
    "call",
    [
        table.Kill(2),
        table.Fork(2),
        table.Wait(2, 0.0),
        table.SetPriority(2, nice=1),
        table.Truncate(2, 0),
        table.StatProcess(2),
        table.Stat("/proc/2"),
        table.Stat("/proc/2/tokens"),
        table.Ls("/proc/2"),
        table.Read("/proc/2/tokens"),
        infer([1], pid=2),
    ],
    ids=lambda call: call.name,
)
def test_a_foreign_process_answers_like_one_that_is_not_there(world: World, call: table.Call) -> None:
    world.attach()
    assert world.spawn() == 2
    everything = frozenset(Capability) - {Capability.ADMIN}
    stranger = Subject("mallory", 1000, 2, False, everything)
    foreign = world.send(call, b"\0m", subject=stranger)
    world.turn(2)
    answer = world.result(foreign, b"\0m").body
    world.send(table.Kill(2))
    waited = world.send(table.Wait(2, 0.0))
    world.turn(2)
    assert world.result(waited).kind == wire.Kind.REPLY
    missing = world.send(call, b"\0m", subject=stranger)
    world.turn(2)
    assert world.result(missing, b"\0m").body == answer
    assert answer["code"] == errors.NoSuchProcess.code
    seen = world.send(table.Ps(), b"\0m", subject=stranger)
    listed = world.send(table.Ls("/proc"), b"\0m", subject=stranger)
    world.turn(2)
    assert world.result(seen, b"\0m").body["processes"] == []
    entries = world.result(listed, b"\0m").body["entries"]
    assert not [entry for entry in entries if entry["path"].removeprefix("/proc/").isdecimal()]


def test_nobody_learns_the_name_of_anothers_model(world: World) -> None:
    world.attach()
    digest, size = world.store.put_bytes(b'{"model_type": "null", "llmasos_null_blocks": 256}')
    mine = Manifest(
        1, "test", "null", 0, "", 64, "", 0.0, [ManifestFile("config.json", digest, size)], owner="alice"
    )
    world.store.commit(parse_name("secret"), mine)
    world.store.commit(parse_name("renamed"), msgspec.structs.replace(mine, owner=""))
    alice = Subject("alice", 1000, 2, False, frozenset(Capability))
    bob = Subject("bob", 1001, 3, False, frozenset(Capability))

    def models(subject: Subject, session: bytes) -> list[list[str]]:
        asked = [world.send(call, session, subject=subject) for call in (table.Lsdev(), table.Df())]
        world.turn()
        devices, room = (world.result(id_, session).body for id_ in asked)
        return [
            [pool["model"] for pool in pools] for pools in (devices["devices"][0]["pools"], room["pools"])
        ]

    world.send(table.SpawnModel(model="secret"), b"\0a", subject=alice)
    world.turn(4)
    assert models(alice, b"\0a") == [["secret:latest"]] * 2
    hidden, same = models(bob, b"\0b")
    assert hidden == same
    assert hidden[0].startswith("(private ")
    # Others may have the same files under a name that everybody sees.
    spawned = world.send(table.SpawnModel(model="renamed"), b"\0b", subject=bob)
    world.turn(4)
    assert world.result(spawned, b"\0b").body["model"] == "renamed:latest"
    assert models(bob, b"\0b") == [["renamed:latest"]] * 2
