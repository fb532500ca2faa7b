"""Processes that are stopped, and resources that run out: descriptors, disk, memory, processes."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def cpu(pid: int) -> float:
    """Seconds of CPU a process has used."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


# -- stopped -------------------------------------------------------------------------------------------------------


def test_a_stopped_worker(start_cluster: StartCluster) -> None:
    """SIGSTOP of one of two workers under clients that make a connection per request: the other one serves them from
    then on; it is replaced at the heartbeat timeout; what it had read is lost with it, nothing else.
    """
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--heartbeat-timeout", "3")
    stopped = cluster.workers()[0]["pid"]
    address = ("127.0.0.1", cluster.port)
    with Crowd(*[Client(address, keep_alive=False) for _ in range(8)]) as crowd:
        wait_until(crowd.all_got(3), "all are served")
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        served = sum(len(c.account.answered) for c in crowd.clients)
        wait_until(lambda: sum(len(c.account.answered) for c in crowd.clients) > served + 100, "the other one serves")
        assert stopped in {w["pid"] for w in cluster.workers()}, "it was replaced first"
        wait_until(lambda: cluster.has(2, without=(stopped,)), "it is replaced", deadline=20)
        print(f"replaced after {time.monotonic() - start:.1f} s")
        wait_until(crowd.all_got(3), "all are served, those too that were with it", deadline=20)
    print(f"lost {crowd.lost}")
    assert crowd.refused == 0
    assert len(crowd.lost) <= 8
    assert "gets KILL" in cluster.output()


def test_a_worker_that_is_stopped_and_goes_on(start_cluster: StartCluster) -> None:
    """SIGSTOP for a second, less than the heartbeat timeout: nothing is lost, nobody is replaced."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--heartbeat-timeout", "10")
    pids = [w["pid"] for w in cluster.workers()]
    with Crowd(*[Client(("127.0.0.1", cluster.port), keep_alive=n % 2 == 0) for n in range(8)]) as crowd:
        wait_until(crowd.all_got(3), "all are served")
        os.kill(pids[0], signal.SIGSTOP)
        time.sleep(1)
        os.kill(pids[0], signal.SIGCONT)
        wait_until(crowd.all_got(3), "all are served")
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert [w["pid"] for w in cluster.workers()] == pids


def test_everything_is_paused(start_cluster: StartCluster) -> None:
    """A frozen container: all processes stand still for longer than the heartbeat timeout; nobody is blamed."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--heartbeat-timeout", "2")
    assert cluster.process is not None
    workers = [w["pid"] for w in cluster.workers()]
    with Crowd(*[Client(("127.0.0.1", cluster.port)) for _ in range(4)]) as crowd:
        wait_until(crowd.all_got(3), "all are served")
        for pid in (*workers, cluster.process.pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(cluster.process.pid, signal.SIGCONT)
        time.sleep(0.1)  # the primary looks around before any worker can speak
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        wait_until(crowd.all_got(3), "all are served")
        time.sleep(2.5)
    assert [w["pid"] for w in cluster.workers()] == workers
    assert (crowd.lost, crowd.closed) == ([], 0)


def test_a_paused_primary(start_cluster: StartCluster) -> None:
    """SIGSTOP of the primary for three seconds: keep-alive clients notice nothing, new ones wait, nobody is lost."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--heartbeat-timeout", "2")
    workers = [w["pid"] for w in cluster.workers()]
    address = ("127.0.0.1", cluster.port)
    old = [Client(address) for _ in range(4)]
    new = [Client(address, keep_alive=False) for _ in range(4)]
    with Crowd(*old) as stayed, Crowd(*new) as came:
        wait_until(stayed.all_got(3), "all are served")
        wait_until(came.all_got(3), "all are served")
        cluster.signal(signal.SIGSTOP)
        end = time.monotonic() + 3
        wait_until(stayed.all_got(50), "keep-alive clients are served without it")
        time.sleep(max(0.0, end - time.monotonic()))
        cluster.signal(signal.SIGCONT)
        wait_until(came.all_got(5), "new connections are served again")
    assert (stayed.lost, came.lost, came.refused) == ([], [], 0)
    assert [w["pid"] for w in cluster.workers()] == workers


# -- descriptors ---------------------------------------------------------------------------------------------------


def test_the_primary_without_descriptors(start_cluster: StartCluster) -> None:
    """At its limit the primary neither dies nor spins; a worker killed then is replaced, clients wait and are
    answered when there are descriptors again.
    """
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    assert cluster.process is not None
    primary, port = cluster.process.pid, cluster.port
    victim = cluster.workers()[0]["pid"]
    limits = resource.prlimit(primary, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{primary}/fd")}
    resource.prlimit(primary, resource.RLIMIT_NOFILE, (min(set(range(1000)) - used), limits[1]))
    cluster.signal(signal.SIGTTIN)  # a third worker: no descriptor for its channel
    wait_until(lambda: "cannot start a worker" in cluster.output(), "it says so")
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
    for client in clients:
        client.sendall(GET)
    before = cpu(primary)
    time.sleep(2)
    spent = cpu(primary) - before
    print(f"CPU in 2 s at the limit: {spent:.3f} s")
    assert cluster.process.poll() is None
    assert spent < 0.2
    os.kill(victim, signal.SIGKILL)
    resource.prlimit(primary, resource.RLIMIT_NOFILE, limits)
    for client in clients:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    wait_until(lambda: cluster.has(3, without=(victim,)), "three workers")


def test_a_worker_without_descriptors_under_load(start_cluster: StartCluster) -> None:
    """A worker at its limit refuses, others answer; it works again when it may. Nobody loses a request."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    poor = cluster.workers()[0]["pid"]
    used = {int(name) for name in os.listdir(f"/proc/{poor}/fd")}
    limits = resource.prlimit(poor, resource.RLIMIT_NOFILE)
    address = ("127.0.0.1", cluster.port)
    with Crowd(*[Client(address, keep_alive=False, target="/slow/0.01") for _ in range(8)]) as crowd:
        resource.prlimit(poor, resource.RLIMIT_NOFILE, (min(set(range(1000)) - used), limits[1]))
        wait_until(lambda: cluster.status()["counters"]["redispatched"] >= 3, "it refuses")
        wait_until(crowd.all_got(20), "all are served")
        resource.prlimit(poor, resource.RLIMIT_NOFILE, limits)
        served = next(w["requests"] for w in cluster.workers() if w["pid"] == poor)
        wait_until(
            lambda: next(w["requests"] for w in cluster.workers() if w["pid"] == poor) > served + 10, "it works again"
        )
    assert (crowd.lost, crowd.refused) == ([], 0)


def test_a_flood_of_connections_is_bounded(start_cluster: StartCluster) -> None:
    """All workers blocked and 5,000 connections: the primary holds as many as its bound, the kernel the others, its
    memory does not grow by more than 8 MB; when the workers go on, all that were let in are answered.
    """
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--backlog", "500")
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    memory, port = primary.memory_info().rss, cluster.port
    clients: list[socket.socket] = []
    with ThreadPoolExecutor(2) as pool:
        blockers = [pool.submit(cluster.get, "/block/6.0", timeout=60) for _ in range(2)]
        wait_until(lambda: sum(w["handed_off"] for w in cluster.workers()) >= 2, "both are handed off")
        try:
            for _ in range(5000):
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
                clients.append(client)
            wait_until(lambda: cluster.status()["listeners"][0]["pending"] >= 500, "the queue is full")
            assert primary.num_fds() < 500 + 60  # `pending` are those in the kernel, too
            assert primary.num_fds() < 560
            assert primary.memory_info().rss - memory < 8 << 20
            assert cluster.status()["state"] == "online"
            for future in blockers:
                assert future.result(60).status == 200
            answered = 0
            for client in clients[:900]:  # those in the queue and the first of the backlog
                client.setblocking(True)
                client.settimeout(30)
                client.sendall(GET)
                answered += client.recv(4096).startswith(b"HTTP/1.1 200")
            assert answered == 900
        finally:
            for client in clients:
                client.close()
    assert cluster.get("/", timeout=30).status == 200


def test_a_client_that_says_nothing(start_cluster: StartCluster) -> None:
    """200 connections without a byte: they cost the primary no credit, others are answered at once."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    silent = [socket.create_connection(("127.0.0.1", cluster.port)) for _ in range(200)]
    wait_until(lambda: sum(w["connections"] for w in cluster.workers()) >= 200, "the workers have them")
    assert cluster.status()["listeners"][0]["pending"] == 0
    assert [cluster.get("/").status for _ in range(20)] == [200] * 20
    for client in silent:
        client.close()


# -- disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_full_disk_under_the_log(start_cluster: StartCluster, unbuffered: str) -> None:
    """Standard error goes to /dev/full, where each write fails with ENOSPC: workers serve, are killed and replaced,
    a reload works, the stop is clean.
    """
    cluster = Cluster(APP, "-w", "2", "--redis", "none", "--access-log", env={"PYTHONUNBUFFERED": unbuffered})
    cluster.log = Path("/dev/full")
    try:
        cluster.start()
        with Crowd(*[Client(("127.0.0.1", cluster.port), keep_alive=n % 2 == 0) for n in range(4)]) as crowd:
            wait_until(crowd.all_got(5), "all are served")
            pid = cluster.workers()[0]["pid"]
            assert cluster.cli("reload").returncode == 0
            wait_until(lambda: cluster.has(2, without=(pid,)), "reloaded")
            wait_until(crowd.all_got(5), "all are served")
        assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
        pid = cluster.workers()[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: cluster.has(2, without=(pid,)), "it is replaced")
        assert cluster.get("/").status == 200
        assert cluster.stop() == 0
    finally:
        cluster.log = cluster.folder / "log"
        cluster.close()


# -- memory and processes ------------------------------------------------------------------------------------------


def test_a_memory_limit_on_a_worker(start_cluster: StartCluster) -> None:
    """A worker whose address space is limited raises MemoryError in the view: 500, and it lives on."""
    cluster = start_cluster(APP, "-w", "1", "--redis", "none")
    pid = cluster.workers()[0]["pid"]
    now = psutil.Process(pid).memory_info().vms
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (now + (64 << 20), limits[1]))
    assert cluster.get("/grow/300").status == 500
    assert cluster.get("/").json["pid"] == pid
    assert "MemoryError" in cluster.output()


def test_a_leak_under_load_with_max_memory(start_cluster: StartCluster) -> None:
    """Requests that leak 2 MB each, --max-memory 150M: workers are drained and replaced, no request is lost."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--max-memory", "150M")
    address = ("127.0.0.1", cluster.port)
    leaking = [Client(address, target="/grow/2", pause=0.02) for _ in range(4)]
    with Crowd(*leaking, *[Client(address, keep_alive=False) for _ in range(4)]) as crowd:
        wait_until(lambda: cluster.status()["counters"]["recycled"] >= 4, "four are recycled", deadline=50)
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert cluster.status()["counters"]["restarts"] == 0


def test_no_more_processes(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A user at the limit of processes (RLIMIT_NPROC): the worker that died cannot be forked, the other one serves,
    and when there is room again it is replaced. Root is not limited, so the cluster runs as another user.
    """
    if os.getuid() != 0:
        pytest.skip("needs root, to run the cluster as a user of its own")
    user = 54321
    prefix = ("setpriv", "--reuid", str(user), "--clear-groups")
    if subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("setpriv is not there")
    readable = subprocess.run(
        [*prefix, sys.executable, "-c", "import gevent"],
        check=False, capture_output=True,
    )  # fmt: skip
    if readable.returncode:
        pytest.skip("this Python cannot be read by another user")
    cluster = Cluster(APP, "-w", "2", "--redis", "none", prefix=prefix)
    os.chmod(cluster.folder, 0o755)
    cluster.runtime.mkdir()
    os.chown(cluster.runtime, user, -1)
    os.chmod(cluster.runtime, 0o700)

    def limit(number: str) -> None:
        assert cluster.process is not None
        command = [*prefix, "prlimit", "--pid", str(cluster.process.pid), f"--nproc={number}:"]
        subprocess.run(command, check=True)

    try:
        cluster.start()
        limit("1")
        pid = cluster.workers()[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "cannot start a worker" in cluster.output(), "it cannot be forked")
        assert cluster.get("/").status == 200
        assert cluster.process is not None
        assert cluster.process.poll() is None
        limit(str(resource.getrlimit(resource.RLIMIT_NPROC)[0]))
        wait_until(lambda: cluster.has(2, without=(pid,)), "it is replaced")
        assert cluster.stop() == 0
    finally:
        print(cluster.output())
        cluster.close()
