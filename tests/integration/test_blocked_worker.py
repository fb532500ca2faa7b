"""A worker that stands in C code, and what becomes of the connections it holds unread."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharedcluster.cluster.board import STANDS_STILL
from sharedcluster.cluster.worker_handle import CREDIT
from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.waiting import wait_until

BY_HAND = ("--policy", "tests.apps.passing:ByHand")


def block(cluster: Cluster, pool: ThreadPoolExecutor) -> int:
    """Have one more worker stand in C code; its pid. Its client is given up with the worker."""
    before = {w["pid"]: w["handed_off"] for w in cluster.workers()}
    pool.submit(cluster.get, "/block/40.0", timeout=60)
    pid = wait_until(
        lambda: next((w["pid"] for w in cluster.workers() if w["handed_off"] > before[w["pid"]]), 0),
        "a worker has the blocking request",
    )
    wait_until(lambda: stands_in_c(pid), "it stands in C code")
    return pid


def stands_in_c(pid: int) -> bool:
    """Whether the process sleeps in `clock_nanosleep`, which gevent's loop never does."""
    number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return number in ("230", "115")  # x86-64, arm64


def test_the_others_answer(start_cluster: StartCluster) -> None:
    """While a worker stands in C code, 20 new connections are all answered by the other one, within a second."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    with ThreadPoolExecutor(24) as pool:
        pid = block(cluster, pool)
        time.sleep(2 * STANDS_STILL / 1e9)  # from then on the board says so
        answers = [pool.submit(cluster.get, "/", timeout=30) for _ in range(20)]
        wait_until(lambda: all(f.done() for f in answers), "all are answered", deadline=1)
        assert {f.result().json["pid"] for f in answers}.isdisjoint({pid})
        os.kill(pid, signal.SIGKILL)


def test_blocked_workers_hold_nobody(start_cluster: StartCluster) -> None:
    """Both workers blocked, ten waiting: all ten are in the kernel; kill -9 both, and all are answered."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    with ThreadPoolExecutor(24) as pool:
        pids = {block(cluster, pool), block(cluster, pool)}
        assert len(pids) == 2
        answers = [pool.submit(cluster.get, "/", timeout=30) for _ in range(10)]
        wait_until(lambda: cluster.status()["listeners"][0]["accepted"] >= 12, "all ten wait in the backlog")
        assert sum(w["connections"] + w["in_flight"] for w in cluster.workers()) <= 4
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        results = [f.result(30) for f in answers]
    assert [r.status for r in results] == [200] * 10
    assert {r.json["pid"] for r in results}.isdisjoint(pids)
    assert cluster.status()["counters"]["redispatched"] == 0


def test_a_stopped_worker_keeps_nobody(start_cluster: StartCluster) -> None:
    """A worker is stopped (SIGSTOP) while it waits for events, so that nothing says it is stuck: the other answers."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    stopped, other = (w["pid"] for w in cluster.workers())
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert {cluster.get("/", timeout=5).json["pid"] for _ in range(20)} == {other}
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: cluster.get("/", timeout=5).json["pid"], range(60)))
        assert set(answers) == {other}
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: cluster.get("/").json["pid"] == stopped, "it takes its turns again")


def test_a_stop_frees_the_port_of_a_blocked_worker(start_cluster: StartCluster) -> None:
    """A worker that stands in C code has the listening socket open: a stop ends it all the same, clients are refused
    and the next server can bind while that worker is still there.
    """
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", "--graceful-timeout", "20")
    with ThreadPoolExecutor(1) as pool:
        pid = block(cluster, pool)
        assert cluster.process is not None
        cluster.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(cluster.port), "newcomers are refused", deadline=10)
        with socket.socket() as successor:
            successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            successor.bind(("127.0.0.1", cluster.port))
            successor.listen()
            socket.create_connection(("127.0.0.1", cluster.port), timeout=5).close()
        assert stands_in_c(pid)
        os.kill(pid, signal.SIGKILL)


def is_refused(port: int) -> bool:
    """Whether nobody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.2).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def test_what_blocked_workers_were_passed_survives_their_death(start_cluster: StartCluster) -> None:
    """Connections passed as descriptors: each worker holds its credit of ten; kill -9 both, and all are answered."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none", *BY_HAND)
    with ThreadPoolExecutor(24) as pool:
        pids = {block(cluster, pool), block(cluster, pool)}
        assert len(pids) == 2
        answers = [pool.submit(cluster.get, "/", timeout=30) for _ in range(10)]
        wait_until(lambda: cluster.status()["listeners"][0]["accepted"] >= 12, "the primary has them all")
        # The blocking request is taken; whether its acknowledgement left before the loop stood still is chance, so
        # each worker holds one fewer than its credit unread, or all of it.
        wait_until(lambda: all(w["handed_off"] >= CREDIT for w in cluster.workers()), "their credit is spent")
        unread = sum(w["handed_off"] - 1 for w in cluster.workers())
        assert 2 * (CREDIT - 1) <= unread <= 2 * CREDIT
        assert cluster.status()["listeners"][0]["pending"] == 10 - unread
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        results = [f.result(30) for f in answers]
    assert [r.status for r in results] == [200] * 10
    assert {r.json["pid"] for r in results}.isdisjoint(pids)
    assert cluster.status()["counters"]["redispatched"] == unread


def test_the_last_worker_is_killed_with_a_queue(start_cluster: StartCluster) -> None:
    """One blocked worker, ten waiting: after kill -9 its replacement answers all, the port never refuses."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    with ThreadPoolExecutor(16) as pool:
        pid = block(cluster, pool)
        answers = [pool.submit(cluster.get, "/", timeout=30) for _ in range(10)]
        wait_until(lambda: cluster.status()["listeners"][0]["accepted"] >= 11, "all ten were accepted by the primary")
        assert not any(f.done() for f in answers)
        os.kill(pid, signal.SIGKILL)
        late = [pool.submit(cluster.get, "/", timeout=30) for _ in range(3)]
        results = [f.result(30) for f in answers + late]
    assert [r.status for r in results] == [200] * 13
    assert {r.json["pid"] for r in results}.isdisjoint({pid})


@pytest.mark.parametrize("policy", [(), BY_HAND], ids=["in turns", "passed"])
def test_a_worker_without_descriptors_returns_its_connections(
    start_cluster: StartCluster, policy: tuple[str, ...]
) -> None:
    """A worker at its limit of descriptors refuses; others answer, and it works again once it may."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none", *policy)
    poor = cluster.workers()[0]["pid"]
    limits = resource.prlimit(poor, resource.RLIMIT_NOFILE)
    resource.prlimit(poor, resource.RLIMIT_NOFILE, (3, limits[1]))  # what is open stays open, nothing new can be
    assert [cluster.get("/").status for _ in range(8)] == [200] * 8
    assert cluster.status()["counters"]["redispatched"] >= 1
    resource.prlimit(poor, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: cluster.get("/").json["pid"] == poor, "it works again")
