"""A thousand reloads, and a soak: nothing grows in the primary, nobody loses anything.

Lengths come from the environment: RELOADS (default 60), SOAK_SECONDS (default 60).
"""

from __future__ import annotations

import os
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
    """Steady load of every kind, with a reload every 30 s and recycling: no loss, and the primary does not grow."""
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(
        APP, "-w", "2", "--redis", "none", "--max-requests", "3000", "--max-requests-jitter", "500",
        env={"LEDGER": str(books.path)},
    )  # fmt: skip
    address = ("127.0.0.1", cluster.port)
    clients = [
        *[Client(address, pause=0.02) for _ in range(6)],
        *[Client(address, keep_alive=False, pause=0.02) for _ in range(6)],
        *[Client(address, target="/slow/0.2?n={n}") for _ in range(2)],
        Client(address, target="/upload?n={n}", body=os.urandom(1 << 20), pause=0.3),
        Client(address, target="/big/1024?n={n}", bite=65536, chew=0.02),
    ]
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    with Crowd(*clients) as crowd:
        start = time.monotonic()
        wait_until(lambda: time.monotonic() > start + min(15, SOAK / 4), "it is warm", deadline=SOAK)
        first, cpu = held(cluster), sum(primary.cpu_times()[:2])
        next_reload = time.monotonic() + 10
        while time.monotonic() < start + SOAK:
            time.sleep(0.5)
            if time.monotonic() > next_reload:
                next_reload += 30
                control.call(cluster.control, "reload", timeout=60)
        wait_until(lambda: cluster.has(2), "all is calm", deadline=60)
        # Connections that are being handed off at this moment have a descriptor here, too.
        wait_until(lambda: held(cluster)[0] <= first[0] + 2, "no descriptor has been leaked")
        last, cpu = held(cluster), sum(primary.cpu_times()[:2]) - cpu
        status = cluster.status()
    accepted = status["listeners"][0]["accepted"]
    print(
        f"{SOAK:.0f} s; descriptors {first[0]} -> {last[0]}, MB {first[1]:.2f} -> {last[1]:.2f}; "
        f"primary's CPU {cpu:.1f} s for {accepted} connections; counters {status['counters']}"
    )
    books.check(crowd, may_lose=0)
    assert crowd.closed == 0
    assert last[1] <= first[1] + 2.0
