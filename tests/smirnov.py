"""Two-sample Kolmogorov-Smirnov test, so that tests need no scipy for it."""

from __future__ import annotations

import bisect
import math


def smirnov(a: list[float], b: list[float]) -> float:
    """The asymptotic p-value of `a` and `b` coming from one distribution (Stephens' approximation)."""
    one, two = sorted(a), sorted(b)
    gap = max(
        abs(bisect.bisect_right(one, v) / len(one) - bisect.bisect_right(two, v) / len(two))
        for v in one + two
    )
    size = math.sqrt(len(one) * len(two) / (len(one) + len(two)))
    scaled = (size + 0.12 + 0.11 / size) * gap
    if scaled < 0.2:
        return 1.0  # the series does not converge there
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))
