"""The policy of beam search: scores in, which beam goes on with which token out. No processes, no memory.

Follows the semantics of Hugging Face transformers' `generate(num_beams=…)` (5.x, vectorised beam search):
candidates are the best K = max(2, 1 + stop tokens) · num_beams continuations of all beams; the best
num_beams that do not end go on; of the best num_beams, those that end become hypotheses, scored by the sum
of log-probabilities over length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmasos.syscalls.types import Beams, Finish, Sequence, TokenLogprob


@dataclass(frozen=True, slots=True)
class Step:
    """One running beam of the next round: it continues beam `parent` with `token`."""

    parent: int
    token: int


@dataclass(slots=True)
class _Candidate:
    parent: int
    token: int
    score: float
    ends: bool


@dataclass(slots=True)
class BeamSearch:
    """A running search. `max_new` is the most tokens a hypothesis may have; `generated[i]` and `scores[i]`
    are the tokens and the summed log-probability of running beam i, best first."""

    params: Beams
    stop_ids: frozenset[int]
    max_new: int
    generated: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    done: bool = False
    _finished: list[tuple[float, list[int], Finish]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Continuations wanted of each beam."""
        return max(2, 1 + len(self.stop_ids)) * self.params.num_beams

    def advance(self, tops: list[list[TokenLogprob]]) -> list[Step]:
        """Takes the best `width` continuations of every running beam; returns the beams that go on.

        Sets `done` when the search is over; the steps then mean nothing.
        """
        length = len(self.generated[0]) + 1
        candidates = [
            _Candidate(
                i,
                top.token,
                self.scores[i] + top.logprob,
                top.token in self.stop_ids or length >= self.max_new,
            )
            for i, continuations in enumerate(tops)
            for top in continuations
        ]
        candidates.sort(key=lambda c: -c.score)
        candidates = candidates[: self.width]
        self._finish([c for c in candidates[: self.params.num_beams] if c.ends], length)
        running = [c for c in candidates if not c.ends][: self.params.num_beams]
        everything_ended = not running
        if running:
            self.generated = [[*self.generated[c.parent], c.token] for c in running]
            self.scores = [c.score for c in running]
        full = len(self._finished) == self.params.num_beams
        stop_when_full = self.params.early_stopping == "true"
        self.done = everything_ended or (full and (stop_when_full or not self._can_improve(length)))
        return [Step(c.parent, c.token) for c in running]

    def cut(self, finish: Finish) -> None:
        """The search ends now: the running beams are hypotheses as they are."""
        length = max(1, len(self.generated[0]))
        running = zip(self.scores, self.generated, strict=True)
        self._keep(
            [(score / length**self.params.length_penalty, tokens, finish) for score, tokens in running]
        )
        self.done = True

    def _finish(self, ended: list[_Candidate], length: int) -> None:
        self._keep(
            [
                (
                    c.score / length**self.params.length_penalty,
                    [*self.generated[c.parent], c.token],
                    Finish.STOP if c.token in self.stop_ids else Finish.LENGTH,
                )
                for c in ended
            ]
        )

    def _keep(self, hypotheses: list[tuple[float, list[int], Finish]]) -> None:
        self._finished += hypotheses
        self._finished.sort(key=lambda hypothesis: -hypothesis[0])
        del self._finished[self.params.num_beams :]

    def _can_improve(self, length: int) -> bool:
        """Whether the best running beam could still beat the worst hypothesis (Hugging Face's heuristic;
        "never" assumes the most favourable length)."""
        favourable = self.params.early_stopping == "never" and self.params.length_penalty > 0
        best = self.scores[0] / (self.max_new if favourable else length) ** self.params.length_penalty
        return bool(best > self._finished[-1][0])

    def results(self) -> list[Sequence]:
        """The best hypotheses, best first."""
        best = self._finished[: self.params.num_return_sequences]
        return [Sequence(tokens=tokens, score=score, finish=finish) for score, tokens, finish in best]
