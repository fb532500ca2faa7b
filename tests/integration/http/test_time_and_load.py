"""Timeouts, limits on concurrency and time, and drain."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

import psutil
import pytest

from tests.integration.http.conftest import Served, get, post, read_all, status_of
from tests.waiting import wait_until

Serve = Callable[..., Served]


@pytest.mark.parametrize(
    "beginning",
    [b"G", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n"],
)
def test_slow_head_is_answered_408(serve: Serve, beginning: bytes) -> None:
    """A head that is not there head_timeout after its first byte gets 408, however steadily it drips."""
    served = serve(head_timeout=0.5)
    with served.connect() as sock:
        started = time.monotonic()
        sock.sendall(beginning)
        sock.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - started < 5:
            try:
                answer = sock.recv(1000)
            except TimeoutError:
                sock.sendall(b"x")
        assert status_of(answer) == 408
        assert 0.4 < time.monotonic() - started < 2.5


@pytest.mark.parametrize("coding", ["Content-Length: 10", "Transfer-Encoding: chunked", "Content-Length: 100000"])
def test_body_without_progress_is_answered_408(serve: Serve, coding: str) -> None:
    """A small body, a chunked one and one the application reads itself: no progress for body_timeout is 408."""
    served = serve(body_timeout=0.5)
    with served.connect() as sock:
        sock.sendall(f"POST /read?-1 HTTP/1.1\r\nHost: a\r\n{coding}\r\n\r\n5\r\nhel".encode())
        assert status_of(read_all(sock)) == 408
    assert served.notes()["in_flight"] == 1


def test_body_with_progress_may_take_longer(serve: Serve) -> None:
    """body_timeout is between two pieces, not for the whole body."""
    served = serve(body_timeout=1.0)
    with served.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 10\r\n\r\n")
        for _ in range(10):
            time.sleep(0.15)
            sock.sendall(b"x")
        assert b'"xxxxxxxxxx"' in read_all(sock)


def test_reader_that_takes_nothing_is_dropped(serve: Serve) -> None:
    """A client that takes nothing for write_timeout is cut off, and what it was sent is closed."""
    served = serve(write_timeout=0.5)
    with served.connect() as sock:
        sock.sendall(get("/huge?100"))
        wait_until(lambda: served.notes()["closed"] == ["huge"], "the generator closed")


def test_idle_connection_is_closed_silently(serve: Serve) -> None:
    """After keep_alive the connection ends without a byte; before, it serves."""
    served = serve(keep_alive=0.5)
    with served.connect() as used, served.connect() as fresh:
        used.sendall(get("/plain", close=False))
        assert used.recv(1000).endswith(b"ok")
        assert used.recv(1000) == b""
        assert fresh.recv(1000) == b""


def test_concurrency_is_limited(serve: Serve) -> None:
    """One request more than limit_concurrency gets 503 with Retry-After; idle and slow connections take no place."""
    served = serve(limit_concurrency=2)
    with served.connect() as one, served.connect() as two, served.connect() as idle, served.connect() as slow_head:
        idle.sendall(get("/plain", close=False))
        assert idle.recv(1000).endswith(b"ok")
        slow_head.sendall(b"GET / HTTP/1.1\r\nHo")
        one.sendall(get("/slow?1"))
        two.sendall(get("/slow?1"))
        wait_until(lambda: status_of(served.ask(get("/plain"))) == 503, "the limit reached")
        answer = served.ask(get("/plain"))
        assert re.search(rb"\r\nRetry-After: \d+\r\n", answer)
        assert read_all(one).endswith(b"ok")
        assert read_all(two).endswith(b"ok")
        assert status_of(served.ask(get("/plain"))) == 200


def test_request_timeout_answers_503_and_ends_the_application(serve: Serve) -> None:
    """A request older than request_timeout is answered for, and its greenlet ended; others are not touched."""
    served = serve(request_timeout=0.5)
    started = time.monotonic()
    assert status_of(served.ask(get("/slow?30"))) == 503
    assert 0.4 < time.monotonic() - started < 2.5
    assert status_of(served.ask(get("/slow?0.1"))) == 200
    assert served.notes()["in_flight"] == 1


def test_request_timeout_cuts_a_response_that_has_begun(serve: Serve) -> None:
    """No second head is sent into a body: the connection is cut, and the body has no end."""
    served = serve(request_timeout=0.5)
    with served.connect() as sock:
        sock.sendall(get("/huge?100"))
        wait_until(lambda: served.notes()["closed"] == ["huge"], "the generator closed")
        assert not read_all(sock).endswith(b"0\r\n\r\n")


def test_event_stream_may_be_older_than_request_timeout(serve: Serve) -> None:
    """An event stream ends with its client or with a drain, not by the clock."""
    served = serve(request_timeout=0.3)
    with served.connect() as sock:
        sock.sendall(get("/events", close=False))
        wait_until(lambda: b"data: 1" in sock.recv(1000), "the first event")
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(1000)


def test_body_limit(serve: Serve) -> None:
    """limit_body refuses by Content-Length before a byte is read, and counts chunks as they come."""
    served = serve(limit_body=100)
    assert status_of(served.ask(post("/echo", b"x" * 100))) == 200
    assert status_of(served.ask(post("/echo", b"x" * 101))) == 413
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert status_of(served.ask(head + b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n")) == 200
    assert status_of(served.ask(head + b"64\r\n" + b"x" * 100 + b"\r\n1\r\nx\r\n0\r\n\r\n")) == 413


def test_large_body_limit_while_the_application_reads(serve: Serve) -> None:
    """A chunked body that outgrows limit_body while it is streamed is 413 too."""
    served = serve(limit_body=1 << 20)
    with served.connect() as sock:
        sock.sendall(b"POST /read?-1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(40):
                sock.sendall(b"8000\r\n" + b"x" * 32768 + b"\r\n")
        except OSError:
            pass
        assert status_of(read_all(sock)) == 413


def test_answer_survives_an_upload_that_goes_on(serve: Serve) -> None:
    """A refused client that is still sending can read the answer: no reset takes it away."""
    served = serve(limit_body=100)
    with served.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        time.sleep(0.1)
        sock.sendall(b"x" * 1000000)
        assert status_of(read_all(sock)) == 413


def test_drain_answers_what_is_in_flight_and_what_is_late(serve: Serve) -> None:
    """In-flight requests and late ones get their answer with `Connection: close`; then nothing is left."""
    served = serve(drain_linger=1.0)
    with served.connect() as busy, served.connect() as late, served.connect() as silent:
        for sock in (late, silent):
            sock.sendall(get("/plain", close=False))
            assert sock.recv(1000).endswith(b"ok")
        busy.sendall(get("/slow?0.5", close=False))
        wait_until(lambda: served.notes()["in_flight"] == 2, "the slow request in flight")
        served.ask(get("/control?drain"))
        late.sendall(get("/plain", close=False))
        for sock in (late, busy):
            answer = read_all(sock)
            assert b"\r\nConnection: close\r\n" in answer
            assert answer.endswith(b"ok")
        assert silent.recv(1000) == b""


def test_drain_that_hands_over_closes_nothing(serve: Serve) -> None:
    """While somebody takes idle connections, a drain ends none: the busy one moves once it has its answer."""
    served = serve(drain_linger=0.5)
    with served.connect() as busy, served.connect() as closing:
        busy.sendall(get("/slow?0.5", close=False))
        closing.sendall(get("/slow?0.5"))
        wait_until(lambda: served.notes()["in_flight"] == 3, "both in flight")
        served.ask(get("/control?hand-over"))
        answer = busy.recv(1000)
        assert answer.endswith(b"ok")
        assert b"Connection: close" not in answer
        busy.sendall(get("/plain"))
        assert read_all(busy).endswith(b"ok")
        assert read_all(closing).endswith(b"ok")


def test_drain_ends_event_streams_politely(serve: Serve) -> None:
    """An event stream gets its last chunk, and its generator is closed."""
    served = serve(drain_linger=0.5)
    with served.connect() as sock:
        sock.sendall(get("/events", close=False))
        wait_until(lambda: b"data: 1" in sock.recv(1000), "the first event")
        served.ask(get("/control?drain"))
        assert read_all(sock) == b"0\r\n\r\n"
        assert served.notes()["closed"] == ["events"]


def test_close_cuts_everything(serve: Serve) -> None:
    """`close` ends connections and applications alike, and the engine serves on."""
    served = serve()
    with served.connect() as busy, served.connect() as stream:
        busy.sendall(get("/slow?30"))
        stream.sendall(get("/events", close=False))
        wait_until(lambda: served.notes()["in_flight"] == 3, "both in flight")
        served.ask(get("/control?close"))
        assert read_all(busy) == b""
    wait_until(lambda: served.notes()["in_flight"] == 1, "both ended")
    assert served.notes()["closed"] == ["events"]


def test_requests_leave_no_cycles(serve: Serve) -> None:
    """No kind of request leaves objects behind that only the cyclic collector could free: it need not run for us."""
    served = serve()
    kinds = [
        get("/plain"), get("/stream"), get("/echo", "Connection: Upgrade", "Upgrade: x"), post("/echo", b"x" * 100),
        post("/read?-1", b"x" * 100_000), b"nonsense\n", get("/fields"), get("/file?4999990"), get("/slow?0.001"),
        b"POST /read?9 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    ]  # fmt: skip
    for kind in kinds:
        served.ask(kind)
    served.ask(get("/garbage"))
    for kind in kinds:
        for _ in range(20):
            served.ask(kind)
        assert int(served.ask(get("/garbage")).rpartition(b"\n")[2]) < 20, kind


def test_slowloris_and_idle_hold_no_greenlet_and_no_cpu(serve: Serve) -> None:
    """500 half heads and 500 idle connections: others are served at once, and the process is quiet."""
    served = serve()
    process = psutil.Process(served.pid)
    socks: list[socket.socket] = []
    try:
        for number in range(1000):
            sock = served.connect()
            sock.sendall(b"GET / HTTP/1.1\r\nHos" if number % 2 else get("/plain", close=False))
            socks.append(sock)
        wait_until(lambda: served.notes()["connections"] == 1001, "all connected")
        before = sum(process.cpu_times()[:2])
        assert status_of(served.ask(get("/plain"))) == 200
        time.sleep(1)
        assert sum(process.cpu_times()[:2]) - before < 0.2
    finally:
        for sock in socks:
            sock.close()
    wait_until(lambda: served.notes()["connections"] == 1, "all gone")
