"""From two looks at a cluster to rates and percentiles: pure, so a table of cases is its test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

WINDOW: Final = 5.0
"""Seconds that latencies are taken over: long enough for a p99 of a slow site, short enough to see a change."""


@dataclass(frozen=True, slots=True)
class Look:
    """A cluster at one moment. `latency` is by worker id: requests by duration, bucket i below 2**i microseconds."""

    moment: float
    facts: Mapping[str, Any]
    latency: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two looks; latencies in milliseconds."""

    requests: float
    by_worker: Mapping[int, float]
    p50: float
    p95: float
    p99: float
    counters: Mapping[str, float]
    """Per second, by the name of the counter."""


def rates(before: Look, after: Look) -> Rates:
    """Compare two looks; a worker that was not there before began at zero."""
    span = max(after.moment - before.moment, 1e-6)
    old = {w["id"]: w["requests"] for w in before.facts["workers"]}
    by_worker = {w["id"]: max(0, w["requests"] - old.get(w["id"], 0)) / span for w in after.facts["workers"]}
    merged: Counter[int] = Counter()
    for worker, buckets in after.latency.items():
        earlier = before.latency.get(worker, ())
        for index, count in enumerate(buckets):
            merged[index] += count - (earlier[index] if index < len(earlier) else 0)
    then, now = before.facts["counters"], after.facts["counters"]
    return Rates(
        requests=sum(by_worker.values()),
        by_worker=by_worker,
        p50=percentile(merged, 0.50),
        p95=percentile(merged, 0.95),
        p99=percentile(merged, 0.99),
        counters={name: max(0, count - then.get(name, 0)) / span for name, count in now.items()},
    )


def percentile(buckets: Mapping[int, int], share: float) -> float:
    """Milliseconds below which a share of the requests stayed, spread evenly over the logarithm within a bucket."""
    total = sum(count for count in buckets.values() if count > 0)
    if not total:
        return 0.0
    wanted, seen = share * total, 0
    for index in sorted(buckets):
        count = buckets[index]
        if count > 0 and seen + count >= wanted:
            return float(2 ** (index - 1 + (wanted - seen) / count)) / 1000
        seen += max(0, count)
    return 0.0


def window(looks: Sequence[Look]) -> tuple[Look, Look] | None:
    """The two looks to compare: the last one, and the oldest within the window."""
    if len(looks) < 2:
        return None
    last = looks[-1]
    first = next(look for look in looks if last.moment - look.moment <= WINDOW or look is last)
    return (looks[-2], last) if first is last else (first, last)


def bar(share: float, width: int) -> str:
    """A bar of ASCII: `[####    ]`."""
    filled = max(0, min(width, math.floor(share * width + 0.5)))
    return "[" + "#" * filled + " " * (width - filled) + "]"


def ratio(counters: Mapping[str, float], good: Sequence[str], all_of: Sequence[str]) -> float | None:
    """The share of the first counters in the second, or None if nothing was counted."""
    whole = sum(counters.get(name, 0) for name in all_of)
    return sum(counters.get(name, 0) for name in good) / whole if whole else None
