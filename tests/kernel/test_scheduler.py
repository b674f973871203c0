"""Who runs next: (processes, budget) → plan, as tables and as properties."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmasos.kernel import scheduler
from llmasos.kernel.devices import Pool
from llmasos.kernel.infer import Infer
from llmasos.kernel.memory import Table
from llmasos.kernel.process import Process
from llmasos.syscalls.types import Sampling, SchedClass

POOL = Pool(1, "m", "d", "", "null", {}, 0.0)


def process(pid: int, lacking: int = 1, sched_class: str = "interactive", **fields: object) -> Process:
    """A process that lacks `lacking` tokens."""
    made = Process(
        pid=pid,
        parent=1,
        owner="o",
        session=None,
        pool=POOL,
        sched_class=SchedClass(sched_class),
        nice=0,
        label="",
        table=Table(),
        born=0.0,
        tokens=[0] * 1000,
        computed=1000 - lacking,
        infer=Infer((b"", pid), Sampling(), 0, 1000, 2000, 1, False, False),
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def pids(processes: list[Process]) -> list[int]:
    return [p.pid for p in processes]


def test_classes_come_first_then_service_then_age() -> None:
    queue = [
        process(1, sched_class="idle"),
        process(2, sched_class="batch"),
        process(3, vruntime=5.0),
        process(4, vruntime=1.0),
        process(5, vruntime=1.0),
        process(6, sched_class="realtime", vruntime=99.0),
    ]
    assert pids(scheduler.order(queue, 0.0, 2.0)) == [6, 4, 5, 3, 2, 1]


def test_who_starves_goes_first_whatever_the_class() -> None:
    queue = [process(1, last_run=9.9), process(2, sched_class="idle", last_run=7.0)]
    assert pids(scheduler.order(queue, 10.0, 2.0)) == [2, 1]


def test_stopped_blocked_and_finished_processes_are_not_in_the_queue() -> None:
    blocked = process(2)
    assert blocked.infer
    blocked.infer.take([1], [], 0.0)
    blocked.infer.credits = 0
    queue = [process(1, stopped=True), blocked, process(3, lacking=0), process(4, infer=None), process(5)]
    assert pids(scheduler.order(queue, 0.0, 2.0)) == [5]


def planned(
    queue: list[Process], step_tokens: int = 256, chunk_tokens: int = 256, most: int = 32
) -> list[tuple[int, int]]:
    shares = scheduler.plan(queue, most, step_tokens, chunk_tokens, lambda process, count: True)
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
    queue = scheduler.order([talking, asking], 0.0, 2.0)
    assert dict(planned(queue, chunk_tokens=40))[2] == count
    assert planned([asking], chunk_tokens=40) == [(2, 200)]


def test_a_prompt_does_not_wait_for_weaker_work_in_its_own_step() -> None:
    ask = process(1, 30)
    weaker = [process(2, sched_class="batch"), process(3, 50, sched_class="idle")]
    equal, stronger = process(4), process(5, sched_class="realtime")
    queue = scheduler.order([ask, *weaker, equal, stronger], 0.0, 2.0)
    assert planned(queue) == [(5, 1), (1, 30), (4, 1)]
    few = process(1, scheduler.PASS_ROWS)  # costs the others no more than they cost it
    assert planned(scheduler.order([few, *weaker], 0.0, 2.0)) == [(1, 16), (2, 1), (3, 50)]
    weaker[0].last_run = -5.0  # it starves
    assert planned(scheduler.order([ask, *weaker], 0.0, 2.0)) == [(2, 1), (1, 30)]


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
    shares = scheduler.plan(queue, 40, budget, chunk, lambda p, count: p.pid not in without_room)
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
        for step in range(steps):
            now = step * 0.01
            first = scheduler.order(self.processes, now, aging_s)[0]
            scheduler.charge(first, 1, now)
            self.served[first.pid] = self.served.get(first.pid, 0) + 1


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
    new = process(2)
    scheduler.enter(new, [old, new], 3.0)
    assert new.vruntime == 500.0


def test_memory_is_taken_from_waiting_then_from_lower_rank_never_from_higher() -> None:
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
    taken = []
    while (victim := scheduler.victim(everybody, claimant, set())) is not None:
        taken.append(victim.pid)
        victim.table = Table()
    assert taken == [1, 2, 3, 6]
