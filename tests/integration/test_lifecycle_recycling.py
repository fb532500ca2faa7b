"""Workers that have served long enough, and workers that have more than their share: nobody notices."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"


class Watch(threading.Thread):
    """Looks at the cluster all the time: the most workers on their way out at once, the fewest that listened."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.most_leaving = 0
        self.fewest_listening = 999
        self.looks = 0
        self.over = threading.Event()
        self._cluster = cluster

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        """Look every 10 ms."""
        while not self.over.wait(0.01):
            states = Counter(w["state"] for w in self._cluster.workers())
            self.most_leaving = max(self.most_leaving, states["draining"])
            self.fewest_listening = min(self.fewest_listening, states["listening"])
            self.looks += 1


def recycled(cluster: Cluster, count: int) -> Callable[[], Any]:
    """A condition: so many workers were recycled."""
    return lambda: cluster.status()["counters"]["recycled"] >= count


def test_after_so_many_requests(start_cluster: StartCluster) -> None:
    """--max-requests with jitter under keep-alive load: never two at once, never fewer than two serve, no client
    loses a request or its connection.
    """
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--max-requests", "150", "--max-requests-jitter", "50")
    address = ("127.0.0.1", cluster.port)
    clients = [Client(address) for _ in range(6)] + [Client(address, keep_alive=False) for _ in range(2)]
    with Watch(cluster) as watch, Crowd(*clients) as crowd:
        wait_until(recycled(cluster, 4), "four workers were recycled", deadline=25)
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert watch.looks > 20
    assert watch.most_leaving <= 1
    assert watch.fewest_listening >= 2
    assert cluster.status()["counters"]["restarts"] == 0


def test_a_worker_that_grows(start_cluster: StartCluster) -> None:
    """--max-memory: the worker that leaks is replaced by one that is small again; its clients notice nothing."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--max-memory", "160M")
    grown = cluster.get("/grow/200").json["pid"]
    with Crowd(*[Client(("127.0.0.1", cluster.port)) for _ in range(4)]) as crowd:
        wait_until(recycled(cluster, 1), "it is recycled", deadline=10)
        wait_until(lambda: grown not in {w["pid"] for w in cluster.workers()}, "it is gone")
        wait_until(crowd.all_got(5), "all are served")
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert "it holds 2" in cluster.output()
    wait_until(lambda: all(0 < w["rss"] < 160 << 20 for w in cluster.workers()), "all are small")


def test_after_so_long(start_cluster: StartCluster) -> None:
    """--max-lifetime 2: both workers are replaced, one after the other."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--max-lifetime", "2")
    first = {w["pid"] for w in cluster.workers()}
    with Watch(cluster) as watch, Crowd(*[Client(("127.0.0.1", cluster.port)) for _ in range(4)]) as crowd:
        wait_until(lambda: first.isdisjoint(w["pid"] for w in cluster.workers()), "both are replaced", deadline=20)
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert watch.most_leaving <= 1
    assert watch.fewest_listening >= 2


def test_old_connections_spread_over_new_workers(start_cluster: StartCluster) -> None:
    """24 long-lived clients that came when there was one worker: after scale 3 each worker serves its share.

    Requests per worker are printed: all at one before, about a third each after.
    """
    cluster = start_cluster(APP, "-w", "1", "--redis", "none")
    address = ("127.0.0.1", cluster.port)
    with Crowd(*[Client(address, pause=0.01) for _ in range(24)]) as crowd:
        wait_until(crowd.all_got(3), "all are served")
        assert cluster.cli("scale", "3").returncode == 0
        wait_until(lambda: len(cluster.workers()) == 3 and cluster.is_ready(), "three workers")
        before = {w["slot"]: w["requests"] for w in cluster.workers()}
        wait_until(
            lambda: (
                max(w["connections"] for w in cluster.workers()) <= 12
                and min(w["connections"] for w in cluster.workers()) >= 4
            ),
            "connections are spread",
            deadline=20,
        )
        middle = {w["slot"]: w["requests"] for w in cluster.workers()}
        wait_until(crowd.all_got(20), "all are served")
        after = {w["slot"]: w["requests"] for w in cluster.workers()}
    print("requests per worker before it spread", before)
    shares = {slot: after[slot] - middle[slot] for slot in after}
    print("requests per worker after it spread", shares)
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert before[1] == before[2] == 0
    assert min(shares.values()) > 0.12 * sum(shares.values())
