"""One process of the generator: many clients on raw sockets in one epoll loop.

Laws:

1. A client has one request under way at the most, as a browser's connection has.
2. With a rate, a request is due at a fixed time and its latency counts from then, also when every client is busy and
   it has to wait: a server that stands still is not spared the requests that would have been sent meanwhile
   (coordinated omission, which ab, wrk and hey commit).
3. A connection that the server closes between two requests is no error, as long as nothing was sent on it.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from sharedcluster.load.plan import Plan, Tally, share
from sharedcluster.load.response import (
    CHUNKED,
    UNTIL_CLOSE,
    BadResponseError,
    Head,
    chunked_body,
    chunked_end,
    read_head,
)

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
PROGRESS_INTERVAL: Final = 0.5
SWEEP_INTERVAL: Final = 0.1
HEADS_KEPT: Final = 4096
RECONNECT_DELAY: Final = 0.05
"""Seconds a client rests after a refused connection, or a server that is away would keep the generator spinning."""


class Client:
    """One connection after the other, and the cookies that came over them."""

    __slots__ = ("begun", "buffer", "busy", "connecting", "cookies", "count", "due", "handshaking", "head", "left",
                 "mask", "received", "request", "rests_until", "sock", "to_send")  # fmt: skip

    def __init__(self, request: bytes, left: int) -> None:
        self.request = request
        self.left = left
        """Requests it may still send, if that is fixed for each client."""
        self.sock: socket.socket | None = None
        self.mask = 0
        self.connecting = False
        self.handshaking = False
        self.busy = False
        self.due = 0.0
        self.begun = 0.0
        self.to_send = b""
        self.buffer = b""
        self.head: Head | None = None
        self.received = 0
        self.cookies: dict[str, str] = {}
        self.count = 0
        self.rests_until = 0.0


class Generator:
    """A share of the plan.

    Args:
        plan: The whole.
        index: Which of its processes this is.
        address: What `getaddrinfo` said of the target.
        progress: Called about twice a second with the number of answers and errors so far.
    """

    def __init__(
        self, plan: Plan, index: int, address: tuple[int, tuple[object, ...]], progress: Callable[[int, int], None]
    ) -> None:
        self.plan = plan
        self.tally = Tally()
        self._family, self._address = address
        self._progress = progress
        self._tls = _tls_context() if plan.target.is_tls else None
        count, self._quota = share(plan, index)
        request = plan.head({}) + plan.body
        self._clients = [Client(request, plan.per_client) for _ in range(count)]
        self._idle = deque(self._clients)
        self._by_fd: dict[int, Client] = {}
        self._waiting: deque[float] = deque()
        self._begun = 0
        self._heads: dict[bytes, Head] = {}
        self._poll = select.epoll()
        self._interval = plan.processes / plan.rate if plan.rate else 0.0
        self._offset = index / plan.rate if plan.rate else 0.0
        self._started = 0.0
        self._ends_at = float("inf")
        self._over = False

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Tally:
        """Send everything, or until the time is over; returns what was seen."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._started = time.perf_counter()
        if self.plan.seconds:
            self._ends_at = self._started + self.plan.seconds
        next_sweep = next_progress = self._started
        while self._clients:
            now = time.perf_counter()
            if now >= self._ends_at:
                self._over = True
            self._begin_what_is_due(now)
            if self._is_done():
                break
            for fd, mask in self._poll.poll(self._wait(now)):
                if client := self._by_fd.get(fd):
                    self._on_event(client, mask)
            if now >= next_sweep:
                next_sweep = now + SWEEP_INTERVAL
                self._sweep(now)
            if now >= next_progress:
                next_progress = now + PROGRESS_INTERVAL
                self._progress(self.tally.answered, self.tally.errors.total())
        ended = time.perf_counter()
        for client in self._clients:
            self._disconnect(client)
        self._poll.close()
        self.tally.seconds = ended - self._started
        self.tally.cpu = [_cpu_since(usage) / max(self.tally.seconds, 1e-9)]
        return self.tally

    def stop(self) -> None:
        """Begin nothing more; what is under way may be answered."""
        self._ends_at = 0.0

    def _is_done(self) -> bool:
        if any(client.busy for client in self._clients):
            return False
        return self._over or self._nothing_left()

    def _nothing_left(self) -> bool:
        if self.plan.per_client:
            return all(client.left <= 0 for client in self._clients)
        return bool(self._quota) and self._begun >= self._quota

    def _wait(self, now: float) -> float:
        """Seconds that epoll may wait."""
        if self._interval and self._idle and not self._over:
            return max(0.0, min(SWEEP_INTERVAL, self._next_due() - now))
        return SWEEP_INTERVAL

    def _next_due(self) -> float:
        return self._started + self._offset + self.tally.offered * self._interval

    def _begin_what_is_due(self, now: float) -> None:
        if self._over:
            return
        if self._interval:
            while (due := self._next_due()) <= now and (not self._quota or self.tally.offered < self._quota):
                if due >= self._ends_at:
                    break
                self.tally.offered += 1
                self._waiting.append(due)
            for _ in range(min(len(self._waiting), len(self._idle))):
                self._begin_one(self._waiting.popleft(), now)
            return
        for _ in range(len(self._idle)):
            if self._nothing_left():
                return
            self._begin_one(now, now)

    def _begin_one(self, due: float, now: float) -> None:
        """Give a request to the first idle client that may send one."""
        client = self._idle.popleft()
        if client.rests_until > now or (self.plan.per_client and client.left <= 0):
            self._idle.append(client)
            if self._interval:
                self._waiting.appendleft(due)
            return
        client.left -= 1
        self._begun += 1
        client.busy = True
        client.due = due
        client.begun = now
        self._send_or_connect(client)

    # -- a client --------------------------------------------------------------------------------------------------

    def _send_or_connect(self, client: Client) -> None:
        client.to_send = client.request
        client.buffer = b""
        client.head = None
        client.received = 0
        if client.sock is None:
            self._connect(client)
        else:
            self._send(client)

    def _connect(self, client: Client) -> None:
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError as error:
            self._failed(client, _named(error))
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(self._address)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            self._failed(client, _named(OSError(code, "")))
            return
        client.sock = sock
        client.connecting = True
        self.tally.connections += 1
        self._by_fd[sock.fileno()] = client
        client.mask = WRITE
        self._poll.register(sock, WRITE)

    def _watch(self, client: Client, mask: int) -> None:
        if client.mask != mask and client.sock is not None:
            client.mask = mask
            self._poll.modify(client.sock, mask)

    def _on_event(self, client: Client, mask: int) -> None:
        try:
            if client.connecting:
                self._connected(client)
            elif client.handshaking:
                self._shake(client)
            elif mask & ~WRITE:
                self._receive(client)
            else:
                self._send(client)
        except BadResponseError as error:
            self._failed(client, f"bad response: {error}")
        except OSError as error:
            self._failed(client, _named(error))

    def _connected(self, client: Client) -> None:
        sock = client.sock
        assert sock is not None
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, "")
        client.connecting = False
        if self._tls:
            del self._by_fd[sock.fileno()]
            self._poll.unregister(sock)
            client.sock = sock = self._tls.wrap_socket(
                sock, server_hostname=self.plan.target.host, do_handshake_on_connect=False
            )
            self._by_fd[sock.fileno()] = client
            self._poll.register(sock, WRITE)
            client.mask, client.handshaking = WRITE, True
            self._shake(client)
            return
        self._send(client)

    def _shake(self, client: Client) -> None:
        assert isinstance(client.sock, ssl.SSLSocket)
        try:
            client.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._watch(client, READ)
            return
        except ssl.SSLWantWriteError:
            self._watch(client, WRITE)
            return
        client.handshaking = False
        self._send(client)

    def _send(self, client: Client) -> None:
        assert client.sock is not None
        if client.to_send is client.request:
            self.tally.sent += 1
        try:
            sent = client.sock.send(client.to_send)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            sent = 0
        except (BrokenPipeError, ConnectionResetError) as error:
            self._failed(client, _named(error))
            return
        client.to_send = client.to_send[sent:]
        self._watch(client, READ | (WRITE if client.to_send else 0))

    def _receive(self, client: Client) -> None:
        assert client.sock is not None
        try:
            data = client.sock.recv(262144)
            while isinstance(client.sock, ssl.SSLSocket) and client.sock.pending():
                data += client.sock.recv(262144)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if not client.busy:  # the server closes an idle connection, or speaks out of turn
            self.tally.closed_idle += 1
            self._disconnect(client)
            return
        self.tally.bytes_in += len(data)
        if not data:
            self._closed(client)
            return
        client.received += len(data)
        client.buffer = client.buffer + data if client.buffer else data
        self._judge(client)

    def _closed(self, client: Client) -> None:
        if client.head is not None and client.head.length == UNTIL_CLOSE:
            self._answered(client, client.head, client.buffer)
        elif client.received:
            self._failed(client, "closed in the middle of a response")
        else:
            self._failed(client, "closed before a response")

    def _judge(self, client: Client) -> None:
        """See whether the response is complete."""
        head = client.head
        if head is None:
            end = client.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            raw = client.buffer[:end]
            head = self._heads.get(raw)
            if head is None:
                head = read_head(raw, self.plan.method)
                if len(self._heads) > HEADS_KEPT:
                    self._heads.clear()
                self._heads[raw] = head
            client.buffer = client.buffer[end + 4 :]
            if 100 <= head.status < 200:
                self._judge(client)
                return
            client.head = head
        if head.length >= 0:
            if len(client.buffer) >= head.length:
                self._answered(client, head, client.buffer)
        elif head.length == CHUNKED and chunked_end(client.buffer, 0) >= 0:
            self._answered(client, head, client.buffer)

    def _answered(self, client: Client, head: Head, body: bytes) -> None:
        tally = self.tally
        tally.answered += 1
        tally.latency.add(time.perf_counter() - client.due)
        tally.statuses[head.status] += 1
        if head.worker:
            tally.workers[head.worker] += 1
        if self.plan.sessions:
            self._check_session(client, head, body)
        if not (head.keeps_alive and self.plan.keep_alive):
            self._disconnect(client)
        self._rest(client)

    def _rest(self, client: Client) -> None:
        client.busy = False
        self._idle.append(client)

    # -- sessions --------------------------------------------------------------------------------------------------

    def _check_session(self, client: Client, head: Head, body: bytes) -> None:
        """The count in the session must go up by one with every answer; a request that failed may have counted."""
        if head.cookies:
            client.cookies.update(head.cookies)
            client.request = self.plan.head(client.cookies) + self.plan.body
        try:
            content = chunked_body(body, 0) if head.length == CHUNKED else body
            count = int(json.loads(content)["count"])
        except (ValueError, KeyError, TypeError, IndexError):
            self.tally.uncounted += 1
            return
        self.tally.increments += 1
        self.tally.lost += max(0, client.count + 1 - count)
        client.count = count

    # -- failures --------------------------------------------------------------------------------------------------

    def _failed(self, client: Client, what: str) -> None:
        if client.busy:
            self.tally.errors[what] += 1
            self._rest(client)
            client.rests_until = time.perf_counter() + RECONNECT_DELAY
        self._disconnect(client)

    def _disconnect(self, client: Client) -> None:
        sock, client.sock = client.sock, None
        client.connecting = client.handshaking = False
        if sock is not None:
            self._by_fd.pop(sock.fileno(), None)
            sock.close()

    def _sweep(self, now: float) -> None:
        for client in self._clients:
            if client.busy and now - client.begun > self.plan.timeout:
                self._failed(client, f"no answer within {self.plan.timeout:g} s")


def _named(error: OSError) -> str:
    known = {
        errno.ECONNREFUSED: "connection refused",
        errno.ECONNRESET: "reset",
        errno.EPIPE: "reset",
        errno.ETIMEDOUT: "connection timed out",
        errno.EMFILE: "this process is out of descriptors (ulimit -n)",
        errno.EADDRNOTAVAIL: "this machine is out of local ports",
    }
    return known.get(error.errno or 0) or (os.strerror(error.errno) if error.errno else str(error))


def _tls_context() -> ssl.SSLContext:
    """Certificates are not checked: what is measured is a server of ours."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _cpu_since(before: resource.struct_rusage) -> float:
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
