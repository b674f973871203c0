"""Timers by virtual clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from llmasos.kernel.timers import Timers


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60), st.floats(0, 100))
def test_what_is_due_comes_in_order_and_what_is_called_off_never(
    plans: list[tuple[float, bool]], now: float
) -> None:
    timers, rang = Timers(), []
    for when, off in plans:
        call_off = timers.add(when, lambda when=when: rang.append(when))
        if off:
            call_off()
            call_off()
    for call in timers.due(now):
        call()
    live = sorted(when for when, off in plans if not off)
    assert rang == [when for when in live if when <= now]
    assert timers.next() == next((when for when in live if when > now), None)


def test_timers_called_off_take_no_memory() -> None:
    timers = Timers()
    timers.add(5.0, lambda: None)
    for _ in range(10_000):
        timers.add(1e9, lambda: None)()
    assert len(timers) < 200
