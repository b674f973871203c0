"""Who runs next: (processes, budget) → plan, as tables and as properties."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.kernel import scheduler
from llmasos.kernel.claims import Claims
from llmasos.kernel.devices import Pool
from llmasos.kernel.infer import Infer
from llmasos.kernel.memory import Memory, Table
from llmasos.kernel.metrics import Series, Tally
from llmasos.kernel.pace import PASS_ROWS
from llmasos.kernel.process import CLASS_RANK, Process
from llmasos.kernel.quotas import Quotas
from llmasos.kernel.runqueue import RunQueue
from llmasos.kernel.shares import Shares
from llmasos.syscalls.types import Quota, Sampling, SchedClass


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def pool(weights: dict[str, float] | None = None) -> Pool:
    queue = RunQueue(Shares(lambda tenant: (weights or {}).get(tenant, 1.0)), CLOCK)
    return Pool(1, "m", "d", "", "null", "", {}, 0.0, queue)


POOL = pool()


def process(
    pid: int, lacking: int = 1, sched_class: str = "interactive", owner: str = "o", **fields: object
) -> Process:
    """A process that lacks `lacking` tokens."""
    made = Process(
        pid=pid,
        parent=1,
        owner=owner,
        session=None,
        pool=POOL,
        sched_class=SchedClass(sched_class),
        nice=0,
        label="",
        table=Table(),
        born=0.0,
        tokens=[0] * 1000,
        computed=1000 - lacking,
        infer=Infer((b"", pid), Sampling(), 0, 1000, 2000, 1, False, False, Tally(Series(), [])),
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def pids(processes: list[Process]) -> list[int]:
    return [p.pid for p in processes]


def queue_of(processes: list[Process], **weights: float) -> RunQueue:
    made = pool(weights)
    for one in processes:
        one.pool = made
        made.queue.touch(one)
    return made.queue


def order(processes: list[Process]) -> list[Process]:
    """The runnable ones, first to run first, as a decision that takes them all would."""
    service = [one.vruntime for one in processes]
    queue = queue_of(processes)
    for one, had in zip(processes, service, strict=True):
        one.vruntime = had  # who enters is lifted to the others
        queue.touch(one)
    taken = list(queue.take(2.0, lambda _: 0.001))
    queue.settle()
    return taken


def test_classes_come_first_then_service_then_age() -> None:
    queue = [
        process(1, sched_class="idle"),
        process(2, sched_class="batch"),
        process(3, vruntime=5.0),
        process(4, vruntime=1.0),
        process(5, vruntime=1.0),
        process(6, sched_class="realtime", vruntime=99.0),
    ]
    assert pids(order(queue)) == [6, 4, 5, 3, 2, 1]


def test_stopped_blocked_and_finished_processes_are_not_in_the_queue() -> None:
    blocked = process(2)
    assert blocked.infer
    blocked.infer.take([1], [], 0.0)
    blocked.infer.credits = 0
    queue = [process(1, stopped=True), blocked, process(3, lacking=0), process(4, infer=None), process(5)]
    assert pids(order(queue)) == [5]


def test_who_changes_after_it_was_entered_is_found_out() -> None:
    one, two = process(1), process(2)
    queue = queue_of([one, two])
    one.stopped = True
    assert pids(list(queue.take(2.0, lambda _: 0.001))) == [2]
    queue.settle()
    one.stopped = False
    queue.touch(one)
    assert pids(list(queue.take(2.0, lambda _: 0.001))) == [1, 2]


def test_a_step_is_divided_between_tenants_by_weight() -> None:
    queue = queue_of([process(pid, owner="ab"[pid % 2] + "/x") for pid in range(40)], a=1.0, b=3.0)
    taken = list(itertools.islice(queue.take(2.0, lambda _: 0.001), 16))
    assert Counter(p.owner for p in taken) == {"a/x": 4, "b/x": 12}


def test_the_longest_cached_prefix_goes_first_among_arrivals_of_a_moment() -> None:
    queue = [process(1), process(2), process(3), process(4)]
    for one, arrived, prefix in zip(queue, (0.0, 0.1, 0.2, 5.0), (0, 3, 9, 99), strict=True):
        assert one.infer
        one.infer.arrived, one.infer.prefix = arrived, prefix
    assert pids(order(queue)) == [3, 2, 1, 4]


def _account(p: Process) -> tuple[int, str]:
    return CLASS_RANK[p.sched_class], p.owner


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_kept_order_is_the_one_that_looking_at_everybody_gives(data: st.DataObject) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    classes, owners = st.sampled_from(["interactive", "batch", "idle"]), st.sampled_from("abc")
    processes = [
        process(pid, sched_class=data.draw(classes), owner=data.draw(owners))
        for pid in range(data.draw(st.integers(1, 12)))
    ]
    queue = queue_of(processes, **weights)
    costs = {p.pid: 1.0 + p.pid / 7 for p in processes}
    for _ in range(data.draw(st.integers(1, 8))):
        some = data.draw(st.sampled_from(processes))
        match data.draw(st.sampled_from(["stop", "continue", "move", "nothing"])):
            case "stop" | "continue" as what:
                some.stopped = what == "stop"
            case "move":
                some.sched_class = SchedClass(data.draw(classes))
        queue.touch(some)
        counters = {_account(p): queue.shares.counter(*_account(p)) for p in processes}
        left = [p for p in processes if p.runnable]
        taken = list(queue.take(1e9, lambda p: costs[p.pid]))
        assert set(taken) == set(left)
        for one in taken:  # the plain rule: look at everybody that is left
            rank, counter = _account(one)[0], counters[_account(one)]
            least_rank, least = min((_account(p)[0], counters[_account(p)]) for p in left)
            assert (rank, counter) == (least_rank, pytest.approx(least))  # summed in another order
            own = [(p.vruntime, p.pid) for p in left if _account(p) == _account(one)]
            assert (one.vruntime, one.pid) == min(own)
            left.remove(one)
            counters[_account(one)] += costs[one.pid] / weights[one.owner]
        for one in taken[: data.draw(st.integers(0, 5))]:
            scheduler.charge(one, costs[one.pid], 0.0)
        queue.settle()


def wants(queue: list[Process]) -> list[scheduler.Share]:
    return [scheduler.Share(process, process.lacking) for process in queue]


def planned(
    queue: list[Process], step_tokens: int = 256, chunk_tokens: int = 256, most: int = 32
) -> list[tuple[int, int]]:
    room = iter(wants(queue))
    turn = list(itertools.islice(room, most))
    shares = scheduler.plan(turn, room, most, step_tokens, chunk_tokens, lambda process, count: True)
    return [(s.process.pid, s.count) for s in shares]


def test_a_step_serves_all_that_generate_and_fills_up_with_prompts() -> None:
    queue = [process(1, 300), process(2), process(3, 50), process(4)]
    assert planned(queue) == [(1, 244), (2, 1), (3, 10), (4, 1)]  # up to a block's end
    assert planned([process(1, 300), process(2), process(4)], 242) == [(1, 228), (2, 1), (4, 1)]
    assert planned([process(1, 30), process(2), process(3)], most=2) == [(1, 30), (2, 1)]
    assert planned([process(1, 3), process(2), process(3)], 2, most=2) == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("speaker", "prompt", "count"),
    [
        ("interactive", "interactive", 32),
        ("realtime", "interactive", 32),
        ("interactive", "batch", 32),
        ("batch", "interactive", 200),  # who generates is weaker: he waits
        ("batch", "batch", 32),
    ],
)
def test_prompts_come_in_chunks_beside_who_is_no_weaker(speaker: str, prompt: str, count: int) -> None:
    talking = process(1, sched_class=speaker)
    asking = process(2, 200, sched_class=prompt)
    queue = order([talking, asking])
    assert dict(planned(queue, chunk_tokens=40))[2] == count
    assert planned([asking], chunk_tokens=40) == [(2, 200)]


def test_a_prompt_does_not_wait_for_weaker_work_in_its_own_step() -> None:
    ask = process(1, 30)
    weaker = [process(2, sched_class="batch"), process(3, 50, sched_class="idle")]
    equal, stronger = process(4), process(5, sched_class="realtime")
    queue = order([ask, *weaker, equal, stronger])
    assert planned(queue) == [(5, 1), (1, 30), (4, 1)]
    few = process(1, PASS_ROWS)  # costs the others no more than they cost it
    assert planned(order([few, *weaker])) == [(1, 16), (2, 1), (3, 50)]
    waiting = queue_of([ask, *weaker])
    waiting.shares.served[CLASS_RANK[SchedClass.BATCH]] = -5.0  # its class starves
    assert planned(list(waiting.take(2.0, lambda _: 0.001))) == [(2, 1), (1, 30)]


@given(
    lacking=st.lists(st.integers(1, 400), max_size=40),
    budget=st.integers(40, 512),
    chunk=st.integers(16, 512),
    without_room=st.sets(st.integers(2, 41)),
)
def test_a_plan_is_within_its_bounds_and_wastes_nothing(
    lacking: list[int], budget: int, chunk: int, without_room: set[int]
) -> None:
    """Who finds no room neither runs nor keeps others from running."""
    queue = [process(pid, n) for pid, n in enumerate(lacking, 2)]
    shares = scheduler.plan(wants(queue), (), 40, budget, chunk, lambda p, count: p.pid not in without_room)
    assert sum(s.count for s in shares) <= budget
    assert all(0 < s.count <= s.process.goal - s.process.computed for s in shares)
    possible = [p for p in queue if p.pid not in without_room]
    assert bool(shares) == bool(possible)
    served = sum(s.count for s in shares)
    bound = min(budget, chunk) if 1 in lacking else budget
    # Less by the tokens that are kept for who generates, and by an unfinished block.
    assert served >= min(bound, sum(p.lacking for p in possible)) - 40 - 16


@dataclass
class Day:
    """Plays steps of one token a process on a device that holds one process a step."""

    processes: list[Process]
    served: dict[int, int] = field(default_factory=dict)

    def play(self, steps: int, aging_s: float) -> None:
        queue = queue_of(self.processes)
        for step in range(steps):
            CLOCK.now = step * 0.01
            first = next(queue.take(aging_s, lambda _: 0.01))
            scheduler.charge(first, 0.01, CLOCK.now)
            queue.settle()
            self.served[first.pid] = self.served.get(first.pid, 0) + 1
        CLOCK.now = 0.0


def test_equal_processes_share_evenly_and_nice_weighs() -> None:
    day = Day([process(1), process(2), process(3, nice=3)])
    day.play(3000, aging_s=1e9)
    assert abs(day.served[1] - day.served[2]) <= 2
    assert 1.9 < day.served[1] / day.served[3] < 2.0  # 1.25 ** 3 = 1.95


def test_nobody_starves_under_a_stronger_class() -> None:
    day = Day([process(1, sched_class="realtime"), process(2, sched_class="idle")])
    day.play(3000, aging_s=2.0)
    assert day.served[2] >= 14


def test_newcomers_neither_jump_the_queue_for_long_nor_wait_for_it() -> None:
    old = process(1, vruntime=500.0)
    queue = queue_of([old])
    new = process(2, pool=old.pool)
    queue.touch(new)
    assert new.vruntime == 500.0


def test_a_tenant_that_was_away_gets_no_credit_for_it() -> None:
    busy, other = process(1, owner="a"), process(2, owner="b")
    queue = queue_of([busy])
    for _ in range(100):
        scheduler.charge(next(queue.take(2.0, lambda _: 0.01)), 0.01, 0.0)
        queue.settle()
    other.pool = busy.pool
    queue.touch(other)
    assert 0.98 <= queue.shares.counter(1, "b") <= queue.shares.counter(1, "a")


def test_among_tenants_who_had_as_much_who_came_last_goes_first() -> None:
    """He was lifted to the other's counter: what he had when he was last here was less."""
    busy = [process(pid, owner="busy") for pid in (1, 2)]
    queue = queue_of(busy)
    queue.shares.charge(CLASS_RANK[busy[0].sched_class], "busy", 5.0, 0.0)
    list(itertools.islice(queue.take(2.0, lambda _: 0.001), 1))
    queue.settle()
    queue.touch(process(3, owner="new"))
    assert pids(list(queue.take(2.0, lambda _: 0.001)))[0] == 3


def test_memory_is_taken_from_waiting_then_from_lower_claims_never_from_higher() -> None:
    def holding(pid: int, **fields: object) -> Process:
        return process(pid, table=Table(b"", [pid]), **fields)

    slow = holding(1)
    assert slow.infer
    slow.infer.take([1], [], 0.0)
    slow.infer.credits = 0  # its reader does not read
    waiting = holding(2, infer=None, sched_class="realtime")
    batch = holding(3, sched_class="batch")
    older, claimant, younger = holding(4), holding(5), holding(6)
    everybody = [slow, waiting, batch, older, claimant, younger]
    assert taken_for(claimant, everybody) == [1, 2, 3, 6]


def taken_for(claimant: Process, holders: list[Process], **quotas: Quota) -> list[int]:
    """Whom `claimant` could take blocks from, in order."""
    made = pool()
    made.memory, made.holders = Memory(100), set(holders)
    taken = []
    claims = Claims(made, Quotas(quotas), 99)
    while (victim := claims.victim(claimant, set())) is not None:
        taken.append(victim.pid)
        claims.took(victim, -len(victim.table.blocks))
        victim.table = Table()
    return taken


def test_who_is_over_its_share_gives_way_first_and_no_further_than_to_it() -> None:
    """Of 100 blocks 50 are each tenant's."""

    def holding(pid: int, owner: str, blocks: int) -> Process:
        return process(pid, owner=owner, table=Table(b"", [0] * blocks))

    hog = [holding(pid, "hog", 20) for pid in (1, 2, 3, 4)]
    meek = [holding(9, "meek/agent", 20)]
    assert taken_for(meek[0], [*hog, *meek]) == [4]
    hog[3].table = Table(b"", [0] * 20)
    assert taken_for(hog[0], [*hog, *meek])[0] == 4, "not of who is below its share, though he is younger"
    hog = [holding(pid, "hog", 20) for pid in (1, 2, 3, 4)]
    kept = Quota(kv_min=80)
    assert taken_for(meek[0], [*hog, *meek], hog=kept) == [], "nor of what is guaranteed"


def test_who_lost_its_blocks_keeps_the_next_ones_until_it_got_on() -> None:
    claimant, victim = process(1, table=Table(b"", [1])), process(2, table=Table(b"", [2]), keeps_until=1016)
    assert taken_for(claimant, [claimant, victim]) == []
    victim.tokens += [0] * 16
    assert taken_for(claimant, [claimant, victim]) == [2]
