"""What is refused: raw bytes in, the status out, one answer, and not a byte behind it served.

Every input is sent whole, and split in two at every byte. Behind each of them a good request is sent on the same
connection; it must never be answered.
"""

from __future__ import annotations

import pytest

from tests.integration.http.conftest import Served, get, status_of

H = "GET / HTTP/1.1\r\nHost: a\r\n"
P = "POST / HTTP/1.1\r\nHost: a\r\n"
C = P + "Transfer-Encoding: chunked\r\n\r\n"

REQUEST_LINES = [
    ("lf-ends-line", "GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("cr-ends-line", "GET / HTTP/1.1\rHost: a\r\n\r\n", 400),
    ("lf-only", "GET / HTTP/1.1\nHost: a\n\n", 400),
    ("two-empty-lines-first", "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("empty-lf-first", "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space-first", " GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two-spaces-after-method", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two-spaces-after-target", "GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space-at-end", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    ("tab-for-space", "GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("no-target", "GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("empty-target", "GET  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("http-0.9", "GET /\r\n\r\n", 400),
    ("version-0.9", "GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    ("version-1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    ("version-2.0", "GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ("version-3.0", "GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
    ("version-lower", "GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("version-1", "GET / HTTP/1\r\nHost: a\r\n\r\n", 400),
    ("version-01.1", "GET / HTTP/01.1\r\nHost: a\r\n\r\n", 400),
    ("version-1.10", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    ("version-spaced", "GET / HTTP/ 1.1\r\nHost: a\r\n\r\n", 400),
    ("version-other-name", "GET / ICAP/1.1\r\nHost: a\r\n\r\n", 400),
    ("h2-preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("method-unknown", "BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    ("method-lower", "get / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    ("method-rtsp", "DESCRIBE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    ("method-source", "SOURCE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    ("method-no-token", "G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("method-too-long", "G" * 33 + " / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("method-connect", "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", 501),
    ("method-connect-without-version", "CONNECT a:80\n\r\n\r\n", 400),
    ("target-fragment", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-non-ascii", "GET /\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-nul", "GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-backslash", "GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-escaped-nul", "GET /a%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-escaped-crlf", "GET /a%0d%0Ab HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-del", "GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-relative", "GET a/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-star", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-authority", "GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-other-scheme", "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-userinfo", "GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-other-host", "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("target-no-host", "GET http:/// HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("binary", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
]
FIELDS = [
    ("host-missing", "GET / HTTP/1.1\r\n\r\n", 400),
    ("host-twice", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    ("host-twice-other-case", "GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n", 400),
    ("host-empty", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    ("host-userinfo", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    ("host-path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ("host-list", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ("host-port-bad", "GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
    ("host-port-large", "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", 400),
    ("host-space", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("host-brackets", "GET / HTTP/1.1\r\nHost: [zz]\r\n\r\n", 400),
    ("host-non-ascii", "GET / HTTP/1.1\r\nHost: \xe9\r\n\r\n", 400),
    ("space-before-colon", H + "A : b\r\n\r\n", 400),
    ("tab-before-colon", H + "A\t: b\r\n\r\n", 400),
    ("no-colon", H + "A\r\n\r\n", 400),
    ("empty-name", H + ": b\r\n\r\n", 400),
    ("name-no-token", H + "A(b): c\r\n\r\n", 400),
    ("name-non-ascii", H + "A\xe9: c\r\n\r\n", 400),
    ("name-nul", H + "A\x00: c\r\n\r\n", 400),
    ("name-space-first", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    ("folded", H + "A: b\r\n c\r\n\r\n", 400),
    ("folded-tab", H + "A: b\r\n\tc\r\n\r\n", 400),
    ("folded-first", "GET / HTTP/1.1\r\nHost:\r\n a\r\n\r\n", 400),
    ("value-nul", H + "A: b\x00c\r\n\r\n", 400),
    ("value-cr", H + "A: b\rB: c\r\n\r\n", 400),
    ("value-lf", H + "A: b\nB: c\r\n\r\n", 400),
    ("value-vt", H + "A: b\x0bc\r\n\r\n", 400),
    ("value-ff", H + "A: b\x0cc\r\n\r\n", 400),
    ("value-escape", H + "A: \x1b[0m\r\n\r\n", 400),
    ("value-del", H + "A: b\x7f\r\n\r\n", 400),
    ("content-type-twice", P + "Content-Type: a/b\r\nContent-Type: a/b\r\nContent-Length: 0\r\n\r\n", 400),
    ("cr-x-ends-head", "GET / HTTP/1.1\r\nHost: a\r\n\rX", 400),
    ("expect-unknown", P + "Content-Length: 1\r\nExpect: 200-ok\r\n\r\nx", 417),
    ("websocket-version", H + "Connection: upgrade\r\nUpgrade: x\r\nSec-WebSocket-Version: 99\r\n\r\n", 426),
    ("expect-list", P + "Content-Length: 1\r\nExpect: 100-continue, x\r\n\r\nx", 417),
]
LENGTHS = [
    (f"length-{name}", P + f"Content-Length: {value}\r\n\r\n" + "xxxxx", 400)
    for name, value in {
        "plus": "+5", "minus": "-5", "minus-zero": "-0", "underscore": "0_5", "hex": "0x5", "octal": "0o5",
        "float": "5.0", "empty": "", "word": "five", "list": "5, 5", "list-differs": "5, 6", "inner-space": "5 5",
        "semicolon": "5;", "quoted": '"5"', "overflow": "18446744073709551616",
        "twenty-digits": "00000000000000000005",
        "leading-zero": "05", "double-zero": "00",
    }.items()
]  # fmt: skip
LENGTHS += [
    ("length-twice", P + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nxxxxx", 400),
    ("length-twice-differs", P + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx", 400),
    ("length-two-spaces", P + "Content-Length:  5\r\n\r\nxxxxx", 400),
    ("length-tab", P + "Content-Length:\t5\r\n\r\nxxxxx", 400),
    ("length-space-behind", P + "Content-Length: 5 \r\n\r\nxxxxx", 400),
    ("length-nbsp", P + "Content-Length: \xa05\r\n\r\nxxxxx", 400),
    ("length-arabic-digit", P + "Content-Length: \xd9\xa5\r\n\r\nxxxxx", 400),
    ("length-space-before-colon", P + "Content-Length : 5\r\n\r\nxxxxx", 400),
    ("length-and-chunked", P + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("chunked-and-length", P + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
]
CODINGS = [
    (f"coding-{name}", P + f"Transfer-Encoding: {value}\r\n\r\n0\r\n\r\n", status)
    for name, value, status in [
        ("unknown", "xchunked", 501), ("suffix", "chunkedx", 501), ("identity", "identity", 501),
        ("gzip", "gzip", 501), ("gzip-chunked", "gzip, chunked", 501), ("not-last", "chunked, gzip", 400),
        ("twice", "chunked, chunked", 400), ("empty", "", 400), ("comma-first", ", chunked", 400),
        ("comma-last", "chunked,", 400), ("quoted", '"chunked"', 501), ("parameter", "chunked;a=b", 501),
        ("vt", "\x0bchunked", 400), ("nbsp", "\xa0chunked", 400), ("nul", "chunked\x00", 400),
    ]
]  # fmt: skip
CODINGS += [
    ("coding-two-fields", P + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("coding-two-fields-other", P + "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n", 400),
    ("coding-folded", P + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    ("coding-space-before-colon", P + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    ("coding-in-1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
]
CHUNKS = [
    (f"chunk-{name}", C + body, 400)
    for name, body in {
        "lf": "5\nhello\r\n0\r\n\r\n", "cr": "5\rhello\r\n0\r\n\r\n", "prefix": "0x5\r\nhello\r\n0\r\n\r\n",
        "plus": "+5\r\nhello\r\n0\r\n\r\n", "minus": "-5\r\nhello\r\n0\r\n\r\n", "space": "5 \r\nhello\r\n0\r\n\r\n",
        "space-first": " 5\r\nhello\r\n0\r\n\r\n", "underscore": "0_5\r\nhello\r\n0\r\n\r\n",
        "no-size": "\r\nhello\r\n",
        "no-hex": "g\r\nhello\r\n0\r\n\r\n", "overflow": "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "data-short": "6\r\nhello\r\n0\r\n\r\n", "data-long": "4\r\nhello\r\n0\r\n\r\n",
        "end-lf": "5\r\nhello\n0\r\n\r\n", "end-any-two": "5\r\nhelloXX0\r\n\r\n",
        "extension-empty": "5;\r\nhello\r\n0\r\n\r\n",
        "extension-lf": "5;a\nb\r\nhello\r\n0\r\n\r\n", "extension-nul": "5;a=\x00\r\nhello\r\n0\r\n\r\n",
        "extension-cr": "5;a\rb\r\nhello\r\n0\r\n\r\n", "extension-open-quote": '5;a="b\r\nhello\r\n0\r\n\r\n',
        "trailer-no-colon": "0\r\nabc\r\n\r\n", "trailer-lf": "0\r\nA: b\n\r\n", "trailer-space": "0\r\nA : b\r\n\r\n",
        "trailer-length": "0\r\nContent-Length: 5\r\n\r\n", "trailer-coding": "0\r\nTransfer-Encoding: x\r\n\r\n",
        "trailer-host": "0\r\nHost: b\r\n\r\n", "trailer-authorization": "0\r\nAuthorization: b\r\n\r\n",
        "trailer-request": "0\r\nGET / HTTP/1.1\r\nHost: b\r\n\r\n", "trailer-folded": "0\r\nA: b\r\n c\r\n\r\n",
    }.items()
]  # fmt: skip
LARGE = [
    ("line-too-long", "GET /" + "a" * 8192 + " HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    ("method-far-too-long", "A" * 9000 + " / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("method-without-end", "A" * 9000, 400),
    ("line-without-end", "GET /" + "a" * 9000, 414),
    ("field-too-large", H + "A: " + "b" * 8192 + "\r\n\r\n", 431),
    ("name-too-large", H + "a" * 8192 + ": b\r\n\r\n", 431),
    ("too-many-fields", H + "A: b\r\n" * 100 + "\r\n", 431),
    ("head-too-large", H + "".join(f"A{n}: {'b' * 7000}\r\n" for n in range(10)) + "\r\n", 431),
    ("head-without-end", H + "".join(f"A{n}: {'b' * 7000}\r\n" for n in range(10)), 431),
    ("chunk-line-too-long", C + "5;a=" + "b" * 300 + "\r\nhello\r\n0\r\n\r\n", 400),
    ("chunk-line-without-end", C + "5;a=" + "b" * 300, 400),
    ("extensions-too-long", C + ("1;a=" + "b" * 200 + "\r\nx\r\n") * 100 + "0\r\n\r\n", 400),
    ("trailers-too-many", C + "0\r\n" + "A: b\r\n" * 101 + "\r\n", 431),
    ("trailers-too-large", C + "0\r\n" + f"A: {'b' * 60000}\r\n" * 2 + "\r\n", 431),
]
BAD = REQUEST_LINES + FIELDS + LENGTHS + CODINGS + CHUNKS
AFTER = get("/notes")


@pytest.mark.parametrize(("raw", "status"), [pytest.param(raw, status, id=name) for name, raw, status in BAD + LARGE])
def test_is_refused_whole(served: Served, raw: str, status: int) -> None:
    """A malformed message gets its status and `Connection: close`; the request behind it gets nothing."""
    answer = served.ask(raw.encode("latin-1") + AFTER)
    assert status_of(answer) == status, answer[:200]
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"in_flight" not in answer


@pytest.mark.parametrize(("raw", "status"), [pytest.param(raw, status, id=name) for name, raw, status in BAD])
def test_is_refused_split_at_every_byte(served: Served, raw: str, status: int) -> None:
    """Where a message is split between two reads changes nothing."""
    data = raw.encode("latin-1")
    for position in range(1, len(data)):
        answer = served.ask(data[:position], data[position:] + AFTER)
        assert status_of(answer) == status, (position, data[:position], answer[:200])
        assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(("raw", "status"), [pytest.param(raw, status, id=name) for name, raw, status in BAD])
def test_is_refused_byte_by_byte(served: Served, raw: str, status: int) -> None:
    """A message that comes one byte at a time is judged alike."""
    data = raw.encode("latin-1")
    answer = served.ask(*[data[i : i + 1] for i in range(len(data))], AFTER)
    assert status_of(answer) == status, answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "raw",
    [
        "G",
        "GET / HT",
        "GET / HTTP/1.1\r\n",
        H,
        H + "\r",
        P + "Content-Length: 5\r\n\r\nhell",
        C + "5\r\nhel",
        C + "0\r\n",
    ],
)
def test_cut_message_is_refused(served: Served, raw: str) -> None:
    """A client that closes its sending side within a message is told so, and no application has run."""
    before = served.notes()["requests"]
    assert status_of(served.ask(raw.encode(), end=True)) == 400
    assert served.notes()["requests"] == before + 1, "only the request for the notes"
