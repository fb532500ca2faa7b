"""What clients of every kind see of a reload: streams, uploads, slow readers, TLS, unix sockets, many idle ones."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.strict_clients import Client, Crowd
from tests.waiting import wait_until

APP = "tests.apps.faults:app"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def reload_and_wait(cluster: Cluster, workers: int = 2) -> None:
    """Reload, and wait until the old generation is gone."""
    result = cluster.cli("reload")
    assert result.returncode == 0, result.stderr
    wait_until(lambda: len(cluster.workers()) == workers, "the old generation is gone", deadline=20)


class Follower(threading.Thread):
    """Reads an event stream of the demo and comes back with Last-Event-ID whenever it ends, as a browser does."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.texts: list[str] = []
        self.connected = 0
        self.cut_inside_an_event = 0
        self.over = threading.Event()
        self._port = port
        self._last = ""

    def run(self) -> None:
        """Follow until it is over."""
        while not self.over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1)
            try:
                connection.request("GET", "/events", headers={"Last-Event-ID": self._last} if self._last else {})
                self._follow(connection.getresponse())
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()

    def _follow(self, answer: http.client.HTTPResponse) -> None:
        self.connected += 1
        fields: dict[str, str] = {}
        while not self.over.is_set():
            try:
                line = answer.readline().decode()
            except TimeoutError:
                return
            if not line:
                self.cut_inside_an_event += bool(fields)
                return
            if line == "\n":
                self._take(fields)
                fields = {}
            elif not line.startswith(":"):
                name, _, value = line.rstrip("\n").partition(":")
                fields[name] = value.strip()

    def _take(self, fields: dict[str, str]) -> None:
        self._last = fields.get("id", self._last)
        if "text" in fields.get("data", ""):
            self.texts.append(json.loads(fields["data"])["text"])


@pytest.mark.parametrize("options", [(), ("--preload",)])
def test_event_streams_resume_elsewhere(start_cluster: StartCluster, redis_url: str, options: tuple[str, ...]) -> None:
    """Four followers through two reloads, a message every 20 ms: each gets every message once, in order."""
    cluster = start_cluster("demo_app", "-w", "2", "--redis", redis_url, *options)
    prefix = f"{time.monotonic_ns()}-"
    followers = [Follower(cluster.port) for _ in range(4)]
    for each in followers:
        each.start()
    wait_until(lambda: all(f.connected for f in followers), "all follow")
    sent: list[str] = []
    over = threading.Event()

    def publish() -> None:
        while not over.wait(0.02):
            text = f"{prefix}{len(sent)}"
            body = f"text={text}".encode()
            answer = cluster.post(
                "/broadcast", body=body, headers={"Content-Type": "application/x-www-form-urlencoded"}
            )
            assert answer.status == 200
            sent.append(text)

    publisher = threading.Thread(target=publish, daemon=True)
    publisher.start()
    for _ in range(2):
        reload_and_wait(cluster)
    count = len(sent)
    wait_until(lambda: len(sent) > count + 10, "ten more are sent")
    over.set()
    publisher.join(10)
    wait_until(lambda: all(f.texts and f.texts[-1] == sent[-1] for f in followers), "all have the last one")
    for each in followers:
        each.over.set()
    for each in followers:
        ours = [text for text in each.texts if text.startswith(prefix)]
        assert ours == [text for text in sent if text in set(ours)]  # once, in order
        assert ours == sent[len(sent) - len(ours) :]  # without a gap
        assert each.connected >= 3
        assert each.cut_inside_an_event == 0


def test_uploads_and_slow_readers(start_cluster: StartCluster) -> None:
    """Uploads of 1 MB and readers that take a second for 2 MB, through three reloads: whole, and on the same
    connection afterwards.
    """
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    address = ("127.0.0.1", cluster.port)
    uploads = [Client(address, target="/upload?n={n}", body=bytes(range(256)) * 4096) for _ in range(3)]
    readers = [Client(address, target="/big/2048?n={n}", bite=65536, chew=0.03) for _ in range(3)]
    with Crowd(*uploads, *readers) as crowd:
        wait_until(crowd.all_got(1), "all are at work")
        for _ in range(3):
            reload_and_wait(cluster)
            wait_until(crowd.all_got(1), "all are served by the new generation")
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)


def test_what_is_in_flight_keeps_its_connection(start_cluster: StartCluster) -> None:
    """Slow requests and streams that a reload meets: answered by the old worker, and their connections live on."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    address = ("127.0.0.1", cluster.port)
    slow = [Client(address, target="/slow/1.0") for _ in range(4)]
    with Crowd(*slow) as crowd:
        wait_until(lambda: sum(w["in_flight"] for w in cluster.workers()) == 4, "all are in flight")
        reload_and_wait(cluster)
        wait_until(crowd.all_got(2), "all are served by the new generation")
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)


def test_an_upload_in_pieces_is_not_cut(start_cluster: StartCluster) -> None:
    """Half a head, or half a body, is with the old worker when the reload comes: the rest is still answered by it."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    address = ("127.0.0.1", cluster.port)
    head = b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
    halves = [(GET[:10], GET[10:]), (head + b"x" * 1000, b"x" * 299_000), (head, b"x" * 300_000)]
    clients = [socket.create_connection(address, timeout=20) for _ in halves]
    for client, (first, _) in zip(clients, halves, strict=True):
        client.sendall(first)
    wait_until(lambda: sum(w["connections"] for w in cluster.workers()) == 3, "the workers have them")
    cluster.signal(signal.SIGHUP)
    wait_until(lambda: any(w["state"] == "draining" for w in cluster.workers()), "the old ones drain")
    for client, (_, rest) in zip(clients, halves, strict=True):
        client.sendall(rest)
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b'"generation":1' in answer.replace(b" ", b"")
        client.close()


def test_thousands_of_idle_connections_move(start_cluster: StartCluster) -> None:
    """1,500 idle keep-alive connections through a reload, with a primary that is paused in the middle of it: every
    one of them is answered afterwards.
    """
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    address = ("127.0.0.1", cluster.port)
    clients = [socket.create_connection(address, timeout=20) for _ in range(1500)]
    try:
        for client in clients:
            client.sendall(GET)
        assert all(client.recv(4096).startswith(b"HTTP/1.1 200") for client in clients)
        cluster.signal(signal.SIGHUP)
        wait_until(lambda: any(w["state"] == "draining" for w in cluster.workers()), "it drains", interval=0.001)
        cluster.signal(signal.SIGSTOP)
        time.sleep(1)  # longer than a worker that does not wait for it takes to leave
        cluster.signal(signal.SIGCONT)
        wait_until(lambda: len(cluster.workers()) == 2 and cluster.is_ready(), "the old generation is gone")
        for client in clients:
            client.sendall(GET)
        answers = [client.recv(4096) for client in clients]
    finally:
        for client in clients:
            client.close()
    assert sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == 1500
    assert cluster.status()["counters"]["migrated"] >= 1500


def test_few_descriptors_and_many_idle_connections(start_cluster: StartCluster) -> None:
    """A primary that may open 256 descriptors moves 400 idle connections: none is lost on the way."""
    cluster = start_cluster(APP, "-w", "2", "--redis", "none")
    import resource

    assert cluster.process is not None
    address = ("127.0.0.1", cluster.port)
    clients = [socket.create_connection(address, timeout=20) for _ in range(400)]
    try:
        for client in clients:
            client.sendall(GET)
        assert all(client.recv(4096).startswith(b"HTTP/1.1 200") for client in clients)
        limits = resource.prlimit(cluster.process.pid, resource.RLIMIT_NOFILE)
        workers = {w["pid"] for w in cluster.workers()}
        resource.prlimit(cluster.process.pid, resource.RLIMIT_NOFILE, (256, limits[1]))
        reload_and_wait(cluster)
        assert workers.isdisjoint(w["pid"] for w in cluster.workers())
        for client in clients:
            client.sendall(GET)
        answers = [client.recv(4096) for client in clients]
    finally:
        for client in clients:
            client.close()
    assert sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == 400


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A certificate for localhost and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)


def test_tls_connections_close_late_and_politely(start_cluster: StartCluster, certificate: tuple[str, str]) -> None:
    """Two reloads under TLS keep-alive clients: no request is lost; a connection ends with an answer that says so,
    or idle, after the linger, with TLS's own farewell.
    """
    cert, key = certificate
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", "--certfile", cert, "--keyfile", key)
    context = ssl.create_default_context(cafile=cert)

    def wrap(connection: socket.socket) -> socket.socket:
        return context.wrap_socket(connection, server_hostname="localhost")

    address = ("127.0.0.1", cluster.port)
    idle = wrap(socket.create_connection(address, timeout=20))
    idle.sendall(GET)
    assert idle.recv(4096).startswith(b"HTTP/1.1 200")
    late = wrap(socket.create_connection(address, timeout=20))
    late.sendall(GET)
    assert late.recv(4096).startswith(b"HTTP/1.1 200")
    with idle, late, Crowd(*[Client(address, wrap=wrap, pause=0.005) for _ in range(4)]) as crowd:
        wait_until(crowd.all_got(5), "all are served")
        cluster.signal(signal.SIGHUP)
        wait_until(lambda: any(w["state"] == "draining" for w in cluster.workers()), "the old ones drain")
        answer = b""
        while b"connection: close" not in answer.lower():  # said as soon as the worker knows
            late.sendall(GET)
            answer = late.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
        wait_until(lambda: len(cluster.workers()) == 2, "the old generation is gone")
        wait_until(crowd.all_got(5), "all are served by the new one")
        reload_and_wait(cluster)
        wait_until(crowd.all_got(5), "all are served by the newest")
        assert idle.recv(4096) == b""  # close_notify; without one this raises SSLEOFError
    assert (crowd.lost, crowd.refused) == ([], 0)
    assert crowd.closed == 8  # told by `Connection: close`, once a reload


def test_unix_sockets(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Keep-alive clients of a unix socket: a reload closes none; a stop answers or refuses everybody who connects."""
    path = str(tmp_path / "socket")
    cluster = start_cluster(APP, "-w", "2", "--redis", "none", bind=("--bind", f"unix:{path}"))
    with Crowd(*[Client(path) for _ in range(4)]) as crowd:
        wait_until(crowd.all_got(5), "all are served")
        reload_and_wait(cluster)
        wait_until(crowd.all_got(5), "all are served by the new generation")
    assert (crowd.lost, crowd.refused, crowd.closed) == ([], 0, 0)
    assert cluster.status()["counters"]["migrated"] >= 4
    hammers = [Client(path, keep_alive=False, pause=0) for _ in range(8)]
    with Crowd(*hammers) as crowd:
        wait_until(crowd.all_got(20), "the clients are at work")
        assert cluster.stop() == 0
    gone = [what for what in crowd.lost if "FileNotFoundError" not in what]  # no file is a refusal
    assert gone == []
    assert "0 connections cut" in cluster.output()
