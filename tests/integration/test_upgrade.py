"""USR2: the primary's own program is replaced, on the same sockets, without a gap."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from pathlib import Path

import psutil

from sharedcluster.errors import SharedClusterError
from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.waiting import wait_until


def upgraded(cluster: Cluster, old: int) -> int:
    """Wait until another primary has the control socket; its pid."""

    def look() -> int:
        try:
            facts = cluster.status()
        except SharedClusterError:  # the socket changes hands at this moment
            return 0
        return int(facts["pid"]) if facts["pid"] != old and facts["state"] == "online" else 0

    return wait_until(look, "another primary answers", deadline=30)


def end(cluster: Cluster, pid: int) -> None:
    """Stop the new primary, which is no child of ours, and wait until it is gone."""
    cluster._seen.add(pid)
    cluster._seen.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not cluster.left_over(), "everything has ended", deadline=20)


def test_sessions_and_requests_survive_an_upgrade(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Under clients that open connections all the time: none fails, the session counts on, pid file and name move."""
    pid_file = tmp_path / "pid"
    cluster = start_cluster("demo_app", "-w", "2", "--pid-file", str(pid_file), env={"SECRET_KEY": "for this test"})
    assert cluster.process is not None
    old, port = cluster.process.pid, cluster.port
    counts: list[bytes] = []
    errors: list[str] = []
    over = threading.Event()

    def click() -> None:
        cookie = ""
        while not over.wait(0.005):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            try:
                connection.request("POST", "/counter", headers={"Cookie": cookie} if cookie else {})
                answer = connection.getresponse()
                counts.append(answer.read())
                cookie = (answer.getheader("set-cookie") or cookie).partition(";")[0]
            except (OSError, http.client.HTTPException) as error:
                errors.append(repr(error))
            finally:
                connection.close()

    client = threading.Thread(target=click)
    client.start()
    try:
        wait_until(lambda: len(counts) > 20, "the client is at work")
        cluster.signal(signal.SIGUSR2)
        new = upgraded(cluster, old)
        assert cluster.wait(20) == 0
        wait_until(lambda: cluster.status()["workers"][0]["state"] == "listening", "the new one serves")
        time.sleep(0.3)
    finally:
        over.set()
        client.join()
    assert errors == []
    assert [int(c.split(b":")[1].split(b",")[0]) for c in counts] == list(range(1, len(counts) + 1))
    assert pid_file.read_text() == f"{new}\n"
    assert cluster.status()["name"] == "demo_app"
    end(cluster, new)
    assert not pid_file.exists()
    assert not list(cluster.runtime.glob("*"))


def test_a_new_program_that_does_not_come_up(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Code that does not load: the old primary says so, keeps every worker and goes on."""
    (tmp_path / "fragile.py").write_text(
        "from flask import Flask\napp = Flask(__name__)\napp.get('/')(lambda: 'one')\n"
    )
    cluster = start_cluster("fragile", "-w", "2", "--redis", "none", cwd=tmp_path)
    before = [w["pid"] for w in cluster.workers()]
    (tmp_path / "fragile.py").write_text("1 / 0\n")
    cluster.signal(signal.SIGUSR2)
    wait_until(lambda: "before it was ready; this one goes on" in cluster.output(), "the failure is said", deadline=20)
    assert "ZeroDivisionError" in cluster.output()
    assert [w["pid"] for w in cluster.workers()] == before
    assert cluster.get("/").body == b"one"
    assert cluster.stop() == 0


def test_a_unix_socket_passes_on(start_cluster: StartCluster, tmp_path: Path) -> None:
    """The file stays through the upgrade and is removed by the last primary."""
    import socket

    path = tmp_path / "app.sock"
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", bind=("--bind", f"unix:{path}"))
    assert cluster.process is not None
    cluster.signal(signal.SIGUSR2)
    new = upgraded(cluster, cluster.process.pid)
    assert cluster.wait(20) == 0
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    end(cluster, new)
    assert not path.exists()
