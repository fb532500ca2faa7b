"""The statistics that every published figure goes through."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ratios import percentile, ratio, summary

FIGURES = st.lists(st.floats(min_value=0.1, max_value=1e6), min_size=1, max_size=40)


@given(FIGURES)
def test_summary_holds_middle_and_ends(values: list[float]) -> None:
    """The median lies between the ends, and the ends are values that were measured."""
    found = summary(values)
    assert found.low <= found.median <= found.high
    assert {found.low, found.high} <= set(values)
    assert found.median == statistics.median(values)


def test_ratio_is_taken_round_by_round() -> None:
    """A disturbance of a whole round cancels, which it would not do in a ratio of medians."""
    ours, theirs = [10.0, 90.0, 11.0], [20.0, 180.0, 22.0]
    found = ratio(ours, theirs)
    assert (found.low, found.median, found.high) == (0.5, 0.5, 0.5)


def test_rounds_that_do_not_pair_are_refused() -> None:
    """A server that missed a round cannot be compared as if it had not."""
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


def test_nothing_measured_is_an_error() -> None:
    """No figure is made from no rounds."""
    with pytest.raises(ValueError, match="no rounds"):
        summary([])
    with pytest.raises(ValueError, match="percentile"):
        percentile([], 0.5)


@pytest.mark.parametrize(("part", "value"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (0.999, 100.0), (1.0, 100.0)])
def test_percentile_is_the_nearest_rank(part: float, value: float) -> None:
    """Percentiles are values that were seen, not ones in between."""
    assert percentile([float(n) for n in range(1, 101)], part) == value


@given(FIGURES, st.floats(min_value=0, max_value=1))
def test_percentile_leaves_the_right_part_above(values: list[float], part: float) -> None:
    """At least the asked part of all values is not above the percentile."""
    ordered = sorted(values)
    found = percentile(ordered, part)
    assert sum(value <= found for value in ordered) >= int(part * 1e6) / 1e6 * len(ordered) - 1e-6
