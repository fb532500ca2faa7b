"""Ratios of interleaved rounds, and how far they spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """The middle of some figures and the two ends."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """The distance of the ends as a part of the median: 0.1 means that they lie within ten per cent."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summary(values: Sequence[float]) -> Summary:
    """Median and range.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no rounds were measured")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Ours over theirs, round by round: what disturbed a round disturbed both, and cancels.

    Raises:
        ValueError: The rounds do not pair, or there are none.
    """
    return summary([a / b for a, b in zip(ours, theirs, strict=True) if b])


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value that `part` (0 to 1) of the sorted values do not exceed (nearest rank).

    Raises:
        ValueError: There are no values.
    """
    if not ordered:
        raise ValueError("a percentile of nothing")
    return ordered[min(len(ordered) - 1, max(0, -(-int(part * 1_000_000) * len(ordered) // 1_000_000) - 1))]
