"""Who gets the next connection."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import StartCluster


def test_sequential_connections_go_round(start_cluster: StartCluster) -> None:
    """16 connections, one after another, over 4 idle workers: each answers exactly 4, in a fixed rotation."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "4", "--redis", "none")
    slots = [cluster.get("/").json["slot"] for _ in range(16)]
    assert Counter(slots) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert slots[:4] * 4 == slots


@pytest.mark.alone
def test_concurrent_connections_are_spread(start_cluster: StartCluster) -> None:
    """400 short connections, 40 at a time: no worker gets more than half again as many as another."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "4", "--redis", "none")
    with ThreadPoolExecutor(40) as pool:
        slots = Counter(pool.map(lambda _: cluster.get("/").json["slot"], range(400)))
    assert sum(slots.values()) == 400
    assert max(slots.values()) <= 1.5 * min(slots.values())
    assert len(slots) == 4
