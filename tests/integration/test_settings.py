"""Settings reach the engine: what the command line says is what clients meet."""

from __future__ import annotations

import socket

from tests.conftest import StartCluster


def ask(port: int, data: bytes) -> bytes:
    """Send bytes, read to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as end:
        end.sendall(data)
        answer = b""
        while piece := end.recv(65536):
            answer += piece
    return answer


def test_limits_trust_and_the_workers_name(start_cluster: StartCluster) -> None:
    """Head and body limits, X-Worker, PROXY protocol with its client in the environ, the access log."""
    cluster = start_cluster(
        "tests.apps.plain:app", "-w", "1", "--redis", "none", "--limit-head", "2K", "--limit-body", "10",
        "--expose-worker", "--proxy-protocol", "--access-log", "--limit-fields", "5",
    )  # fmt: skip
    port = cluster.port
    proxy = b"PROXY TCP4 192.0.2.9 192.0.2.1 1234 80\r\n"
    head = b"Host: x\r\nConnection: close\r\n"
    assert ask(port, proxy + b"GET / HTTP/1.1\r\n" + head + b"\r\n").startswith(b"HTTP/1.1 200")
    assert b"X-Worker: 0" in ask(port, proxy + b"GET / HTTP/1.1\r\n" + head + b"\r\n")
    assert b" 431 " in ask(port, proxy + b"GET / HTTP/1.1\r\n" + head + b"A: " + b"x" * 3000 + b"\r\n\r\n")
    assert b" 431 " in ask(port, proxy + b"GET / HTTP/1.1\r\n" + head + b"A: 1\r\n" * 9 + b"\r\n")
    post = b"POST /echo HTTP/1.1\r\n" + head + b"Content-Length: 11\r\n\r\n12345678901"
    assert b" 413 " in ask(port, proxy + post)
    assert not ask(port, b"GET / HTTP/1.1\r\n" + head + b"\r\n").startswith(b"HTTP/1.1 200")
    assert "192.0.2.9" in cluster.output()
