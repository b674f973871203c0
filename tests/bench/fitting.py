"""A machine for the simulator, fitted to what the flight recorder says of real steps.

    seconds = fixed + decode_sequence · rows + prefill_token · tokens
              + context_token · (context of rows) + prefill_context_token · (context of prompts' tokens)

by least squares of the relative errors, without the steps that something else held up. What a step costs
beside the device is the median distance of two that followed each other, less the second one's time.
"""

from __future__ import annotations

import itertools
import statistics

import numpy
from llmasos.drivers.simulated import StepTime
from llmasos.kernel.recorder import Decision
from numpy.typing import NDArray
from simulation import Machine

OUTLIER = 4.0
"""Steps that are so many median errors off say something about the machine's other work."""

Floats = NDArray[numpy.float64]


def machine(
    decisions: list[Decision], alone_s: float, blocks: int, step_tokens: int, sequences: int
) -> tuple[Machine, list[float]]:
    """The machine, and the relative errors of the steps it was fitted to. The first of `decisions` are those
    of prompts that were alone; `alone_s` is their TTFT."""
    shapes = numpy.array([_shape(one) for one in decisions])
    seconds = numpy.array([(one.seconds or 0.0) / one.rounds for one in decisions])
    found, errors = _least_squares(shapes, seconds)
    fixed, row, token, context, prefill_context = (float(max(0.0, value)) for value in found)
    pause = _pause(decisions)
    lonely = [one.seconds or 0.0 for one in decisions if one.tokens == 24 and not one.rows]
    transit = max(0.0, alone_s - statistics.median(lonely) - pause) / 2
    step_time = StepTime(fixed, token, row, context, prefill_context)
    made = Machine(step_time, 1, blocks, step_tokens, sequences, round(pause, 6), round(transit, 6))
    return made, errors


def _shape(one: Decision) -> tuple[float, ...]:
    rows = [work.start + 1 for work in one.work if work.count == 1]
    prompts = [work for work in one.work if work.count > 1]
    attended = sum(work.count * (work.start + (work.count + 1) / 2) for work in prompts)
    return 1.0, len(rows), sum(work.count for work in prompts), sum(rows), attended


def _least_squares(shapes: Floats, seconds: Floats) -> tuple[Floats, list[float]]:
    # A step whose sequences were all over takes no time: relative errors have a floor.
    weights = 1 / numpy.maximum(seconds, numpy.percentile(seconds, 10))
    kept = numpy.ones(len(seconds), bool)
    for _ in range(10):
        scaled = shapes[kept] * weights[kept, None]
        found = numpy.linalg.lstsq(scaled, (seconds * weights)[kept], rcond=None)[0]
        off = numpy.abs(shapes @ found - seconds) * weights
        kept = off < OUTLIER * numpy.median(off[kept])
    return found, [float(error) for error in off]


def _pause(decisions: list[Decision]) -> float:
    """Of pairs of which the second was sent before the first had landed."""
    gaps = [
        b.landed - a.landed - (b.seconds or 0.0)
        for a, b in itertools.pairwise(decisions)
        if a.landed is not None and b.landed is not None and b.ticket == a.ticket + 1 and b.time < a.landed
    ]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0
