"""Connections in a program of its own: rotation, and every way in which Node loses one."""

from __future__ import annotations

import http.client
import os
import resource
import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.program_process import StartLab, who
from tests.redis_process import free_port
from tests.waiting import wait_until

ONE_STANDS_STILL = (
    "any(w.handle.row.stands_still(__import__('time').monotonic_ns()) for w in cluster.workers.values())"
)


@pytest.mark.alone  # a worker that others keep from the CPU has not fallen idle yet, and is passed over
def test_idle_workers_take_turns(start_lab: StartLab) -> None:
    """16 connections, one after the other, over 4 workers: each has 4, in one fixed order."""
    lab = start_lab(4)
    port = lab.serve(1, 2, 3, 4)
    order = [who(port)["id"] for _ in range(16)]
    assert sorted(order[:4]) == [1, 2, 3, 4]
    assert order == order[:4] * 4


@pytest.mark.alone
def test_a_blocked_worker_holds_nobody_up(start_lab: StartLab) -> None:
    """One worker stands in C: at most its credit waits for it, everybody else is answered by the other one."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    with ThreadPoolExecutor(12) as pool:
        blocked = pool.submit(who, port, "/block/3", 20)
        lab.wait_begun()
        wait_until(lambda: lab.do(ONE_STANDS_STILL), "the primary sees that it is blocked")
        answers = [pool.submit(who, port, "/", 20) for _ in range(10)]
        wait_until(lambda: len([a for a in answers if a.done()]) >= 8, "8 or more are answered", deadline=2.5)
        assert not blocked.done()
        ids = [a.result()["id"] for a in answers if a.done()]
        assert len(set(ids)) == 1
        assert blocked.result()["id"] not in ids
        assert [a.result()["id"] in (1, 2) for a in answers] == [True] * 10


def test_a_connection_handed_to_a_worker_that_dies_is_served_by_another(start_lab: StartLab) -> None:
    """Node #21746: kill -9 between the hand-off and the acknowledgement; there the client waits for ever."""
    lab = start_lab(1)
    port = lab.serve(1)
    with ThreadPoolExecutor(4) as pool:
        blocked = pool.submit(who, port, "/block/30", 40)
        lab.wait_begun()
        waiting = [pool.submit(who, port, "/", 40) for _ in range(2)]
        wait_until(lambda: lab.do("len(cluster.workers[1].handle.unacknowledged)") >= 1, "one is in its socket")
        lab.fork(1)
        lab.serve(2)
        os.kill(lab.pid(1), signal.SIGKILL)
        assert [each.result()["id"] for each in waiting] == [2, 2]
        assert blocked.exception() is not None  # its request had been read: nobody else may run it


def test_the_last_worker_dies_and_nobody_is_refused(start_lab: StartLab) -> None:
    """10 clients in the queue of the only worker, kill -9: its replacement serves all ten, the port never refuses."""
    lab = start_lab(1)
    port = free_port()
    lab.serve(1, port=port)
    with ThreadPoolExecutor(12) as pool:
        pool.submit(who, port, "/block/30", 40)
        lab.wait_begun()
        queued = [pool.submit(who, port, "/", 40) for _ in range(5)]
        os.kill(lab.pid(1), signal.SIGKILL)
        lab.wait_exit(1)
        queued += [pool.submit(who, port, "/", 40) for _ in range(5)]  # while there is no worker at all
        lab.fork(1)
        lab.serve(2, port=port)
        assert [each.result()["id"] for each in queued] == [2] * 10


def test_a_worker_out_of_descriptors_gives_its_connections_to_another(start_lab: StartLab) -> None:
    """In Node the client hangs and the worker is out of the rotation for good; here it comes back with its limit."""
    lab = start_lab(2)
    port = lab.serve(1, 2)
    pid = lab.pid(1)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(n for n in range(1000) if n not in used), limits[1]))
    assert {who(port)["id"] for _ in range(6)} == {2}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: who(port)["id"] == 1, "it has work again")


def test_max_connections_are_exact(start_lab: StartLab) -> None:
    """Limits of 0, 1 and 9 on three workers and 10 clients: 0, 1 and 9; an eleventh waits until one leaves."""
    lab = start_lab(3)
    port = free_port()
    for id, limit in ((1, 0), (2, 1), (3, 9)):
        lab.serve(id, port=port, max_connections=limit)
    clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=15) for _ in range(10)]
    served = []
    for client in clients:
        client.request("GET", "/")
        served.append(int(client.getresponse().read().split(b'"id": ')[1][:1]))
    assert [served.count(id) for id in (1, 2, 3)] == [0, 1, 9]
    with ThreadPoolExecutor(1) as pool:
        eleventh = pool.submit(who, port, "/", 15)
        wait_until(lambda: lab.do("sum(w.handle.handed_off for w in cluster.workers.values())") > 12, "it was refused")
        assert not eleventh.done()
        clients[served.index(2)].close()
        assert eleventh.result()["id"] == 2
    for client in clients:
        client.close()


def test_the_primary_survives_its_limit_of_descriptors(start_lab: StartLab) -> None:
    """EMFILE on accept is no crash and no busy loop; the client is served when descriptors are free again."""
    lab = start_lab(1)
    port = lab.serve(1)
    pid = lab.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(n for n in range(1000) if n not in used), limits[1]))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        lab.wait_for("out of file descriptors")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert lab.output.count("out of file descriptors") < 20


def test_sticky_clients_stay(start_lab: StartLab) -> None:
    """`scheduling_policy="sticky"`: one address, one worker, while it lives; then another one."""
    lab = start_lab()
    lab.do("cluster.setup_primary(scheduling_policy='sticky')")
    lab.fork(3)
    port = lab.serve(1, 2, 3)
    first = {who(port)["id"] for _ in range(6)}
    assert len(first) == 1
    lab.do(f"cluster.workers[{min(first)}].disconnect()")
    lab.wait_exit(min(first))
    second = {who(port)["id"] for _ in range(6)}
    assert len(second) == 1
    assert second != first


def test_shared_sockets(start_lab: StartLab) -> None:
    """SCHED_NONE: the workers accept for themselves, also after one was killed and after one was let go."""
    lab = start_lab(env={"SHAREDCLUSTER_POLICY": "none"})
    lab.fork(3)
    port = lab.serve(1, 2, 3)
    assert {who(port)["id"] for _ in range(20)} <= {1, 2, 3}
    assert lab.do("sum(w.handle.handed_off for w in cluster.workers.values())") == 0
    os.kill(lab.pid(1), signal.SIGKILL)
    lab.wait_exit(1)
    lab.do("cluster.workers[2].disconnect()")
    lab.wait_exit(2)
    assert {who(port)["id"] for _ in range(4)} == {3}


def test_tls_sessions_resume_on_another_worker(start_lab: StartLab, tmp_path: Path) -> None:
    """One session, several connections, several workers: all but the first resume (Node: 15 of 16)."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    lab = start_lab(3)
    assert lab.at(1, "serve(certfile='/no/such.pem')")["raised"] == "ConfigError"
    port = lab.serve(1, 2, 3, certfile=str(cert), keyfile=str(key))
    context = ssl.create_default_context(cafile=str(cert))
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    session, resumed, seen = None, 0, set()
    for _ in range(6):
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
        ):
            secure.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            seen.add(secure.recv(65536).split(b'"id": ')[1][:1])
            resumed += bool(secure.session_reused)
            session = secure.session
    assert resumed == 5
    assert len(seen) == 3
