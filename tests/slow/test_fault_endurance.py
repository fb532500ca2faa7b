"""A thousand reloads, and a soak: nothing grows in the primary, nobody loses anything.

Lengths come from the environment: RELOADS (default 60), SOAK_SECONDS (default 60), and SOAK_RATE, the requests per
second of the soak's quick clients (default 400).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from sharedcluster.control import client as control
from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.slow.test_fault_storms import Books
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
RELOADS = int(os.environ.get("RELOADS", "60"))
SOAK = float(os.environ.get("SOAK_SECONDS", "60"))
RATE = float(os.environ.get("SOAK_RATE", "400"))


def held(cluster: Cluster) -> tuple[int, float]:
    """The primary's descriptors and its own memory in MB."""
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    return primary.num_fds(), primary.memory_full_info().uss / 1048576


@pytest.mark.timeout(120 + RELOADS * 10)
@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_reloads_do_not_add_up(start_cluster: StartCluster, tmp_path: Path, options: tuple[str, ...]) -> None:
    """So many reloads with clients: as many descriptors as before, less than 2 MB more, no zombie, no loss."""
    (tmp_path / "small.py").write_text("def app(environ, start):\n    start('200 OK', [('Content-Length', '2')])\n"
                                       "    return [b'ok']\n")  # fmt: skip
    cluster = start_cluster("small:app", "-w", "2", "--redis", "none", *options, cwd=tmp_path)
    with Crowd(*[Client(("127.0.0.1", cluster.port), pause=0.05) for _ in range(8)]) as crowd:
        start = time.monotonic()
        first: tuple[int, float] | None = None
        for number in range(RELOADS):
            assert control.call(cluster.control, "reload", timeout=60)["generation"] == number + 2
            if number % 100 == 99:
                print(f"{number + 1} reloads, {time.monotonic() - start:.0f} s: held {held(cluster)}")
            if number == min(20, RELOADS // 3):
                wait_until(lambda: cluster.has(2), "the old generation is gone", deadline=30)
                first = held(cluster)
        wait_until(lambda: cluster.has(2), "the old generation is gone", deadline=30)
        took = time.monotonic() - start
    assert first is not None
    last = held(cluster)
    counters = cluster.status()["counters"]
    print(
        f"{RELOADS} reloads in {took:.0f} s; descriptors {first[0]} -> {last[0]}, MB {first[1]:.2f} -> {last[1]:.2f}; "
        f"answered {crowd.answered}, lost {len(crowd.lost)}, closed {crowd.closed}, counters {counters}"
    )
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert last[0] <= first[0] + 2
    assert last[1] <= first[1] + 2.0
    assert cluster.process is not None
    assert not [c for c in psutil.Process(cluster.process.pid).children() if c.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.timeout(300 + int(SOAK) * 2)
def test_soak(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Steady load of every kind, a reload every 30 s, recycling, and a worker killed every few minutes: only what a
    killed worker had in hand is lost, no other connection is closed, and the primary does not grow.
    """
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(
        APP, "-w", "2", "--redis", "none",
        "--max-requests", str(int(RATE * 7)), "--max-requests-jitter", str(int(RATE)),
        env={"LEDGER": str(books.path)},
    )  # fmt: skip
    address, pause = ("127.0.0.1", cluster.port), 12 / RATE
    clients = [
        *[Client(address, pause=pause) for _ in range(6)],
        *[Client(address, keep_alive=False, pause=pause) for _ in range(6)],
        *[Client(address, target="/slow/0.2?n={n}") for _ in range(2)],
        Client(address, target="/upload?n={n}", body=os.urandom(1 << 20), pause=0.3),
        Client(address, target="/big/1024?n={n}", bite=65536, chew=0.02, pause=0.3),
    ]
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    kills = may_lose = 0
    with Crowd(*clients) as crowd:
        start = time.monotonic()
        wait_until(lambda: time.monotonic() > start + min(15, SOAK / 4), "it is warm", deadline=SOAK)
        first, cpu = held(cluster), sum(primary.cpu_times()[:2])
        next_reload, next_kill, next_line = start + 25, start + min(75, SOAK / 2), start
        while (now := time.monotonic()) < start + SOAK:
            time.sleep(0.5)
            if now > next_line:
                next_line += 60
                print(f"{now - start:5.0f} s: held {held(cluster)}, answered {crowd.answered}, lost {len(crowd.lost)}")
            if now > next_reload:
                next_reload += 30
                control.call(cluster.control, "reload", timeout=60)
            if now > next_kill:
                next_kill += 240
                victim = next(w for w in cluster.workers() if w["state"] == "listening")
                os.kill(victim["pid"], signal.SIGKILL)
                kills += 1
                may_lose += victim["connections"] + 4  # and those it took since the board was read
        wait_until(lambda: cluster.has(2), "all is calm", deadline=60)
        # Connections that are being handed off at this moment have a descriptor here, too.
        wait_until(lambda: held(cluster)[0] <= first[0] + 2, "no descriptor has been leaked")
        last, cpu = held(cluster), sum(primary.cpu_times()[:2]) - cpu
        status = cluster.status()
    accepted = status["listeners"][0]["accepted"]
    print(
        f"{SOAK:.0f} s, {kills} kills; descriptors {first[0]} -> {last[0]}, MB {first[1]:.2f} -> {last[1]:.2f}; "
        f"primary's CPU {cpu:.1f} s for {accepted} connections; counters {status['counters']}"
    )
    books.check(crowd, may_lose=may_lose)
    assert crowd.closed == sum(len(c.account.lost) for c in clients if c.keep_alive)
    assert last[1] <= first[1] + 2.0
