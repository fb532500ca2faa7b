"""One client connection: bytes in, requests to the application, bytes out.

Theory of operation. Each connection has one read watcher on gevent's loop for its whole life. When bytes arrive, the
loop's callback reads them, judges the head and starts the application in a pooled greenlet, all in one go; an idle
connection is this object and a watcher, no greenlet. Most applications answer without waiting, so a request is:
epoll, one read, one switch to the greenlet, one write, one switch back.

States (`phase`):

    IDLE ──bytes──> HEAD ──whole head──> BODY ──small body read──> SERVING ──answered──> IDLE
      │                │                   │                          ├── taken over by the application ──> TAKEN
      │                └──── refused ──────┴──────────> LINGERING <───┘
      └──────────── closed by either side ───> CLOSED <───┘

Laws:
- `phase` is SERVING exactly while an exchange exists; no second request is read before it has been answered.
- In SERVING the loop reads at most one piece ahead, then stops watching: a pipelining client is held back by TCP.
- Whoever waits (`waiter`) is one greenlet, and it is woken exactly once: by readiness, by time, or by the end.
- After `refuse`, nothing the client has sent or will send is looked at.
- `fd` is -1 from the moment it is closed: a greenlet that wakes up late writes to nobody, never to a stranger.
"""

from __future__ import annotations

import _socket
import io
import logging
import os
import posix
import time
from typing import TYPE_CHECKING, Any

import httptools
from greenlet import getcurrent

from sharedcluster.http import policy
from sharedcluster.http.body import BodyStream
from sharedcluster.http.chunked import ChunkedDecoder
from sharedcluster.http.exchange import SENDFILE, ClientGone, Exchange
from sharedcluster.http.policy import Refused, Rule
from sharedcluster.http.request import CHUNKED, Head, HeadReader
from sharedcluster.http.response import refusal
from sharedcluster.http.settings import Environ, Proxied, ReleasedConnection

if TYPE_CHECKING:
    from greenlet import greenlet

    from sharedcluster.http.server import Server

log = logging.getLogger("sharedcluster.http")

IDLE, HEAD, BODY, SERVING, TAKEN, LINGERING, CLOSED = range(7)

READ = 65536
NEVER = float("inf")
LINGER_TIME = 2.0
"""Seconds a client may go on sending after it was refused."""
LINGER_BYTES = 4 << 20
DRAIN_BODY = 65536
"""Unread bytes of a body that are read and dropped to keep a connection; beyond it the connection closes."""

# From posix, for gevent's monkey patch replaces os.close by one that waits for a turn of the loop.
os_close = posix.close
os_read = posix.read
os_write = posix.write


class Connection:
    """A connection and the state of its current message."""

    has_sendfile = True

    __slots__ = (
        "_buffer",
        "_decoder",
        "_early",
        "_exchange",
        "_head",
        "_is_at_end",
        "_is_opening",
        "_is_streaming",
        "_is_watching",
        "_last_bytes",
        "_last_head",
        "_lingered",
        "_waiter",
        "_waiting_on",
        "_watcher",
        "expiry",
        "fd",
        "index",
        "peer",
        "phase",
        "proxied",
        "reader",
        "server",
        "slot",
        "template",
    )

    def __init__(
        self,
        server: Server,
        index: int,
        fd: int,
        peer: tuple[str, int] | None,
        proxied: Proxied | None,
        template: Environ,
        reader: HeadReader,
    ) -> None:
        # For the connection's life.
        self.server = server
        self.index = index
        self.fd = fd
        self.peer = peer
        self.proxied = proxied
        self.template = template
        self.reader = reader
        self._watcher: Any = None
        self._is_watching = False
        self._last_bytes: bytes | None = None
        self._last_head: Head | None = None
        # For the current message.
        self.phase = IDLE
        self.expiry = NEVER
        self.slot = -1
        self._buffer = b""
        self._head: Head | None = None
        self._decoder: ChunkedDecoder | None = None
        self._early: Any = None
        self._exchange: Exchange | None = None
        self._waiter: greenlet | None = None
        self._waiting_on: Any = None
        self._is_at_end = False
        self._is_opening = True
        self._is_streaming = False
        self._lingered = 0

    # The loop's side: bytes arrive.

    def open(self) -> None:
        """Begin: under load the first request is there already, and a short-lived connection needs no watcher."""
        self.expiry = self.server.idle_until
        self.server.wheel.add(self)
        self.on_readable()
        self._is_opening = False
        self._watch()

    def _watch(self) -> None:
        if self._is_watching or self._is_opening or self._is_streaming or self._is_at_end or self.phase == CLOSED:
            return
        if self._watcher is None:
            self._watcher = self.server.loop.io(self.fd, 1)
        self._watcher.start(self.on_readable)
        self._is_watching = True

    def _unwatch(self) -> None:
        if self._is_watching:
            self._watcher.stop()
            self._is_watching = False

    def _receive(self) -> bytes:
        """Read what there is. Raises BlockingIOError if there is nothing, OSError if the connection is broken."""
        return os_read(self.fd, READ)

    def on_readable(self) -> None:
        """The loop says there are bytes, or the end."""
        try:
            data = self._receive()
            if self.phase == IDLE and data:
                self.server.counters.bytes_in += len(data)
                # The same bytes again, as a client that polls sends them, mean the same request again.
                if data == self._last_bytes:
                    self._serve(self._last_head, None)  # type: ignore[arg-type]  # set together with _last_bytes
                else:
                    self._read_head(data)
            else:
                self._on_other(data)
        except BlockingIOError:
            return
        except OSError:
            self.lose()
        except Exception:
            log.exception("[BUG] a connection is cut")
            self.lose()

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
        self._unwatch()
        if data:
            self._buffer += data
            return
        # A client may close its sending side and wait for the answer. One of an event stream does not.
        self._is_at_end = True
        exchange = self._exchange
        if exchange is not None and exchange.is_event_stream:
            exchange.end(None)

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
            head = self.reader.read(bytes_of_head, self.template)
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
        settings = self.server.settings
        if len(data) > settings.limit_head:
            raise Refused(policy.HEAD_TOO_LARGE)
        if len(data) > settings.limit_line and b"\r\n" not in data:
            raise Refused(policy.LINE_TOO_LONG)
        self._look_early(data, seen)
        self._buffer = data
        if self.phase != HEAD:
            self.phase = HEAD
            self._expire_in(settings.head_timeout)
        return True

    def _look_early(self, data: bytes, seen: int) -> None:
        """Refuse at once what llhttp finds wrong; a lone LF would else make its sender wait for the timeout."""
        if self._early is None:
            self._early = httptools.HttpRequestParser(self)
            seen = 0
        try:
            self._early.feed_data(data[seen:])
        except httptools.HttpParserError as error:
            self._early = None
            if b"\n" in data or not chr(data[0]).isalpha():
                raise self.reader.explain(data, str(error)) from None

    def _begin_body(self, head: Head) -> None:
        """A body follows, or an upgrade. Read it first if it is small and the client sends it unasked."""
        settings = self.server.settings
        ready, self._buffer = self._buffer, b""
        if head.upgrade and not head.length:
            self._buffer = ready
            self._serve(head, None)
            return
        if settings.limit_body and head.length > settings.limit_body:
            self.refuse(Refused(policy.BODY_TOO_LARGE))
            return
        self._decoder = None
        if head.length == CHUNKED:
            self._decoder = ChunkedDecoder(settings.limit_head, settings.limit_fields)
        self._head = head
        self.phase = BODY
        if head.length > settings.buffer_body or (head.expects_continue and not ready):
            self._stream_body(ready)
        else:
            self._expire_in(settings.body_timeout)
            self._read_body(ready, is_first=True)

    def _read_body(self, data: bytes, *, is_first: bool = False) -> None:
        """Take a piece of a body that is read before the application runs."""
        head = self._head
        assert head is not None
        if not is_first:
            self.expiry = self.server.wheel.now + self.server.settings.body_timeout
        settings = self.server.settings
        if self._decoder is None:
            body = self._buffer + data
            if len(body) < head.length:
                self._buffer = body
                return
            self._buffer = body[head.length :]
            self._serve(head, io.BytesIO(body[: head.length]))
            return
        try:
            self._buffer += self._decoder.feed(data)
            if settings.limit_body and len(self._buffer) > settings.limit_body:
                raise Refused(policy.BODY_TOO_LARGE)  # noqa: TRY301 - answered like what the decoder raises
        except Refused as refused:
            self.refuse(refused)
            return
        if self._decoder.done:
            body, self._buffer = self._buffer, self._decoder.rest
            self._serve(head, io.BytesIO(body))
        elif len(self._buffer) > settings.buffer_body:
            body, self._buffer = self._buffer, b""
            self._stream_body(body)

    def _stream_body(self, ready: bytes) -> None:
        """Let the application read the body itself; the loop keeps its hands off the socket meanwhile."""
        head = self._head
        assert head is not None
        self._unwatch()
        self._is_streaming = True
        if self._decoder is None:
            ready, self._buffer = ready[: head.length], ready[head.length :]
        stream = BodyStream(
            self,
            head.length,
            self._decoder,
            ready,
            self.server.settings.limit_body,
            asks=head.expects_continue and not ready,
        )
        self._serve(head, stream)

    # Serving.

    def _serve(self, head: Head, body: Any) -> None:
        """Start the application. Returns when it has answered or first waits."""
        server = self.server
        counters = server.counters
        if counters.in_flight >= server.concurrency:
            self.refuse(Refused(policy.OVERLOADED), is_head=head.is_head)
            return
        counters.in_flight += 1
        self.phase = SERVING
        self._head = None
        if server.request_timeout:
            self._expire_in(server.request_timeout)
        else:
            self.expiry = NEVER
        self._exchange = exchange = Exchange(self, head, body)
        server.greenlets.start(exchange)

    def can_live_on(self, body: Any) -> bool:
        """Whether the connection can serve another request after this one, as far as its body goes."""
        if type(body) is not BodyStream:
            return True
        unread = body.unread
        return unread is not None and unread <= DRAIN_BODY and body.failure is None

    def finish(self, exchange: Exchange) -> None:
        """The exchange is over (called in its greenlet): be idle again, or end."""
        server = self.server
        server.count(exchange)
        self._exchange = None
        self._is_streaming = False
        if self.phase != SERVING:  # lost, refused or taken over meanwhile
            if self.phase == LINGERING:
                self._watch()
            return
        response = exchange.response
        if response is None or not response.keep_alive or not self._drop_body(exchange.input):
            self._end(exchange)
            return
        self.phase = IDLE
        self.expiry = server.idle_until
        if self._buffer or self._is_at_end:
            # From the loop, so that a pipelining client takes turns with the others.
            server.loop.run_callback(self._go_on)
        else:
            if not self._is_watching:
                self._watch()
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
        self._watch()

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
        if self.phase != SERVING:
            return
        if exchange.head.keep_alive or self._buffer or type(exchange.input) is BodyStream or self._has_more():
            self._linger()
        else:
            self.close()

    def _has_more(self) -> bool:
        """Whether a client that announced its last request has sent more; closing then would reset the connection."""
        try:
            return self._receive() != b""
        except OSError:
            return False

    # The greenlet's side.

    def send(self, data: bytes) -> None:
        """Send all of `data`, waiting only if the client does not take it.

        Raises:
            ClientGone: The client has left, or took nothing for write_timeout.
        """
        try:
            sent = os_write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ClientGone(str(error)) from None
        if sent < len(data):
            rest = memoryview(data)[sent:]
            while rest:
                self._wait_writable()
                rest = rest[self._try_write(rest) :]

    def _try_write(self, data: memoryview) -> int:
        try:
            return os_write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ClientGone(str(error)) from None

    def send_file(self, fd: int, offset: int, size: int) -> None:
        """Send a part of a file from kernel to kernel; raises as `send`."""
        end = offset + size
        while offset < end:
            try:
                sent = os.sendfile(self.fd, fd, offset, min(end - offset, SENDFILE))
            except BlockingIOError:
                self._wait_writable()
                continue
            except OSError as error:
                raise ClientGone(str(error)) from None
            if sent == 0:
                raise ClientGone("the file became shorter while it was sent")
            offset += sent

    def pull(self) -> bytes:
        """The next bytes for a body that is being streamed; b"" at the end of the connection."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        while True:
            if self.fd < 0:
                raise ClientGone("the connection was closed")
            try:
                data = self._receive()
            except BlockingIOError:
                self._wait_readable()
                continue
            except OSError as error:
                raise ClientGone(str(error)) from None
            self.server.counters.bytes_in += len(data)
            return data

    def push_back(self, data: bytes) -> None:
        """Bytes behind the end of a body: the next message's."""
        self._buffer = data + self._buffer

    def _wait_readable(self) -> None:
        if self._watcher is None:
            self._watcher = self.server.loop.io(self.fd, 1)
        self._unwatch()
        if not self._wait(self._watcher, self.server.settings.body_timeout):
            raise Refused(policy.BODY_TIMEOUT)

    def _wait_writable(self) -> None:
        if self.fd < 0:
            raise ClientGone("the connection was closed")
        watcher = self.server.loop.io(self.fd, 2)
        try:
            if not self._wait(watcher, self.server.settings.write_timeout):
                raise ClientGone("took nothing for write_timeout")
        finally:
            watcher.close()

    def _wait(self, watcher: Any, seconds: float) -> bool:
        """Wait in this greenlet for `watcher`; False when `seconds` have passed without it."""
        before = self.expiry
        self._waiter = getcurrent()
        if seconds:
            self.expiry = min(before, time.monotonic() + seconds)
            self.server.wheel.sooner(self)
        self._waiting_on = watcher
        watcher.start(self._wake)
        try:
            is_ready = bool(self.server.hub.switch())
        finally:
            self._waiter = self._waiting_on = None
            watcher.stop()
            if watcher is self._watcher:
                self._is_watching = False
            if self.phase == SERVING:
                self.expiry = before
        if self.fd < 0:
            raise ClientGone("the connection was closed")
        return is_ready

    def _wake(self, is_ready: bool = True) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.switch(is_ready)

    # Leaving.

    @property
    def is_releasable(self) -> bool:
        """Between two requests, with not one byte of the next read: another worker can go on with it."""
        return self.phase == IDLE and not self._buffer and not self._is_at_end and not self._is_opening

    def release(self) -> ReleasedConnection:
        """Let go of the descriptor without closing it."""
        released = ReleasedConnection(self.fd, self.index, self.peer, self.proxied)
        self._detach()
        return released

    def hurry(self) -> None:
        """The worker drains: an idle connection has until `drain_linger` to send one more request."""
        if self.phase == IDLE:
            self.expiry = self.server.idle_until
            self.server.wheel.sooner(self)

    def cut(self) -> None:
        """Close now, and end the application's work on it."""
        exchange = self._exchange
        self.close()
        if exchange is not None:
            self.server.loop.run_callback(exchange.end, None)

    # Time and the end.

    def _expire_in(self, seconds: float) -> None:
        self.expiry = time.monotonic() + seconds if seconds else NEVER  # the wheel's time may be old
        self.server.wheel.sooner(self)

    def expire(self, now: float) -> None:
        """The wheel: `expiry` has passed."""
        phase = self.phase
        if phase == SERVING:
            exchange = self._exchange
            timeout = self.server.request_timeout
            if exchange is not None and timeout and now - exchange.started_at >= timeout:
                self.expiry = NEVER
                exchange.end(policy.REQUEST_TIMEOUT)
            else:
                self.expiry = NEVER
                self._wake(False)
        elif phase == HEAD:
            self.refuse(Refused(policy.HEAD_TIMEOUT))
        elif phase == BODY:
            self.refuse(Refused(policy.BODY_TIMEOUT))
        elif phase == IDLE:
            self._close_idle()
        else:
            self.close()

    def _close_idle(self) -> None:
        """Nothing came for keep_alive. Look once more, for the loop may have been busy while a request arrived."""
        self.expiry = self.server.idle_until
        self.on_readable()
        if self.phase == IDLE and self._buffer == b"" and self._exchange is None:
            self.close()

    def refuse(self, refused: Refused, *, is_head: bool = False) -> None:
        """Answer a message that breaks a rule, as far as the client takes it at once, and end."""
        server = self.server
        rule: Rule = refused.rule
        server.count_refusal(refused)
        retry_after = 1 if rule is policy.OVERLOADED else None
        answer = refusal(rule, server.standing, is_head=is_head, retry_after=retry_after)
        try:
            self._try_write(memoryview(answer))
        except ClientGone:
            self.lose()
            return
        self._linger()

    def _linger(self) -> None:
        """Half-close, then read and drop for a bounded while: closing with unread input would reset the connection,
        and a reset can take the answer from the client's hands (RFC 9112 9.6).
        """
        self._buffer = b""
        self._early = None
        self.phase = LINGERING
        self._expire_in(LINGER_TIME)
        sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, self.fd)
        try:
            sock.shutdown(_socket.SHUT_WR)
        except OSError:
            self.lose()
            return
        finally:
            sock.detach()
        if self._is_at_end:
            self.close()
        else:
            self._watch()

    def lose(self) -> None:
        """The client is gone, or the connection is worth nothing more."""
        self.close()

    def close(self) -> None:
        """Close the descriptor and forget everything."""
        if self.phase != CLOSED:
            os_close(self._detach())

    def _detach(self) -> int:
        """Stop watching, forget everything, and return the descriptor."""
        self.phase = CLOSED
        if self._waiting_on is not None:
            self._waiting_on.stop()
            self.server.loop.run_callback(self._wake, False)
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        fd, self.fd = self.fd, -1
        self.expiry = NEVER
        self._buffer = b""
        self._last_bytes = self._last_head = self._early = None
        self.server.forget(self)
        return fd
