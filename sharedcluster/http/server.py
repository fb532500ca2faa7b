"""All live connections of one worker, between the descriptors it is handed and the application it runs.

`serve` is called in the hub for each connection; it reads at once, for under load the request is there already. What
is shared by connections lives here: the loop, the wheel of deadlines, the pool of greenlets, the counters, the line
with today's date. Draining is a state of this object: responses say `Connection: close`, an idle connection is kept
for a moment to answer a request that is on its way (closing at once would race with it).
"""

from __future__ import annotations

import logging
import os
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from sharedcluster.http.access_log import json_line, text_line
from sharedcluster.http.body import EmptyInput
from sharedcluster.http.connection import Connection
from sharedcluster.http.counters import Counters, HttpStats
from sharedcluster.http.deadlines import GONE, TICK, Wheel
from sharedcluster.http.exchange import Exchange, FileWrapper, Later
from sharedcluster.http.forwarded import REMEMBERED, AllowList
from sharedcluster.http.greenlets import GreenletPool
from sharedcluster.http.policy import Refused
from sharedcluster.http.proxy_protocol import Greeting
from sharedcluster.http.request import HeadReader
from sharedcluster.http.response import standing_fields
from sharedcluster.http.settings import Environ, HttpSettings, ListenerFacts, Proxied, ReleasedConnection
from sharedcluster.http.tls import TlsConnection
from sharedcluster.http.transport import NEVER

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("sharedcluster.http")


class Readers(dict[str, HeadReader]):
    """The two readers of a listener, found by a client's address: of those who may speak for others, and the rest."""

    def __init__(self, settings: HttpSettings, site: Environ, allowed: AllowList) -> None:
        self._allowed = allowed
        self._stranger = HeadReader(settings, site)
        self._proxy = HeadReader(settings, site, allowed)

    def __missing__(self, address: str) -> HeadReader:
        reader = self._proxy if address in self._allowed else self._stranger
        if len(self) < REMEMBERED:
            self[address] = reader
        return reader


class Server:
    """Serves `application` on the connections it is given.

    Made in the worker after it was forked and patched, in the thread whose loop serves.

    Args:
        application: Any WSGI callable.
        settings: Limits, times, trust.
        environ: Further keys for every request's environ.
    """

    def __init__(
        self, application: WSGIApplication, settings: HttpSettings, *, environ: Mapping[str, object] | None = None
    ) -> None:
        self.application = application
        self.settings = settings
        self.hub: Any = gevent.get_hub()
        self.loop: Any = self.hub.loop
        self.wheel = Wheel()
        self.greenlets = GreenletPool(self.hub, Exchange)
        self.parked = self.greenlets.parked
        self.ready = self.greenlets.ready
        self.in_flight = 0
        self.counters = Counters()
        self.is_draining = False
        self.on_idle: Callable[[ReleasedConnection], None] | None = None
        self.concurrency = settings.limit_concurrency or sys.maxsize
        self.request_timeout = settings.request_timeout
        self.access_log = settings.access_log
        self._access_line = json_line if settings.access_log_format == "json" else text_line
        self.standing = ""
        self.idle_until = NEVER
        self.unread = bytearray(4)
        """What Transport.part asks the kernel to fill in; one for all, for nobody waits between that and the look."""
        self._extra = dict(environ or {})
        self._readers: dict[int, Readers] = {}
        self._tls: dict[int, ssl.SSLContext] = {}
        self._allowed = AllowList(settings.forwarded_allow_ips)
        self._connections: set[Connection | Greeting] = set()
        self._drained = Event()
        self._timer: Any = None
        self._second = 0

    # What the worker calls.

    def add_listener(self, index: int, facts: ListenerFacts) -> None:
        """Make a listener's connections servable; `index` is what `serve` is told."""
        if facts.tls is not None:
            self._tls[index] = facts.tls
        site: Environ = {
            "SERVER_NAME": facts.host or "localhost",
            "SERVER_PORT": str(facts.port or (443 if facts.tls else 80)),
            "SERVER_SOFTWARE": "sharedcluster",
            "SCRIPT_NAME": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https" if facts.tls else "http",
            "wsgi.input": EmptyInput(),
            "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.multithread": True,
            "wsgi.multiprocess": self.settings.multiprocess,
            "wsgi.run_once": False,
            "sharedcluster.later": Later,
            **self._extra,
        }
        self._readers[index] = Readers(self.settings, site, self._allowed)

    def serve(self, fd: int, listener: int, peer: tuple[str, int] | None, proxied: Proxied | None = None) -> None:
        """Take ownership of a connected descriptor. Called in the hub; waits for nothing, raises nothing.

        Args:
            fd: A stream socket, non-blocking or not.
            listener: The index it was added with.
            peer: The client's address and port, None on a unix socket.
            proxied: What a PROXY head said when the connection was served by another worker.
        """
        os.set_blocking(fd, False)
        if self._timer is None:
            self._start_clock()
        self.counters.accepted += 1
        if self.settings.proxy_protocol and proxied is None and (peer[0] if peer else "127.0.0.1") in self._allowed:
            greeting = Greeting(self, fd, listener, peer)
            self._connections.add(greeting)
            greeting.open()
        else:
            self.begin(fd, listener, peer, proxied)

    def begin(
        self, fd: int, listener: int, peer: tuple[str, int] | None, proxied: Proxied | None, data: bytes = b""
    ) -> None:
        """Go on with a connection whose client is known; `data` is what has been read of its bytes."""
        client = proxied.client if proxied is not None and proxied.client is not None else peer
        reader = self._readers[listener]["127.0.0.1" if client is None else client[0]]
        kind = TlsConnection if listener in self._tls else Connection
        connection = kind(self, listener, fd, peer, proxied, client, reader)
        self._connections.add(connection)
        connection.open(data)

    def tls_of(self, listener: int) -> ssl.SSLContext:
        """The context of a listener that speaks TLS."""
        return self._tls[listener]

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    @property
    def requests(self) -> int:
        """Requests served since the start."""
        return self.counters.requests

    def stats(self) -> HttpStats:
        """All counters at once, for a heartbeat."""
        return self.counters.picture(len(self._connections), self.in_flight)

    def release_idle(self, most: int | None = None) -> list[ReleasedConnection]:
        """Let go of the connections that are between two requests, and return them; nothing of them is closed."""
        idle = [connection for connection in self._connections if connection.is_releasable]
        released = [connection.release() for connection in idle[:most]]
        self._check_drained()
        return released

    def release_when_idle(self, take: Callable[[ReleasedConnection], None] | None) -> None:
        """From now on give each connection that falls idle to `take`, in the hub or in a request's greenlet.

        None ends it. With this a drain closes none: it needs no `Connection: close` while somebody takes them.
        """
        self.on_idle = take

    def drain(self) -> None:
        """End: answer what is in flight or on its way, say `Connection: close`, keep nothing idle for long."""
        self.is_draining = True
        self._drained.clear()
        self._refresh(time.monotonic())
        for connection in list(self._connections):
            connection.hurry()
        self._check_drained()

    def is_drained(self) -> bool:
        """True when no connection is left."""
        return not self._connections

    def wait_drained(self, timeout: float) -> bool:
        """Wait, in a greenlet, until no connection is left; False if `timeout` seconds were not enough."""
        end = time.monotonic() + timeout
        while self._connections and (left := end - time.monotonic()) > 0:
            self._drained.clear()
            self._drained.wait(left)
        return not self._connections

    def close(self) -> None:
        """Cut everything now."""
        for connection in list(self._connections):
            connection.cut()
        self._stop_clock()

    # What connections call.

    def forget(self, connection: Connection | Greeting) -> None:
        """`connection` is closed or released."""
        if connection.slot != GONE:
            self.wheel.remove(connection)
        self._connections.discard(connection)
        if self.is_draining:
            self._check_drained()

    def moves(self, connection: Connection) -> bool:
        """Whether `connection` goes to another worker when it falls idle, so that a drain need not end it."""
        return self.on_idle is not None and connection.is_movable

    def fell_idle(self, connection: Connection) -> None:
        """`connection` waits for its next request, while the worker drains or gives idle ones away."""
        if self.on_idle is not None and connection.is_releasable:
            self.on_idle(connection.release())
        elif self.is_draining:
            connection.hurry()

    def log_exchange(self, exchange: Exchange, seconds: float) -> None:
        """Write a finished exchange, which took `seconds`, to the access log."""
        connection = exchange.connection
        environ = exchange.head.environ_for(connection.address, connection.port)
        environ["sharedcluster.request_id"] = exchange.request_id
        if exchange.response is not None:
            sent = exchange.bytes_out - len(exchange.opening)
            self._log_access(environ, exchange.response.code, sent, seconds)
        elif exchange.has_switched:
            self._log_access(environ, 101, 0, seconds)

    def count_refusal(self, refused: Refused, environ: Environ, exchange: Exchange | None) -> None:
        """A message was refused, or an `exchange` answered for; `environ` is what is known of it."""
        self.counters.refused += 1
        self.counters.by_class[refused.rule.status // 100] += 1
        log.debug("refused %s: %s", environ.get("REMOTE_ADDR"), refused)
        if self.access_log is not None:
            seconds = 0.0
            if exchange is not None:
                environ = {**environ, "sharedcluster.request_id": exchange.request_id}
                seconds = exchange.age
            self._log_access(environ, refused.rule.status, 0, seconds)

    def _log_access(self, environ: Environ, status: int, sent: int, seconds: float) -> None:
        if self.access_log is not None:
            self.access_log(self._access_line(environ, now=time.time(), status=status, sent=sent, seconds=seconds))

    # The clock.

    def _start_clock(self) -> None:
        self._refresh(time.monotonic())
        self._timer = self.loop.timer(TICK, TICK, ref=False)
        self._timer.start(self._on_tick)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _on_tick(self) -> None:
        now = time.monotonic()
        self._refresh(now)
        if self.is_draining:
            for connection in list(self._connections):
                connection.hurry()
        self.wheel.turn(now)
        if not self._connections:
            self._stop_clock()

    def _refresh(self, now: float) -> None:
        """Work out once per tick what every request needs."""
        self.wheel.now = now
        idle = self.settings.drain_linger if self.is_draining else self.settings.keep_alive or NEVER
        self.idle_until = now + idle
        second = int(time.time())
        if second != self._second:
            self._second = second
            self.standing = standing_fields(second, worker=self.settings.expose_worker)

    def _check_drained(self) -> None:
        if self.is_draining and not self._connections:
            self._drained.set()
