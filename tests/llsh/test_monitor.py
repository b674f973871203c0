"""What `top` draws, without a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from llmasos.syscalls import types as t
from llmasos.userland.llsh.monitor import Act, Snapshot, View
from rich.console import Console


def process(pid: int, owner: str = "ann", blocks: int = 0, **more: Any) -> t.ProcessInfo:
    given = {"state": t.State.RUNNING, "tokens_per_s": 1.0, "queue_place": 0, "generated": 0} | more
    return t.ProcessInfo(
        pid=pid,
        parent=1,
        owner=owner,
        name="",
        model="tiny:latest",
        device="cpu",
        sched_class=t.SchedClass.INTERACTIVE,
        nice=0,
        waiting_for="",
        context=10,
        computed=10,
        blocks=blocks,
        age_s=1.0,
        **given,
    )


def picture(*processes: t.ProcessInfo, free: int = 40) -> Snapshot:
    made = Snapshot.__new__(Snapshot)
    made.processes = list(processes)
    pool = t.PoolInfo("tiny:latest", "float32", "int8", "test", 0, 1, 100, free, len(processes))
    made.devices = [t.DeviceInfo("cpu", "cpu", "busy", "", 10**9, 10**9, 1, 0, 12.5, [pool])]
    return made


def drawn(view: View, snapshot: Snapshot, width: int = 80, height: int = 24) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(view.screen(snapshot, width, height))
    return out.getvalue().splitlines()


def test_the_map_shows_whose_the_kv_memory_is() -> None:
    snapshot = picture(process(2, "ann", 20), process(3, "bob", 40))
    (bar,) = [line for line in drawn(View(), snapshot, width=104) if line.startswith("  [")]
    assert (bar.count("A"), bar.count("B"), bar.count(".")) == (20, 40, 40)
    shared = picture(process(2, "ann", 60), process(3, "ann", 60))
    assert drawn(View(), shared, width=104)[3].count("A") == 60, "shared blocks are counted once"
    crumb = picture(process(2, "ann", 59), process(3, "bob", 0), process(4, "carl", 1))
    assert drawn(View(), crumb, width=24)[3].count("C") == 1, "who has anything is seen"


def test_totals_tenants_and_queue() -> None:
    lines = drawn(View(), picture(process(2, "ann"), process(3, "bob", queue_place=1)))
    assert "2 processes, 2 running, 1 queued" in lines[0]
    assert "2 tenants" in lines[0]
    assert "2.0 tokens/s" in lines[0]
    assert any("B bob  1 process" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (24, 6), (20, 4)])
def test_it_fits_into_any_terminal(width: int, height: int) -> None:
    snapshot = picture(*(process(pid, f"tenant{pid % 9}", 1) for pid in range(2, 60)))
    view = View()
    for _ in range(30):
        view.press("down", snapshot)
        lines = drawn(view, snapshot, width, height)
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)
        if height > 5:
            assert any(line.split()[:1] == [str(view.selected)] for line in lines), "the selected one is seen"


def test_orders_and_what_is_selected() -> None:
    snapshot = picture(process(2, blocks=1, generated=9), process(3, blocks=5, tokens_per_s=2.0))
    view = View()
    assert [p.pid for p in view.sorted(snapshot)] == [3, 2]
    view.press("t", snapshot)
    assert [p.pid for p in view.sorted(snapshot)] == [2, 3]
    view.press("down", snapshot)
    assert view.selected == 3
    assert view.press("s", snapshot) == Act("stop", 3)
    view.press("m", snapshot)
    assert view.current(snapshot).pid == 3, "it stays selected when the order changes"
    assert view.press("s", picture(process(3, state=t.State.STOPPED))) == Act("cont", 3)


def test_an_answer_is_for_the_process_that_was_asked_about() -> None:
    view, snapshot = View(), picture(process(2), process(3))
    view.press("k", snapshot)
    assert view.press("y", picture(process(3))) is None
    assert view.status() == "process 2 is gone"
    view.press("r", picture(process(3)))
    for key in "-21":
        view.press(key, picture(process(3)))
    assert view.press("enter", picture(process(3))) is None
    view.press("r", snapshot)
    for key in ("-", "5", "0", "backspace", "enter"):
        act = view.press(key, snapshot)
    assert act == Act("nice", 3, -5)
