"""A connected descriptor on gevent's loop: reading in the loop's callback, writing and waiting in a greenlet.

Laws:
- Every call is tried first; only what would block waits.
- Whoever waits (`_waiter`) is one greenlet, woken exactly once: by readiness, by time, or by the end.
- `fd` is -1 from the moment it is closed: a greenlet that wakes up late writes to nobody, never to a stranger.
- The read watcher calls either the connection (`on_readable`) or one waiting greenlet, never both.
"""

from __future__ import annotations

import os
import posix
import time
from _socket import AF_INET, MSG_MORE, SHUT_WR, SOCK_NONBLOCK, SOCK_STREAM, socket
from fcntl import ioctl
from termios import FIONREAD
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from sharedcluster.http import policy
from sharedcluster.http.policy import Refused

if TYPE_CHECKING:
    from greenlet import greenlet

    from sharedcluster.http.server import Server

READ = 65536
NEVER = float("inf")
SENDFILE = 1 << 20
"""Bytes per sendfile, so that one large file does not keep the loop from others."""

# From posix, for gevent's monkey patch replaces os.close by one that waits for a turn of the loop.
os_close = posix.close
os_read = posix.read
os_write = posix.write

NON_BLOCKING_STREAM = SOCK_STREAM | SOCK_NONBLOCK
NONE_UNREAD = bytes(4)
"""What FIONREAD fills in for a descriptor with nothing to read: an int of C, 0."""


class ClientGone(OSError):  # noqa: N818 - a fact, as in "client disconnected"
    """The client has left, or takes nothing: there is nobody to answer."""


class Transport:
    """What a connection is apart from HTTP. `expiry` and `slot` are what the wheel needs."""

    has_sendfile = True
    sends_now = True
    """Whether `send_now` is possible."""

    __slots__ = ("_is_held", "_is_watching", "_waiter", "_waiting_on", "_watcher", "expiry", "fd", "server", "slot")
    # Set by Connection.__init__, in one go with its own: a connection that lives for one request feels each call.
    server: Server
    fd: int
    expiry: float
    slot: int
    _watcher: Any
    _is_watching: bool
    _is_held: bool
    _waiter: greenlet | None
    _waiting_on: Any

    def on_readable(self) -> None:
        """The loop says there are bytes, or the end."""
        raise NotImplementedError

    def watch(self) -> None:
        """Let the loop call `on_readable`, unless the connection is closed or held (its bytes are somebody's)."""
        if self._is_watching or self._is_held or self.fd < 0:
            return
        if self._watcher is None:
            self._watcher = self.server.loop.io(self.fd, 1)
        self._watcher.start(self.on_readable)
        self._is_watching = True

    def unwatch(self) -> None:
        """Leave what comes in the kernel."""
        if self._is_watching:
            self._watcher.stop()
            self._is_watching = False

    def receive(self) -> bytes:
        """Read what there is. Raises BlockingIOError if there is nothing, OSError if the connection is broken."""
        return os_read(self.fd, READ)

    def receive_or_wait(self) -> bytes:
        """In a greenlet: the next bytes, b"" at the end.

        Raises:
            Refused: BODY_TIMEOUT, when nothing comes.
            ClientGone: The connection is broken.
        """
        while self.fd >= 0:
            try:
                return self.receive()
            except BlockingIOError:
                self._wait_readable()
            except OSError as error:
                raise ClientGone(str(error)) from None
        raise ClientGone("the connection was closed")

    def send(self, data: bytes | memoryview) -> None:
        """In a greenlet: send all of `data`, waiting only if the client does not take it.

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
            self._send_rest(memoryview(data)[sent:])

    def send_last(self, data: bytes) -> None:
        """As `send`, and then close the sending side: `data` is all that was left to say.

        The end leaves in the segment of the data, so there is one packet less to make and one wake-up less for the
        client; it leaves now, not with the last copy of the descriptor, which may be another process's; and whatever
        the client sends from here on can reset the connection, but not take back what it was sent.
        """
        sock = self._as_socket()
        try:
            sent = sock.send(data, MSG_MORE)
            if sent == len(data):
                sock.shutdown(SHUT_WR)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ClientGone(str(error)) from None
        finally:
            sock.detach()
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:])

    def _as_socket(self) -> socket:
        """For calls that need one. To be detached: the descriptor stays the connection's. The family says nothing.

        Raises:
            ClientGone: The connection is closed.
        """
        if self.fd < 0:
            raise ClientGone("the connection was closed")
        # Made non-blocking, or a default timeout of the application's would let a send wait for the client.
        return socket(AF_INET, NON_BLOCKING_STREAM, 0, self.fd)

    def _send_rest(self, rest: memoryview) -> None:
        while rest:
            self._wait_writable()
            rest = rest[self.send_now(rest) :]

    def send_now(self, data: bytes | memoryview) -> int:
        """Send what the client takes at once, and return how many bytes that was. Raises ClientGone."""
        try:
            return os_write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ClientGone(str(error)) from None

    def send_file(self, fd: int, offset: int, size: int) -> None:
        """In a greenlet: send a part of a file from kernel to kernel; raises as `send`."""
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

    def answer(self, data: bytes) -> None:
        """Write as much of a short message as the client takes at once; raises ClientGone."""
        self.send_now(data)

    def part(self) -> bool:
        """Say the last word before the descriptor is closed. False if the client has sent what was not read.

        Closing would reset the connection then.
        """
        unread = self.server.unread
        try:
            ioctl(self.fd, FIONREAD, unread)  # not a read: that there is nothing would be an exception, which is dear
        except OSError:
            return True
        return unread == NONE_UNREAD

    def say_end(self) -> None:
        """Tell the peer, where the transport has words for it, that nothing more will be sent."""

    def half_close(self) -> None:
        """Close the sending side only; raises OSError if the client has left."""
        self.say_end()
        sock = self._as_socket()
        try:
            sock.shutdown(SHUT_WR)
        finally:
            sock.detach()

    def detach(self) -> None:
        """Stop watching, and wake whoever waits."""
        if self._waiting_on is not None:
            self._waiting_on.stop()
            self.server.loop.run_callback(self._wake, False)
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None
        self._is_watching = False

    # Waiting, in a greenlet.

    def _wait_readable(self) -> None:
        self.unwatch()
        if self._watcher is None:
            self._watcher = self.server.loop.io(self.fd, 1)
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
        """Wait for `watcher`; False when `seconds` have passed without it."""
        before = self.expiry
        mine = self.expiry = min(before, time.monotonic() + seconds) if seconds else before
        self.server.wheel.sooner(self)
        self._waiter = getcurrent()
        self._waiting_on = watcher
        watcher.start(self._wake)
        try:
            is_ready = self.server.hub.switch() is not False
        finally:
            self._waiter = self._waiting_on = None
            watcher.stop()
            if self.expiry == mine:  # else the connection has moved on: it lingers, or is closed
                self.expiry = before
        if self.fd < 0:
            raise ClientGone("the connection was closed")
        return is_ready

    def _wake(self, is_ready: bool = True) -> bool:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return False
        waiter.switch(is_ready)
        return True

    # The wheel's side.

    def expire_in(self, seconds: float) -> None:
        """Expire `seconds` from now; 0 is never."""
        self.expiry = time.monotonic() + seconds if seconds else NEVER  # the wheel's time may be old
        self.server.wheel.sooner(self)

    def expire(self, now: float) -> None:
        """`expiry` has passed."""
        raise NotImplementedError
