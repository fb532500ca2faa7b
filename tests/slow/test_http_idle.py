"""Ten thousand idle connections: what each costs, and what they cost the one that is active."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable

import psutil
import pytest

from tests.integration.http.conftest import Served, get
from tests.integration.http.conftest import serve as serve
from tests.waiting import wait_until

CONNECTIONS = 10_000
FIELDS = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120 Safari/537.36",
    "Accept: */*",
    "Cookie: session=eyJfcGVybWFuZW50Ijp0cnVlLCJpZCI6MTJ9.ZXhhbXBsZQ.abcdefghijklmnop",
)


@pytest.mark.parametrize("has_asked", [False, True], ids=["silent", "after a request"])
def test_ten_thousand_idle_connections(serve: Callable[..., Served], has_asked: bool) -> None:
    """Each costs less than 8 KiB and no CPU; a request on another one is answered as if they were not there."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < CONNECTIONS + 200:
        pytest.skip("too few file descriptors allowed: ulimit -n")
    served = serve()
    process = psutil.Process(served.pid)
    for _ in range(100):
        served.ask(get("/plain"))
    before = process.memory_full_info().uss
    socks: list[socket.socket] = []
    try:
        for number in range(CONNECTIONS):
            sock = socket.socket()
            sock.bind((f"127.0.0.{2 + number // 5000}", 0))
            sock.connect(("127.0.0.1", served.port))
            socks.append(sock)
            if has_asked:
                sock.sendall(get("/plain", *FIELDS, close=False))
        for sock in socks if has_asked else ():
            assert sock.recv(1000).endswith(b"ok")
        wait_until(lambda: served.notes()["connections"] == CONNECTIONS + 1, "all connected")
        each = (process.memory_full_info().uss - before) / CONNECTIONS
        latencies = []
        with served.connect() as active:
            for _ in range(2000):
                started = time.perf_counter()
                active.sendall(get("/plain", close=False))
                active.recv(1000)
                latencies.append(time.perf_counter() - started)
        cpu = sum(process.cpu_times()[:2])
        time.sleep(2)
        cpu = (sum(process.cpu_times()[:2]) - cpu) / 2
        latencies.sort()
        p50, p99 = latencies[len(latencies) // 2] * 1e6, latencies[len(latencies) * 99 // 100] * 1e6
        print(f"\n{each:.0f} bytes each, {cpu:.2%} CPU at rest, active one: p50 {p50:.0f} us, p99 {p99:.0f} us")
        assert each < 8192
        assert cpu < 0.05
    finally:
        for sock in socks:
            sock.close()
    wait_until(lambda: served.notes()["connections"] == 1, "all gone")
