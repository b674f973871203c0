"""Limits by owner path: what is refused, until when, and what is counted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from llmasos.drivers.null import NullDriver
from llmasos.kernel.charges import MOST_TIMES, Charges
from llmasos.kernel.loop import Kernel
from llmasos.kernel.quotas import Quotas
from llmasos.kernel.tenants import LABEL_RIGHTS, Subject
from llmasos.syscalls import errors, table, wire
from llmasos.syscalls import types as t

from .conftest import World, infer, reference

ALICE = Subject("alice", 1000, 7, False, LABEL_RIGHTS)
AGENT = ALICE.narrowed("agent")


def retry_after(quotas: Quotas, owner: str, tokens: int, now: float) -> float:
    """Seconds that an infer is told to wait; 0: it is let in."""
    try:
        quotas.start(owner, tokens, now)
    except errors.QuotaExceeded as refusal:
        return float(refusal.details["retry_after"])
    return 0.0


def test_input_tokens_come_back_at_their_rate() -> None:
    quotas = Quotas({"alice": t.Quota(tokens_in=600)})
    assert retry_after(quotas, "alice", 500, 0.0) == 0
    assert retry_after(quotas, "alice", 200, 0.0) == 10.0  # 100 are left, 10 come a second
    assert retry_after(quotas, "alice", 200, 9.9) == pytest.approx(0.1, abs=0.01)
    assert retry_after(quotas, "alice", 200, 10.0) == 0
    assert retry_after(quotas, "bob", 10**6, 10.0) == 0


def test_what_is_more_than_a_minute_s_worth_waits_for_a_full_bucket_and_owes_the_rest() -> None:
    quotas = Quotas({"alice": t.Quota(tokens_in=600)})
    assert retry_after(quotas, "alice", 1200, 0.0) == 0
    assert retry_after(quotas, "alice", 1, 0.0) == pytest.approx(60.1)


def test_what_was_generated_over_the_limit_is_waited_for_afterwards() -> None:
    quotas = Quotas({"alice": t.Quota(tokens_out=60)})
    quotas.start("alice", 5, 0.0)
    quotas.generated("alice", 90, 1.0)
    assert retry_after(quotas, "alice", 1, 1.0) == pytest.approx(31.0)
    assert retry_after(quotas, "alice", 1, 32.0) == 0


def test_limits_above_an_owner_count_for_it_and_nothing_is_charged_by_who_is_refused() -> None:
    quotas = Quotas({"alice": t.Quota(tokens_in=100), "alice/agent": t.Quota(queue=1)})
    over = quotas.start("alice/agent", 10, 0.0)
    with pytest.raises(errors.QuotaExceeded) as refused:
        quotas.start("alice/agent", 10, 0.0)
    assert refused.value.details["path"] == "alice/agent"
    assert refused.value.details["quota"] == "queue"
    over()
    over()
    assert retry_after(quotas, "alice/agent", 90, 0.0) == 0
    assert retry_after(quotas, "alice/other", 1, 0.0) > 0
    assert dict(quotas.nodes())["alice"].infers == 1


def quotas_of(world: World) -> dict[str, dict[str, object]]:
    id_ = world.send(table.Quotas())
    world.flush()
    return {str(node["path"]): node for node in world.result(id_).body["quotas"]}


def test_a_quota_is_set_while_the_kernel_runs_and_use_is_told_by_node(world: World) -> None:
    world.attach()
    spawned = [world.send(table.SpawnModel(model="tiny"), session=b"\0b", subject=AGENT) for _ in range(2)]
    world.turn(3)
    pid = world.result(spawned[0], b"\0b").body["pid"]
    world.send(infer(list(range(40)), pid=pid, max_tokens=4), session=b"\0b", subject=AGENT)
    world.turn(9)
    used = quotas_of(world)
    assert (used["alice"]["processes"], used["alice/agent"]["processes"], used["alice"]["blocks"]) == (
        2,
        2,
        3,
    )
    world.send(table.SetQuota("alice", t.Quota(processes=2)))
    refused = world.send(table.SpawnModel(model="tiny"), session=b"\0b", subject=AGENT)
    world.flush()
    assert world.error(refused, b"\0b") is errors.QuotaExceeded
    assert world.result(refused, b"\0b").body["details"]["retry_after"] > 0
    world.send(table.SetQuota("alice", None))
    again = world.send(table.SpawnModel(model="tiny"), session=b"\0b", subject=AGENT)
    world.turn(2)
    assert world.result(again, b"\0b").kind == wire.Kind.REPLY
    seen = world.send(table.Quotas(), session=b"\0b", subject=AGENT)
    world.flush()
    assert [node["path"] for node in world.result(seen, b"\0b").body["quotas"]] == ["alice/agent"]
    setting = world.send(table.SetQuota("alice", None), session=b"\0b", subject=AGENT)
    world.flush()
    assert world.error(setting, b"\0b") is errors.PermissionDenied


@pytest.mark.parametrize("path", ["", "/", "alice/", "/alice", "alice//agent"])
def test_limits_of_a_path_that_nobody_can_have_are_refused(tmp_path: Path, path: str) -> None:
    world = World(tmp_path)
    setting = world.send(table.SetQuota(path, t.Quota(queue=1)))
    world.flush()
    assert world.error(setting) is errors.InvalidArgument


def test_an_owner_keeps_within_its_blocks_and_still_gets_on(tmp_path: Path) -> None:
    world = World(tmp_path, quotas={"alice": t.Quota(kv_max=8)})
    world.model("tiny")
    world.attach()
    ids = [
        world.send(infer([n] * 40, model="tiny", max_tokens=60), session=b"\0b", subject=ALICE, credits_=999)
        for n in range(3)
    ]
    big = world.send(infer([1] * 100, model="tiny", max_tokens=100), session=b"\0b", subject=ALICE)
    reasons = set()
    for _ in range(400):
        world.turn()
        held = sum(len(p.table.blocks) for p in world.kernel.processes)
        assert held <= 8
        reasons |= {p.waiting_for for p in world.kernel.processes}
    assert "quota" in reasons
    assert world.error(big, b"\0b") is errors.NeverFits
    for n, id_ in enumerate(ids):
        items = [a for a in world.answers(id_, b"\0b") if a.kind == wire.Kind.ITEMS]
        assert [token for a in items for token in a.body["tokens"]] == reference([n] * 40, 60)


def test_what_can_never_end_within_new_limits_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.model("tiny")
    world.attach()
    lives, dies = (
        world.send(infer([n] * 40, model="tiny", max_tokens=n), session=b"\0b", subject=ALICE, credits_=999)
        for n in (60, 200)
    )
    world.turn(8)
    world.send(table.SetQuota("alice", t.Quota(kv_max=8)))
    world.turn(200)
    assert world.result(lives, b"\0b").body["finish"] == "length"
    assert world.error(dies, b"\0b") is errors.NeverFits


def test_what_does_not_fit_any_more_when_its_model_comes_back_smaller_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.model("tiny", max_position_embeddings=1024)
    world.attach()
    dies = world.send(infer([1] * 40, model="tiny", max_tokens=900))
    world.turn(4)
    world.die()
    load = NullDriver.load
    monkeypatch.setattr(
        NullDriver, "load", lambda self, spec: msgspec.structs.replace(load(self, spec), blocks=50)
    )
    world.attach(2)
    world.turn(6)
    assert world.error(dies) is errors.NeverFits


def test_snapshots_keep_within_an_owner_s_disk(tmp_path: Path) -> None:
    world = World(tmp_path, quotas={"root": t.Quota(disk_bytes=1)})
    world.model("tiny")
    world.attach()
    pid = world.spawn()
    world.send(infer(list(range(40)), pid=pid, max_tokens=4))
    world.turn(9)
    refused = world.send(table.Snapshot(pid, "mine"))
    world.flush()
    assert world.error(refused) is errors.QuotaExceeded
    world.send(table.SetQuota("root", t.Quota(disk_bytes=10**6)))
    kept = world.send(table.Snapshot(pid, "mine"))
    world.turn(3)
    assert world.result(kept).kind == wire.Kind.REPLY
    assert int(str(quotas_of(world)["root"]["disk_bytes"])) > 40 * 8


def test_limits_set_by_a_call_outlive_the_kernel_until_the_configuration_changes_them(tmp_path: Path) -> None:
    world = World(tmp_path, quotas={"bob": t.Quota(queue=3), "carol": t.Quota(queue=4)})
    rows: dict[str, bytes] = {}

    def durable() -> None:
        for name, data in world.kernel.ledger.take().items():
            rows.pop(name, None)
            if data is not None:
                rows[name] = data

    def reborn() -> dict[str, t.Quota | None]:
        durable()
        kernel = Kernel(world.kernel.config, world.store, ["null"], lambda: world.now, seed=2, rows=rows)
        return {path: node.limit for path, node in kernel.quotas.nodes()}

    world.send(table.SetQuota("alice", t.Quota(weight=2.0)))
    world.send(table.SetQuota("bob", None))
    world.turn(1)
    assert reborn() == {"alice": t.Quota(weight=2.0), "carol": t.Quota(queue=4)}
    changed = msgspec.structs.replace(world.kernel.config, quotas={"alice": t.Quota(weight=5.0)})
    world.kernel.reconfigure(lambda: changed)
    assert reborn() == {"alice": t.Quota(weight=5.0)}


def test_saying_that_tokens_were_seen_does_not_make_input_free(world: World) -> None:
    world.attach()
    world.send(table.SetQuota("alice", t.Quota(tokens_in=50)))
    refused = []
    for _ in range(3):
        call = infer(list(range(20)), model="tiny", max_tokens=4, seen=1)
        asked = world.send(call, session=b"\0b", subject=AGENT)
        world.turn(9)
        refused.append(world.result(asked, b"\0b").kind == wire.Kind.ERROR)
    assert refused == [False, False, True]


def test_a_request_that_comes_again_is_not_charged_again() -> None:
    charges = Charges(trusting=0.0)
    assert not charges.knows(b"alice", 5, 1.0)
    charges.made(b"alice", 5)
    assert charges.knows(b"alice", 5, 1.0)
    assert not charges.knows(b"alice", 6, 1.0)
    assert not charges.knows(b"bob", 5, 1.0)
    charges.answered(b"alice", 5)
    assert not charges.knows(b"alice", 5, 1.0)
    for _ in range(MOST_TIMES + 1):
        charges.made(b"alice", 5)
    assert not charges.knows(b"alice", 5, 1.0)
    charges.made(b"alice", 7)
    charges.forget(b"alice")
    assert not charges.knows(b"alice", 7, 1.0)
    assert Charges(trusting=30.0).knows(b"alice", 5, 29.0)  # an earlier kernel had charged it
