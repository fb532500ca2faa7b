"""A small soft limit of descriptors, as a shell or systemd gives it, does not bound the connections."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import StartCluster
from tests.program_process import StartProgram
from tests.waiting import wait_until


def soft_limit(pid: int) -> int:
    """How many descriptors a process may open."""
    return psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_connections_up_to_the_hard_limit(start_cluster: StartCluster, options: tuple[str, ...]) -> None:
    """Started with 64 of 2,000: primary and worker have 2,000, and 300 connections to one worker are all answered."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", *options, prefix=("prlimit", "--nofile=64:2000")
    )
    assert cluster.process is not None
    (worker,) = cluster.workers()
    assert [soft_limit(pid) for pid in (cluster.process.pid, worker["pid"])] == [2000, 2000]
    clients = [socket.create_connection(("127.0.0.1", cluster.port), timeout=20) for _ in range(300)]
    try:
        wait_until(lambda: cluster.workers()[0]["connections"] == 300, "the worker has them all")
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [client.recv(12) for client in clients] == [b"HTTP/1.1 200"] * 300
    finally:
        for client in clients:
            client.close()


def test_a_hard_limit_stays(start_cluster: StartCluster) -> None:
    """What the operator allows at the most is not changed: 256 of 256."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", prefix=("prlimit", "--nofile=256:256")
    )
    assert cluster.process is not None
    assert soft_limit(cluster.process.pid) == 256
    assert cluster.get("/").status == 200


def test_a_program_raises_it_too(start_program: StartProgram, tmp_path: Path) -> None:
    """`from sharedcluster import cluster`: from the first fork on, primary and workers may open 2,000."""
    (tmp_path / "program.py").write_text(
        "import resource\nfrom sharedcluster import cluster\n"
        "if cluster.is_primary:\n    cluster.fork()\n"
        "print('worker' if cluster.is_worker else 'primary', resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "if cluster.is_worker:\n    cluster.worker.disconnect()\n"
    )
    program = start_program("--nofile=64:2000", sys.executable, "program.py", cwd=tmp_path, interpreter="prlimit")
    program.wait_for("primary 2000")
    program.wait_for("worker 2000")
