"""The primary's laws, looked at from outside while it runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from sharedcluster.cluster.worker_handle import CREDIT, TURNS
from tests.cluster_process import ROOT, request
from tests.conftest import StartCluster

SPY = """
import json, os, sys, threading
_fork = os.fork
def fork():
    # Called by the primary for each worker: what has it loaded, and how many threads does it run?
    if sys.argv[1:2] == ["run"] and "sharedcluster.cluster.primary" in sys.modules:
        with open(os.environ["SPY"], "w") as file:
            json.dump({"modules": sorted(sys.modules), "threads": len(os.listdir("/proc/self/task"))}, file)
    return _fork()
os.fork = fork
"""


def test_it_has_one_thread_and_none_of_the_workers_modules(start_cluster: StartCluster, tmp_path: Path) -> None:
    """At its last fork, after a scale-up: no gevent, redis, flask, httptools, nor the application; one thread."""
    (tmp_path / "sitecustomize.py").write_text(SPY)
    env = {"SPY": str(tmp_path / "seen.json"), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", env=env)
    cluster.cli("scale", "3")
    cluster.get("/")
    seen = json.loads((tmp_path / "seen.json").read_text())
    loaded = {name.partition(".")[0] for name in seen["modules"]}
    assert not loaded & {"gevent", "greenlet", "redis", "flask", "werkzeug", "httptools", "asyncio", "multiprocessing"}
    assert "tests.apps.plain" not in seen["modules"]
    assert seen["threads"] == 1
    assert cluster.process is not None
    assert len(os.listdir(f"/proc/{cluster.process.pid}/task")) == 1


def test_it_costs_about_nothing_when_idle(start_cluster: StartCluster) -> None:
    """Over two seconds without a request the primary uses less than 2 % of a CPU."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    assert cluster.process is not None

    def used() -> float:
        fields = Path(f"/proc/{cluster.process.pid}/stat").read_text().rsplit(")", 1)[1].split()  # type: ignore[union-attr]
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, start = used(), time.monotonic()
    time.sleep(2.0)  # the measurement itself
    assert (used() - before) / (time.monotonic() - start) < 0.02


BY_HAND = ("--policy", "tests.apps.passing:ByHand")


def test_a_crowd_waits_in_the_kernel_and_then_here(start_cluster: StartCluster) -> None:
    """All workers blocked, more clients than the backlog holds: the primary takes some into its queue, within its
    bound, and when the worker is killed all are served by its replacement.
    """
    import signal
    import socket
    from concurrent.futures import ThreadPoolExecutor

    from tests.waiting import wait_until

    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", "--backlog", "20")
    port = cluster.port
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.get, "/block/60.0", timeout=90)
        wait_until(lambda: cluster.workers()[0]["handed_off"] >= 1, "the worker is blocked")
        clients = []
        for number in range(1, 36):
            clients.append(socket.create_connection(("127.0.0.1", port), timeout=30))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if number > 20:  # the kernel's bound; a handshake that finds it full is tried again a second later
                wait_until(lambda: cluster.status()["listeners"][0]["accepted"] > number, "it has been seen")  # noqa: B023
        assert 35 - TURNS <= cluster.status()["listeners"][0]["pending"] <= 35
        os.kill(cluster.workers()[0]["pid"], signal.SIGKILL)
        for each in clients:
            with each:
                assert each.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_full_queue_leaves_clients_in_the_kernels_backlog(start_cluster: StartCluster) -> None:
    """All workers blocked and many clients: the primary takes its bound and no more, and serves all of them after."""
    import socket
    from concurrent.futures import ThreadPoolExecutor

    from tests.waiting import wait_until

    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", "--backlog", "20", *BY_HAND)
    port = cluster.port
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.get, "/block/3.0", timeout=30)
        wait_until(lambda: cluster.workers()[0]["handed_off"] >= 1, "the worker is blocked")
        clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(35)]
        for each in clients:
            each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        wait_until(lambda: cluster.status()["listeners"][0]["pending"] == 20, "the queue is full")
        assert cluster.status()["listeners"][0]["accepted"] <= 20 + CREDIT + 1
        for each in clients:
            with each:
                assert each.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_primary_survives_its_limit_of_descriptors(start_cluster: StartCluster) -> None:
    """Passing, EMFILE on accept: no crash, no spinning; when descriptors are free again who waits is served.

    In turns the primary needs none, and serves them at once.
    """
    import resource
    import socket

    from tests.waiting import wait_until

    in_turns = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    assert in_turns.process is not None
    port = in_turns.port
    limits = resource.prlimit(in_turns.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(in_turns.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    assert [request(port, "GET", "/").status for _ in range(3)] == [200] * 3
    resource.prlimit(in_turns.process.pid, resource.RLIMIT_NOFILE, limits)

    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", *BY_HAND)
    assert cluster.process is not None
    pid, port = cluster.process.pid, cluster.port
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))  # what is open stays open, nothing new can be
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    wait_until(lambda: "out of file descriptors" in cluster.output(), "it is said")
    assert cluster.output().count("out of file descriptors") < 20
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    with client:
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
