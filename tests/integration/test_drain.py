"""Stopping: what is in flight is answered, nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster_process import Cluster, is_refused
from tests.conftest import StartCluster
from tests.waiting import wait_until


def nothing_is_left(cluster: Cluster) -> None:
    """No process and no socket file of the cluster is there."""
    wait_until(lambda: not cluster.left_over(), f"processes {cluster.left_over()} are gone", deadline=5)
    assert not list(cluster.runtime.glob("*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_are_answered(start_cluster: StartCluster, number: signal.Signals) -> None:
    """TERM or INT during 20 requests of 2 s: all get 200 and are told to close, exit code 0, nothing left behind."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2")
    port = cluster.port
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(cluster.get, "/slow/2.0") for _ in range(20)]
        wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 20, "all are in flight")
        cluster.note_processes()
        cluster.signal(number)
        results = [f.result(20) for f in answers]
    assert [r.status for r in results] == [200] * 20
    assert {r.headers.get("connection") for r in results} == {"close"}
    assert cluster.wait() == 0
    assert is_refused(port)
    nothing_is_left(cluster)


def test_an_idle_keep_alive_connection_gets_its_late_request_answered(start_cluster: StartCluster) -> None:
    """A request that is on its way when the drain begins is answered, with Connection: close."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    connection = cluster.connect()
    connection.request("GET", "/")
    assert connection.getresponse().read()
    cluster.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in cluster.output(), "the drain has begun")
    time.sleep(0.5)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("connection")) == (200, "close")
    connection.close()
    assert cluster.wait() == 0


def test_connections_made_at_the_moment_of_term_are_served_or_refused(start_cluster: StartCluster) -> None:
    """Clients that connect all the time through a TERM: each is answered or refused, none is reset or cut."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    port = cluster.port
    end = time.monotonic() + 20

    def hammer(_: int) -> tuple[int, str]:
        served = 0
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    answer = b""
                    while data := connection.recv(65536):
                        answer += data
            except ConnectionRefusedError:
                return served, "refused"
            except OSError as error:
                return served, repr(error)
            if not answer.startswith(b"HTTP/1.1 200"):
                return served, f"cut: {answer!r}"
            served += 1
        return served, "never refused"

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(hammer, n) for n in range(8)]
        wait_until(lambda: cluster.status()["listeners"][0]["accepted"] > 200, "the clients are at work")
        cluster.signal(signal.SIGTERM)
        outcomes = [f.result(30) for f in clients]
    assert {how for _, how in outcomes} == {"refused"}, outcomes
    assert cluster.wait() == 0
    assert "0 connections cut" in cluster.output()


def test_the_deadline_ends_what_does_not_end(start_cluster: StartCluster) -> None:
    """A request of 60 s and a drain deadline of 1 s: the worker is gone soon after, and that is said."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", "--graceful-timeout", "1")
    with ThreadPoolExecutor(1) as pool:
        cut = pool.submit(cluster.get, "/slow/60.0", timeout=30)
        wait_until(lambda: cluster.workers()[0]["in_flight"] == 1, "it is in flight")
        start = time.monotonic()
        assert cluster.stop() == 0
        assert time.monotonic() - start < 8
        assert cut.exception(10) is not None
    assert "1 requests were cut" in cluster.output()
    assert re.search(r"cut after \d+\.\d s: GET /slow/60\.0", cluster.output())


def test_a_blocked_worker_is_killed_at_the_deadline(start_cluster: StartCluster) -> None:
    """A worker that stands in C code neither drains nor hears TERM: KILL ends it."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", "--graceful-timeout", "1")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.get, "/block/60.0", timeout=30)
        # At least: a turn more than there are connections may be given (`turns`, law 2), and it is not used up now.
        wait_until(lambda: cluster.workers()[0]["handed_off"] >= 1, "it is handed off")
        assert cluster.stop() == 0
    assert "gets KILL" in cluster.output()
    nothing_is_left(cluster)


def test_a_second_interrupt_stops_now(start_cluster: StartCluster) -> None:
    """Ctrl+C twice: what is in flight is cut, and the command is back at once."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.get, "/slow/60.0", timeout=30)
        wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 1, "it is in flight")
        cluster.note_processes()
        cluster.signal(signal.SIGINT)
        wait_until(lambda: "draining" in cluster.output(), "the first was heard")
        start = time.monotonic()
        cluster.signal(signal.SIGINT)
        cluster.wait(10)
        assert time.monotonic() - start < 5
    nothing_is_left(cluster)


def test_the_terminals_interrupt_reaches_only_the_primary(start_cluster: StartCluster) -> None:
    """INT to the whole process group, as a terminal sends it, is one orderly drain."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cluster.get, "/slow/1.5")
        wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 1, "it is in flight")
        cluster.note_processes()
        assert cluster.process is not None
        os.killpg(cluster.process.pid, signal.SIGINT)
        assert answer.result(10).status == 200
    assert cluster.wait() == 0
    nothing_is_left(cluster)


def test_the_primary_is_killed(start_cluster: StartCluster) -> None:
    """kill -9 of the primary: requests in flight finish, no process remains, the port is free."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2")
    port = cluster.port
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(cluster.get, "/slow/1.5") for _ in range(4)]
        wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 4, "they are in flight")
        cluster.note_processes()
        cluster.signal(signal.SIGKILL)
        assert [f.result(20).status for f in answers] == [200] * 4
    assert is_refused(port)
    wait_until(lambda: not cluster.left_over(), "no orphan remains", deadline=15)


def test_the_primary_is_killed_with_clients_in_the_backlog(start_cluster: StartCluster) -> None:
    """Clients connect while the primary is stopped, so that it is nobody's turn; kill -9: the workers answer them."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "2", "--redis", "none")
    port = cluster.port
    cluster.note_processes()
    cluster.signal(signal.SIGSTOP)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(30)]
    for each in clients:
        each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    cluster.signal(signal.SIGKILL)
    for each in clients:
        with each:
            assert each.recv(65536).startswith(b"HTTP/1.1 200")
    wait_until(lambda: not cluster.left_over(), "no orphan remains", deadline=15)
    assert is_refused(port)


def test_what_the_application_forked_does_not_keep_the_port(start_cluster: StartCluster) -> None:
    """A process that a view forked outlives a killed cluster; the port is free all the same."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none")
    port, child = cluster.port, cluster.get("/fork").json["pid"]
    try:
        cluster.signal(signal.SIGKILL)
        wait_until(lambda: is_refused(port), "the port is free", deadline=15)
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_primary_is_killed_while_a_worker_is_blocked(start_cluster: StartCluster) -> None:
    """Even a worker that stands in C code does not outlive its primary for ever."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", "--heartbeat-timeout", "2", "--graceful-timeout", "1"
    )
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cluster.get, "/block/60.0", timeout=30)
        wait_until(lambda: cluster.workers()[0]["handed_off"] >= 1, "it is handed off")
        cluster.note_processes()
        cluster.signal(signal.SIGKILL)
        wait_until(lambda: not cluster.left_over(), "no orphan remains", deadline=20)
