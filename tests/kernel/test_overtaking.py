"""Who waits for a first token goes before the step that runs, or before the next one: who may, who may not,
what it costs others."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.tenants import LABEL_RIGHTS, Subject
from llmasos.syscalls import types as t
from llmasos.syscalls import wire

from .conftest import ROOT, Machine, infer

FIXED, TOKEN, ROW = 0.01, 0.0005, 0.003
OWN = FIXED + 20 * TOKEN
"""Seconds of a step with a newcomer's prompt alone."""
BUSY = FIXED + 24 * ROW


class Box(Machine):
    """A device on which 24 contexts of a class, all of tenant `many`, generate; step times are known."""

    def __init__(self, home: Path, of_class: t.SchedClass = t.SchedClass.BATCH, **config: object) -> None:
        settings = {"draft_tokens": 0, "swap_disk_bytes": 0, "step_ms": 200}
        super().__init__(home, StepTime(FIXED, TOKEN, ROW, 0.0), **settings)
        self.model("tiny", **{"llmasos_null_blocks": 4096, **config})
        self.attach()
        self.number = 0
        for prompt, new in ((40, 4), (9, 2), (70, 6), (20, 3)) * 3:  # tells rows from tokens
            id_ = self.ask("many", of_class, prompt, new)
            self.run(lambda id_=id_: self.ended(id_))
        self.crowd = [self.ask("many", of_class, 20, 1000) for _ in range(24)]
        self.run(self.now + 3)

    def ask(self, tenant: str, of_class: t.SchedClass, prompt: int = 20, new: int = 8) -> int:
        self.number += 1
        tokens = [(self.number * 7919 + place * 31) % 50_000 for place in range(prompt)]
        call = infer(tokens, model="tiny", max_tokens=new, sched_class=of_class)
        subject = Subject(tenant, 1000, 1, False, LABEL_RIGHTS)
        return self.send(call, session=b"\0" + tenant.encode(), subject=subject, credits_=4096)

    def wait_of(self, id_: int) -> float:
        came = self.now
        self.run(lambda: bool(self.seen.get(id_)))
        return self.first_token_s(id_) - came

    def early(self) -> None:
        """The clock stands where a step has just begun."""
        (device,) = self.kernel.devices.values()
        self.run(lambda: len(device.flights) == 1 and device.begun == self.now)
        self.run(self.now + 0.004)


def test_a_stronger_class_waits_for_no_step(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for delay in (0.0, 0.013, 0.031, 0.05):
        box.early()
        box.run(box.now + delay)
        assert box.wait_of(box.ask("one", t.SchedClass.INTERACTIVE)) <= OWN + 0.005
        box.run(box.now + 1)


def test_what_is_overtaken_goes_on_where_it_was(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.early()
    made = sum(len(a.body["tokens"]) for id_ in box.crowd for _, a in box.seen[id_])
    began = box.now
    box.ask("one", t.SchedClass.INTERACTIVE, new=1)
    box.run(began + 5)
    more = sum(len(a.body["tokens"]) for id_ in box.crowd for _, a in box.seen[id_]) - made
    assert more == pytest.approx(24 * (5 - OWN) / BUSY, rel=0.02), "only the newcomer's time is lost"


def test_the_same_tenant_and_class_waits_for_the_step(tmp_path: Path) -> None:
    box = Box(tmp_path, t.SchedClass.INTERACTIVE)
    box.early()
    assert box.wait_of(box.ask("many", t.SchedClass.INTERACTIVE)) > BUSY


def test_another_tenant_of_the_class_goes_first_until_he_has_had_his_share(tmp_path: Path) -> None:
    box = Box(tmp_path, t.SchedClass.INTERACTIVE)
    box.early()
    assert box.wait_of(box.ask("one", t.SchedClass.INTERACTIVE)) <= OWN + 0.005
    waits = []
    for _ in range(40):
        id_ = box.ask("one", t.SchedClass.INTERACTIVE, prompt=300, new=1)
        waits.append(box.wait_of(id_))
    one, many = (box.kernel.devices["null"].shares.counter(1, tenant) for tenant in ("one", "many"))
    assert one - many <= 0.2 + FIXED + 300 * TOKEN
    assert max(waits) > FIXED + 300 * TOKEN + BUSY / 2, "who has had a lot waits as others do"


def test_a_weaker_class_overtakes_nobody(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.early()
    box.ask("one", t.SchedClass.IDLE)
    box.run(box.now + 2)
    assert not any(batch.overtakes for batch in box.sent)


def test_a_step_ends_however_many_arrive(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.early()
    began, seen = box.now, [len(box.seen[id_]) for id_ in box.crowd]
    while [len(box.seen[id_]) for id_ in box.crowd] == seen:
        box.ask("one", t.SchedClass.INTERACTIVE, new=1)
        box.run(box.now + 0.005)
    assert box.now - began <= 2 * BUSY + 2 * OWN


def test_only_first_tokens_overtake(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.early()
    before = len(box.sent)
    id_ = box.ask("one", t.SchedClass.INTERACTIVE, new=8)
    box.run(lambda: box.ended(id_))
    assert [batch.overtakes for batch in box.sent[before:]].count(True) == 1


def test_nobody_overtakes_a_step_whose_memory_may_be_given_away(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.early()
    box.kernel.message(b"\0many", ROOT, wire.encode_cancel(box.crowd[0]))
    before = len(box.sent)
    id_ = box.ask("one", t.SchedClass.INTERACTIVE)
    box.flush()
    assert len(box.sent) == before, "it waits: a block of who was cancelled is still being written to"
    assert box.wait_of(id_) <= BUSY + OWN


def test_nobody_is_pushed_out_by_a_step_that_overtakes(tmp_path: Path) -> None:
    box = Box(tmp_path, max_position_embeddings=2048, llmasos_null_blocks=400)
    (pool,) = box.kernel.devices["null"].pools
    while pool.memory.free >= 7:
        box.early()
    before = len(box.sent)
    box.ask("one", t.SchedClass.INTERACTIVE, prompt=100)
    box.flush()
    assert not any(batch.overtakes for batch in box.sent[before:])


def test_a_device_that_cannot_interrupt_its_steps_takes_them_in_turn(tmp_path: Path) -> None:
    box = Box(tmp_path)
    (pool,) = box.kernel.devices["null"].pools
    pool.loaded = msgspec.structs.replace(pool.loaded, interruptible=False)
    box.early()
    box.ask("one", t.SchedClass.INTERACTIVE)
    box.run(box.now + 1)
    assert not any(batch.overtakes for batch in box.sent)


def test_a_result_that_came_first_is_booked_first(tmp_path: Path) -> None:
    """The running step ended while the one that was to overtake it was on its way."""
    box = Box(tmp_path)
    box.early()
    id_ = box.ask("one", t.SchedClass.INTERACTIVE)
    box.flush()
    step = box.held.pop()
    assert step.batch.overtakes
    (device,) = box.kernel.devices.values()
    box.run(lambda: len(device.flights) == 1)
    box.held.appendleft(step)
    box.run(lambda: box.ended(id_))
    assert box.result(id_, session=b"\0one").body["finish"] == "length"
    assert all(not box.ended(other) for other in box.crowd)


class Plain(Box):
    """A box whose device cannot interrupt its steps."""

    def __init__(self, home: Path, of_class: t.SchedClass = t.SchedClass.BATCH) -> None:
        super().__init__(home, of_class)
        (pool,) = self.kernel.devices["null"].pools
        pool.loaded = msgspec.structs.replace(pool.loaded, interruptible=False)
        self.early()


@pytest.mark.parametrize("of_class", [t.SchedClass.BATCH, t.SchedClass.INTERACTIVE])
def test_a_newcomer_shares_no_step_with_those_before_whom_he_goes(
    of_class: t.SchedClass, tmp_path: Path
) -> None:
    box = Plain(tmp_path, of_class)
    for delay in (0.0, 0.02, 0.06):
        box.early()
        box.run(box.now + delay)
        assert box.wait_of(box.ask("one", t.SchedClass.INTERACTIVE)) <= BUSY + OWN + 0.005
        box.run(box.now + 1)


def test_who_generates_misses_one_step_at_most(tmp_path: Path) -> None:
    box = Plain(tmp_path, t.SchedClass.INTERACTIVE)
    (device,) = box.kernel.devices.values()
    crowd = {work.seq for work in box.sent[-1].work}
    for tenant, other in (("one", "two"), ("three", "four")):
        for _ in range(16):
            box.ask(tenant, t.SchedClass.INTERACTIVE, prompt=1)
        box.run(lambda: device.flights[-1].apart)
        before = len(box.sent)
        for _ in range(16):
            box.ask(other, t.SchedClass.INTERACTIVE, prompt=1)
        box.run(lambda before=before: len(box.sent) > before)
        assert crowd & {work.seq for work in box.sent[before].work}
        box.run(box.now + 2)


def test_a_long_prompt_gets_no_step_of_its_own(tmp_path: Path) -> None:
    box = Plain(tmp_path, t.SchedClass.INTERACTIVE)
    before = len(box.sent)
    id_ = box.ask("one", t.SchedClass.INTERACTIVE, prompt=1000)
    box.run(lambda: bool(box.seen.get(id_)))
    assert all(len(batch.work) > 1 for batch in box.sent[before:-1])


def test_a_step_of_newcomers_is_not_overtaken_by_others(tmp_path: Path) -> None:
    """Or two tenants' newcomers would keep each other from running."""
    box = Plain(tmp_path, t.SchedClass.INTERACTIVE)
    (device,) = box.kernel.devices.values()
    box.ask("one", t.SchedClass.INTERACTIVE)
    box.run(lambda: device.flights[0].apart and len(device.flights) == 1)
    (pool,) = device.pools
    pool.loaded = msgspec.structs.replace(pool.loaded, interruptible=True)
    before = len(box.sent)
    id_ = box.ask("two", t.SchedClass.INTERACTIVE)
    box.flush()
    assert len(box.sent) == before
    box.run(lambda: len(box.sent) > before)
    assert not box.sent[before].overtakes
    box.run(lambda: box.ended(id_))
