"""One `infer` on a process: what it wants, its stream, its credits, how it ends.

The stream never blocks the kernel: when the reader's credits are used up, what is generated is kept here
(at most a step's worth: the process is not scheduled while `blocked`, nor ahead of the result that makes it
so) until more credits come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.syscalls.types import Chosen, Finish, InferEvent, Sampling, TokenLogprob

from .beams import BeamSearch
from .modelfs.session_files import Unfinished

if TYPE_CHECKING:
    from .metrics import Tally
    from .process import Process


ITEM_TOKENS = 512
"""Most tokens, of input and output, that one stream item tells of: with 20 alternatives each it is 150 KB."""


@dataclass(slots=True, eq=False)
class Infer:
    """`start` is where generation begins, `limit` the length of the context at which it ends by LENGTH.
    `prompt_length` tokens count as given and the rest as generated: fewer than `start` when it goes on with
    an infer that was interrupted.

    `request` is (session, request id). `reap`: the process goes away with the infer (it was spawned for
    it); `leave`: the process exits, and stays for `wait`. `arrived` is on the kernel's clock.
    """

    request: tuple[bytes, int]
    sampling: Sampling
    first_input: int
    start: int
    limit: int
    credits: int
    reap: bool
    leave: bool
    tally: Tally
    arrived: float = 0.0
    prefix: int = 0  # blocks of its input that were computed already when it came
    beams: BeamSearch | None = None
    prompt_length: int = 0  # 0: `start`
    members: list[Process] = field(default_factory=list)  # the running beams, in the order of `beams.scores`
    tops: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # pid -> this round's continuations
    scored: int = 0  # input tokens before this position have their scores
    cached: int = 0
    crashes: int = 0
    seq: int = 0
    first_token: float | None = None
    made: int = 0
    brought: int = 0  # of the tokens made, those that the client had when it asked again
    held: list[InferEvent] = field(default_factory=list)
    finish: Finish | None = None  # set when generation is over but the reader has not taken it all

    samples: bool = field(init=False)  # a token is to be sampled (with max_tokens 0, input is only taken in)
    drafts: bool = field(init=False)  # guesses may be made

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt_length or self.start
        self.samples = self.limit > self.start
        self.drafts = self.beams is None and not self.sampling.follows_text

    @property
    def scoring(self) -> bool:
        """Whether scores of the input are still to come."""
        return self.sampling.prompt_logprobs and self.scored < self.start

    @property
    def blocked(self) -> bool:
        """The reader has no room, or nothing is left to compute."""
        return self.finish is not None or (self.credits == 0 and bool(self.held))

    def unfinished(self, known: int) -> Unfinished:
        """What is left of it where the context is `known` tokens."""
        return Unfinished(self.sampling, self.prompt_length, self.limit - known)

    def rate(self, now: float) -> float:
        """Generated tokens a second since the first one."""
        if self.first_token is None or now <= self.first_token:
            return 0.0
        return max(0, self.made - self.brought - 1) / (now - self.first_token)

    def take(self, tokens: list[int], chosen: list[Chosen], now: float) -> None:
        """Books generated tokens for the reader."""
        if self.first_token is None:
            self.first_token = now
        self.made += len(tokens)
        self.held.append(InferEvent(tokens=tokens, logprobs=chosen))

    def take_prompt(self, position: int, scores: list[Chosen]) -> None:
        """Books scores of the input tokens from `position` on; a recomputed context brings some again,
        and scores of what was generated."""
        fresh = scores[max(0, self.scored - position) : max(0, self.start - position)]
        if fresh:
            self.scored = max(self.scored, position) + len(fresh)
        for start in range(0, len(fresh), ITEM_TOKENS):
            self.held.append(InferEvent(prompt_logprobs=fresh[start : start + ITEM_TOKENS]))

    def deliver(self) -> list[tuple[int, InferEvent]]:
        """The (sequence number, item) pairs that may be sent now. What the reader was too slow for is
        joined into fewer items."""
        if len(self.held) > self.credits:
            self.held = _joined(self.held)
        items, self.held = self.held, []
        if len(items) > self.credits:
            items, self.held = items[: self.credits], items[self.credits :]
        self.credits -= len(items)
        numbered = list(enumerate(items, self.seq))
        self.seq += len(items)
        return numbered


def _joined(items: list[InferEvent]) -> list[InferEvent]:
    """The same stream in as few items as ITEM_TOKENS allows."""
    joined: list[InferEvent] = []
    size = ITEM_TOKENS
    for item in items:
        added = len(item.tokens) + len(item.prompt_logprobs)
        if size + added > ITEM_TOKENS:
            joined.append(item)
            size = added
            continue
        last = joined[-1]
        joined[-1] = InferEvent(
            tokens=last.tokens + item.tokens,
            logprobs=last.logprobs + item.logprobs,
            prompt_logprobs=last.prompt_logprobs + item.prompt_logprobs,
        )
        size += added
    return joined
