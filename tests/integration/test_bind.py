"""Where a cluster can listen."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from tests.cluster_process import request
from tests.conftest import StartCluster
from tests.redis_process import free_port
from tests.waiting import wait_until

ASK = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def ask(end: socket.socket) -> bytes:
    """One request over a connected socket."""
    end.sendall(ASK)
    answer = b""
    while data := end.recv(65536):
        answer += data
    return answer


def test_a_unix_socket(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Served, and the file is removed at the end; a stale file of a dead server is replaced."""
    path = tmp_path / "app.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", bind=("--bind", f"unix:{path}"))
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(path))
        assert ask(end).startswith(b"HTTP/1.1 200")
    assert cluster.stop() == 0
    assert not path.exists()


def test_a_unix_socket_with_a_long_path(start_cluster: StartCluster, tmp_path: Path) -> None:
    """A path longer than the 107 bytes of sun_path works."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", bind=("--bind", f"unix:{folder}/app.sock")
    )
    fd = os.open(folder, os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(f"/proc/self/fd/{fd}/app.sock")
        assert ask(end).startswith(b"HTTP/1.1 200")
    os.close(fd)
    assert cluster.stop() == 0
    assert not (folder / "app.sock").exists()


def test_several_addresses_and_ipv6(start_cluster: StartCluster) -> None:
    """IPv4 and IPv6 side by side; port 0 is shown as the port it became."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", bind=("-b", "127.0.0.1:0", "-b", "[::1]:0")
    )
    addresses = [each["address"] for each in cluster.status()["listeners"]]
    assert addresses[1].startswith("[::1]:")
    assert not addresses[0].endswith(":0")
    with socket.create_connection(("::1", int(addresses[1].rpartition(":")[2]))) as end:
        assert ask(end).startswith(b"HTTP/1.1 200")
    assert cluster.get("/").status == 200


def test_dual_stack(start_cluster: StartCluster) -> None:
    """[::] answers on IPv6 and on IPv4."""
    cluster = start_cluster("tests.apps.plain:app", "-w", "1", "--redis", "none", bind=("-b", "[::]:0"))
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, cluster.port)) as end:
            assert ask(end).startswith(b"HTTP/1.1 200")


ACTIVATE = """
import os, socket, sys
bound = socket.socket(); bound.bind(("127.0.0.1", 0)); bound.listen()
print(bound.getsockname()[1], flush=True)
if bound.fileno() != 3: os.dup2(bound.fileno(), 3)
os.set_inheritable(3, True)
if sys.argv[1] == "systemd":
    os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def test_a_descriptor_is_inherited(start_cluster: StartCluster) -> None:
    """`--bind fd://3` serves a socket that somebody else bound."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none",
        bind=("--bind", "fd://3"), prefix=(sys.executable, "-c", ACTIVATE, "fd"), ready=False, python=False,
    )  # fmt: skip
    wait_until(cluster.is_ready, "it listens")
    assert request(int(cluster.output().split()[0]), "GET", "/").status == 200


def test_systemds_sockets_are_used(start_cluster: StartCluster) -> None:
    """LISTEN_FDS for our pid wins over the default address."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none",
        bind=(), prefix=(sys.executable, "-c", ACTIVATE, "systemd"), ready=False, python=False,
    )  # fmt: skip
    wait_until(cluster.is_ready, "it listens")
    port = int(cluster.output().split()[0])
    assert request(port, "GET", "/").status == 200


def test_a_descriptor_that_is_no_socket(start_cluster: StartCluster) -> None:
    """fd://N of something else is an error that says so; exit code 4."""
    cluster = start_cluster("tests.apps.plain:app", ready=False, bind=("--bind", "fd://0"))
    assert cluster.wait() == 4
    assert "Cannot listen on fd://0" in cluster.output()


def test_connections_before_the_app_is_loaded_wait(start_cluster: StartCluster, tmp_path: Path) -> None:
    """The port is bound before anything is loaded: a client that comes early is answered, not refused."""
    (tmp_path / "late.py").write_text(
        "import time\nfrom flask import Flask\napp = Flask(__name__)\ntime.sleep(1)\napp.get('/')(lambda: 'late')\n"
    )
    port = str(free_port())
    cluster = start_cluster("late", "-w", "1", "--redis", "none", cwd=tmp_path, bind=("--port", port), ready=False)
    end = wait_until(lambda: socket.create_connection(("127.0.0.1", int(port)), timeout=20), "it is bound", deadline=5)
    with end:
        assert b"late" in ask(end)
    assert cluster.is_ready()
