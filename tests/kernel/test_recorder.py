"""The flight recorder: what it keeps of each step, and when it is written down."""

from __future__ import annotations

import json

from llmasos.kernel.effects import Dump
from llmasos.kernel.recorder import Recorder
from llmasos.kernel.tenants import LABEL_RIGHTS, Subject
from llmasos.syscalls import table, wire

from .conftest import World, infer


def lines(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.splitlines()]


def test_each_step_is_kept_with_its_parts_and_its_end(world: World) -> None:
    world.attach()
    world.spawn()
    id_ = world.send(infer([7] * 40, model="tiny", max_tokens=3))
    world.turn(8)
    pid = world.result(id_).body["pid"]
    decisions = lines(world.kernel.recorder.text())
    assert [d["outcome"] for d in decisions] == ["done"] * len(decisions)
    assert decisions[0]["work"][0][:4] == [pid, 0, 40, True]
    assert decisions[0]["tokens"] == 40
    assert decisions[0]["device"] == "null"
    assert decisions[1]["work"][0][:3] == [pid, 40, 1]
    assert decisions[1]["rows"] == 1
    assert all(d["landed"] >= d["time"] and d["seconds"] >= 0 for d in decisions)


def test_who_was_pushed_out_and_for_whom(world: World) -> None:
    world.attach()
    world.model("small", llmasos_null_blocks=8, max_position_embeddings=128)
    first = world.spawn("small")
    second = world.spawn("small")
    world.send(infer([2] * 90, pid=second, max_tokens=0))
    world.turn(4)
    world.send(infer([1] * 90, pid=first, max_tokens=2))
    world.turn(4)
    pushed = [push for d in lines(world.kernel.recorder.text()) for push in d["pushed"]]
    assert pushed == [{"victim": second, "claimant": first, "blocks": 6}]
    assert world.kernel.recorder.pushes == 1


def test_a_drivers_death_has_it_written_once_without_any_token(world: World) -> None:
    world.attach()
    world.spawn()
    world.holds_steps = True
    world.send(infer([31_337] * 20, model="tiny", max_tokens=5))
    world.flush()
    world.kernel.worker_gone(1)
    (dump,) = [e for e in world.kernel.take_effects() if isinstance(e, Dump)]
    assert dump.why == "null-died"
    assert lines(dump.lines)[-1]["outcome"] == "lost"
    assert b"31337" not in dump.lines
    world.drivers.clear()
    world.held.clear()
    world.attach(2)
    world.flush()
    world.kernel.worker_gone(2)
    assert not [e for e in world.kernel.take_effects() if isinstance(e, Dump)], "again at once"


def test_a_failed_step_is_kept_with_its_error(world: World) -> None:
    world.attach()
    world.spawn()
    world.holds_steps = True
    world.send(infer([1] * 20, model="tiny", max_tokens=5))
    world.flush()
    effects: list[object] = []
    carry_out = world.carry_out
    world.carry_out = lambda effect: (effects.append(effect), carry_out(effect))  # type: ignore[method-assign]
    world.land(fails=True)
    (dump,) = [e for e in effects if isinstance(e, Dump)]
    assert lines(dump.lines)[-1]["outcome"] == "DeviceFault"


def test_the_ring_keeps_the_newest(world: World) -> None:
    world.attach()
    recorder = Recorder(lambda: 0.0, 4)
    world.kernel.recorder = recorder
    world.spawn()
    world.send(infer([1] * 20, model="tiny", max_tokens=9))
    world.turn(20)
    kept = lines(recorder.text())
    assert len(kept) == 4
    assert kept == sorted(kept, key=lambda d: d["ticket"])
    short = recorder.text(limit=len(recorder.text()) - 1)
    assert lines(short) == kept[1:]


def test_the_administrator_reads_it_as_a_file_and_nobody_else(world: World) -> None:
    world.attach()
    world.spawn()
    world.send(infer([1] * 20, model="tiny", max_tokens=2))
    world.turn(5)
    read = world.send(table.Read("/proc/flight"))
    world.flush()
    assert world.result(read).kind == wire.Kind.REPLY
    listed = world.send(table.Ls("/proc"))
    world.flush()
    assert "/proc/flight" in [entry["path"] for entry in world.result(listed).body["entries"]]
    eve = Subject("eve", 1000, 9, False, LABEL_RIGHTS)
    refused = world.send(table.Read("/proc/flight"), session=b"\0e", subject=eve)
    listed = world.send(table.Ls("/proc"), session=b"\0e", subject=eve)
    world.flush()
    assert world.error(refused, b"\0e").__name__ == "NoSuchFile"
    assert [entry["path"] for entry in world.result(listed, b"\0e").body["entries"]] == ["/proc/uptime"]
