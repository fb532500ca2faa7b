"""A served process per set of settings, and a client that speaks raw bytes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PACKET = 50000
"""A packet must fit into one read of the server, or its rest is lost."""
ROOT = Path(__file__).parents[3]


class Served:
    """A running engine."""

    def __init__(self, **options: Any) -> None:
        extra = {
            key: options.pop(key) for key in ("certfile", "keyfile", "log_level", "send_buffer") if key in options
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.http.served", json.dumps({"settings": options, **extra})],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if options.get("access_log") else None,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        facts = json.loads(self.process.stdout.readline())
        self.port: int = facts["port"]
        self.packets: str = facts["packets"]
        self.pid: int = facts["pid"]

    def close(self) -> None:
        """End the process; it removes its folder."""
        self.process.communicate(timeout=10)

    def connect(self) -> socket.socket:
        """A TCP connection."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, *pieces: bytes, end: bool = False) -> bytes:
        """Send each piece as one packet, and return all that is answered until the server ends or falls silent.

        With `end` the client closes its sending side after the last piece.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(self.packets)
            try:
                for piece in pieces:
                    for start in range(0, len(piece), PACKET):
                        sock.send(piece[start : start + PACKET])
                if end:
                    sock.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before the last piece: what was answered can still be read
            return read_all(sock)

    def notes(self) -> dict[str, Any]:
        """What the application noted, and the counters."""
        answer: dict[str, Any] = json.loads(self.ask(get("/notes")).partition(b"\r\n\r\n")[2])
        return answer


def read_all(sock: socket.socket, silence: float = 5.0) -> bytes:
    """Everything until the end; a server that keeps the connection is told by `Connection: close` in the request."""
    answer = b""
    sock.settimeout(silence)
    while True:
        try:
            data = sock.recv(65536)
        except (ConnectionResetError, TimeoutError):
            return answer
        if not data:
            return answer
        answer += data


def get(path: str, *fields: str, close: bool = True) -> bytes:
    """A GET request."""
    lines = [f"GET {path} HTTP/1.1", "Host: test", *fields, *(["Connection: close"] if close else []), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def post(path: str, body: bytes, *fields: str) -> bytes:
    """A POST request with a Content-Length that is its last on this connection."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        f"Content-Length: {len(body)}",
        *fields,
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + body


def status_of(answer: bytes) -> int:
    """The status code of the first response, 0 if there is none."""
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """The engine with its default settings."""
    running = Served()
    yield running
    running.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start engines with settings of the test's own."""
    running: list[Served] = []

    def start(**options: Any) -> Served:
        running.append(Served(**options))
        return running[-1]

    yield start
    for one in running:
        one.close()


def elapsed(since: float) -> float:
    """Seconds since `since` (monotonic)."""
    return time.monotonic() - since
