"""A worker that stands in C code, and what becomes of the connections it holds unread."""

from __future__ import annotations

import os
import resource
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

from sharedcluster.cluster.worker_handle import CREDIT
from tests.cluster_process import Answer, Cluster
from tests.conftest import StartCluster
from tests.waiting import wait_until


def blocked_worker(cluster: Cluster, pool: ThreadPoolExecutor) -> int:
    """Have one worker stand in C code; its pid. Its client is given up with the worker."""
    before = {w["pid"]: w["handed_off"] for w in cluster.workers()}
    pool.submit(lambda: cluster.get("/block/40.0", timeout=60))
    return wait_until(
        lambda: next((w["pid"] for w in cluster.workers() if w["handed_off"] > before[w["pid"]]), 0),
        "a worker has the blocking request",
    )


def test_the_others_answer_and_the_unread_ones_survive_a_kill(start_cluster: StartCluster) -> None:
    """Of 20 connections a blocked worker holds at most its credit; after kill -9 of it these are answered too."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    with ThreadPoolExecutor(24) as pool:
        pid = blocked_worker(cluster, pool)
        # Time for the worker to be inside the view: from now on it reads nothing.
        time.sleep(0.2)
        answers: list[Future[Answer]] = [pool.submit(cluster.get, "/", timeout=30) for _ in range(20)]
        start = time.monotonic()
        wait_until(
            lambda: sum(f.done() for f in answers) >= 20 - CREDIT, "the other worker answers the rest", deadline=1
        )
        assert time.monotonic() - start < 1
        held = [f for f in answers if not f.done()]
        assert 1 <= len(held) <= CREDIT
        os.kill(pid, signal.SIGKILL)
        assert [f.result(30).status for f in answers] == [200] * 20
    assert cluster.status()["counters"]["redispatched"] >= len(held)


def test_the_last_worker_is_killed_with_a_queue(start_cluster: StartCluster) -> None:
    """One blocked worker, ten waiting: after kill -9 its replacement answers all, the port never refuses."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    with ThreadPoolExecutor(16) as pool:
        pid = blocked_worker(cluster, pool)
        time.sleep(0.2)
        answers = [pool.submit(cluster.get, "/", timeout=30) for _ in range(10)]
        wait_until(lambda: cluster.status()["listeners"][0]["accepted"] >= 11, "all ten were accepted by the primary")
        assert not any(f.done() for f in answers)
        os.kill(pid, signal.SIGKILL)
        late = [pool.submit(cluster.get, "/", timeout=30) for _ in range(3)]
        results = [f.result(30) for f in answers + late]
    assert [r.status for r in results] == [200] * 13
    assert {r.json["pid"] for r in results}.isdisjoint({pid})


def test_a_worker_without_descriptors_returns_its_connections(start_cluster: StartCluster) -> None:
    """A worker at its limit of descriptors refuses; others answer, and it works again once it may."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    poor = cluster.workers()[0]["pid"]
    used = {int(name) for name in os.listdir(f"/proc/{poor}/fd")}
    first_free = next(number for number in range(1000) if number not in used)
    limits = resource.prlimit(poor, resource.RLIMIT_NOFILE)
    resource.prlimit(poor, resource.RLIMIT_NOFILE, (first_free, limits[1]))
    assert [cluster.get("/").status for _ in range(8)] == [200] * 8
    assert cluster.status()["counters"]["redispatched"] >= 1
    resource.prlimit(poor, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: cluster.get("/").json["pid"] == poor, "it works again")
