"""Framing responses: whatever an application says, a client reads one response or none."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedcluster.http import response
from sharedcluster.http.response import BadResponseError, frame, refusal, standing_fields

STANDING = standing_fields(0, worker="3")
NAMES = st.sampled_from(
    ["Content-Type", "content-length", "Connection", "Transfer-Encoding", "Date", "X-A", "Set-Cookie"]
)
VALUES = st.one_of(
    st.sampled_from(["5", "0", "close", "Keep-Alive", "chunked", "text/plain", "", "a\r\nb: c", "\x7f"]),
    st.text(max_size=8),
)
STATUSES = st.one_of(
    st.sampled_from(["200 OK", "204 No Content", "304 Not Modified", "404 ", "100 Continue"]), st.text(max_size=9)
)


def test_standing_fields() -> None:
    """Date is an IMF-fixdate, and X-Worker stands behind it when it is wanted."""
    assert STANDING == "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nX-Worker: 3\r\n"
    assert standing_fields(0, worker=None).count("\r\n") == 1


@settings(max_examples=1000)
@given(
    STATUSES,
    st.lists(st.tuples(st.one_of(NAMES, st.text(max_size=6)), VALUES), max_size=5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(-1, 9),
)
def test_a_client_reads_what_was_meant(
    status: str, fields: list[tuple[str, str]], keep_alive: bool, is_head: bool, is_http10: bool, length: int
) -> None:
    """h11 as the client: one head, the application's fields, and a framing that agrees with what we will send."""
    try:
        head = frame(status, fields, STANDING, keep_alive, is_head, is_http10, length)
    except BadResponseError:
        return
    client = h11.Connection(h11.CLIENT)
    request = h11.Request(method="HEAD" if is_head else "GET", target="/", headers=[("Host", "a")])
    client.send(request)
    client.send(h11.EndOfMessage())
    client.receive_data(head.data)
    event = client.next_event()
    assert isinstance(event, h11.Response)
    assert event.status_code == head.code == int(status[:3])
    names = [name for name, _ in event.headers]
    assert names.count(b"date") >= 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert client.client_is_waiting_for_100_continue is False
    said = [(n.lower(), v.strip(" \t")) for n, v in fields if n.lower() in ("x-a", "set-cookie", "content-type")]
    assert [(n.decode(), v.decode("latin-1")) for n, v in event.headers if n.decode() in dict(said)] == said
    body = b"" if not head.has_body else b"x" * max(head.length, 0)
    client.receive_data(b"1\r\nx\r\n0\r\n\r\n" if head.chunked else body)
    if not head.has_body or head.length >= 0 or head.chunked:
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data)
        expected = h11.MUST_CLOSE if not head.keep_alive else h11.DONE
        assert client.their_state in (expected, h11.MUST_CLOSE if is_http10 else expected)
    else:
        assert not head.keep_alive


@pytest.mark.parametrize(
    ("status", "is_head", "length", "expected"),
    [
        ("200 OK", False, 5, b"Content-Length: 5"),
        ("200 OK", False, -1, b"Transfer-Encoding: chunked"),
        ("200 OK", True, 5, b"Content-Length: 5"),
        ("204 No Content", False, 5, None),
        ("205 Reset Content", False, 0, b"Content-Length: 0"),
    ],
)
def test_framing_fields(status: str, is_head: bool, length: int, expected: bytes | None) -> None:
    """The framing is ours when the application leaves it to us."""
    lines = frame(status, [], STANDING, True, is_head, False, length).data.split(b"\r\n")
    assert [line for line in lines if line.startswith((b"Content-Length", b"Transfer-"))] == (
        [expected] if expected else []
    )


def test_remembered_fields_are_bounded() -> None:
    """An application that never repeats itself fills no memory, and is served as well."""
    for number in range(5000):
        frame("200 OK", [("X-A", str(number)), ("Set-Cookie", str(number))], STANDING, True, False, False, 0)
    assert len(response._fields) <= response.KNOWN
    assert not [field for field in response._fields if field[0] == "Set-Cookie"]
    assert b"\r\nX-A: 4999\r\n" in frame("200 OK", [("X-A", "4999")], STANDING, True, False, False, 0).data


def test_refusal_is_a_whole_response() -> None:
    """It has a length and closes; the answer to HEAD has no body."""
    from sharedcluster.http.policy import HEAD_TIMEOUT, OVERLOADED

    assert refusal(HEAD_TIMEOUT, STANDING).endswith(
        b"\r\nContent-Length: 20\r\nConnection: close\r\n\r\n408 Request Timeout\n"
    )
    answer = refusal(OVERLOADED, STANDING, is_head=True)
    assert b"\r\nRetry-After: 1\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")
