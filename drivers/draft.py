"""Guesses what a sequence will say next: what followed the last time its newest tokens stood in it.

Prompt-lookup decoding (Saxena, 2023): quotations, code edits and tables repeat their context, and a guess
costs a look into a dictionary. The guesses are verified in the same step, so they never change a result. The
drafter measures how many come true, guesses more or fewer, and pauses where it does not pay.
"""

from __future__ import annotations

from array import array

NGRAM = 3
"""So many tokens have to stand there again."""

FIRST_LENGTH = 2
LONGEST = 16
FIRST_PAUSE = 16
LONGEST_PAUSE = 512
PAYS = 0.3
"""The share of guesses that must come true; below, a row spent on a guess costs more than it brings."""


class Drafter:
    """Of one sequence. Knows its tokens by `note`, which has to be told of each once, in order."""

    __slots__ = ("_length", "_noted", "_pause", "_places", "_rate", "_resume")

    def __init__(self) -> None:
        self._places: dict[
            tuple[int, ...], int
        ] = {}  # n-gram -> the position behind its newest place but one
        self._noted = 0
        self._length = FIRST_LENGTH
        self._rate = 1.0
        self._pause = FIRST_PAUSE
        self._resume = 0

    def propose(self, tokens: array[int], most: int) -> list[int]:
        """At most `most` guesses of what follows `tokens`. What repeats itself with a short period is guessed
        to go on so."""
        known = len(tokens)
        place = self._look_up(tokens)
        if place < 0 or known < self._resume:
            return []
        period = known - place
        return [tokens[place + index % period] for index in range(min(most, self._length))]

    def learn(self, known: int, guessed: int, right: int) -> None:
        """Books that of `guessed` tokens `right` came true; `known` tokens are known now."""
        self._rate += 0.2 * (right / guessed - self._rate)
        if right == guessed:
            self._length = min(2 * self._length, LONGEST)
            self._pause = FIRST_PAUSE
        else:
            self._length = max(right + 1, 1)
        if self._rate < PAYS:
            self._resume = known + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._rate, self._length = 2 * PAYS, FIRST_LENGTH

    def _look_up(self, tokens: array[int]) -> int:
        """Where the newest n-gram stood before: the position behind it; -1 if it never did."""
        # The newest n-gram is looked up before it is noted, or it would find itself.
        for end in range(max(self._noted, NGRAM), len(tokens)):
            self._places[tuple(tokens[end - NGRAM : end])] = end
        self._noted = max(self._noted, len(tokens))
        if len(tokens) < NGRAM:
            return -1
        return self._places.get(tuple(tokens[len(tokens) - NGRAM :]), -1)
