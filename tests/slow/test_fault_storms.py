"""Storms: workers killed all the time, and everything at once, with strict books on every request.

The books: a client gives each request a number, and the application writes the number into a ledger when it begins.
Afterwards each answered request must be in the ledger once, none twice, and each that was lost must have been in the
hands of a worker that was killed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sharedcluster.control import client as control
from sharedcluster.control.protocol import ControlError
from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
SECONDS = float(os.environ.get("STORM_SECONDS", "20"))
pytestmark = pytest.mark.timeout(300 + int(SECONDS) * 4)


class Books:
    """The ledger of an application and what its clients saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def check(self, crowd: Crowd, *, may_lose: int) -> None:
        """Compare, and print the figures.

        Args:
            crowd: The clients, which have ended.
            may_lose: The most requests that may have been lost: those in flight in killed workers.
        """
        begun = Counter(int(line) for line in self.path.read_text().split())
        answered = [n for c in crowd.clients for n in c.account.answered]
        lost = [n for c in crowd.clients for n, _ in c.account.lost]
        print(
            f"answered {len(answered)}, lost {len(lost)} (at most {may_lose}), of those begun "
            f"{sum(n in begun for n in lost)}, refused {crowd.refused}, begun twice "
            f"{sum(count > 1 for count in begun.values())}, "
            f"slowest {max(c.account.longest for c in crowd.clients):.2f} s"
        )
        print(Counter(crowd.lost))
        assert crowd.refused == 0
        assert [n for n, count in begun.items() if count > 1] == []
        assert [n for n in answered if n not in begun] == []
        assert len(lost) <= may_lose


def clients(cluster: Cluster) -> list[Client]:
    """Keep-alive and one request per connection, quick and slow, and uploads."""
    address = ("127.0.0.1", cluster.port)
    return [
        *[Client(address) for _ in range(8)],
        *[Client(address, keep_alive=False) for _ in range(8)],
        *[Client(address, target="/slow/0.05?n={n}") for _ in range(4)],
        *[Client(address, target="/upload?n={n}", body=os.urandom(1 << 20), pause=0.05) for _ in range(2)],
    ]


@pytest.mark.parametrize("options", [(), ("--preload",), ("--policy", "least-connections"), ("--policy", "shared")])
def test_kill_all_workers_again_and_again(
    start_cluster: StartCluster, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """kill -9 of one of three workers every 150 ms under 22 clients: nobody is refused, nothing is done twice, a
    client loses a request only if its worker was killed with it, and at the end all is well again.
    """
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", *options, env={"LEDGER": str(books.path)})
    chance = random.Random(5)
    killed = may_lose = 0
    with Crowd(*clients(cluster)) as crowd:
        wait_until(crowd.all_got(2), "all are served")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            victims = [w for w in cluster.workers() if w["state"] == "listening" and w["pid"]]
            if victims:
                victim = chance.choice(victims)
                os.kill(victim["pid"], signal.SIGKILL)
                killed += 1
                may_lose += victim["connections"] + 4  # and those it took since the board was read
            time.sleep(0.15)
        wait_until(lambda: cluster.has(3), "all are replaced", deadline=40)
        wait_until(crowd.all_got(3), "all are served")
    print("killed", killed)
    # A killed worker takes its connections with it: requests it was serving, and idle ones, whose next request fails.
    books.check(crowd, may_lose=may_lose)
    assert cluster.status()["counters"]["restarts"] >= killed * 0.9
    assert cluster.process is not None
    assert not [c for c in psutil.Process(cluster.process.pid).children() if c.status() == psutil.STATUS_ZOMBIE]
    assert cluster.stop() == 0
    wait_until(lambda: not cluster.left_over(), "nothing is left")


@pytest.mark.parametrize("policy", ["round-robin", "tests.apps.passing:ByHand"], ids=["in turns", "passed"])
def test_what_was_not_read_is_never_lost(start_cluster: StartCluster, tmp_path: Path, policy: str) -> None:
    """One request per connection, workers that block for 30 ms in C code, kill -9 all the time: more requests wait
    unread for workers than are being served, and only those being served are lost.
    """
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(APP, "-w", "3", "--redis", "none", "--policy", policy, env={"LEDGER": str(books.path)})
    address = ("127.0.0.1", cluster.port)
    killed = 0
    with Crowd(*[Client(address, keep_alive=False, target="/block/0.03?n={n}", pause=0) for _ in range(40)]) as crowd:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            victims = [w["pid"] for w in cluster.workers() if w["state"] == "listening"]
            if len(victims) == 3:
                os.kill(random.choice(victims), signal.SIGKILL)
                killed += 1
            time.sleep(0.1)
        wait_until(lambda: cluster.has(3), "all are replaced", deadline=40)
    redispatched = cluster.status()["counters"]["redispatched"]
    print("killed", killed, "re-dispatched", redispatched)
    # A worker that blocks serves one at a time; one more may have been accepted and not begun.
    books.check(crowd, may_lose=killed * 2)
    assert redispatched == 0 if policy == "round-robin" else redispatched > killed


def test_reload_scale_recycle_at_once(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Reloads, scaling, draining by hand, recycling and TERM to workers, at random, several a second: not a request,
    not a keep-alive connection is lost, every exit is accounted for.
    """
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(
        APP, "-w", "3", "--redis", "none", "--max-requests", "1000", "--max-requests-jitter", "500",
        env={"LEDGER": str(books.path)},
    )  # fmt: skip
    assert cluster.process is not None
    primary = psutil.Process(cluster.process.pid)
    chance = random.Random(7)
    wanted = 3
    fewest = 99

    told: set[int] = set()

    def scale() -> None:
        nonlocal wanted
        wanted = chance.randint(1, 5)
        control.call(cluster.control, "scale", workers=str(wanted))

    def drain() -> None:
        rows = [w for w in cluster.workers() if w["state"] == "listening"]
        try:
            control.call(cluster.control, "drain", id=chance.choice(rows)["id"])
        except (ControlError, IndexError):
            return  # it leaves already

    def term() -> None:
        # One that still loads has nothing to drain: TERM ends it, which counts as a restart. A second TERM ends any.
        pids = [w["pid"] for w in cluster.workers() if w["state"] == "listening" and w["pid"] not in told]
        if pids:
            told.add(victim := chance.choice(pids))
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGTERM)

    deeds: list[Callable[[], object]] = [
        lambda: cluster.signal(signal.SIGHUP), scale, drain, term, lambda: cluster.signal(signal.SIGTTIN),
        lambda: cluster.signal(signal.SIGTTOU),
    ]  # fmt: skip
    done: Counter[int] = Counter()
    with Crowd(*clients(cluster)) as crowd:
        wait_until(crowd.all_got(2), "all are served")
        descriptors = primary.num_fds()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            number = chance.randrange(len(deeds))
            deeds[number]()
            done[number] += 1
            fewest = min(fewest, sum(w["state"] == "listening" for w in cluster.workers()))
            time.sleep(chance.random() * 0.6)
        control.call(cluster.control, "scale", workers="3")
        wait_until(lambda: cluster.status()["state"] == "online" and cluster.has(3), "it is calm again", deadline=60)
        wait_until(crowd.all_got(3), "all are served")
        counters = cluster.status()["counters"]
    print("deeds", dict(done), "counters", counters, "fewest that listened", fewest)
    books.check(crowd, may_lose=0)
    assert crowd.closed == 0
    assert fewest >= 1
    assert counters["restarts"] == 0
    wait_until(lambda: primary.num_fds() <= descriptors + 4, "no descriptor has leaked")
    assert not [c for c in primary.children() if c.status() == psutil.STATUS_ZOMBIE]
    assert cluster.stop() == 0


def test_the_primary_is_killed_under_load(start_cluster: StartCluster, tmp_path: Path) -> None:
    """kill -9 of the primary under 22 clients: requests being served are answered, workers leave, the port is free;
    what waited in the primary or the kernel is reset or refused, and that is all that is lost.
    """
    books = Books(tmp_path / "ledger")
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", env={"LEDGER": str(books.path)})
    everybody = clients(cluster)
    with Crowd(*everybody) as crowd:
        wait_until(crowd.all_got(5), "all are served")
        cluster.note_processes()
        cluster.signal(signal.SIGKILL)
        for each in everybody:
            each.over.set()
        wait_until(lambda: not cluster.left_over(), "no orphan remains", deadline=20)
    begun = {int(line) for line in books.path.read_text().split()}
    lost = [(n, what) for c in crowd.clients for n, what in c.account.lost]
    print("lost", len(lost), "of those begun", [what for n, what in lost if n in begun])
    assert not [what for n, what in lost if n in begun]
