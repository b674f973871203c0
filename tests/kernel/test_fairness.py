"""Tenants on one device, in virtual time: who floods does not keep others waiting, weights are kept, and
memory that is wanted several times over is not fought for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.tenants import LABEL_RIGHTS, Subject
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .conftest import Machine

PLENTY = 1 << 16


class Tenants(Machine):
    """Sends requests of tenants, each with another prompt."""

    def __init__(
        self, home: Path, blocks: int = 4096, step_time: StepTime | None = None, **settings: object
    ) -> None:
        settings = {"draft_tokens": 0, "max_requests": PLENTY, "swap_disk_bytes": 0} | settings
        super().__init__(home, step_time or StepTime(), **settings)
        self.model("tiny", llmasos_null_blocks=blocks, max_position_embeddings=1024)
        self.attach()
        self.spawn_now()
        self.owners: dict[int, str] = {}

    def ask(self, tenant: str, prompt: int, new: int) -> int:
        count = len(self.owners)
        tokens = [(count * 7919 + place * 31) % 50_000 for place in range(prompt)]
        call = table.Infer(model="tiny", tokens=t.pack_tokens(tokens), max_tokens=new)
        subject = Subject(tenant, 1000, 1, False, LABEL_RIGHTS)
        id_ = self.send(call, session=b"\0" + tenant.encode(), subject=subject, credits_=999)
        self.owners[id_] = tenant
        return id_

    def served(self) -> Counter[str]:
        """Tokens that each tenant's processes were given, those that have ended too."""
        made: Counter[str] = Counter()
        for id_, tenant in self.owners.items():
            made[tenant] += sum(len(a.body.get("tokens", ())) for _, a in self.seen.get(id_, ()))
        return made


QUICK = StepTime(0.003, 0.0004, 0.0008, 1e-7)
"""As a 4-bit SmolLM2 on two cores."""


@pytest.mark.parametrize(("step_time", "requests", "length"), [(StepTime(), 30, 24), (QUICK, 64, 64)])
def test_two_busy_tenants_are_served_by_weight_in_any_minute(
    tmp_path: Path, step_time: StepTime, requests: int, length: int
) -> None:
    """Also where far more wait than a step serves: who is not let in keeps nobody from running."""
    world = Tenants(tmp_path, step_time=step_time, quotas={"heavy": t.Quota(weight=3)})
    running = {
        world.ask(tenant, length, length): tenant for tenant in ("light", "heavy") for _ in range(requests)
    }
    marks = []
    for tick in range(10 * 4, 131 * 4):
        for id_ in [id_ for id_ in running if world.ended(id_)]:
            tenant = running.pop(id_)
            running[world.ask(tenant, length, length - id_ % 8)] = tenant
        world.run(tick / 4)
        if tick % 120 == 40:
            marks.append(world.served())
    for before, after in zip(marks, marks[2:], strict=False):
        minute = after - before
        assert minute["heavy"] / minute["light"] == pytest.approx(3, rel=0.05)


def first_tokens(home: Path, others: int) -> list[float]:
    """How long a tenant's prompts take to their first token while another one sends `others` a second."""
    home.mkdir()
    world = Tenants(home)
    waits: list[tuple[float, int]] = []
    for tick in range(200):
        world.run(5 + tick / 10)
        for _ in range(others // 10):
            world.ask("hog", 48, 12)
        if tick >= 50 and tick % 10 == 7:
            world.run(world.now + 0.013)
            waits.append((world.now, world.ask("victim", 48, 12)))
    world.run(world.now + 5)
    return sorted(world.first_token_s(id_) - at for at, id_ in waits)


def test_a_flood_costs_others_next_to_nothing(tmp_path: Path) -> None:
    alone, flooded = first_tokens(tmp_path / "alone", 0), first_tokens(tmp_path / "flooded", 100)
    assert flooded[-1] <= 1.2 * alone[-1]


def test_memory_wanted_four_times_over_is_not_fought_for(tmp_path: Path) -> None:
    def spent(blocks: int, at_once: int) -> float:
        home = tmp_path / f"{blocks}-{at_once}"
        home.mkdir()
        world = Tenants(home, blocks)
        begun, ids = world.now, list[int]()
        while len(ids) < 16 or not all(world.ended(id_) for id_ in ids):
            while len(ids) < 16 and sum(not world.ended(id_) for id_ in ids) < at_once:
                ids.append(world.ask("a", 64, 192))
            world.run(world.now + 0.05)
            assert all(p.preemptions <= 3 for p in world.kernel.processes)
        return world.now - begun

    assert spent(64, at_once=16) < spent(64, at_once=4) / 0.8, "as quick as with as many as there is room for"


def test_newcomers_of_one_decision_do_not_outgrow_their_quota(tmp_path: Path) -> None:
    world = Tenants(tmp_path, quotas={"q": t.Quota(kv_max=64)})
    ids = [world.ask("q", 15, 241) for _ in range(16)]  # of 16 blocks each in the end
    (pool,) = world.kernel.devices["null"].pools
    while not all(world.ended(id_) for id_ in ids):
        world.run(world.now + 0.05)
        assert len(pool.admitted) <= 4
        assert not any(p.preemptions for p in world.kernel.processes)


def test_many_tenants_who_wait_for_memory_do_not_stop_those_who_run(tmp_path: Path) -> None:
    world = Tenants(tmp_path, blocks=700, step_time=QUICK)
    for tenant in range(12):
        world.ask(f"in{tenant}", 200, 700)
    world.run(5.0)
    for tenant in range(100):
        world.ask(f"waits{tenant}", 200, 700)
    world.run(6.0)
    before = len(world.sent)
    world.run(9.0)
    rows = [len(batch.work) for batch in world.sent[before:]]
    assert sum(rows) / len(rows) > 4
