"""A rolling reload: nobody is refused, nothing is lost, no client connection is closed."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.waiting import wait_until

APP = """
from flask import Flask
app = Flask(__name__)
@app.get("/")
def version():
    return {version!r}
"""


@pytest.fixture
def changing(start_cluster: StartCluster, tmp_path: Path) -> Cluster:
    """A cluster of two workers whose application is a file that a test can write anew."""
    (tmp_path / "changing.py").write_text(APP.format(version="one"))
    return start_cluster("changing:app", "-w", "2", "--redis", "none", cwd=tmp_path)


class KeepAliveClient(threading.Thread):
    """One connection, a request after another until told to stop; a connection that is closed under it is counted."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self.answers: list[int] = []
        self.closed_by_server = 0
        self.errors: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Ask until it is over."""
        while not self.over.wait(0.002):
            try:
                self.connection.request("GET", "/")
                answer = self.connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                self.connection.close()
                continue
            self.answers.append(answer.status)
            if answer.will_close:
                self.closed_by_server += 1
        self.connection.close()


def all_went_on(clients: list[KeepAliveClient], seen: list[int]) -> bool:
    """Whether each client has had ten more answers than it had."""
    return all(len(c.answers) > n + 10 for c, n in zip(clients, seen, strict=True))


def test_new_code_serves_and_no_connection_is_closed(changing: Cluster, tmp_path: Path) -> None:
    """Three reloads under eight strict keep-alive clients: no error, no connection closed, new code answers."""
    clients = [KeepAliveClient(changing.port) for _ in range(8)]
    for each in clients:
        each.start()
    wait_until(lambda: all(len(c.answers) > 10 for c in clients), "all clients are served")
    for version in ("second", "three", "four"):
        (tmp_path / "changing.py").write_text(APP.format(version=version))
        result = changing.cli("reload")
        assert result.returncode == 0, result.stderr
        seen = [len(c.answers) for c in clients]
        wait_until(partial(all_went_on, clients, seen), "all clients are served by the new generation")
        assert changing.get("/").body == version.encode()
        wait_until(lambda: len(changing.workers()) == 2, "the old generation is gone")
    for each in clients:
        each.over.set()
        each.join()
    assert [c.errors for c in clients] == [[]] * 8
    assert sum(c.closed_by_server for c in clients) == 0
    assert {status for c in clients for status in c.answers} == {200}
    assert changing.status()["counters"]["migrated"] >= 8
    assert changing.status()["generation"] == 4


def test_code_that_does_not_load_changes_nothing(changing: Cluster, tmp_path: Path) -> None:
    """The command fails with the application's traceback; the old workers, the same processes, go on serving."""
    before = {w["pid"] for w in changing.workers()}
    (tmp_path / "changing.py").write_text("from flask import Flask\napp = Flask(__name__\n")
    result = changing.cli("reload")
    assert result.returncode == 3
    assert "SyntaxError" in result.stderr
    assert changing.get("/").body == b"one"
    wait_until(lambda: {w["pid"] for w in changing.workers()} == before, "the failed generation is gone")
    assert changing.status()["state"] == "online"
    (tmp_path / "changing.py").write_text(APP.format(version="mended"))
    assert changing.cli("reload").returncode == 0
    assert changing.get("/").body == b"mended"


def test_reloads_queue(changing: Cluster, tmp_path: Path) -> None:
    """Two HUPs at once and one more during the reload: at the end one generation is left, with the last code."""
    (tmp_path / "changing.py").write_text(APP.format(version="second"))
    changing.signal(signal.SIGHUP)
    wait_until(lambda: changing.status()["state"] == "reloading", "it reloads")
    (tmp_path / "changing.py").write_text(APP.format(version="three"))
    changing.signal(signal.SIGHUP)
    wait_until(lambda: changing.status()["counters"]["reloads"] >= 2, "both were done")
    wait_until(lambda: len(changing.workers()) == 2, "one generation is left")
    assert {changing.get("/").body for _ in range(4)} == {b"three"}


def test_scaling_by_command_and_signal(changing: Cluster) -> None:
    """scale 4, scale -1, TTIN, TTOU: as many workers as asked for; slots are used again, ids are not."""
    assert changing.cli("scale", "4").stdout.strip().endswith("4 workers")
    wait_until(lambda: len(changing.workers()) == 4 and changing.is_ready(), "four workers")
    assert changing.cli("scale", "-1").returncode == 0
    wait_until(lambda: len(changing.workers()) == 3, "three workers")
    changing.signal(signal.SIGTTIN)
    wait_until(lambda: len(changing.workers()) == 4 and changing.is_ready(), "four workers again")
    changing.signal(signal.SIGTTOU)
    wait_until(lambda: len(changing.workers()) == 3, "three workers again")
    rows = changing.workers()
    assert [row["slot"] for row in rows] == [0, 1, 2]
    assert changing.cli("scale", "0").returncode == 2
    changing.cli("scale", "+1")
    wait_until(lambda: len(changing.workers()) == 4, "four once more")
    assert changing.workers()[3]["id"] == 6


def test_ready_means_that_the_loop_turns(changing: Cluster, tmp_path: Path) -> None:
    """New code has loaded, and what it started on import keeps the loop for itself: it is not counted on, the old
    workers serve, until the loop turns.
    """
    (tmp_path / "changing.py").write_text(APP.format(version="two") + KEEPS_THE_LOOP)
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(changing.cli, "reload")
        wait_until(lambda: len(list(tmp_path.glob("loaded-*"))) == 2, "both have loaded", deadline=30)
        facts = changing.status()
        assert (facts["state"], facts["generation"]) == ("reloading", 1)
        assert {changing.get("/").body for _ in range(4)} == {b"one"}
        (tmp_path / "gate").touch()
        assert reload.result(60).returncode == 0
    assert {changing.get("/").body for _ in range(4)} == {b"two"}


KEEPS_THE_LOOP = """
import os, pathlib, time
import gevent
from gevent import monkey
def keep_the_loop():
    pathlib.Path(f"loaded-{os.getpid()}").touch()
    while not os.path.exists("gate"):
        monkey.get_original("time", "sleep")(0.02)
if os.environ.get("SHAREDCLUSTER_SLOT"):
    gevent.spawn(keep_the_loop)
"""
WAITS = """
import os, time
from gevent import monkey
while not os.path.exists("gate"):
    monkey.get_original("time", "sleep")(0.02)
"""


def newcomers(cluster: Cluster, generation: int = 2) -> set[int]:
    """The processes of a generation that still load."""
    return {w["pid"] for w in cluster.workers() if w["generation"] == generation and w["state"] != "listening"}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_newcomer_that_somebody_killed_is_replaced(changing: Cluster, tmp_path: Path, end: signal.Signals) -> None:
    """TERM by an operator, KILL by the kernel: the reload goes on with another newcomer in its place."""
    (tmp_path / "changing.py").write_text(APP.format(version="two") + WAITS)
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(changing.cli, "reload")
        wait_until(lambda: len(newcomers(changing)) == 2, "two load")
        for _ in range(2):
            before = newcomers(changing)
            victim = min(before)
            os.kill(victim, end)
            wait_until(
                lambda: len(newcomers(changing) - before) == 1 and victim not in newcomers(changing),  # noqa: B023 - called within this turn of the loop
                "another one loads",
            )
        (tmp_path / "gate").touch()
        assert reload.result(60).returncode == 0
    assert {changing.get("/").body for _ in range(4)} == {b"two"}
    assert f"was killed by {end.name}" in changing.output()
    assert changing.status()["counters"]["restarts"] == 2


def test_newcomers_that_are_killed_again_and_again_end_the_reload(changing: Cluster, tmp_path: Path) -> None:
    """At the third one the reload is abandoned, the command says why, and the old workers have not stopped serving."""
    old = {w["pid"] for w in changing.workers()}
    (tmp_path / "changing.py").write_text(APP.format(version="two") + WAITS)
    with ThreadPoolExecutor(1) as pool:
        reload = pool.submit(changing.cli, "reload")
        killed: set[int] = set()
        for _ in range(3):
            victim = min(wait_until(lambda: newcomers(changing) - killed, "one loads"))
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        result = reload.result(60)
    assert result.returncode == 3
    assert "a new worker was killed by SIGKILL before it was ready" in result.stderr
    wait_until(lambda: {w["pid"] for w in changing.workers()} == old, "the failed generation is gone")
    assert {changing.get("/").body for _ in range(4)} == {b"one"}
