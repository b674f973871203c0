"""The kernel forgets what is over: its objects do not outlive the processes and sessions they were for."""

from __future__ import annotations

import gc

from llmasos.kernel.process import Process
from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .conftest import World, infer


def alive(world: World) -> int:
    """Objects of this kernel that are still reachable: processes and sessions."""
    gc.collect()
    pools = [pool for device in world.kernel.devices.values() for pool in device.pools]
    processes = [thing for thing in gc.get_objects() if type(thing) is Process and thing.pool in pools]
    return len(processes) + len(world.kernel.sessions.by_id)


def visit(world: World, number: int) -> None:
    """A client that asks, spawns, forks, kills, does not wait for everything, and leaves."""
    me = b"\0%d" % number
    for start in range(3):
        call = infer([start, number, *range(40)], model="tiny", max_tokens=8)
        world.send(call, session=me, credits_=99)
    spawned = world.send(table.SpawnModel("tiny"), session=me)
    world.turn(4)
    pid = int(world.result(spawned, me).body["pid"])
    world.send(infer([1, 2, 3], pid=pid, max_tokens=5), session=me, credits_=99)
    world.turn(10)
    world.send(table.Fork(pid, 2), session=me)
    world.send(table.Kill(pid, t.Signal.KILL), session=me)
    world.send(table.Wait(pid, 30.0), session=me)
    world.turn(2 + number % 3 * 10)
    world.kernel.disconnected(me)
    world.turn(2)
    del world.inbox[me]


def test_nothing_is_left_of_clients_that_came_and_went(world: World) -> None:
    world.attach()
    for number in range(5):
        visit(world, number)
    world.now += 60
    world.turn()
    before = alive(world)
    for number in range(5, 25):
        visit(world, number)
    world.now += 60
    world.turn()
    assert alive(world) <= before
