"""What a training process works on: which program is due to it, what it told, who listens. Facts only."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmasos.syscalls import errors
from llmasos.syscalls.training import Recipe, TrainEvent, TrainResult

from .modelfs.runs import RunRow
from .programs import Program
from .sessions import Request

PREPARER = "llmasos.userland.dataset"
TRAINER = "llmasos.drivers.trainer"

MOST_EVENTS = 4096
"""The last so many events of a run are kept for those who follow it."""


@dataclass(slots=True, eq=False)
class Run:
    """What a process trains: `dataset` with its `digest`. `program` is what works for it now; a trainer
    attaches as `connection` and is `ready` when it waits for grants. `deaths` are programs in a row that
    brought it no further."""

    id: str
    dataset: str
    digest: str
    target: str
    recipe: Recipe
    result: TrainResult | None = None
    problem: errors.LLMasOSError | None = None
    program: Program | None = None
    number: int = 0  # by which its trainer says whose it is
    connection: int | None = None
    ready: bool = False
    prepared: bool = False
    exited: bool = False  # the trainer's process, but something that it said may not have been heard
    leaving: bool = False
    begun_at: float = 0.0  # its preparer
    weighed_at: float = 0.0  # when it was looked what it keeps on the disk
    turns: int = 0  # that its preparer had, and did not get done
    stopping: bool = False
    tidied: bool = False
    deaths: int = 0
    due: float = 0.0
    stopped_at: float | None = None
    grant: int = 0
    aged: bool = False  # the grant was given because its class had waited for too long
    called_in: bool = False
    called_at: float = 0.0
    granted_at: float = 0.0
    charged_at: float = 0.0
    look_at: float = 0.0  # when the kernel looks again whether it has to yield
    step: int = 0
    steps: int = 0
    tokens: int = 0
    pace: float = 0.0
    events: deque[TrainEvent] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    dropped: int = 0  # events before those that are kept
    followers: list[Follower] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        """Whether it has a trainer."""
        return self.program is not None and self.program.arguments[0] == TRAINER

    @property
    def prepares(self) -> bool:
        """Whether its data set is being prepared."""
        return self.program is not None and self.program.arguments[0] == PREPARER

    @property
    def waits(self) -> bool:
        """For a grant."""
        return self.ready and not self.grant

    @property
    def waiting_for(self) -> str:
        """What keeps it from being ready."""
        if self.program is None:
            return "its turn to be loaded" if self.result is None else "its model to be committed"
        module = self.program.arguments[0]
        return {PREPARER: "its data set", TRAINER: "its trainer"}.get(module, "its model to be committed")

    def row(self) -> RunRow:
        problem = errors.to_wire(self.problem) if self.problem else None
        return RunRow(self.id, self.dataset, self.digest, self.target, self.recipe, self.result, problem)

    def remember(self, event: TrainEvent) -> None:
        """It told something."""
        self.dropped += len(self.events) == MOST_EVENTS
        self.events.append(event)
        if event.phase == "train":
            self.step, self.steps = event.step, event.steps
            self.tokens, self.pace = event.tokens, event.tokens_per_s

    def forget_after(self, step: int, eval_step: int) -> None:
        """Its trainer goes on behind `step` and the evaluation of `eval_step`: what came after has not
        been."""
        while self.events and not self.events[-1].is_behind(step, eval_step):
            self.events.pop()
        self.step = step


@dataclass(slots=True, eq=False)
class Follower:
    """A `follow` that is being served; `next` is the number of the event that comes next."""

    request: Request
    next: int
    credits: int
    seq: int = 0
