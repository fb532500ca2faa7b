"""From two looks to rates: counters that only grow, workers that come and go, percentiles out of buckets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.operating.samples import Look, bar, percentile, rates, ratio, window


def look(moment: float, workers: dict[int, int], latency: dict[int, list[int]] | None = None, **counters: int) -> Look:
    """A look at workers by id and requests."""
    facts: dict[str, Any] = {"workers": [{"id": i, "requests": n} for i, n in workers.items()], "counters": counters}
    return Look(moment, facts, latency or {})


def test_rates_are_differences_over_time() -> None:
    """Two workers, one of them new, over two seconds; a worker that left does not count."""
    now = rates(look(1.0, {1: 100, 2: 50}, gaps=1), look(3.0, {2: 70, 3: 10}, gaps=5))
    assert now.by_worker == {2: 10.0, 3: 5.0}
    assert now.requests == 15.0
    assert now.counters == {"gaps": 2.0}


def test_percentiles_are_merged_over_workers() -> None:
    """99 requests below 1.024 ms in one worker and one below 1048.576 ms in the other: p50 and p99 tell them apart."""
    fast, slow = [0] * 28, [0] * 28
    fast[10], slow[20] = 99, 1
    now = rates(look(0.0, {1: 0, 2: 0}), look(1.0, {1: 99, 2: 1}, {1: fast, 2: slow}))
    assert 0.5 < now.p50 < 1.1
    assert now.p99 < 1.1
    assert percentile({10: 99, 20: 1}, 1.0) == pytest.approx(1048.576)


def test_nothing_is_zero() -> None:
    """No requests: no latency."""
    assert percentile({}, 0.99) == 0.0
    assert percentile({3: 0}, 0.5) == 0.0


@given(st.dictionaries(st.integers(1, 27), st.integers(1, 1000), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_lies_in_its_bucket(buckets: dict[int, int], share: float) -> None:
    """Whatever the counts: the result lies within the bucket that holds the wanted request."""
    wanted = share * sum(buckets.values())
    seen = 0
    for index in sorted(buckets):
        seen += buckets[index]
        if seen >= wanted:
            break
    assert 2 ** (index - 1) / 1000 <= percentile(buckets, share) <= 2**index / 1000 + 1e-9


def test_the_window_is_a_few_seconds() -> None:
    """The last look is compared with the oldest one of the last five seconds, or with the one before it."""
    looks = [look(float(t), {}) for t in (0, 1, 2, 6, 7)]
    assert window(looks) == (looks[2], looks[4])
    assert window([looks[0], looks[4]]) == (looks[0], looks[4])
    assert window(looks[:1]) is None


def test_bars_and_ratios() -> None:
    """ASCII, never longer than its frame."""
    assert bar(0.41, 10) == "[####      ]"
    assert bar(9.0, 4) == "[####]"
    assert ratio({"hits": 3, "misses": 1}, ["hits"], ["hits", "misses"]) == 0.75
    assert ratio({}, ["hits"], ["hits"]) is None
