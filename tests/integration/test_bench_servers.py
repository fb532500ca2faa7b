"""The benchmarks' servers and clients as processes: whatever they do, nothing waits for ever and nothing is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.load import own
from benchmarks.peers import Peer, Place
from benchmarks.servers import CannotServeError, Server, free_port, terminate_all
from tests.waiting import wait_until

STUBBORN = """
import http.server, os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


SILENT = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(60)
"""


def _server(program: str) -> Server:
    def command(place: Place) -> list[str]:
        return [sys.executable, "-c", program, str(place.port)]

    return Server(Peer("a peer", command), Place("plain", free_port(), 1, ""))


def test_nothing_is_left_of_a_server() -> None:
    """Not a child that left for a session of its own and does not hear TERM; nor the folder."""
    server = _server(STUBBORN)
    try:
        server.start()
        members = processes.cpu_by_process(server.pid)
        assert len(members) == 2
    finally:
        terminate_all([server])
        server.stop()
    wait_until(lambda: not any(Path("/proc", str(pid), "exe").exists() for pid in members), "all of it gone")
    assert not server.folder.exists()


def test_a_server_that_ends_is_named_with_what_it_said() -> None:
    """It is not waited for."""
    server = _server("raise SystemExit('no such option')")
    try:
        with pytest.raises(CannotServeError, match=r"a peer ended with 1:\s+no such option"):
            server.start()
    finally:
        server.stop()


def test_a_client_that_cannot_connect_says_why() -> None:
    """The last line of what it wrote is the reason, not the first of a traceback."""
    with pytest.raises(RuntimeError, match="ConnectionRefusedError"):
        own.Started("holder", str(free_port()), "1", "/")


def test_a_client_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and does not answer cannot hold up the run."""
    monkeypatch.setattr(own, "READY_DEADLINE", 0.5)
    server = _server(SILENT)
    try:
        server.launch()
        wait_until(lambda: _listens(server.port), "listening")
        with pytest.raises(RuntimeError, match="not connected within"):
            own.Started("holder", str(server.port), "1", "/")
    finally:
        server.stop()


def _listens(port: int) -> bool:
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)
