"""What an operator can set about HTTP, and what a listener says about its connections."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Limits, times and trust of the engine. Sizes are bytes, times are seconds, 0 switches a limit off.

    The limits on the head cannot be switched off: `limit_head` bounds the memory an unread request can take.
    """

    limit_head: int = 65536
    """Request line and fields together; beyond it 431 (414 for the request line, which has `limit_line`)."""
    limit_line: int = 8192
    """The request line, and any one field line."""
    limit_fields: int = 100
    limit_body: int = 0
    limit_concurrency: int = 0
    """Requests being served at once by this worker; one more is answered 503 with Retry-After."""
    buffer_body: int = 65536
    """A body up to this size is read whole before the application runs; a larger one is streamed."""
    keep_alive: float = 75.0
    head_timeout: float = 10.0
    """From the first byte of a head to its last."""
    body_timeout: float = 30.0
    """Between two pieces of a body."""
    write_timeout: float = 30.0
    """Between two pieces the client takes."""
    request_timeout: float = 0.0
    """From the start of the application to the last byte of its answer."""
    drain_linger: float = 2.0
    """How long a drain keeps an idle connection, so as to answer a request that is on its way."""
    forwarded_allow_ips: tuple[str, ...] = ("127.0.0.1",)
    """Addresses and networks whose forwarding headers count; "*" is everyone, "" is nobody.
    The peer of a unix socket counts as 127.0.0.1."""
    forwarded_headers: tuple[str, ...] = ("for", "proto")
    """Which of for, proto, host, port, prefix are taken from an allowed peer. The last three are passed through by
    many proxies as their client sent them, so they are opt-in, as in werkzeug's ProxyFix."""
    proxy_protocol: bool = False
    """Expect a PROXY protocol head (v1 or v2) at the start of every connection from an allowed peer.
    It is off by default, and required when on: a sender's absence of a head must never be a client's choice."""
    access_log: Callable[[str], None] | None = None
    """Called with one line per response."""
    access_log_format: str = "text"
    """text or json."""
    expose_worker: str | None = None
    """The value of an `X-Worker` field on every response."""
    multiprocess: bool = True


@dataclass(frozen=True, slots=True)
class ListenerFacts:
    """What a connection's listener says to its environ.

    `host` is an IP address ("" for a unix socket, whose path is in `unix_path`). `tls` is a context that was made
    once, before the workers were forked, so that its session tickets open on every one of them.
    """

    host: str = ""
    port: int = 0
    unix_path: str | None = None
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Proxied:
    """What a PROXY protocol head said of a connection; travels with it from worker to worker."""

    client: tuple[str, int] | None
    """None where the proxy spoke for itself (LOCAL, UNKNOWN)."""


@dataclass(frozen=True, slots=True)
class ReleasedConnection:
    """An idle connection that has left its server: whoever holds this owns `fd`."""

    fd: int
    listener: int
    peer: tuple[str, int] | None
    proxied: Proxied | None


Environ = dict[str, object]
Extra = Mapping[str, object]
