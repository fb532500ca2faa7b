"""Who the client is: PROXY protocol and forwarding fields, from those who may speak for others and from the rest."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.http.conftest import Served, get, read_all, status_of

Serve = Callable[..., Served]
SPOOFS = (
    "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil", "X-Forwarded-Prefix: /evil",
    "X-Real-IP: 6.6.6.6", "Forwarded: for=6.6.6.6",
)  # fmt: skip


def seen(answer: bytes) -> dict[str, Any]:
    """The environ /echo saw."""
    environ: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["environ"]
    return environ


def test_fields_of_strangers_never_reach_the_application(serve: Serve) -> None:
    """With nobody allowed, no forwarding field is even visible."""
    served = serve(forwarded_allow_ips=["10.0.0.0/8"])
    environ = seen(served.ask(get("/echo", *SPOOFS)))
    assert not [key for key in environ if "FORWARDED" in key or "REAL_IP" in key]
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["REMOTE_ADDR"] == ""


def test_allowed_proxy_speaks_for_its_client(served: Served) -> None:
    """By default the local proxy's For and Proto count; what it passes through of the rest does not."""
    with served.connect() as sock:
        fields = ("X-Forwarded-For: 6.6.6.6, 192.0.2.7", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil")
        sock.sendall(get("/echo", *fields))
        environ = seen(read_all(sock))
    assert environ["REMOTE_ADDR"] == "192.0.2.7"
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["HTTP_HOST"] == "test"
    assert environ["SCRIPT_NAME"] == ""


def test_contradiction_is_refused(served: Served) -> None:
    """A proxy that says http and https at once, or no scheme at all, is misconfigured."""
    assert status_of(served.ask(get("/", "X-Forwarded-Proto: http", "X-Forwarded-Ssl: on"))) == 400
    assert status_of(served.ask(get("/", "X-Forwarded-Proto: javascript"))) == 400


V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 80\r\n"
V2_HEAD = b"\r\n\r\n\x00\r\nQUIT\n"
V2 = (
    V2_HEAD
    + b"\x21\x11"
    + struct.pack("!H", 12 + 4)
    + bytes([192, 0, 2, 7, 198, 51, 100, 1])
    + b"\x12\x67\x00\x50"
    + b"TLV!"
)
V2_6 = V2_HEAD + b"\x21\x21\x00\x24" + socket.inet_pton(socket.AF_INET6, "2001:db8::7") * 2 + b"\x12\x67\x00\x50"


@pytest.mark.parametrize(
    ("head", "client"),
    [(V1, "192.0.2.7"), (V2, "192.0.2.7"), (V2_6, "2001:db8::7"),
     (b"PROXY TCP6 2001:db8::7 ::1 1 2\r\n", "2001:db8::7"),
     (b"PROXY UNKNOWN\r\n", ""), (b"PROXY UNKNOWN ffff:f...f 1 2\r\n", ""), (V2_HEAD + b"\x20\x00\x00\x00", "")],
)  # fmt: skip
def test_proxy_heads_split_at_every_byte(serve: Serve, head: bytes, client: str) -> None:
    """Both versions, wherever they are split; the request behind may come with the same packet."""
    served = serve(proxy_protocol=True)
    data = head + get("/echo")
    for position in range(1, len(data)):
        assert seen(served.ask(data[:position], data[position:]))["REMOTE_ADDR"] == client
    assert seen(served.ask(data))["REMOTE_ADDR"] == client


@pytest.mark.parametrize(
    "head",
    [
        b"", b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 80\n", b"PROXY TCP4 192.0.2.777 198.51.100.1 4711 80\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.1 4711 80\r\n", b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 99999\r\n",
        b"PROXY UNKNOWN " + b"x" * 100 + b"\r\n", b"proxy tcp4 192.0.2.7 198.51.100.1 4711 80\r\n",
        V2_HEAD + b"\x31\x11\x00\x0c" + b"x" * 12, V2_HEAD + b"\x21\x11\x00\x04" + b"x" * 4,
        V2_HEAD + b"\x22\x11\x00\x0c" + b"x" * 12, V2_HEAD + b"\x21\x11\xff\xff",
    ],
)  # fmt: skip
def test_connection_without_a_proper_head_is_closed(serve: Serve, head: bytes) -> None:
    """Where the protocol is expected, nothing else is served: no head, no answer."""
    served = serve(proxy_protocol=True)
    assert served.ask(head + get("/echo"), end=True) == b""


def test_proxy_head_counts_at_the_first_byte_only(serve: Serve) -> None:
    """On a later request, or where the protocol is off or the peer not allowed, it is a malformed request."""
    served = serve(proxy_protocol=True)
    answer = served.ask(V1 + get("/plain", close=False), V1 + get("/notes"))
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1 400") == 1
    assert status_of(serve().ask(V1 + get("/echo"))) == 400
    assert status_of(serve(proxy_protocol=True, forwarded_allow_ips=["10.0.0.0/8"]).ask(V1 + get("/echo"))) == 400


def test_client_behind_two_proxies(serve: Serve) -> None:
    """What the PROXY head names is the peer from then on: its fields count only if it is allowed itself."""
    served = serve(proxy_protocol=True, forwarded_allow_ips=["127.0.0.1", "192.0.2.7"])
    environ = seen(served.ask(V1 + get("/echo", "X-Forwarded-For: 203.0.113.9")))
    assert environ["REMOTE_ADDR"] == "203.0.113.9"
    other = V1.replace(b"192.0.2.7", b"192.0.2.8")
    assert seen(served.ask(other + get("/echo", "X-Forwarded-For: 203.0.113.9")))["REMOTE_ADDR"] == "192.0.2.8"


def test_proxied_client_survives_migration(serve: Serve) -> None:
    """A released connection knows its client on the next worker too, and is asked for no second PROXY head."""
    served = serve(proxy_protocol=True)
    with served.connect() as sock:
        sock.sendall(V1 + get("/echo", close=False))
        assert seen(sock.recv(10000))["REMOTE_ADDR"] == "192.0.2.7"
        served.ask(V1 + get("/migrate"))
        sock.sendall(get("/echo"))
        assert seen(read_all(sock))["REMOTE_ADDR"] == "192.0.2.7"


def test_slow_proxy_head_ends(serve: Serve) -> None:
    """A connection whose head does not come has head_timeout."""
    served = serve(proxy_protocol=True, head_timeout=0.5)
    with served.connect() as sock:
        sock.sendall(V1[:10])
        assert sock.recv(100) == b""
