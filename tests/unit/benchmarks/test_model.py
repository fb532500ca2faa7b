"""The capacity model: what saturates first, and how far more workers help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.capacity import saturating_workers
from benchmarks.model import Costs, redis_limit, workers_limit

COSTS = Costs(read=100, write=200, heard=10, redis_write=20, redis_told=1)


def test_redis_by_hand() -> None:
    """A tenth of the requests write, ten workers are told: 0.1 x (20 + 10) = 3 µs of Redis per request."""
    assert redis_limit(COSTS, workers=10, writes=0.1) == pytest.approx(1e6 / 3)


def test_workers_by_hand() -> None:
    """Each request costs its worker 110 µs, and the ten of them 0.1 x 10 µs each for what the others wrote."""
    assert workers_limit(COSTS, workers=10, writes=0.1) == pytest.approx(10e6 / (110 + 10))


def test_a_site_that_only_reads_does_not_need_redis() -> None:
    """Reads come from the workers' memory, so Redis sets no limit."""
    assert redis_limit(COSTS, workers=10, writes=0.0) == float("inf")


@given(st.integers(min_value=1, max_value=1000), st.floats(min_value=0.01, max_value=1))
def test_more_workers(workers: int, writes: float) -> None:
    """They serve more, up to a ceiling that hearing of writes sets; and each takes something from Redis."""
    assert workers_limit(COSTS, workers, writes) < workers_limit(COSTS, workers + 1, writes) < 1e6 / (writes * 10)
    assert redis_limit(COSTS, workers, writes) > redis_limit(COSTS, workers + 1, writes)


def test_a_primary_feeds_more_workers_the_longer_connections_live() -> None:
    """40 µs per connection against 120 µs of work: three workers; nineteen more requests of 60 µs: 31.5."""
    assert saturating_workers(40, 120, 60, 1) == 3
    assert saturating_workers(40, 120, 60, 20) == 31.5
