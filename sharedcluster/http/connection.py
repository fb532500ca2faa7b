"""One client connection: bytes in, requests to the application, bytes out.

Theory of operation. Each connection has one read watcher on gevent's loop for its whole life. When bytes arrive, the
loop's callback reads them and judges the head; the application starts in a pooled greenlet, at once if nothing else
has come, or else when all that has come was read (`greenlets`). An idle connection is this object and a watcher, no
greenlet. Most applications answer without waiting, so a request is: epoll, one read, one write, and at most one switch
to a greenlet and one back.

States (`phase`):

    IDLE ──bytes──> HEAD ──whole head──> BODY ──small body read──> SERVING ──answered──> IDLE
      │                │                   │                          ├── taken over by the application ──> TAKEN
      │                └──── refused ──────┴──────────> LINGERING <───┘
      └──────────── closed by either side ───> CLOSED <───┘

Laws:
- `phase` is SERVING exactly while an exchange exists; no second request is read before it has been answered.
- In SERVING the loop reads at most one piece ahead, then stops watching: a pipelining client is held back by TCP. Only
  beside an event stream, which may never write again, it goes on looking for the client's end.
- After `refuse`, nothing the client has sent or will send is looked at.
"""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING, Any

from sharedcluster.http import policy
from sharedcluster.http.body import BodyStream, IncomingBody
from sharedcluster.http.deadlines import GONE
from sharedcluster.http.exchange import Exchange
from sharedcluster.http.policy import Refused
from sharedcluster.http.request import Head, HeadReader, PartialHead
from sharedcluster.http.response import refusal
from sharedcluster.http.settings import Environ, Proxied, ReleasedConnection
from sharedcluster.http.transport import NEVER, READ, ClientGone, Transport, os_close
from sharedcluster.http.upgrade import TakenSocket

if TYPE_CHECKING:
    from sharedcluster.http.server import Server

log = logging.getLogger("sharedcluster.http")

IDLE, HEAD, BODY, SERVING, TAKEN, LINGERING, CLOSED = range(7)

LINGER_TIME = 2.0
"""Seconds a client may go on sending after it was refused."""
LINGER_BYTES = 4 << 20


class Connection(Transport):
    """A connection and the state of its current message."""

    __slots__ = (
        "_body",
        "_buffer",
        "_early",
        "_exchange",
        "_head",
        "_is_at_end",
        "_is_opening",
        "_last_bytes",
        "_last_fields",
        "_last_head",
        "_lingered",
        "_taken",
        "address",
        "index",
        "peer",
        "phase",
        "port",
        "proxied",
        "reader",
    )

    def __init__(
        self,
        server: Server,
        index: int,
        fd: int,
        peer: tuple[str, int] | None,
        proxied: Proxied | None,
        client: tuple[str, int] | None,
        reader: HeadReader,
    ) -> None:
        # For the connection's life.
        self.server = server
        self.fd = fd
        self.index = index
        self.peer = peer
        self.proxied = proxied
        self.reader = reader
        self.address, self.port = ("", "") if client is None else (client[0], f"{client[1]}")
        self.slot = GONE
        self._watcher = self._waiter = self._waiting_on = None
        self._is_watching = False
        self._is_held = self._is_opening = True
        # What was said last; at first what another connection began with, for this one may begin with the same.
        self._last_bytes, self._last_head = reader.newest
        self._last_fields: bytes | None = None
        # For the current message.
        self.phase = IDLE
        self.expiry = server.idle_until
        self._buffer = b""
        self._head: Head | None = None
        self._body: IncomingBody | None = None
        self._early: PartialHead | None = None
        self._exchange: Exchange | None = None
        self._taken: Any = None
        self._is_at_end = False

    # The loop's side: bytes arrive.

    def open(self, data: bytes = b"") -> None:
        """Begin: under load the first request is there already, and a short-lived connection needs no watcher.

        `data` is what has been read before, behind a PROXY head.
        """
        if data:
            self._buffer = data
            self._go_on()
        else:
            self.on_readable()
        if self.phase == CLOSED:
            return
        self._is_opening = False
        if self.slot == GONE:  # else it had to be added before
            self.server.wheel.add(self)
        if type(self._exchange) is Exchange and type(self._exchange.input) is BodyStream:
            return  # whose bytes are the application's
        self._is_held = self._is_at_end or self.phase == TAKEN
        self.watch()

    def on_readable(self) -> None:
        """The loop says there are bytes, or the end."""
        try:
            data = self.receive()
            if self.phase == IDLE and data:
                self.server.counters.bytes_in += len(data)
                # The same bytes again, as a client that polls sends them, mean the same request again.
                if data == self._last_bytes:
                    self._serve(self._last_head, None)  # type: ignore[arg-type]  # set together with _last_bytes
                elif self._is_opening or not self._read_known(data):
                    self._read_head(data)
            else:
                self._on_other(data)
        except BlockingIOError:
            return
        except OSError:
            self._lose()
        except Exception:
            log.exception("[BUG] a connection is cut")
            self.close()

    def _lose(self) -> None:
        """The connection is broken. An event stream that waits for its next event would never find out by itself."""
        if self._exchange is not None and self._exchange.is_event_stream:
            self._exchange.end(None)
        else:
            self.close()

    def _read_known(self, data: bytes) -> bool:
        """If the fields are those of the last request, only the request line has to be read, or the cookie."""
        last, last_head = self._last_bytes, self._last_head
        if last is None or last_head is None:
            return False
        # Whose cookie has changed once, will change it again.
        head = None if last_head.around is None else self.reader.read_cookie(data, last, last_head)
        if head is None:
            fields = self._last_fields
            if fields is None:
                self._last_fields = fields = last[last.index(b"\r\n") :]
            if data.endswith(fields):
                head = self.reader.read_line(data, fields, last_head)
            elif last_head.around is None:
                head = self.reader.read_cookie(data, last, last_head)
            if head is None:
                return False
        if head.around is not None:
            self._last_fields = None
        self._last_bytes = data
        self._last_head = head
        self._serve(head, None)
        return True

    def _on_other(self, data: bytes) -> None:
        """Bytes in any state but between two messages, or the end in any state."""
        self.server.counters.bytes_in += len(data)
        phase = self.phase
        if phase == LINGERING:
            self._lingered += len(data)
            if not data or self._lingered > LINGER_BYTES:
                self.close()
        elif phase == SERVING:
            self._read_ahead(data)
        elif phase == TAKEN:
            self.on_taken_data(data)
        elif not data:
            if phase == IDLE:
                self.close()
            else:
                self.refuse(Refused(policy.BODY_CUT))
        elif phase == HEAD:
            self._read_head(self._buffer + data, len(self._buffer))
        elif phase == BODY:
            self._read_body(data)

    def _read_ahead(self, data: bytes) -> None:
        """A request is being served, and the client has sent more, or its end."""
        exchange = self._exchange
        is_event_stream = exchange is not None and exchange.is_event_stream
        if data:
            self._buffer += data
            if is_event_stream and len(self._buffer) <= READ:
                return  # go on watching, for only so its client's end is seen
        else:
            self._is_at_end = self._is_held = True
        self.unwatch()
        # A client may close its sending side and wait for the answer. One of an event stream does not.
        if exchange is not None and is_event_stream:
            exchange.end(None)

    def begin_event_stream(self) -> None:
        """An event stream begins, which may never write again: from here on the loop looks out for its client's end.

        Raises:
            ClientGone: It has left already.
        """
        if self._is_at_end:
            raise ClientGone("left before its event stream began")
        self.watch()

    def _read_head(self, data: bytes, seen: int = 0) -> None:
        """`data` is all there is of the next message, `seen` bytes of which have been looked at before."""
        end = data.find(b"\r\n\r\n", max(seen - 3, 0)) + 4
        try:
            if end < 4 or data.startswith(b"\r\n"):
                if not self._is_incomplete(data, seen):
                    self._early = None
                    self._read_head(data[2:])
                return
            is_all = end == len(data)
            bytes_of_head = data if is_all else data[:end]
            head = self.reader.read_first(bytes_of_head) if self._is_opening else self.reader.read(bytes_of_head)
        except Refused as refused:
            self.refuse(refused)
            return
        self._early = None
        self._buffer = b"" if is_all else data[end:]
        if head.length or head.upgrade:
            self._begin_body(head)
        else:
            if is_all:
                self._last_bytes = data
                self._last_fields = None
                self._last_head = head
            self._serve(head, None)

    def _is_incomplete(self, data: bytes, seen: int) -> bool:
        """Wait for the rest of a head, unless what there is can no longer become one.

        Returns False if one empty line stands before a request line (RFC 9112 2.2 asks to ignore it).
        """
        if data.startswith(b"\r\n"):
            if data.startswith(b"\r\n\r"):
                raise Refused(policy.LEADING_LINES)
            if len(data) > 2:
                return False
        if self._early is None:
            self._early = PartialHead(self.reader)
            seen = 0
        self._early.look(data, seen)
        self._buffer = data
        if self.phase != HEAD:
            self.phase = HEAD
            self.expire_in(self.server.settings.head_timeout)
        return True

    def _begin_body(self, head: Head) -> None:
        """A body follows, or an upgrade. Read it first if it is small and the client sends it unasked."""
        settings = self.server.settings
        if head.upgrade and not head.length:
            self._serve(head, None)
            return
        self._head = head
        if settings.limit_body and head.length > settings.limit_body:
            self.refuse(Refused(policy.BODY_TOO_LARGE))
            return
        ready, self._buffer = self._buffer, b""
        self._body = IncomingBody(head.length, settings)
        self.phase = BODY
        if head.expects_continue and not ready:
            self._stream_body(head, asks=True)
        else:
            self.expire_in(settings.body_timeout)
            self._read_body(ready)

    def _read_body(self, data: bytes) -> None:
        """Take a piece of a body that is read before the application runs."""
        head, body = self._head, self._body
        assert head is not None
        assert body is not None
        settings = self.server.settings
        self.expiry = self.server.wheel.now + settings.body_timeout if settings.body_timeout else NEVER
        try:
            self._buffer += body.feed(data)
        except Refused as refused:
            self.refuse(refused)
            return
        if body.is_whole:
            whole, self._buffer = self._buffer, body.rest
            self._serve(head, io.BytesIO(whole))
        elif max(head.length, len(self._buffer)) > settings.buffer_body:
            self._stream_body(head, asks=False)

    def _stream_body(self, head: Head, *, asks: bool) -> None:
        """Let the application read the body itself; the loop keeps its hands off the socket meanwhile."""
        assert self._body is not None
        self.unwatch()
        self._is_held = True
        ready, self._buffer = self._buffer, b""
        self._serve(head, BodyStream(self, self._body, ready, asks=asks))

    # Serving.

    def _serve(self, head: Head, body: Any) -> None:
        """Start the application, or let it start when the loop has read what else has come."""
        server = self.server
        if server.in_flight >= server.concurrency:
            self.refuse(Refused(policy.OVERLOADED), is_head=head.is_head)
            return
        server.in_flight += 1
        self.phase = SERVING
        if server.request_timeout:
            self.expire_in(server.request_timeout)
        else:
            self.expiry = NEVER
        self._exchange = exchange = Exchange(self, head, body)
        ready = server.ready
        if self._is_opening or not (ready or server.loop.pendingcnt):
            # A new connection waits for nobody: what is not begun when a worker dies should still be in the kernel.
            parked = server.parked
            worker = parked.pop() if parked else server.greenlets.make()
            worker.switch(exchange)
            return
        # More has come in this pass of the loop: read it first.
        if not ready:
            server.loop.run_callback(server.greenlets.run_ready)
        ready.append(exchange)

    def finish(self, exchange: Exchange) -> None:
        """The exchange is over (called in its greenlet): be idle again, or end."""
        self._exchange = None
        body = exchange.input
        if body is not None:
            self._head = self._body = None
        self._is_held = self._is_opening or self._is_at_end
        if self.phase != SERVING:  # lost, refused or taken over meanwhile
            if self.phase == LINGERING:
                self.watch()
            elif self.phase == TAKEN:
                self.end_taken()
            return
        if not exchange.keep_alive or (body is not None and not self._drop_body(body)):
            if self.phase == SERVING:  # else it was lost while the body was dropped
                self._end(exchange)
            return
        server = self.server
        self.phase = IDLE
        self.expiry = server.idle_until
        if self._buffer or self._is_at_end:
            # From the loop, so that a pipelining client takes turns with the others.
            server.loop.run_callback(self._go_on)
        else:
            if not self._is_watching:
                self.watch()
            if server.is_draining or server.on_idle is not None:
                server.fell_idle(self)

    def _go_on(self) -> None:
        """Serve what was read ahead."""
        if self.phase != IDLE:
            return
        data, self._buffer = self._buffer, b""
        if data:
            self._read_head(data)
        elif self._is_at_end:
            self.close()
        self.watch()

    def _drop_body(self, body: Any) -> bool:
        """Read what the application left of a body, which is known to be little."""
        if type(body) is not BodyStream:
            return True
        try:
            while body.unread:
                body.take()
        except OSError:
            return False
        return body.unread == 0

    def _end(self, exchange: Exchange) -> None:
        """The last response has been sent. Close at once if the client asked for it and all it sent was read."""
        if exchange.head.keep_alive or self._buffer or type(exchange.input) is BodyStream or not self.part():
            self._linger()
        else:
            self.close()

    def push_back(self, data: bytes) -> None:
        """Bytes behind the end of a body: the next message's."""
        self._buffer = data + self._buffer

    def pull(self) -> bytes:
        """The next bytes for a body that is being streamed; b"" at the end of the connection."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        data = self.receive_or_wait()
        self.server.counters.bytes_in += len(data)
        return data

    def take_over(self) -> Any:
        """The application wants the connection itself: from here on the engine neither reads nor writes it.

        Returns:
            A socket, in front of whose bytes stands what has been read behind the head.
        """
        exchange = self._exchange
        if self.phase != SERVING or exchange is None or exchange.has_begun:
            raise ClientGone("the connection is closed, or its response has begun")
        exchange.is_over = exchange.has_switched = True
        self.phase = TAKEN
        self.unwatch()
        self.expiry = NEVER
        prefix, self._buffer = self._buffer, b""
        self._taken = self.make_socket(prefix)
        return self._taken

    def make_socket(self, prefix: bytes) -> Any:
        """What `take_over` returns."""
        self._is_held = True
        fd, self.fd = self.fd, -1
        return TakenSocket(fd, prefix)

    def on_taken_data(self, data: bytes) -> None:
        """Bytes for an application that has taken over; a plain connection does not read them."""

    def end_taken(self) -> None:
        """The application that had taken over is done."""
        self.close()

    # Leaving.

    is_movable = True
    """Whether another worker could go on with the connection once it is idle."""

    @property
    def is_releasable(self) -> bool:
        """Between two requests, with not one byte of the next read: another worker can go on with it."""
        return (
            self.is_movable
            and self.phase == IDLE
            and not self._buffer
            and not self._is_at_end
            and not self._is_opening
        )

    def release(self) -> ReleasedConnection:
        """Let go of the descriptor without closing it."""
        fd, self.fd = self.fd, -1
        self.close()
        return ReleasedConnection(fd, self.index, self.peer, self.proxied)

    def hurry(self) -> None:
        """The worker drains: who is idle may send one more request; who never ends is told to."""
        if self.phase == TAKEN:
            if self._taken is not None:
                self._taken.say_goodbye()
        elif self.phase == IDLE or (self._exchange is not None and self._exchange.is_event_stream):
            self.expiry = min(self.expiry, self.server.idle_until)
            self.server.wheel.sooner(self)

    def cut(self) -> None:
        """Close now, and end the application's work on it."""
        exchange = self._exchange
        if exchange is not None and self.phase == SERVING:
            log.warning("cut after %.1f s: %s", exchange.age, exchange.describe())
        self.close()
        if exchange is not None:
            self.server.loop.run_callback(self._end_cut, exchange)

    def _end_cut(self, exchange: Exchange) -> None:
        """From the loop: end an exchange that has not ended by itself, for closing woke it if it waited to write."""
        if self._exchange is exchange:
            exchange.end(None)

    def expire(self, now: float) -> None:
        """The wheel: `expiry` has passed."""
        phase = self.phase
        if phase == SERVING:
            self._expire_serving()
        elif phase == HEAD:
            self.refuse(Refused(policy.HEAD_TIMEOUT))
        elif phase == BODY:
            self.refuse(Refused(policy.BODY_TIMEOUT))
        elif phase == IDLE:
            self._close_idle()
        elif phase != TAKEN:
            self.close()

    def _expire_serving(self) -> None:
        """A wait has taken too long, or the request has."""
        exchange = self._exchange
        if exchange is None:
            return
        timeout = self.server.request_timeout
        if exchange.is_event_stream:
            if self.server.is_draining and not self._wake(False):
                exchange.wind_up()
        elif timeout and exchange.age >= timeout:
            exchange.end(policy.REQUEST_TIMEOUT)
        elif not self._wake(False):
            self.expiry = NEVER

    def _close_idle(self) -> None:
        """Nothing came for keep_alive. Look once more, for the loop may have been busy while a request arrived."""
        self.expiry = self.server.idle_until
        self.on_readable()
        if self.phase == IDLE and not self._buffer and self._exchange is None:
            self.say_end()
            self.close()

    def refuse(self, refused: Refused, *, is_head: bool = False) -> None:
        """Answer a message that breaks a rule, as far as the client takes it at once, and end."""
        server = self.server
        exchange = self._exchange
        head = self._head if exchange is None else exchange.head
        environ: Environ = {"REMOTE_ADDR": self.address} if head is None else head.environ_for(self.address, self.port)
        server.count_refusal(refused, environ, exchange)
        standing = server.standing if exchange is None else exchange.add_id(server.standing)
        try:
            self.answer(refusal(refused.rule, standing, is_head=is_head))
            self._linger()
        except OSError:
            self.close()

    def _linger(self) -> None:
        """Half-close, then read and drop for a bounded while: closing with unread input would reset the connection,
        and a reset can take the answer from the client's hands (RFC 9112 9.6).
        """
        self._buffer = b""
        self._early = None
        self._lingered = 0
        self.phase = LINGERING
        self.expire_in(LINGER_TIME)
        try:
            self.half_close()
        except OSError:
            self.close()
            return
        if self._is_at_end:
            self.close()
        else:
            self._is_held = self._is_opening
            self.watch()

    def close(self) -> None:
        """Close the descriptor, unless it is another's by now, and forget everything."""
        if self.phase == CLOSED:
            return
        self.phase = CLOSED
        if self._watcher is not None or self._waiting_on is not None:
            self.detach()
        self.expiry = NEVER
        self._buffer = b""
        self.server.forget(self)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os_close(fd)
        if self._taken is not None:
            taken, self._taken = self._taken, None
            taken.close()
