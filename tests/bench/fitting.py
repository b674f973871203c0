"""A machine for the simulator, fitted to what the flight recorder says of real steps.

    seconds = fixed + decode_sequence · rows + prefill_token · tokens
              + context_token · (context of rows) + prefill_context_token · (context of prompts' tokens)

by least absolute relative errors (iterated least squares), so that steps which something else held up count
without pulling. What is left is the machine's other work, and that engines take rows by fours or eights: a
step's time is simulated with a factor drawn from real over fitted times of steps with about as many rows.
What a step costs beside the device is the median distance of two that followed each other, less the second
one's time; or, when it comes to an idle device, what passes beside its own time. After a rest that is more,
and the step itself takes longer: caches and page tables belong to others by then.
"""

from __future__ import annotations

import itertools
import statistics

import numpy
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.recorder import Decision
from numpy.typing import NDArray
from replay import LONELY, Rest
from simulation import Factors, Machine, Wake

FACTORS = 100
LIKE = (1, 2, 4, 8, 16, 64)  # up to so many rows steps are alike

Floats = NDArray[numpy.float64]


def machine(
    decisions: list[Decision], rests: list[Rest], blocks: int, step_tokens: int, sequences: int
) -> tuple[Machine, list[float]]:
    """The machine, and the relative errors of the steps it was fitted to."""
    shapes = numpy.array([_shape(one) for one in decisions])
    seconds = numpy.array([(one.seconds or 0.0) / one.rounds for one in decisions])
    found = numpy.maximum(_fit(shapes, seconds), 0.0)
    fixed, row, token, context, prefill_context = (float(value) for value in found)
    ratios = seconds / numpy.maximum(shapes @ found, 1e-9)
    prompts = shapes[:, 2] > 0
    pause, wake = _beside(decisions)
    transit = (rests[0].ttft - rests[0].step - wake) / 2
    lonely = fixed + token * LONELY + prefill_context * LONELY * (LONELY + 1) / 2
    wakes = tuple(
        Wake(rest.seconds, _least(rest.ttft - 2 * transit - lonely), _least(rest.then - rests[0].then))
        for rest in rests
    )
    made = Machine(
        StepTime(fixed, token, row, context, prefill_context),
        1,
        blocks,
        step_tokens,
        sequences,
        _least(pause),
        wakes,
        _least(transit),
        _by_rows(shapes[~prompts, 1], ratios[~prompts]),
        _factors(ratios[prompts]),
    )
    return made, [float(off) for off in numpy.abs(ratios - 1)]


def _shape(one: Decision) -> tuple[float, ...]:
    rows = [work.start + 1 for work in one.work if work.count == 1]
    prompts = [work for work in one.work if work.count > 1]
    attended = sum(work.count * (work.start + (work.count + 1) / 2) for work in prompts)
    return 1.0, len(rows), sum(work.count for work in prompts), sum(rows), attended


def _fit(shapes: Floats, seconds: Floats) -> Floats:
    # A step whose sequences were all over takes no time: relative errors have a floor.
    relative = 1 / numpy.maximum(seconds, numpy.percentile(seconds, 10))
    weights = relative
    for _ in range(50):
        found = numpy.linalg.lstsq(shapes * weights[:, None], seconds * weights, rcond=None)[0]
        off = numpy.abs(shapes @ found - seconds) * relative
        weights = relative / numpy.sqrt(numpy.maximum(off, 0.01))
    return found


def _by_rows(rows: Floats, ratios: Floats) -> tuple[Factors, ...]:
    edges = [0, *LIKE]
    found = [_factors(ratios[(low < rows) & (rows <= most)]) for low, most in itertools.pairwise(edges)]
    return tuple(Factors(most, values) for most, values in zip(LIKE, found, strict=True))


def _factors(ratios: Floats) -> tuple[float, ...]:
    """The distribution as equally likely values."""
    if not len(ratios):
        return (1.0,)
    places = (numpy.arange(FACTORS) + 0.5) / FACTORS
    return tuple(round(float(value), 4) for value in numpy.quantile(ratios, places))


def _beside(decisions: list[Decision]) -> tuple[float, float]:
    """Seconds of pause between steps, and of waking up for one that comes when the one before has landed."""
    pauses, wakes = [], []
    for a, b in itertools.pairwise(decisions):
        if a.landed is None or b.landed is None or b.ticket != a.ticket + 1 or b.overtakes:
            continue
        if b.time < a.landed:
            pauses.append(b.landed - a.landed - (b.seconds or 0.0))
        else:
            wakes.append(b.landed - b.time - (b.seconds or 0.0))
    return _median(pauses), _median(wakes)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def _least(seconds: float) -> float:
    """To the microsecond, and no less than nothing, whatever noise says."""
    return round(max(0.0, seconds), 6)
