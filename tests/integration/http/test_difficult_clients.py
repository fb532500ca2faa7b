"""Clients that leave, stall, or send what nobody expects at that moment: the engine neither leaks nor loses count."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.http.conftest import Served, get, post, read_all, status_of
from tests.integration.http.test_tls import certificate, shake_hands, trusting  # noqa: F401 - the first is a fixture
from tests.waiting import wait_until

Serve = Callable[..., Served]
FILE = b"0123456789" * 500000
HELLO = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED_HELLO = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


def reset(sock: socket.socket) -> None:
    """Close with a reset instead of an end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def narrow(served: Served) -> socket.socket:
    """A client whose small buffer soon makes the server wait for it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", served.port))
    return sock


@pytest.mark.parametrize("leaves", [reset, socket.socket.close])
def test_a_client_that_leaves_in_mid_response(serve: Serve, leaves: Callable[[socket.socket], None]) -> None:
    """Whatever is being sent and however the client goes: what it was sent is closed, and nothing is left."""
    served = serve()
    closed = []
    for path, name in (
        ("/huge?100", "huge"), ("/file", ""), ("/endless", "endless"), ("/events", "events"), ("/write", ""),
        ("/slow?0.2", ""), ("/late-events?0.2", "late events"),
    ):  # fmt: skip
        sock = narrow(served)
        sock.sendall(get(path, close=False))
        if "0.2" in path:
            wait_until(lambda: served.notes()["in_flight"] == 2, "the request in flight")
        else:
            assert sock.recv(1000)
        leaves(sock)
        wait_until(lambda: served.notes()["in_flight"] == 1, f"{path} ended")
        closed += [name] if name else []
        notes = served.notes()
        assert notes["closed"] == closed
        assert notes["connections"] == 1


def test_an_event_stream_whose_client_talks_and_leaves(serve: Serve) -> None:
    """Bytes behind the request of an event stream do not hide its client's end, and too many of them end it."""
    served = serve()
    for after, leaves in ((b"G", True), (b"G" * 100_000, False)):
        sock = served.connect()
        sock.sendall(get("/events", close=False))
        assert status_of(sock.recv(1000)) == 200
        sock.sendall(after)
        if leaves:
            wait_until(lambda: served.notes()["in_flight"] == 2, "the bytes read")
            sock.close()
        wait_until(lambda: served.notes()["in_flight"] == 1, "the stream ended")
        sock.close()
    assert served.notes()["closed"] == ["events", "events"]


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (b"", []),
        (b"\r\n", [400]),
        (b"GET / HT", [400]),
        (HELLO[:-1], [400]),
        (CHUNKED_HELLO[:-2], [400]),
        (HELLO.replace(b"th: 5", b"th: 70000"), [400]),
        (HELLO, [200]),
        (HELLO + b"GET / HT", [200, 400]),
        (HELLO * 2 + CHUNKED_HELLO, [200, 200, 200]),
        (get("/slow?0.1", close=False) + HELLO, [200, 200]),
        (get("/events", close=False), [200]),
        (b"nonsense\r\n\r\n", [400]),
        (b"POST /read?5 HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", [100, 400]),
    ],
)
def test_half_close_in_every_phase(served: Served, sent: bytes, answers: list[int]) -> None:
    """Who closes the sending side gets the answers to what was whole and 400 for what was not, then the end."""
    for pieces in ([sent], [sent[:-1], sent[-1:]]):
        with served.connect() as sock:
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(5)
            answer = b""
            while data := sock.recv(65536):
                answer += data
        assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == answers
    wait_until(lambda: served.notes()["connections"] == 1, "all gone")


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_client_that_sends_on_after_its_last_request(
    serve: Serve,
    certificate: tuple[Path, Path],  # noqa: F811 - the fixture
    tmp_path: Path,
    is_deaf: bool,
    encrypted: bool,
) -> None:
    """Closing with its bytes unread would be a reset, which can eat the answer: they are read and dropped instead."""
    files = {"certfile": str(certificate[0]), "keyfile": str(certificate[1])} if encrypted else {}
    served = serve(**files)
    with contextlib.ExitStack() as open_ones:
        sock = open_ones.enter_context(served.connect())
        if encrypted:
            sock = open_ones.enter_context(trusting(certificate).wrap_socket(sock, server_hostname="localhost"))
        mark = tmp_path / "mark"
        if is_deaf:  # and so not one turn of the loop shows it the bytes
            sock.sendall(get(f"/deaf?{mark}"))
            wait_until(mark.exists, "the last request in flight")
        else:
            sock.sendall(get("/slow?0.5"))
            wait_until(lambda: served.notes()["in_flight"] == 2, "the last request in flight")
        sock.sendall(get("/notes"))
        mark.unlink(missing_ok=True)
        answer = b""
        while data := sock.recv(1000):
            answer += data
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"ok" in answer
        assert served.notes()["connections"] == 2, "it was closed with unread bytes"
        sock.sendall(b"x" * 100_000)
    wait_until(lambda: served.notes()["connections"] == 1, "it ended")


def test_a_client_that_has_said_all_is_closed_at_once(served: Served) -> None:
    """Whoever announces its last request and keeps to it costs no lingering: when it reads the end it is forgotten."""
    for path in ("/plain", "/stream", "/slow?0.01", "/file?4999990", "/lazy", "/write", "/nothing", "/endless?2500"):
        with served.connect() as sock:
            sock.sendall(get(path))
            assert read_all(sock)
            assert served.notes()["connections"] == 1, path


@pytest.mark.parametrize("fields", [[], ["Connection: keep-alive"]])
def test_a_client_that_resets_before_its_answer(serve: Serve, fields: list[str]) -> None:
    """The answer is for nobody then, also if it were the last: that is no error of the application's."""
    served = serve(access_log="stderr", log_level="WARNING")
    sock = served.connect()
    sock.sendall(get("/slow?0.3", *fields, close=not fields))
    wait_until(lambda: served.notes()["in_flight"] == 2, "the request in flight")
    reset(sock)
    wait_until(lambda: served.notes()["connections"] == 1, "the reset seen")
    wait_until(lambda: served.notes()["in_flight"] == 1, "the request ended")
    _, errors = served.process.communicate(timeout=10)
    assert b"Traceback" not in errors


def test_a_last_answer_that_is_not_taken_at_once(serve: Serve) -> None:
    """Whatever part of the last answer the client has room for: it gets all of it, once, and then the end."""
    served = serve(send_buffer=4608)
    for size in (1, 5_000, 20_000, 65_000):
        with narrow(served) as sock:
            sock.sendall(post(f"/read?{size}", b"0123456789" * (size // 10) + b"x" * (size % 10)))
            if size == 65_000:
                wait_until(lambda: served.notes()["in_flight"] == 2, "the answer being sent")
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
            assert b"\r\nConnection: close\r\n" in head + b"\r\n"
            assert body == b"0123456789" * (size // 10) + b"x" * (size % 10)


def test_a_last_answer_behind_others_that_were_not_taken(served: Served) -> None:
    """The same where there may be room for none of it, because the client has not taken the answers before it."""
    for ahead in range(256, 300):  # how many fit is the kernel's affair; behind one of these counts the last does not
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(served.packets)
            sock.send(get("/plain", close=False) * ahead + get("/plain"))

            def is_stuck_or_over() -> bool:
                notes = served.notes()
                return bool(notes["in_flight"] == 2 or notes["connections"] == 1)

            wait_until(is_stuck_or_over, "all that can be sent is sent")
            answer = read_all(sock)
            assert answer.count(b"HTTP/1.1 200") == answer.count(b"\r\n\r\nok") == ahead + 1


def test_ten_thousand_tiny_chunks(served: Served) -> None:
    """One byte per chunk, read before the application runs or by it: every byte arrives, the next request is found."""
    for count in (10_000, 100_000):
        with served.connect() as sock:
            sock.sendall(b"POST /read?-1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            sock.sendall(b"1;a=b\r\nx\r\n" * 1000 + b"1\r\nx\r\n" * (count - 1000) + b"0\r\n\r\n" + get("/plain"))
            answer = read_all(sock)
        assert b"x" * count in re.sub(rb"\r\n[0-9a-f]+\r\n", b"", answer)
        assert answer.endswith(b"\r\n\r\nok")


def test_extensions_of_a_streamed_body_are_bounded(served: Served) -> None:
    """Extensions beyond 16 KiB in all are refused also where the application is reading already."""
    with served.connect() as sock:
        sock.sendall(b"POST /read?-1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(
            b"11000\r\n" + b"x" * 0x11000 + b"\r\n" + (b"1;a=" + b"b" * 200 + b"\r\nx\r\n") * 100 + b"0\r\n\r\n"
        )
        sock.sendall(get("/notes"))
        answer = read_all(sock)
    assert status_of(answer) == 400
    assert b"in_flight" not in answer


@pytest.mark.parametrize(
    ("fields", "status"),
    [("Content-Length: 101", 413), ("Content-Length: 5\r\nExpect: tea", 417), ("Content-Length: +5", 400)],
)
def test_a_refusal_does_not_ask_for_the_body(serve: Serve, fields: str, status: int) -> None:
    """Who waits for 100 Continue and is refused gets only the refusal; what it sends all the same is not served."""
    served = serve(limit_body=100)
    head = f"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n{fields}\r\n\r\n"
    answer = served.ask(head.encode(), get("/notes"))
    assert status_of(answer) == status
    assert answer.count(b"HTTP/1.1 ") == 1


def test_overload_does_not_ask_for_the_body(serve: Serve) -> None:
    """A client that waits for 100 Continue while all places are taken gets 503 at once."""
    served = serve(limit_concurrency=1)
    with served.connect() as busy, served.connect() as asking:
        busy.sendall(get("/slow?1"))
        wait_until(lambda: status_of(served.ask(get("/plain"))) == 503, "the place taken")
        asking.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        answer = read_all(asking)
        assert status_of(answer) == 503
        assert b"\r\nRetry-After: " in answer
        assert read_all(busy).endswith(b"ok")


def test_pipelined_bodies_under_a_drain(serve: Serve) -> None:
    """The request in flight is answered with `Connection: close`, and no body behind it is taken for a request."""
    served = serve(drain_linger=0.5)
    with served.connect() as sock:
        sock.sendall(get("/slow?0.5", close=False) + HELLO + CHUNKED_HELLO)
        wait_until(lambda: served.notes()["in_flight"] == 2, "the first in flight")
        served.ask(get("/control?drain"))
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.endswith(b"ok")


def test_pipelined_bodies_under_a_hand_over(serve: Serve) -> None:
    """Where idle connections move on, all that was pipelined is answered first, a half request included."""
    served = serve(drain_linger=0.5)
    with served.connect() as sock:
        sock.sendall(get("/slow?0.5", close=False) + HELLO + CHUNKED_HELLO + HELLO[:30])
        wait_until(lambda: served.notes()["in_flight"] == 2, "the first in flight")
        served.ask(get("/control?hand-over"))
        answer = b""
        while answer.count(b'"body": "hello"') < 2:
            answer += sock.recv(65536)
        sock.sendall(HELLO[30:] + get("/plain"))
        answer += read_all(sock)
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == [200] * 5
    assert answer.count(b"Connection: close") == 1
    assert answer.endswith(b"\r\n\r\nok")


def test_slow_reader_of_a_file_survives_a_drain(serve: Serve) -> None:
    """A drain in the middle of sendfile waits until a client that reads slowly has every byte."""
    served = serve(drain_linger=0.1)
    with narrow(served) as sock:
        sock.sendall(get("/file", close=False))
        beginning = sock.recv(1000)
        served.ask(get("/control?drain"))
        assert (beginning + b"".join(iter(lambda: sock.recv(4096), b""))).endswith(b"\r\n\r\n" + FILE)


def test_reader_of_a_file_that_takes_nothing_is_dropped(serve: Serve) -> None:
    """write_timeout holds for sendfile as for any other body."""
    served = serve(write_timeout=0.5)
    with narrow(served) as sock:
        sock.sendall(get("/file", close=False))
        wait_until(lambda: served.notes()["in_flight"] == 2, "the file being sent")
        wait_until(lambda: served.notes()["connections"] == 1, "the connection gone")


def test_a_body_without_end_has_an_end_for_its_readers(served: Served) -> None:
    """HEAD, and a Content-Length that is reached, end a generator that would go on for ever: it is closed."""
    before = served.notes()["closed"].count("endless")
    answer = served.ask(b"HEAD /endless HTTP/1.1\r\nHost: a\r\n\r\n" + get("/plain"))
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == [200, 200]
    assert served.ask(get("/endless?1500", close=False)).endswith(b"\r\n\r\n" + b"x" * 1500)
    assert served.notes()["closed"].count("endless") == before + 2


@pytest.mark.parametrize(
    ("path", "length"),
    [("/nothing", b""), ("/plain", b"2"), ("/stream", b"")],
)
def test_head_promises_no_length_it_does_not_know(served: Served, path: str, length: bytes) -> None:
    """An answer to HEAD without a body says nothing of the length GET would have (RFC 9110 8.6), least of all 0."""
    answer = served.ask(b"HEAD %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode() + get("/plain"))
    head = answer.partition(b"\r\n\r\n")[0]
    assert re.findall(rb"Content-Length: (\d+)", head) == ([length] if length else [])
    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("upgrade", ["raw", "websocket"])
@pytest.mark.parametrize(
    "body", ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
def test_upgrade_with_a_body_is_a_request_like_any_other(served: Served, upgrade: str, body: str) -> None:
    """A body would stand between the head and the new protocol, so no socket is promised; nothing is smuggled."""
    head = f"POST /ignore-upgrade HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    answer = served.ask((head + body).encode() + get("/plain"))
    first, second = answer.split(b"HTTP/1.1 200 OK")[1:]
    assert first.endswith(b"False")
    assert second.endswith(b"ok")


def test_tls_byte_by_byte(serve: Serve, certificate: tuple[Path, Path]) -> None:  # noqa: F811 - the fixture
    """One byte per record and one byte of a record per read: head, body and next request are found all the same."""
    served = serve(certfile=str(certificate[0]), keyfile=str(certificate[1]))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting(certificate).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with served.connect() as sock:
        shake_hands(tls, incoming, outgoing, sock)
        request = HELLO + CHUNKED_HELLO + get("/plain")
        for byte in request[:30]:
            tls.write(bytes([byte]))
        for byte in outgoing.read():
            sock.send(bytes([byte]))
        for byte in request[30:]:
            tls.write(bytes([byte]))
            sock.sendall(outgoing.read())
        incoming.write(read_all(sock))
        answer = b""
        while data := tls.read(65536):
            answer += data
    assert answer.count(b'"body": "hello"') == 2
    assert answer.endswith(b"\r\n\r\nok")


def test_tls_end_is_only_the_end_of_sending(serve: Serve, certificate: tuple[Path, Path]) -> None:  # noqa: F811
    """A client that says close_notify and waits still gets its answer; one that resets leaves nothing behind."""
    served = serve(certfile=str(certificate[0]), keyfile=str(certificate[1]))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting(certificate).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with served.connect() as sock, served.connect() as rude:
        rude.sendall(b"\x16\x03\x01")
        reset(rude)
        shake_hands(tls, incoming, outgoing, sock)
        tls.write(get("/slow?0.2"))
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        sock.sendall(outgoing.read())
        sock.shutdown(socket.SHUT_WR)
        assert len(read_all(sock)) > 100
    wait_until(lambda: served.notes()["connections"] == 1, "both gone")


def test_keep_alive_zero_is_no_limit(serve: Serve) -> None:
    """As with the other times, 0 switches the limit off: an idle connection stays."""
    served = serve(keep_alive=0)
    with served.connect() as sock:
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.sendall(get("/plain"))
        assert read_all(sock).endswith(b"ok")


def test_closing_everything_blames_nobody(serve: Serve) -> None:
    """A cut that wakes a sender and ends its request does both once: nothing is thrown into a greenlet at rest."""
    served = serve(access_log="stderr", log_level="WARNING")
    with narrow(served) as sock:
        sock.sendall(get("/huge?100"))
        wait_until(lambda: served.notes()["in_flight"] == 2, "the answer being sent")
        served.ask(get("/control?close"))
        wait_until(lambda: served.notes()["in_flight"] == 1, "the request ended")
    assert served.notes()["closed"] == ["huge"]
    _, errors = served.process.communicate(timeout=10)
    assert b"cut after" in errors
    assert b"thrown into" not in errors
