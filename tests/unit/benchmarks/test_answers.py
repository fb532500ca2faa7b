"""What our load client understands of an answer."""

from __future__ import annotations

import pytest

from benchmarks.load.answers import MORE, UNTIL_CLOSE, is_whole, parse_head
from benchmarks.load.plan import Plan
from benchmarks.load.wrk import parse

OK = b"HTTP/1.1 200 OK\r\n"


def test_head_that_is_not_whole_yet() -> None:
    """Half a head is no head."""
    assert parse_head(OK + b"Content-Length: 5\r\n") is None


@pytest.mark.parametrize(
    ("fields", "body", "length", "whole"),
    [
        (b"Content-Length: 5\r\n", b"hello", 5, True),
        (b"content-length:5\r\n", b"hell", 5, False),
        (b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n", MORE, True),
        (b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n", MORE, False),
        (b"", b"hello", UNTIL_CLOSE, False),
    ],
)
def test_where_an_answer_ends(fields: bytes, body: bytes, length: int, whole: bool) -> None:
    """By its length, by its last chunk, or by the end of the connection, which only the socket can tell."""
    data = OK + fields + b"\r\n" + body
    head = parse_head(data)
    assert head is not None
    assert (head.status, head.length) == (200, length)
    assert is_whole(data, head) is whole


def test_a_server_that_wants_to_close_is_noticed() -> None:
    """`Connection: close` is what the strict account of a reload counts."""
    head = parse_head(OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n")
    assert head is not None
    assert head.closes


def test_cookies_are_kept_without_their_attributes() -> None:
    """A client sends back name and value, of each Set-Cookie."""
    head = parse_head(
        OK + b"Set-Cookie: a=1; Path=/; HttpOnly\r\nset-cookie: b=x=y; Secure\r\nContent-Length: 0\r\n\r\n"
    )
    assert head is not None
    assert head.cookies == ((b"a", b"1"), (b"b", b"x=y"))


def test_a_plan_travels() -> None:
    """What is asked of the client's process is what it reads."""
    plan = Plan(80, "/", 4, 1.5, login="/login", rate=100)
    assert Plan.loads(plan.dumps()) == plan


def test_wrk_with_failures() -> None:
    """Answers with an error status are failures, not requests; times come in microseconds."""
    line = (
        '{"requests":100,"seconds":2.0,"bytes":9,"connect":1,"read":4,"write":0,"status":10,"timeout":2,'
        '"p50":1500,"p99":20000,"max":30000}'
    )
    seen = parse(f"Running\n\nJSON {line}\n", client_cpu=0.5)
    assert (seen.requests, seen.failed, seen.dropped, seen.rate) == (90, 13, 4, 45.0)
    assert (seen.p50, seen.p99, seen.highest) == (0.0015, 0.02, 0.03)


def test_wrk_without_a_summary() -> None:
    """A run that died is an error, not a row of zeros."""
    with pytest.raises(ValueError, match="no summary"):
        parse("unable to connect", client_cpu=0.0)
