"""What the kernel counts is what has happened, and who asks gets what he may know."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from llmasos.kernel.metrics import BOUNDS, MOST_TENANTS, OTHER, Waits
from llmasos.kernel.tenants import Subject
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .conftest import World, infer

ALICE = Subject("alice", 1000, 7, False, frozenset(t.TENANT_RIGHTS) | {t.Capability.CONNECT})


def families(world: World, subject: Subject | None = None) -> dict[str, dict[tuple[str, ...], t.Sample]]:
    session = b"\0" + (subject.path.encode() if subject else b"a")
    id_ = world.send(table.Stats(), session, **({"subject": subject} if subject else {}))
    world.turn()
    reply = world.result(id_, session).body
    return {
        family["name"]: {tuple(labels): t.Sample(list(labels), *rest) for labels, *rest in family["samples"]}
        for family in reply["families"]
    }


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(1, 5))))
def test_every_wait_is_in_one_bucket(waits: list[tuple[float, int]]) -> None:
    made = Waits()
    for seconds, times in waits:
        made.add(seconds, times)
    for index, bound in enumerate(BOUNDS):
        assert sum(made.counts[: index + 1]) == sum(times for seconds, times in waits if seconds <= bound)
    assert sum(made.counts) == sum(times for _, times in waits)


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


def test_ten_thousand_tenants_are_bounded(world: World) -> None:
    world.attach()
    for number in range(MOST_TENANTS + 20):
        subject = Subject(f"t{number}", 1000, 7, False, ALICE.rights)
        world.send(infer([1], model="tiny", max_tokens=1), b"\0" + subject.path.encode(), subject=subject)
    world.turn(400)
    found = families(world)["tenant_requests"]
    assert len(found) == MOST_TENANTS + 1
    assert found[(OTHER,)].value == 20
