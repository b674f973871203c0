"""Workers that hang are ended; workers that only take long are not."""

from __future__ import annotations

import signal

import pytest
from llmasos.kernel import watchdog
from llmasos.syscalls import errors, table

from .conftest import World, infer, reference


def pass_time(world: World, seconds: float) -> None:
    """Goes from timer to timer, as the I/O shell does."""
    end = world.now + seconds
    while (due := world.kernel.next_timer()) is not None and due <= end:
        world.now = max(world.now, due)
        world.flush()
    world.now = end
    world.flush()


@pytest.fixture
def busy(world: World) -> World:
    """A device that knows its pace (a step takes no time) and holds the step that it has."""
    world.attach()
    world.spawn()
    world.send(infer([1, 2], model="tiny", max_tokens=8))
    world.turn(20)
    world.holds_steps = True
    world.asked = world.send(infer([5], model="tiny", max_tokens=4))  # type: ignore[attr-defined]
    world.flush()
    assert world.held
    return world


def test_a_worker_whose_step_does_not_end_is_ended_and_its_work_done_by_the_next(busy: World) -> None:
    pass_time(busy, watchdog.LEAST_S - 1)
    assert not busy.killed
    pass_time(busy, 2)
    assert (busy.killed, busy.signals) == ([101], [signal.SIGABRT])
    pass_time(busy, watchdog.GRACE_S)
    assert busy.signals == [signal.SIGABRT, signal.SIGKILL]
    assert any("hangs" in line.text for line in busy.kernel.log.after(0))
    busy.die()
    busy.attach(2)
    busy.holds_steps = False
    busy.turn(20)
    assert busy.tokens(busy.asked) == reference([5], 4)  # type: ignore[attr-defined]


def test_a_worker_that_ends_by_itself_is_not_sent_a_second_signal(busy: World) -> None:
    pass_time(busy, watchdog.LEAST_S + 1)
    busy.die()
    busy.attach(2)
    pass_time(busy, watchdog.GRACE_S + 1)
    assert busy.killed == [101]


def test_what_hangs_every_worker_is_refused(busy: World) -> None:
    for worker in (1, 2):
        pass_time(busy, watchdog.LEAST_S + 1)
        busy.die(worker)
        if worker == 1:
            busy.attach(2)
            busy.flush()
            pass_time(busy, watchdog.UNKNOWN_S)  # the new worker's pace is not known yet
    busy.flush()
    assert busy.error(busy.asked) is errors.DeviceFault  # type: ignore[attr-defined]


def test_steps_that_end_are_no_hang_however_many_there_are(busy: World) -> None:
    for _ in range(4):
        pass_time(busy, 6)
        busy.land()
    assert not busy.killed
    id_ = busy.send(table.Lsdev())
    busy.flush()
    (device,) = busy.result(id_).body["devices"]
    assert (device["idle_s"], device["running_s"]) == (0.0, 0.0)
    pass_time(busy, 30)  # idle, which is not hanging
    assert not busy.killed
    busy.send(infer([6], model="tiny", max_tokens=4))
    busy.flush()
    pass_time(busy, 3)
    id_ = busy.send(table.Lsdev())
    busy.flush()
    (device,) = busy.result(id_).body["devices"]
    assert (device["idle_s"], device["running_s"]) == (33.0, 3.0)


def test_the_first_step_of_a_model_may_take_its_time(world: World) -> None:
    world.attach()
    world.spawn()
    world.holds_steps = True
    world.send(infer([1], model="tiny", max_tokens=1))
    world.flush()
    pass_time(world, watchdog.UNKNOWN_S - 1)
    assert not world.killed
    pass_time(world, 2)
    assert world.killed
