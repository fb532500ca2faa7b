"""What is served: requests in, exact responses out, and connections that live on or end as they should."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
from typing import Any

import pytest

from tests.integration.http.conftest import Served, get, post, read_all, status_of
from tests.waiting import wait_until

H = "GET / HTTP/1.1\r\nHost: a\r\n"
P = "POST /echo HTTP/1.1\r\nHost: a\r\n"


def seen_by_app(answer: bytes) -> dict[str, Any]:
    """The JSON of /echo."""
    assert status_of(answer) == 200, answer
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


GOOD: list[tuple[str, str, dict[str, str], str]] = [
    ("plain", "GET /a/b?c=d&e HTTP/1.1\r\nHost: a\r\n",
     {"PATH_INFO": "/a/b", "QUERY_STRING": "c=d&e", "HTTP_HOST": "a"}, ""),
    ("escapes", "GET /%C3%A9%2F%7f?%41%00 HTTP/1.1\r\nHost: a\r\n",
     {"PATH_INFO": "/\xc3\xa9/\x7f", "QUERY_STRING": "%41%00", "RAW_URI": "/%C3%A9%2F%7f?%41%00"}, ""),
    ("escape-broken", "GET /%zz% HTTP/1.1\r\nHost: a\r\n", {"PATH_INFO": "/%zz%"}, ""),
    ("two-slashes", "GET //a HTTP/1.1\r\nHost: a\r\n", {"PATH_INFO": "//a"}, ""),
    ("dots-stay", "GET /a/../b HTTP/1.1\r\nHost: a\r\n", {"PATH_INFO": "/a/../b"}, ""),
    ("one-empty-line-first", "\r\nGET /x HTTP/1.1\r\nHost: a\r\n", {"PATH_INFO": "/x"}, ""),
    ("absolute", "GET http://A:80/x?y HTTP/1.1\r\nHost: a:80\r\n", {"PATH_INFO": "/x", "QUERY_STRING": "y"}, ""),
    ("absolute-no-path", "GET http://a?y HTTP/1.1\r\nHost: a\r\n", {"PATH_INFO": "/", "QUERY_STRING": "y"}, ""),
    ("star", "OPTIONS * HTTP/1.1\r\nHost: a\r\n", {"PATH_INFO": "*", "REQUEST_METHOD": "OPTIONS"}, ""),
    ("ipv6-host", "GET / HTTP/1.1\r\nHost: [::1]:8000\r\n", {"HTTP_HOST": "[::1]:8000"}, ""),
    ("underscore-host", "GET / HTTP/1.1\r\nHost: my_service.local\r\n", {"HTTP_HOST": "my_service.local"}, ""),
    ("spaces-around-value", H + "A: \t b c \t\r\n", {"HTTP_A": "b c"}, ""),
    ("no-space-before-value", H + "A:b\r\n", {"HTTP_A": "b"}, ""),
    ("empty-value", H + "A:\r\n", {"HTTP_A": ""}, ""),
    ("latin-1-value", H + "A: \xe9\x80\r\n", {"HTTP_A": "\xe9\x80"}, ""),
    ("tab-in-value", H + "A: b\tc\r\n", {"HTTP_A": "b\tc"}, ""),
    ("odd-name", H + "!#$%&'*+-.^`|~0: b\r\n", {"HTTP_!#$%&'*+_.^`|~0": "b"}, ""),
    ("repeated", H + "A: b\r\nA: c\r\n", {"HTTP_A": "b,c"}, ""),
    ("repeated-cookie", H + "Cookie: a=b\r\nCookie: c=d\r\n", {"HTTP_COOKIE": "a=b; c=d"}, ""),
    ("content-type", P + "Content-Type: a/b\r\nContent-Length: 0\r\n",
     {"CONTENT_TYPE": "a/b", "CONTENT_LENGTH": "0"}, ""),
    ("length", P + "Content-Length: 5\r\n", {"CONTENT_LENGTH": "5"}, "hello"),
    ("length-spaces", P + "content-LENGTH:5\r\n", {"CONTENT_LENGTH": "5"}, "hello"),
    ("get-with-body", H + "Content-Length: 5\r\n", {"REQUEST_METHOD": "GET"}, "hello"),
    ("http-1.0", "GET /x HTTP/1.0\r\n", {"SERVER_PROTOCOL": "HTTP/1.0"}, ""),
    ("expect-in-1.0", "POST /x HTTP/1.0\r\nExpect: any\r\nContent-Length: 5\r\n", {"HTTP_EXPECT": "any"}, "hello"),
    ("websocket-key-1", H + "Sec-WebSocket-Key1: x\r\n", {"PATH_INFO": "/"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "environ", "body"), [pytest.param(*rest, id=name) for name, *rest in GOOD])
def test_environ_whole_and_split_at_every_byte(served: Served, raw: str, environ: dict[str, str], body: str) -> None:
    """A request means the same wherever it is split."""
    data = (raw + "Connection: close\r\n\r\n" + body).encode("latin-1")
    for position in range(len(data)):
        pieces = [data[:position], data[position:]] if position else [data]
        found = seen_by_app(served.ask(*pieces))
        assert found["body"] == body
        assert {key: found["environ"].get(key) for key in environ} == environ, position


def test_names_with_underscores_never_reach_the_application(served: Served) -> None:
    """`X_Forwarded_For` must not stand in for `X-Forwarded-For`, nor `Content_Length` for `Content-Length`."""
    found = seen_by_app(served.ask(get("/echo", "X_A: b", "Content_Length: 5", "Transfer_Encoding: chunked")))
    assert not [key for key in found["environ"] if key in ("HTTP_X_A", "CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING")]
    assert "" not in found["environ"]


CHUNKED = P + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("wire", "body"),
    [
        ("5\r\nhello\r\n0\r\n\r\n", "hello"),
        ("0\r\n\r\n", ""),
        ("1\r\na\r\n000002\r\nbc\r\n0\r\n\r\n", "abc"),
        ("A\r\n0123456789\r\n00\r\n\r\n", "0123456789"),
        ('5;a;b=c;d="e\\"f;\t"\r\nhello\r\n0;x\r\n\r\n', "hello"),
        ("5\r\nhello\r\n0\r\nX-Sum: 1\r\nOther: \xe9\r\n\r\n", "hello"),
        ("2\r\n\r\n\r\n0\r\n\r\n", "\r\n"),
    ],
)
def test_chunked_body_split_at_every_byte(served: Served, wire: str, body: str) -> None:
    """Chunks, extensions and trailers are read alike wherever the bytes are split; trailers are dropped."""
    data = (CHUNKED + wire).encode("latin-1")
    for position in range(1, len(data)):
        found = seen_by_app(served.ask(data[:position], data[position:]))
        assert found["body"] == body
        assert "HTTP_X_SUM" not in found["environ"]


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    """Requests sent at once get their answers in their order, the slow one first if it was first."""
    slow = get("/slow?0.1", close=False)
    body = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
    chunked = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    answer = served.ask(slow + get("/stream", close=False) + body + chunked + get("/x"))
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == [200] * 5
    positions = [answer.index(part) for part in (b"\r\n\r\nok", b"piece2", b'"hello"', b'"abc"', b'"/x"')]
    assert positions == sorted(positions)


def test_repeated_fields_do_not_hide_a_bad_line(served: Served) -> None:
    """On a connection whose fields are always the same, every request line is judged as on a new one."""
    good = b"GET /echo?1 HTTP/1.1\r\nHost: a\r\n\r\n"
    lines = {
        b"GET /echo?2 HTTP/1.1": 200, b"POST /echo?%41 HTTP/1.1": 200, b"HEAD /echo HTTP/1.1": 200,
        b"GET /a%0ab HTTP/1.1": 400, b"GET /\x00 HTTP/1.1": 400, b"GET /a#b HTTP/1.1": 400, b"GET  /a HTTP/1.1": 400,
        b"GET /a HTTP/1.1 ": 400, b"GET /a\\b HTTP/1.1": 400, b"BREW /a HTTP/1.1": 501, b"GET /a HTTP/2.0": 505,
        b"GET a HTTP/1.1": 400, b"GET http://b/ HTTP/1.1": 400, b"GET /a\r\nHost: b HTTP/1.1": 400,
        b"GET /a HTTP/1.1\r\nHost: b": 400, b"GET / HTTP/1.1\r\nContent-Length: 5": 200, b"GET /\xe9 HTTP/1.1": 400,
        b"GET /a HTTP/1.0": 200, b"": 400, b"\r\nGET /a HTTP/1.1": 200, b"GET /" + b"a" * 8192 + b" HTTP/1.1": 414,
    }  # fmt: skip
    for line, status in lines.items():
        answer = served.ask(
            good, line + b"\r\nHost: a\r\n\r\n" + (b"hello" if b"Length" in line else b""), b"!", end=True
        )
        assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer)][:2] == [200, status], line


def test_a_connection_s_lines_and_cookies_are_each_request_s_own(served: Served) -> None:
    """Whatever changes from one request to the next, and back again, the application sees what this one said."""
    chosen = random.Random(7)
    for _ in range(40):
        with served.connect() as sock:
            for _ in range(12):
                path, cookie = (
                    chosen.choice(["/echo", "/echo?1", "/echo?22"]),
                    chosen.choice(["a=1", "a=2", "a=33", ""]),
                )
                line = f"Cookie: {cookie}\r\n" if cookie else ""
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n{line}\r\n".encode())
                answer = http.client.HTTPResponse(sock)
                answer.begin()
                environ = json.loads(answer.read())["environ"]
                assert (environ["RAW_URI"], environ.get("HTTP_COOKIE", "")) == (path, cookie)


def test_a_thousand_pipelined_requests(served: Served) -> None:
    """However many requests stand in one stream, each is answered once."""
    with served.connect() as sock:
        sock.sendall(get("/plain", close=False) * 999 + get("/plain"))
        assert read_all(sock).count(b"\r\n\r\nok") == 1000


@pytest.mark.parametrize(
    ("request_bytes", "lives_on"),
    [
        (b"GET /plain HTTP/1.1\r\nHost: a\r\n\r\n", True),
        (b"GET /plain HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", True),
        (b"GET /plain HTTP/1.1\r\nHost: a\r\nConnection: foo, Close\r\n\r\n", False),
        (b"GET /plain HTTP/1.0\r\n\r\n", False),
        (b"GET /plain HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", True),
        (b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
        (b"POST /plain HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", True),
    ],
)
def test_connection_lives_on_or_ends(served: Served, request_bytes: bytes, lives_on: bool) -> None:
    """`Connection`, the version and the framing decide, and the response says so."""
    answer = served.ask(request_bytes, request_bytes, get("/plain"))
    first = answer.partition(b"\r\n\r\n")[0]
    assert answer.count(b"HTTP/1.1 200") == (3 if lives_on else 1)
    assert (b"Connection: close" in first) is not lives_on
    assert (b"Connection: keep-alive" in first) is (lives_on and b"HTTP/1.0" in request_bytes)


def test_head_has_the_fields_but_no_body(served: Served) -> None:
    """HEAD gets what GET gets without the body, and the next response follows at once."""
    answer = served.ask(
        b"HEAD /plain HTTP/1.1\r\nHost: a\r\n\r\nHEAD /stream HTTP/1.1\r\nHost: a\r\n\r\n" + get("/plain")
    )
    first, second, _, body = answer.split(b"\r\n\r\n")
    assert b"Content-Length: 2" in first
    assert b"Transfer-Encoding: chunked" in second
    assert body == b"ok"


def test_streaming_is_chunked_for_11_and_ends_with_the_connection_for_10(served: Served) -> None:
    """A body of unknown length never lacks an end."""
    answer = served.ask(get("/stream"))
    assert answer.endswith(b"\r\n\r\n7\r\npiece0;\r\n7\r\npiece1;\r\n7\r\npiece2;\r\n0\r\n\r\n")
    answer = served.ask(b"GET /stream HTTP/1.0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\npiece0;piece1;piece2;")
    assert b"Transfer-Encoding" not in answer


def wished(served: Served, status: str, *fields: tuple[str, str], body: tuple[str, ...] = ("ok",)) -> bytes:
    """The answer to a wish at /fields, on a connection that could live on."""
    wish = json.dumps({"status": status, "fields": fields, "body": body}).encode()
    request = b"POST /fields HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(wish), wish)
    return served.ask(request, get("/notes"))


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        ("200 OK\r\nX: y", []),
        ("200 OK\n", []),
        ("200", []),
        ("20 OK", []),
        ("100 Continue", []),
        ("0200 OK", []),
        ("200 OK", [("A", "b\r\nC: d")]),
        ("200 OK", [("A", "b\nC: d")]),
        ("200 OK", [("A", "b\rC: d")]),
        ("200 OK", [("A", "b\x00")]),
        ("200 OK", [("A", "\u20ac")]),
        ("200 OK", [("A\r\nB", "c")]),
        ("200 OK", [("A B", "c")]),
        ("200 OK", [("A:", "c")]),
        ("200 OK", [("", "c")]),
        ("200 OK", [("Set-Cookie", "b\r\nC: d")]),
        ("200 OK", [("A", "b"), ("Set-Cookie", "b\x00")]),
        ("200 OK", [("Set-Cookie", "\u20ac")]),
        ("200 OK", [("Set-Cookie", 7)]),
        ("200 OK", [("Content-Length", "+2")]),
        ("200 OK", [("Content-Length", "2"), ("Content-Length", "3")]),
    ],
)
def test_an_application_cannot_inject(served: Served, status: str, fields: list[tuple[str, str]]) -> None:
    """What would break the head of a response becomes a 500; nothing of it is sent."""
    answer = wished(served, status, *fields)
    assert status_of(answer) == 500
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"C: d" not in answer


def test_body_longer_than_its_length_is_cut(served: Served) -> None:
    """What is beyond Content-Length would be read as the next response: it is not sent, and the connection ends."""
    answer = wished(served, "200 OK", ("Content-Length", "3"), body=("ab", "cd", "ef"))
    assert answer.endswith(b"\r\n\r\nabc")


def test_body_shorter_than_its_length_ends_the_connection(served: Served) -> None:
    """A client that waits for the rest learns from the end that it will not come."""
    answer = wished(served, "200 OK", ("Content-Length", "9"))
    assert answer.endswith(b"\r\n\r\nok")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_no_body_where_there_can_be_none(served: Served, status: str) -> None:
    """204 and 304 end with their head, whatever the application returned."""
    answer = wished(served, status, ("ETag", '"x"'))
    first, _, rest = answer.partition(b"\r\n\r\n")
    assert status.encode() in first
    assert rest.startswith(b"HTTP/1.1 200")
    assert b"Content-Length" not in first
    assert b"Transfer-Encoding" not in first


def test_hop_by_hop_fields_of_the_application_are_dropped(served: Served) -> None:
    """The framing is the server's; only `Connection: close` is heeded."""
    answer = wished(served, "200 OK", ("Transfer-Encoding", "gzip"), ("Keep-Alive", "x"), ("Upgrade", "y"))
    head = answer.partition(b"\r\n\r\n")[0]
    assert not re.search(rb"Transfer-Encoding|Keep-Alive|Upgrade", head)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert wished(served, "200 OK", ("Connection", "close")).count(b"HTTP/1.1 ") == 1


COOKIES = [[], ["a=b"], ["a=b", "c=d"], ["a=b", "a=b"], ["", "a=\xe9\t"], ["a=" + "b" * 5000]]


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "302 Found"])
def test_cookies_arrive_in_their_order_and_change_nothing_else(served: Served, status: str) -> None:
    """Whichever fields stand around them, and whatever was answered on the connection before."""
    wishes, expected = [], []
    for cookies in [*COOKIES, *reversed(COOKIES)]:
        for after in ([], [("X-A", "1")]):
            fields = [("Content-Type", "text/plain"), *(("Set-Cookie", value) for value in cookies), *after]
            wish = json.dumps({"status": status, "fields": fields, "body": ["ok"]}).encode()
            wishes.append(b"POST /fields HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(wish), wish))
            names = [
                "date",
                "content-type",
                *(["x-a"] if after else []),
                *([] if "204" in status else ["content-length"]),
            ]
            expected.append((cookies, sorted(names)))
    rest = served.ask(*wishes, end=True)
    found = []
    for _ in wishes:
        head, _, rest = rest.partition(b"\r\n\r\n")
        lines = [line.partition(": ") for line in head.decode("latin-1").split("\r\n")[1:]]
        cookies = [value for name, _, value in lines if name == "Set-Cookie"]
        found.append((cookies, sorted(name.lower() for name, _, _ in lines if name != "Set-Cookie")))
        rest = rest if "204" in status else rest.removeprefix(b"ok")
    assert found == expected
    assert rest == b""


def test_own_date_is_not_doubled(served: Served) -> None:
    """An application's Date stands; otherwise the server adds one."""
    assert re.search(rb"\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", wished(served, "200 OK"))
    assert wished(served, "200 OK", ("date", "x")).partition(b"\r\n\r\n")[0].lower().count(b"\r\ndate: ") == 1


@pytest.mark.parametrize(
    ("path", "status", "end"),
    [
        ("/crash", 500, b"500 Internal Server Error\n"),
        ("/twice", 500, b"500 Internal Server Error\n"),
        ("/never", 500, b"500 Internal Server Error\n"),
        ("/error-page", 503, b"sorry"),
        ("/closing-list", 200, b"Content-Length: 2\r\nConnection: close\r\n\r\nok"),
        ("/write", 200, b"4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n"),
        ("/lazy", 200, b"4\r\nlazy\r\n0\r\n\r\n"),
        ("/crash-late", 200, b"5\r\nfirst\r\n"),
        ("/crash-after-write", 200, b"5\r\nfirst\r\n"),
        ("/too-late", 200, b"5\r\nfirst\r\n"),
        ("/crash-in-close", 200, b"5\r\nwhole\r\n0\r\n\r\n"),
        ("/file?4999990", 200, b"Content-Length: 10\r\nConnection: close\r\n\r\n0123456789"),
    ],
)
def test_pep_3333(served: Served, path: str, status: int, end: bytes) -> None:
    """start_response, exc_info, write, generators, file_wrapper; a crash after the head cuts the body short."""
    answer = served.ask(get(path))
    assert status_of(answer) == status
    assert answer.endswith(end)


def test_a_list_that_can_be_closed_is(served: Served) -> None:
    """Of one piece, it is sent as any list is, and closed then, also when that fails."""
    before = json.loads(served.ask(get("/notes")).partition(b"\r\n\r\n")[2])["closed"]
    served.ask(get("/closing-list"))
    assert status_of(served.ask(get("/closing-list?bad"))) == 500
    after = json.loads(served.ask(get("/notes")).partition(b"\r\n\r\n")[2])["closed"]
    assert after[len(before) :] == ["closing list"] * 2


def test_a_file_is_sent_whole(served: Served) -> None:
    """wsgi.file_wrapper sends every byte, also to a client that takes them slowly."""
    with served.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(get("/file"))
        assert read_all(sock).endswith(b"\r\n\r\n" + b"0123456789" * 500000)


def test_large_body_is_streamed(served: Served) -> None:
    """A body beyond the buffer is read by the application itself, byte for byte."""
    body = b"0123456789abcdef" * 65536
    with served.connect() as sock:
        sock.sendall(post("/read?-1", body))
        assert read_all(sock).endswith(b"\r\n\r\n" + body)


def test_read_waits_for_all_it_was_asked_for(served: Served) -> None:
    """`read(n)` of a streamed body returns n bytes however they trickle in: a short read would look like the end."""
    with served.connect() as sock:
        sock.sendall(b"POST /read?70000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 70000\r\n\r\n")
        for _ in range(9):
            sock.sendall(b"x" * 7000)
            wait_until(lambda: served.notes()["in_flight"] == 2, "the application reading")
        sock.sendall(b"x" * 7000)
        assert read_all(sock).count(b"x") == 70000 + 1


def test_large_chunked_body_is_streamed_and_the_next_request_is_served(served: Served) -> None:
    """The request behind a streamed body is found where the body ends."""
    body = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with served.connect() as sock:
        sock.sendall(
            b"POST /read?-1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body * 8 + b"0\r\n\r\n"
        )
        sock.sendall(get("/plain"))
        answer = read_all(sock)
    assert answer.count(b"x") >= 8 * 65536
    assert answer.endswith(b"\r\n\r\nok")


def test_unread_rest_of_a_body(served: Served) -> None:
    """A little that the application left is read and dropped; if it is much, the connection ends."""
    with served.connect() as sock:
        sock.sendall(b"POST /read?60000 HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100000)
        sock.sendall(get("/plain"))
        answer = read_all(sock)
        assert b"Content-Length: 60000\r\n" in answer
        assert answer.endswith(b"\r\n\r\nok")
    with served.connect() as sock:
        sock.sendall(b"POST /plain HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000000)
        sock.sendall(get("/notes"))
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in answer


def test_continue_is_sent_when_the_application_reads(served: Served) -> None:
    """100 Continue comes on the first read, once; then the body; then the answer."""
    with served.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello" + get("/plain"))
        answer = read_all(sock)
    assert b'"hello"' in answer
    assert answer.endswith(b"\r\n\r\nok")


def test_no_continue_for_an_application_that_does_not_read(served: Served) -> None:
    """The final answer comes without 100, and the connection ends: nobody knows whether the body will follow."""
    request = b"POST /plain HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    answer = served.ask(request, b"hello" + get("/notes"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_malformed_streamed_body_is_an_error_to_the_application(served: Served) -> None:
    """A large body that breaks the chunked coding raises in wsgi.input, and the status is the rule's."""
    with served.connect() as sock:
        sock.sendall(
            b"POST /read?-1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10001\r\n" + b"x" * 65537
        )
        sock.sendall(b"XX" + get("/notes"))
        answer = read_all(sock)
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1 ") == 1


def test_cut_streamed_body_never_looks_whole(served: Served) -> None:
    """An application that catches the error sees an error, not a short body."""
    with served.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 1000)
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert status_of(answer) == 400
    assert answer.endswith(b"!BodyError")


def test_generator_is_closed_when_the_client_leaves(served: Served) -> None:
    """A client that goes away in the middle of a stream ends it; nobody goes on producing for nobody."""
    before = served.notes()["closed"].count("huge")
    with served.connect() as sock:
        sock.sendall(get("/huge?100"))
        sock.recv(1000)
    wait_until(lambda: served.notes()["closed"].count("huge") == before + 1, "the generator closed")


def test_event_stream_ends_with_its_client(served: Served) -> None:
    """An event stream that waits for its next event learns at once that its client has left."""
    before = served.notes()["closed"].count("events")
    with served.connect() as sock:
        sock.sendall(get("/events", close=False))
        wait_until(lambda: b"data: 1" in sock.recv(1000), "the first event")
    wait_until(lambda: served.notes()["closed"].count("events") == before + 1, "the stream closed")
    assert served.notes()["in_flight"] == 1


def test_half_closed_client_gets_its_answer(served: Served) -> None:
    """A client may close its sending side and wait."""
    assert served.ask(get("/slow?0.1", close=False), end=True).endswith(b"\r\n\r\nok")


def test_slow_reader_costs_a_bounded_buffer(served: Served) -> None:
    """100 MiB for a client that reads nothing yet: the process does not grow by more than a few."""
    import psutil

    process = psutil.Process(served.pid)
    before = process.memory_info().rss
    with served.connect() as sock:
        sock.sendall(get("/huge?100"))
        assert sock.recv(100)
        cpu = sum(process.cpu_times()[:2])
        assert served.notes()["in_flight"] == 2
        assert process.memory_info().rss - before < 16 << 20
        assert sum(process.cpu_times()[:2]) - cpu < 0.5


def test_migration_closes_nothing(served: Served) -> None:
    """An idle connection is released and served again elsewhere without its client noticing."""
    with served.connect() as idle:
        idle.sendall(get("/plain", close=False))
        assert idle.recv(1000).endswith(b"ok")
        released = int(served.ask(get("/migrate")).rpartition(b"\r\n")[2])
        assert released >= 1
        idle.sendall(get("/plain"))
        assert read_all(idle).endswith(b"\r\n\r\nok")


def test_clients_that_say_the_same_are_told_apart(served: Served) -> None:
    """A head is remembered for all clients of a listener, and each sees its own address: at once, and kept alive."""
    head = get("/echo", "X-Same: yes", close=False)
    with served.connect() as one, served.connect() as other:
        for sock in (one, other, one, other):
            sock.sendall(head)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += sock.recv(65536)
            environ = json.loads(answer.partition(b"\r\n\r\n")[2])["environ"]
            assert (environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"])) == sock.getsockname()
    for _ in range(3):
        with served.connect() as sock:
            sock.sendall(get("/echo", "X-Same: yes"))
            environ = json.loads(read_all(sock).partition(b"\r\n\r\n")[2])["environ"]
            assert (environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"])) == sock.getsockname()
    environ = json.loads(served.ask(get("/echo", "X-Same: yes")).partition(b"\r\n\r\n")[2])["environ"]
    assert environ["REMOTE_ADDR"] == ""
    assert "REMOTE_PORT" not in environ
