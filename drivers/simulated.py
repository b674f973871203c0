"""The null driver with a clock: each step takes the time that a model of a device says, in virtual time.

Nothing sleeps. A step starts when it is submitted or when the step before it ends, whichever is later, and
collecting it moves the clock to its end. Simulated days of traffic run in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from . import base
from .base import Batch, Description, Encode, Encoded, Interrupt, SeqOut, StepResult
from .mirror import Choice, Piece, Step
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
    token of context that a row attends to; a prompt's rows, which read it together, may pay less for that.
    Defaults: a 135M model on a small CPU."""

    fixed: float = 0.012
    prefill_token: float = 0.0008
    decode_sequence: float = 0.003
    context_token: float = 2e-7
    prefill_context_token: float | None = None  # None: as much as a decoding row

    def of(self, step: Step) -> float:
        seconds = self.fixed
        prefill_context = self.prefill_context_token
        if prefill_context is None:
            prefill_context = self.context_token
        for piece in step.pieces:
            rows = piece.end - piece.start
            decoding = piece.known - piece.start == 1  # its guesses are prefill to the device
            seconds += self.decode_sequence if decoding else 0
            seconds += self.prefill_token * (piece.drafted if decoding else rows)
            attended = rows * (piece.start + piece.end + 1) / 2
            seconds += (self.context_token if decoding else prefill_context) * attended
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

    def encode(self, encode: Encode) -> Encoded:
        self._submitted[encode.ticket] = self.clock()
        seconds = self._step_time.fixed + self._step_time.prefill_token * sum(encode.lengths)
        return replace(super().encode(encode), seconds=self._finish(encode.ticket, seconds))

    def _round(self, resident: Resident, step: Step, interrupt: Interrupt | None) -> float:
        seconds = self._step_time.of(step)
        super()._round(resident, step, interrupt)  # in no time: of this machine the simulation is not about
        return seconds

    def _finish(self, ticket: int, seconds: float) -> float:
        begun = max(self._submitted.pop(ticket), self._free_at)
        self._free_at = begun + seconds
        self.clock.advance_to(self._free_at)
        return seconds


class LightDriver(SimulatedDriver):
    """The same times with tokens that nobody checks: they depend on sequence and position alone, so that the
    simulator spends its time in the kernel. No scores, no beams. Steps have at most `step_tokens` tokens of
    `max_sequences` sequences; each takes `factor(rows that generate, has a
    prompt)` times what the model says."""

    def __init__(
        self,
        step_time: StepTime,
        step_tokens: int,
        max_sequences: int,
        factor: Callable[[int, bool], float],
    ) -> None:
        super().__init__(step_time=step_time)
        self._step_tokens, self._max_sequences = step_tokens, max_sequences
        self._factor = factor
        self._drawn: dict[int, float] = {}  # by ticket

    def describe(self) -> Description:
        return replace(super().describe(), step_tokens=self._step_tokens, max_sequences=self._max_sequences)

    def begin(self, ticket: int) -> Step:
        step = super().begin(ticket)
        rows = sum(piece.known - piece.start == 1 for piece in step.pieces)
        self._drawn[ticket] = self._factor(rows, rows < len(step.pieces))
        return step

    def result(self, step: Step, seconds: float) -> StepResult:
        del self._drawn[step.batch.ticket]
        return super().result(step, seconds)

    def _round(self, resident: Resident, step: Step, interrupt: Interrupt | None) -> float:
        return super()._round(resident, step, interrupt) * self._drawn[step.batch.ticket]

    def _compute(self, resident: Resident, piece: Piece) -> None:
        pass

    def _score(self, resident: Resident, piece: Piece) -> SeqOut:
        vocab_size = resident.loaded.vocab_size
        ends = range(piece.known, piece.end + 1) if piece.choose else ()
        return piece.done(
            [Choice((piece.sequence.id * 7919 + end * 104_729) % vocab_size) for end in ends], [], []
        )


@dataclass(slots=True)
class _Running:
    """What has begun: when its round `ends` and what it took by then, or the whole result."""

    ends: float
    seconds: float
    step: Step | None
    result: Encoded | None = None


class SimulatedWorker:
    """A device in virtual time for who moves the clock: steps wait in `held` and run one after another, but
    one that overtakes interrupts the one that runs, and one that cuts ends it with its round. The worker's
    own time is `pause` seconds a step; `wake(idle seconds)` is what it is instead when the step comes to an
    idle device, and how much more than a pause it is before the next step."""

    def __init__(
        self,
        driver: SimulatedDriver,
        pause: float = 0.0,
        wake: Callable[[float], tuple[float, float]] = lambda idle: (0.0, 0.0),
    ) -> None:
        self.driver = driver
        self.pause = pause
        self.wake = wake
        self._landed = 0.0
        self._follows = False  # a step was held when that one landed
        self._late = 0.0  # still not awake
        self.held: deque[base.Step | base.Encode] = deque()
        self._begun: list[_Running] = []  # who runs at the end

    @property
    def running(self) -> bool:
        return bool(self._begun)

    @property
    def ends(self) -> float:
        """When the round that runs ends."""
        return self._begun[-1].ends if self._begun else float("inf")

    def begin(self, now: float) -> None:
        """Starts the first step that is held if none runs, and those that overtake."""
        if not self._begun and self.held:
            self._start(self.held.popleft(), now)
        for step in [step for step in self.held if isinstance(step, base.Step) and step.batch.overtakes]:
            self.held.remove(step)
            self._start(step, now)

    def _start(self, message: base.Step | base.Encode, now: float) -> None:
        own, late = self.pause, 0.0
        if not self._begun and (now > self._landed or not self._follows):
            own, late = self.wake(now - self._landed)
        own, self._late = own + self._late, late
        if isinstance(message, base.Encode):
            done = self.driver.encode(message)
            new = _Running(now + own + done.seconds, done.seconds, None, done)
        else:
            step = self.driver.begin(self.driver.submit(message.batch))
            seconds = self.driver.round(step)
            new = _Running(now + own + seconds, seconds, step)
        for other in self._begun:
            other.ends += own + new.seconds
        self._begun.append(new)

    def land(self, now: float) -> StepResult | Encoded | None:
        """The result of the step that has ended by `now`; if only a round of it has, the next one begins."""
        if now < self.ends:
            return None
        ended = self._begun[-1]
        if ended.step is not None and not self._is_cut() and self.driver.again(ended.step):
            seconds = self.driver.round(ended.step)
            ended.ends += seconds
            ended.seconds += seconds
            return None
        self._begun.pop()
        self._landed, self._follows = now, bool(self.held)
        return ended.result if ended.step is None else self.driver.result(ended.step, ended.seconds)

    def _is_cut(self) -> bool:
        return any(isinstance(message, base.Step) and message.batch.cuts for message in self.held)
