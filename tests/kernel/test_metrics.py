"""What the kernel counts is what has happened, and who asks gets what he may know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.kernel.infer import Infer
from llmasos.kernel.metrics import BOUNDS, MOST_NAMED, MOST_SERIES, MOST_TENANTS, OTHER, Metrics, Waits
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t

from .conftest import ROOT, World, infer

ALICE = Subject("alice", 1000, 7, False, frozenset(t.TENANT_RIGHTS) | {t.Capability.CONNECT})

NONE = t.Sample([], 0)


def families(world: World, subject: Subject | None = None) -> dict[str, dict[tuple[str, ...], t.Sample]]:
    session = b"\0" + (subject.path.encode() if subject else b"scraper")
    id_ = world.send(table.Stats(), session, subject=subject or ROOT)
    world.turn()
    reply = world.result(id_, session).body
    return {
        family["name"]: {tuple(labels): t.Sample(list(labels), *rest) for labels, *rest in family["samples"]}
        for family in reply["families"]
    }


@given(st.lists(st.floats(0, 1000)))
def test_every_wait_is_in_one_bucket(waits: list[float]) -> None:
    made = Waits()
    for seconds in waits:
        made.add(seconds)
    for index, bound in enumerate(BOUNDS):
        assert sum(made.counts[: index + 1]) == sum(seconds <= bound for seconds in waits)
    assert sum(made.counts) == len(waits)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 100)), max_size=20))
def test_tokens_that_come_together_share_their_wait(items: list[tuple[int, float]]) -> None:
    now = 0.0
    metrics = Metrics(lambda: now)
    process: Any = SimpleNamespace(model="m", sched_class="batch", tenant="alice")
    one = Infer((b"", 1), t.Sampling(), 0, 3, 400, 0, True, False, metrics.came(process))
    for count, seconds in items:
        now += seconds
        metrics.took(one, count, now)
    series = one.tally.series
    assert series.generated == sum(count for count, _ in items)
    assert sum(series.first_token.counts) == min(1, len(items))
    assert sum(series.between.counts) == sum(count for count, _ in items[1:])
    assert series.between.total == pytest.approx(sum(seconds for _, seconds in items[1:]), abs=1e-6)
    for bound in BOUNDS:
        below = sum(count for count, seconds in items[1:] if seconds / count <= bound * (1 - 1e-6))
        assert sum(series.between.counts[: BOUNDS.index(bound) + 1]) >= below


def test_requests_are_counted_by_model_class_and_end(world: World) -> None:
    world.attach()
    ids = [world.send(infer([1, 2, 3], model="tiny", max_tokens=count)) for count in (4, 1)]
    world.turn(12)
    assert all(world.answers(id_) for id_ in ids)
    found = families(world)
    key = ("tiny:latest", "interactive")
    assert found["requests"][(*key, "length")].value == 2
    assert found["prompt_tokens"][key].value == 6
    assert found["generated_tokens"][key].value == 5
    assert sum(found["first_token_seconds"][key].buckets) == 2
    assert sum(found["queue_seconds"][key].buckets) == 2
    assert sum(found["between_tokens_seconds"][key].buckets) == 3
    assert found["requests_running"][key].value == found["requests_waiting"][key].value == 0
    assert found["steps"][("null",)].value >= 4
    assert found["tenant_requests"][("root",)].value == 2


def test_a_tenant_learns_what_he_used_himself(world: World) -> None:
    world.attach()
    world.send(infer([1, 2, 3], model="tiny", max_tokens=2))
    world.send(infer([1, 2], model="tiny", max_tokens=3), b"\0alice", subject=ALICE)
    world.turn(12)
    found = families(world, ALICE)
    assert {name for name in found if not name.startswith("tenant_")} == set()
    assert {labels for samples in found.values() for labels in samples} == {("alice",)}
    assert found["tenant_generated_tokens"][("alice",)].value == 3


def test_a_sub_tenant_learns_nothing_of_its_tenant(world: World) -> None:
    world.attach()
    world.send(infer([1, 2], model="tiny", max_tokens=3), b"\0alice", subject=ALICE)
    world.turn(12)
    assert not any(families(world, ALICE.narrowed("agent")).values())


def test_the_tenant_who_is_one_too_many_counts_as_other(world: World) -> None:
    world.attach()
    for number in range(MOST_NAMED + 20):
        subject = Subject(f"t{number}", 1000, 7, False, ALICE.rights)
        world.send(infer([1], model="tiny", max_tokens=1), b"\0" + subject.path.encode(), subject=subject)
    world.turn(400)
    found = families(world)["tenant_requests"]
    assert len(found) == MOST_NAMED + 1
    assert found[(OTHER,)].value == 20
    late = Subject(f"t{MOST_NAMED + 19}", 1000, 7, False, ALICE.rights)
    assert families(world, late)["tenant_requests"][(late.path,)].value == 1


def test_ten_thousand_tenants_are_bounded(world: World) -> None:
    metrics = world.kernel.metrics
    for number in range(MOST_TENANTS + 20):
        process: Any = SimpleNamespace(model=f"m{number}", sched_class="batch", tenant=f"t{number}")
        one = Infer((b"", 1), t.Sampling(), 0, 3, 4, 0, True, False, metrics.came(process))
        metrics.took(one, 1, 1.0)
        metrics.ended(one, "length", 1)
    found = {family.name: family for family in metrics.families(world.kernel)}
    generated = {sample.labels[0]: sample.value for sample in found["tenant_generated_tokens"].samples}
    assert len(generated) == MOST_NAMED + 1
    assert sum(generated.values()) == MOST_TENANTS + 20
    assert len(found["prompt_tokens"].samples) == MOST_SERIES + 1
    assert sum(sample.value for sample in found["prompt_tokens"].samples) == 3 * (MOST_TENANTS + 20)
    assert not any(metrics.use_of(f"t{MOST_TENANTS + 19}")[0].samples)


def test_who_waits_for_memory_is_told_from_who_runs(world: World) -> None:
    """16 blocks hold four of these contexts."""
    world.model("small", llmasos_null_blocks=16, max_position_embeddings=128)
    world.attach()
    pids = [world.spawn("small") for _ in range(8)]
    ids = [world.send(infer(list(range(60)), pid=pid, max_tokens=4)) for pid in pids]
    world.turn()
    key = ("small:latest", "interactive")
    found = families(world)
    running, waiting = found["requests_running"][key].value, found["requests_waiting"][key].value
    assert running > 0
    assert waiting > 0
    assert running + waiting + found["requests"].get((*key, "length"), NONE).value == 8
    world.turn(60)
    assert all(world.answers(id_) for id_ in ids)
    found = families(world)
    assert found["requests_running"][key].value == found["requests_waiting"][key].value == 0
    assert found["requests"][(*key, "length")].value == 8


def test_however_a_request_ends_it_runs_no_more(world: World) -> None:
    world.attach()
    beams = t.Beams(num_beams=2)
    world.send(infer([1, 2, 3], model="tiny", max_tokens=3, beams=beams))
    world.turn(12)
    for ending in ("cancel", "kill", "die"):
        id_ = world.send(infer([4, 5], model="tiny", max_tokens=2000))
        world.turn(6)
        if ending == "cancel":
            world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
        elif ending == "kill":
            world.kernel.processes.signal(next(iter(world.kernel.processes)), t.Signal.KILL)
        else:
            world.kernel.disconnected(b"\0a")
        world.turn(3)
    found = families(world)
    key = ("tiny:latest", "interactive")
    assert found["requests_running"][key].value == found["requests_waiting"][key].value == 0
    assert found["requests"][(*key, "length")].value == 1
    assert found["requests"][(*key, "killed")].value == 1
    assert sum(sample.value for sample in found["requests"].values()) == 4
