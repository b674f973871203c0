"""Workers that hang are ended; workers that only take long are not."""

from __future__ import annotations

import signal

import pytest
from llmasos.drivers import base
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


@pytest.fixture
def loads(world: World) -> World:
    """A device whose loads do not end, and what is to be loaded by its name."""
    world.attach()
    world.holds_loads = True
    world.asked = world.send(table.SpawnModel(model="tiny"))  # type: ignore[attr-defined]
    world.flush()
    assert len(world.loads) == 1
    return world


def test_a_load_that_hangs_is_ended_and_hangs_no_third_worker(loads: World) -> None:
    pass_time(loads, watchdog.LOAD_S - 1)
    assert not loads.killed
    for worker in (1, 2):
        pass_time(loads, watchdog.LOAD_S + watchdog.GRACE_S + 1)
        assert loads.signals == [signal.SIGABRT, signal.SIGKILL] * worker
        loads.die(worker)
        loads.attach(worker + 1)
        loads.flush()
    assert loads.error(loads.asked) is errors.DeviceFault  # type: ignore[attr-defined]
    again = loads.send(infer([1], model="tiny", max_tokens=1))
    loads.flush()
    assert loads.error(again) is errors.DeviceFault
    assert len(loads.loads) == 2
    loads.model("other", llmasos_null_memory=1)
    loads.holds_loads = False
    assert loads.spawn_now("other")


def test_a_load_may_take_as_long_as_a_slow_disk_does(loads: World) -> None:
    (device,) = loads.kernel.devices.values()
    pass_time(loads, 1)
    loads.die()
    (pool,) = device.pools
    pool.files = {"config.json": base.File("/big", "sha256:0", int(watchdog.LOAD_BYTES_S * 5000))}
    loads.attach(2)
    loads.flush()
    pass_time(loads, watchdog.LOAD_S + 4999)
    assert not loads.killed
    pass_time(loads, 2)
    assert loads.killed == [102]


def test_a_load_that_ended_is_not_watched_any_more(world: World) -> None:
    world.attach()
    world.spawn()
    pass_time(world, 2 * watchdog.LOAD_S)
    assert not world.killed


def test_what_nobody_waits_for_any_more_is_not_loaded_again(loads: World) -> None:
    loads.kernel.disconnected(b"\0a")
    loads.die()
    loads.attach(2)
    loads.flush()
    assert len(loads.loads) == 1
