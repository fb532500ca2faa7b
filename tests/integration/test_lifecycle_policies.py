"""Who gets the next connection, on real clusters: least-connections, sticky and shared."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.cluster_process import ROOT, Cluster
from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
SOURCES = [f"127.0.0.{number}" for number in range(2, 26)]


def ask(cluster: Cluster, path: str = "/", source: str = "") -> dict[str, int]:
    """One request on a connection of its own, from a local address."""
    client = Client(("127.0.0.1", cluster.port), keep_alive=False, target=path, source=source)
    body = client.ask()
    client.hang_up()
    assert not client.account.lost, client.account.lost
    facts: dict[str, int] = json.loads(body)
    return facts


def kill_and_replace(cluster: Cluster, slot: int) -> None:
    """kill -9 the worker of a slot; its replacement serves on return."""
    pid, count = cluster.workers()[slot]["pid"], len(cluster.workers())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cluster.has(count, without=(pid,)), "it is replaced")


def slots_of(cluster: Cluster) -> dict[str, int]:
    """Which slot answers each source address; asked twice, it must say the same."""
    port = cluster.port

    def slot(source: str) -> int:
        found = set()
        for _ in range(2):
            client = Client(("127.0.0.1", port), keep_alive=False, target="/", source=source)
            found.add(json.loads(client.ask())["slot"])
            client.hang_up()
        (only,) = found
        return int(only)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(SOURCES, pool.map(slot, SOURCES), strict=True))


def test_least_connections_goes_round_slow_work(start_cluster: StartCluster) -> None:
    """Two workers have two slow requests each, a third has none: of twelve quick ones all are sent to the third."""
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--policy", "least-connections")
    with ThreadPoolExecutor(6) as pool:
        # Each is sent where least is in flight: two each. The third worker's share is then taken away. One after the
        # other: one that is accepted before its request is there is not in flight yet.
        slow = []
        for count in range(1, 7):
            slow.append(pool.submit(ask, cluster, "/slow/5.0"))
            wait_until(lambda n=count: sum(w["in_flight"] for w in cluster.workers()) == n, "it is in flight")  # type: ignore[misc]
        assert [w["in_flight"] for w in cluster.workers()] == [2, 2, 2]
        kill_and_replace(cluster, 2)  # its two are lost, and its replacement has none in flight
        quick = Counter(ask(cluster)["slot"] for _ in range(12))
        assert quick == {2: 12}
        assert sum(future.exception(20) is None for future in slow) == 4


@pytest.mark.alone
def test_least_connections_spreads_a_burst(start_cluster: StartCluster) -> None:
    """Six slow requests in the same moment, each sent with its connection: two for each of three workers.

    Mostly: a worker that takes its turn late leaves the next one to another, who may then have three, never more.
    """
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--policy", "least-connections")
    seen = []
    for _ in range(5):
        with ExitStack() as opened:
            for _ in range(6):
                client = opened.enter_context(socket.create_connection(("127.0.0.1", cluster.port), timeout=10))
                client.sendall(b"GET /slow/1.0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 6, "all are in flight")
            seen.append(sorted(w["in_flight"] for w in cluster.workers()))
            wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 0, "all are answered")
    assert seen.count([2, 2, 2]) >= 3, seen
    assert all(most <= 3 for _, _, most in seen), seen


def test_sticky_clients_stay(start_cluster: StartCluster) -> None:
    """24 client addresses: each has one slot, through a reload and a kill -9; scaling moves only some of them."""
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--policy", "sticky")
    first = slots_of(cluster)
    assert set(first.values()) == {0, 1, 2}
    assert cluster.cli("reload").returncode == 0
    wait_until(lambda: len(cluster.workers()) == 3, "the old generation is gone")
    assert slots_of(cluster) == first
    kill_and_replace(cluster, 1)
    assert slots_of(cluster) == first
    assert cluster.cli("scale", "4").returncode == 0
    wait_until(lambda: cluster.has(4), "four workers")
    four = slots_of(cluster)
    assert all(slot in (first[source], 3) for source, slot in four.items())
    assert 1 <= sum(slot == 3 for slot in four.values()) <= 16
    assert cluster.cli("scale", "3").returncode == 0
    wait_until(lambda: len(cluster.workers()) == 3, "three workers")
    assert slots_of(cluster) == first


def test_sticky_survives_a_reload_that_fails_late(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Two new workers listen, the third one's code raises: every client is where it was before."""
    good = (
        "from flask import Flask, request\napp = Flask(__name__)\n"
        "@app.get('/')\ndef who(): return {'slot': request.environ['sharedcluster.worker'].slot}\n"
    )
    (tmp_path / "late.py").write_text(good)
    cluster = start_cluster("late:app", "-w", "3", "--redis", "none", "--policy", "sticky", cwd=tmp_path)
    first = slots_of(cluster)
    (tmp_path / "late.py").write_text(
        good + "import os, time\nif os.environ.get('SHAREDCLUSTER_SLOT') == '2':\n    time.sleep(1)\n    1/0\n"
    )
    assert cluster.cli("reload").returncode == 3
    wait_until(lambda: len(cluster.workers()) == 3, "the failed generation is gone")
    assert slots_of(cluster) == first


def test_shared_loses_nothing(start_cluster: StartCluster) -> None:
    """Workers that accept for themselves: all serve; two reloads, a scale-down and a stop lose no request."""
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--policy", "shared")
    address = ("127.0.0.1", cluster.port)
    with Crowd(*[Client(address) for _ in range(6)], *[Client(address, keep_alive=False) for _ in range(3)]) as crowd:
        wait_until(lambda: all(w["requests"] > 20 for w in cluster.workers()), "all workers serve")
        for _ in range(2):
            assert cluster.cli("reload").returncode == 0
            wait_until(lambda: len(cluster.workers()) == 3, "the old generation is gone")
            wait_until(crowd.all_got(10), "everybody is served by the new one")
        assert cluster.cli("scale", "1").returncode == 0
        wait_until(lambda: len(cluster.workers()) == 1, "one worker is left")
        wait_until(crowd.all_got(10), "everybody is served by it")
        assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
        assert cluster.stop() == 0
    # After the stop a client is refused, or told to close and then refused; nobody is cut.
    assert crowd.lost == []
    assert "0 connections cut" in cluster.output()


def test_a_shared_worker_without_descriptors_rests(start_cluster: StartCluster) -> None:
    """It does not spin, its clients wait in the kernel, and are answered when it may open descriptors again."""
    cluster = start_cluster(APP, "-w", "1", "--redis", "none", "--policy", "shared")
    poor = cluster.workers()[0]["pid"]
    used = {int(name) for name in os.listdir(f"/proc/{poor}/fd")}
    limits = resource.prlimit(poor, resource.RLIMIT_NOFILE)
    first_free = next(number for number in range(1000) if number not in used)
    resource.prlimit(poor, resource.RLIMIT_NOFILE, (first_free, limits[1]))
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        process = psutil.Process(poor)
        beats = process.cpu_times()
        switches = process.num_ctx_switches().voluntary
        wait_until(lambda: process.num_ctx_switches().voluntary >= switches + 6, "it slept six times", deadline=10)
        spent = process.cpu_times()
        assert spent.user + spent.system - beats.user - beats.system < 0.5
        resource.prlimit(poor, resource.RLIMIT_NOFILE, limits)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_policy_of_ones_own(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A class of the user's decides, across a reload to new code; when it raises, round-robin serves on."""
    (tmp_path / "mine.py").write_text(
        "class Highest:\n"
        "    def __init__(self): self.workers = []\n"
        "    def add(self, worker): self.workers.append(worker)\n"
        "    def remove(self, worker): self.workers.remove(worker)\n"
        "    def pick(self, peer):\n"
        "        if peer[0] == '127.0.0.9': raise RuntimeError('a mistake of mine')\n"
        "        return max((w for w in self.workers if w.has_credit), key=lambda w: w.slot, default=None)\n"
    )
    cluster = start_cluster(
        APP, "-w", "3", "--redis", "none", "--policy", "mine:Highest", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert {ask(cluster)["slot"] for _ in range(6)} == {2}
    assert cluster.cli("reload").returncode == 0
    wait_until(lambda: cluster.has(3), "the old generation is gone")
    assert {ask(cluster)["slot"] for _ in range(6)} == {2}
    ask(cluster, source="127.0.0.9")
    assert {ask(cluster)["slot"] for _ in range(6)} == {0, 1, 2}
    assert cluster.output().count("round-robin from now on") == 1
    assert "a mistake of mine" in cluster.output()
