"""Twenty reloads under 64 clients of every kind: what the README promises, with its capacity curve."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.slow.test_fault_storms import Books
from tests.strict_clients import Crowd, EventReader, sixty_four
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
RELOADS = 20
GAP = float(os.environ.get("RELOAD_GAP", "2"))


class Curve(threading.Thread):
    """How many workers listened, looked at all the time."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.seconds: Counter[int] = Counter()
        self.over = threading.Event()
        self._cluster = cluster

    def run(self) -> None:
        """Look every 20 ms."""
        while not self.over.wait(0.02):
            self.seconds[sum(w["state"] == "listening" for w in self._cluster.workers())] += 1


@pytest.mark.timeout(600 + 20 * int(GAP))
@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_twenty_reloads(start_cluster: StartCluster, tmp_path: Path, options: tuple[str, ...]) -> None:
    """0 requests lost, 0 refused, 0 keep-alive connections closed, never fewer than two workers that listen, every
    stream ended at the end of an event.
    """
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", *options, env={"LEDGER": str(books.path)})
    curve = Curve(cluster)
    clients = sixty_four(("127.0.0.1", cluster.port))
    with Crowd(*clients) as crowd:
        others = Crowd(*[c for c in clients if not isinstance(c, EventReader)])
        wait_until(others.all_got(1), "all are served", deadline=30)
        curve.start()
        for number in range(RELOADS):
            next_at = time.monotonic() + GAP
            result = cluster.cli("reload")
            assert result.returncode == 0, result.stderr
            assert cluster.status()["generation"] == number + 2
            time.sleep(max(0.0, next_at - time.monotonic()))
        wait_until(lambda: cluster.has(2), "the old generation is gone", deadline=40)
        wait_until(others.all_got(1), "all are served", deadline=30)
        curve.over.set()
        curve.join()
        counters = cluster.status()["counters"]
    streams = [c.account for c in clients if isinstance(c, EventReader)]
    looks = sum(curve.seconds.values())
    print("workers that listened:", {n: f"{100 * count / looks:.1f} %" for n, count in sorted(curve.seconds.items())})
    print("streams ended politely:", sum(len(a.answered) for a in streams), "counters", counters)
    books.check(others, may_lose=0)
    assert (crowd.lost, crowd.refused, others.closed) == ([], 0, 0)
    assert min(curve.seconds) >= 2
    assert counters["reloads"] == RELOADS
