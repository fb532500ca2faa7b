"""When a worker has served long enough, and who holds too many connections."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sharedcluster.cluster.recycling import Limits, due, jitter_of, surplus
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from tests.unit.cluster.fake_workers import worker


def served(id: int, *, requests: int = 0, rss: int = 0, at: float = 0.0) -> WorkerHandle:
    """A listening worker that has said these numbers."""
    handle = worker(id, at=at)
    handle.stats = replace(handle.stats, requests=requests, rss=rss)
    return handle


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(), ""),
        (Limits(requests=101), ""),
        (Limits(requests=100), "it served 100 requests"),
        (Limits(memory=50 << 20), "it holds 60 MB"),
        (Limits(lifetime=9.0), "it has lived 10 s"),
        (Limits(lifetime=11.0), ""),
    ],
)
def test_each_limit(limits: Limits, reason: str) -> None:
    """A limit is reached or it is not; 0 is off."""
    assert limits.reason(served(1, requests=100, rss=60 << 20), now=10.0) == reason


def test_jitter_spreads_the_workers() -> None:
    """Workers of one age and load do not all reach the limit at once, and a worker's own limit does not move."""
    handles = [worker(id) for id in range(50)]
    drawn = [jitter_of(handle, 100) for handle in handles]
    assert len(set(drawn)) > 20
    assert drawn == [jitter_of(handle, 100) for handle in handles]
    assert all(0 <= n <= 100 for n in drawn)


def test_never_two_at_once() -> None:
    """All are due: the oldest goes; while one leaves or comes up, nobody does."""
    limits = Limits(requests=10)
    handles = [served(1, requests=50, at=2.0), served(2, requests=50, at=1.0)]
    assert due(handles, limits, 100.0) == (handles[1], "it served 50 requests")
    handles[1].retiring = "max-requests"
    assert due(handles, limits, 100.0) is None
    assert due([handles[0], worker(3, state=WorkerState.FORKED)], limits, 100.0) is None


@pytest.mark.parametrize(
    ("connections", "give"),
    [
        ([10, 10], []),
        ([40, 0], [20]),
        ([14, 10], []),
        ([30, 30, 0, 0], [15, 15]),
        ([5, 0], []),
        ([50], []),
    ],
)
def test_surplus(connections: list[int], give: list[int]) -> None:
    """Far more than the share is given back down to the share; small differences are left alone."""
    handles = [worker(n + 1) for n in range(len(connections))]
    for handle, count in zip(handles, connections, strict=True):
        handle.row.waits(0, count, 0)
    assert [count for _, count in surplus(handles)] == give
