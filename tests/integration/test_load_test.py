"""The load generator against real servers: what it counts is what the server counted, and failures are failures."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster_process import ROOT, Cluster
from tests.conftest import StartCluster
from tests.redis_process import free_port
from tests.waiting import wait_until


def load(*arguments: str, ok: bool = True) -> dict[str, Any]:
    """Run `sharedcluster load-test ... --json`; with `ok` it must exit with 0, else with 1."""
    done = subprocess.run(
        [sys.executable, "-m", "sharedcluster", "load-test", *arguments, "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if ok else 1), done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture
def plain(start_cluster: StartCluster) -> Cluster:
    """Two workers that say who they are."""
    return start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none", "--expose-worker")


def test_it_counts_what_the_server_counts(plain: Cluster) -> None:
    """Requests by worker add up, agree with the server's own figures, and clients keep their connections."""
    report = load(f"http://127.0.0.1:{plain.port}/", "-n", "3000", "-c", "20", "--cores", "2")
    assert report["requests"] == 3000
    assert report["errors"] == report["non_2xx"] == 0
    assert report["connections"] == 20
    assert sum(report["workers"].values()) == 3000
    assert report["generator"]["processes"] == 2
    latency = report["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]

    def agree() -> bool:
        return bool({str(w["slot"]): w["requests"] for w in plain.workers()} == report["workers"])

    wait_until(agree, "the server's figures are the same")


def test_quick_and_new_connections(plain: Cluster) -> None:
    """10 users of 20 requests are 200, as artillery has it; without keep-alive each has a connection of its own."""
    report = load("quick", f"http://127.0.0.1:{plain.port}/", "--count", "10", "--num", "20", "--no-keepalive")
    assert report["requests"] == report["connections"] == 200
    assert not report["keep_alive"]


def test_bodies_methods_and_bad_statuses(plain: Cluster) -> None:
    """-d posts; a 404 is an answer, counted as non-2xx."""
    url = f"http://127.0.0.1:{plain.port}"
    assert load(f"{url}/echo", "-n", "10", "-c", "2", "-d", "hello")["statuses"] == {"200": 10}
    assert load(f"{url}/nowhere", "-n", "10", "-c", "2")["non_2xx"] == 10
    assert load(f"{url}/stream/2", "-n", "4", "-c", "2")["statuses"] == {"200": 4}


def test_a_rate_is_kept_and_a_stall_is_not_spared(plain: Cluster) -> None:
    """100 a second for 3 s while both workers stand still for 1 s: the p95 counts from when each request was due."""
    stall = [threading.Thread(target=plain.get, args=("/block/1.0",)) for _ in range(2)]

    def begin() -> None:
        for thread in stall:
            thread.start()

    timer = threading.Timer(0.8, begin)
    timer.start()
    report = load(f"http://127.0.0.1:{plain.port}/", "-t", "3", "-c", "4", "--rps", "100")
    timer.join()
    for thread in stall:
        thread.join()
    assert report["offered"] == 300
    assert report["requests"] == 300
    # 4 clients are held up, but the 100 requests that were due meanwhile waited as well.
    assert report["latency_ms"]["p90"] > 200


def test_sessions_through_a_reload(start_cluster: StartCluster) -> None:
    """Ten clients count in their sessions while the workers are replaced: no error and no increment is lost."""
    demo = start_cluster("demo_app", "-w", "2", "--expose-worker")
    result: list[dict[str, Any]] = []
    url = f"http://127.0.0.1:{demo.port}/counter"
    thread = threading.Thread(target=lambda: result.append(load(url, "-t", "3", "-c", "10", "--sessions")))
    thread.start()
    wait_until(lambda: sum(w["requests"] for w in demo.workers()) > 50, "it is under load")
    assert demo.cli("reload").returncode == 0
    thread.join()
    (report,) = result
    assert report["errors"] == 0
    assert report["sessions"]["lost"] == 0
    assert report["sessions"]["increments"] == report["requests"] > 100


@contextmanager
def forgetful_server(drop_every: int) -> Iterator[int]:
    """A server that counts right but for each `drop_every`th answer, and hangs up instead of answering each 7th."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        number, count = 0, 0
        while not over.is_set():
            connection, _ = listener.accept()
            with connection:
                if not connection.recv(65536):
                    continue
                number += 1
                if number % 7 == 0:
                    continue
                count = count + 1 if number % drop_every else 1
                body = json.dumps({"count": count}).encode()
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    over.set()
    with socket.create_connection(listener.getsockname()):
        pass
    thread.join()
    listener.close()


def test_lost_sessions_and_errors_are_seen() -> None:
    """A server that forgets and hangs up: both are counted, and the exit code is 1."""
    with forgetful_server(drop_every=10) as port:
        report = load(f"http://127.0.0.1:{port}/", "-n", "60", "-c", "1", "--sessions", ok=False)
    assert report["errors_by_kind"] == {"closed before a response": 8}
    assert report["requests"] == 52
    assert report["sessions"]["lost"] > 0
    assert any("closes connections" in note for note in report["notes"])


def test_a_slow_server_times_out(plain: Cluster) -> None:
    """--timeout: no answer is an error by its name."""
    began = time.monotonic()
    report = load(f"http://127.0.0.1:{plain.port}/slow/5.0", "-n", "2", "-c", "2", "--timeout", "0.3", ok=False)
    assert report["errors_by_kind"] == {"no answer within 0.3 s": 2}
    assert time.monotonic() - began < 5


def test_nobody_there() -> None:
    """Said once, in words."""
    done = subprocess.run(
        [sys.executable, "-m", "sharedcluster", "load-test", f"http://127.0.0.1:{free_port()}/", "-n", "10"],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Nobody answers at 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr
