"""The null driver with a clock: each step takes the time that a model of a device says, in virtual time.

Nothing sleeps. A step starts when it is submitted or when the step before it ends, whichever is later, and
collecting it moves the clock to its end. Simulated days of traffic run in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from .base import Batch, Description
from .mirror import Step
from .null import NullDriver, Resident


@dataclass(slots=True)
class VirtualClock:
    """Seconds since the simulation began; moves only when told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, moment: float) -> None:
        self.now = max(self.now, moment)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step: a fixed part, one for each prefill token, for each decoding sequence, and for each
    token of context that a row attends to. Defaults: a 135M model on a small CPU."""

    fixed: float = 0.012
    prefill_token: float = 0.0008
    decode_sequence: float = 0.003
    context_token: float = 2e-7

    def of(self, step: Step) -> float:
        seconds = self.fixed
        for piece in step.pieces:
            rows = piece.end - piece.start
            decoding = piece.known - piece.start == 1  # its guesses are prefill to the device
            seconds += self.decode_sequence if decoding else 0
            seconds += self.prefill_token * (piece.drafted if decoding else rows)
            seconds += self.context_token * rows * (piece.start + piece.end + 1) / 2
        return seconds


class SimulatedDriver(NullDriver):
    """Tokens of the null driver, times of `step_time`, on `clock`."""

    name = "simulated"

    def __init__(self, clock: VirtualClock | None = None, step_time: StepTime | None = None) -> None:
        super().__init__()
        self.clock = clock or VirtualClock()
        self._step_time = step_time or StepTime()
        self._submitted: dict[int, float] = {}
        self._free_at = 0.0

    def describe(self) -> Description:
        return replace(super().describe(), text="a step-time model on a virtual clock", step_tokens=256)

    def submit(self, batch: Batch) -> int:
        self._submitted[batch.ticket] = self.clock()
        return super().submit(batch)

    def _round(self, resident: Resident, step: Step) -> float:
        seconds = self._step_time.of(step)
        super()._round(resident, step)  # in no time: of this machine the simulation is not about
        return seconds

    def _finish(self, ticket: int, seconds: float) -> float:
        begun = max(self._submitted.pop(ticket), self._free_at)
        self._free_at = begun + seconds
        self.clock.advance_to(self._free_at)
        return seconds
