"""How long a step takes: learnt from the steps that were measured, one pool on one device at a time.

    seconds = fixed + row · (rows that generate) + token · (tokens of prompts)

A running estimate by normalised least mean squares (Widrow and Hoff, 1960), so that it follows when contexts
grow or somebody else takes the cores. One step that was held up changes it little.
"""

from __future__ import annotations

FIRST_CHUNK = 64
"""Prompt tokens of a bounded step while nobody knows what a token costs."""

LEAST_CHUNK = 16
"""A bounded step carries so many prompt tokens at least: prompts always get on."""

PASS_ROWS = 16
"""One pass over the weights serves about so many rows in the time of one: up to here rows are cheap."""

MANY_ROWS = 1 << 20

UNKNOWN_S = 0.001
LEAST_COST_S = 1e-6
"""Nothing is for free, or it would not be shared."""

_RATE = 0.2  # of an error goes into the estimate
_YOUNG = 5  # so many steps are believed more than that
_FIXED_GAIN = 64.0  # reading the weights is most of a step, until rows and tokens prove otherwise


class Transfer:
    """How long it takes to write KV to a file and to read it, in seconds a byte; a guess until learnt."""

    __slots__ = ("read", "write")

    def __init__(self) -> None:
        self.write = self.read = 1e-9

    def learn_write(self, size: int, seconds: float) -> None:
        self.write += _RATE * (seconds / size - self.write)

    def learn_read(self, size: int, seconds: float) -> None:
        self.read += _RATE * (seconds / size - self.read)

    def there_and_back(self, size: int) -> float:
        """Seconds to write `size` bytes and to read them again."""
        return size * (self.write + self.read)


class Pace:
    """All parts in seconds; zero until learnt."""

    __slots__ = ("_seen", "fixed", "row", "token")

    def __init__(self) -> None:
        self.fixed = self.row = self.token = 0.0
        self._seen = 0

    def expected(self, rows: int, tokens: int) -> float | None:
        """Seconds of a step; None before the first one."""
        return self.fixed + self.row * rows + self.token * tokens if self._seen else None

    @property
    def one_pass(self) -> float:
        """Seconds of a step in which as many generate as one pass over the weights serves."""
        return self.fixed + PASS_ROWS * self.row

    def cost(self, count: int) -> float:
        """Seconds that `count` positions of one process add to a step, before anything is known 1 ms each."""
        if not self._seen:
            return count * UNKNOWN_S
        return max(LEAST_COST_S, self.row if count == 1 else self.token * count)

    def learn(self, rows: float, tokens: int, seconds: float) -> None:
        expected = self.fixed + self.row * rows + self.token * tokens
        error = seconds - expected
        if self._seen >= _YOUNG:
            error = max(-expected / 2, min(error, expected))
        self._seen += 1
        rate = max(_RATE, 1 / self._seen)
        share = rate * error / (_FIXED_GAIN + rows * rows + tokens * tokens)
        self.fixed = max(0.0, self.fixed + _FIXED_GAIN * share)
        self.row = max(0.0, self.row + rows * share)
        self.token = max(0.0, self.token + tokens * share)

    def rows_within(self, seconds: float) -> int:
        """Generating rows that a step may have to stay within `seconds`, one at least."""
        if self.row <= 0:
            return MANY_ROWS
        return max(1, int((seconds - self.fixed) / self.row))

    def tokens_within(self, rows: int, seconds: float) -> int:
        """Prompt tokens that a step of `rows` generating rows may carry to stay within `seconds`."""
        if self.token <= 0:
            return FIRST_CHUNK
        return max(LEAST_CHUNK, int((seconds - self.fixed - self.row * rows) / self.token))
