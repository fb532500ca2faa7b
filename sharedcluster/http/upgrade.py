"""WebSocket: the connection itself for an application that asks for it, as `environ["werkzeug.socket"]`.

The key is set on requests with an `Upgrade` field. It is a promise only: as long as nothing is asked of it, the
request is like any other. At its first use the engine gives the connection up: what has been read behind the head is
put in front of what comes, and the library (simple-websocket under flask-sock) speaks for itself.

A drain sends the close frame 1001 in the library's place, for the library knows of no drain; the client answers it,
and the library ends as it does when a client leaves. No frame is sent into the middle of another.
"""

from __future__ import annotations

import _socket
import contextlib
from typing import TYPE_CHECKING, Any

import gevent
import gevent.socket

if TYPE_CHECKING:
    from sharedcluster.http.connection import Connection

GOING_AWAY = b"\x88\x02\x03\xe9"
"""RFC 6455 5.5.1, 7.4.1: a close frame with status 1001."""


class UpgradeSocket:
    """Stands for a connection's socket and becomes it when it is used."""

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self._socket: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._socket is None:
            if self._connection is None:
                raise OSError("the request is over, and so is the use of its socket")
            self._socket = self._connection.take_over()
        return getattr(self._socket, name)

    def retire(self) -> None:
        """The request is over: what nobody took stays the engine's."""
        self._connection = None


class TakenSocket(gevent.socket.socket):  # type: ignore[misc]  # gevent ships no types
    """A plain connection as a gevent socket. `prefix` is what had been read already."""

    def __init__(self, fd: int, prefix: bytes) -> None:
        super().__init__(fileno=fd)
        self._prefix = prefix
        self._senders = 0
        self._was_told = False

    def recv(self, size: int, *flags: int) -> bytes:
        """As socket.recv; first what had been read already."""
        if self._prefix:
            data, self._prefix = self._prefix[:size], self._prefix[size:]
            return data
        received: bytes = super().recv(size, *flags)
        return received

    def recv_into(self, buffer: Any, size: int = 0, *flags: int) -> int:
        """As socket.recv_into."""
        if self._prefix:
            data = self.recv(size or len(buffer))
            buffer[: len(data)] = data
            return len(data)
        received: int = super().recv_into(buffer, size, *flags)
        return received

    def send(self, data: Any, *flags: int) -> int:
        """All of `data`, unlike socket.send: libraries do not look at what it returns, and half a frame is none."""
        if self._senders:  # gevent's sendall is made of this
            sent: int = super().send(data, *flags)
            return sent
        self.sendall(data, *flags)
        return len(data)

    def sendall(self, data: Any, *flags: int) -> None:
        """As socket.sendall; it is known meanwhile that a frame is on its way."""
        self._senders += 1
        try:
            super().sendall(data, *flags)
        finally:
            self._senders -= 1

    def say_goodbye(self) -> None:
        """Send the close frame once, as soon as none of the library's frames is half sent. Called every tick."""
        if not self._senders and not self._was_told:
            self._was_told = True
            with contextlib.suppress(OSError):  # it has left, or takes nothing: the drain's deadline ends it
                self._sock.send(GOING_AWAY)


class Pump:
    """Joins an encrypted connection to a pair of plain sockets, one end of which the library gets.

    So the library has a real socket with a descriptor it can select on, and none of OpenSSL's buffers behind its back.
    """

    def __init__(self, connection: Connection, data: bytes) -> None:
        ours, theirs = _socket.socketpair()
        self.outer = TakenSocket(theirs.detach(), b"")
        self._connection = connection
        self._inner = gevent.socket.socket(fileno=ours.detach())
        self._writable: Any = connection.server.loop.io(self._inner.fileno(), 2)
        self._pending = data
        self._is_at_end = False
        self._flush()
        gevent.spawn(self._send_on)

    def feed(self, data: bytes) -> None:
        """From the loop: decrypted bytes for the library, b"" at the end. What it leaves holds the client back."""
        if data:
            self._pending += data
        else:
            self._is_at_end = True
            self._connection.unwatch()
        self._flush()

    def _flush(self) -> None:
        try:
            if self._pending:
                self._pending = self._pending[self._inner._sock.send(self._pending) :]
        except BlockingIOError:
            pass
        except OSError:
            self._pending = b""  # the library has closed its end
        if self._pending:
            self._connection.unwatch()
            self._writable.start(self._flush)
            return
        self._writable.stop()
        if self._is_at_end:
            with contextlib.suppress(OSError):
                self._inner._sock.shutdown(_socket.SHUT_WR)
        else:
            self._connection.watch()

    def _send_on(self) -> None:
        """In a greenlet of its own: what the library writes goes out encrypted, and its end is the connection's."""
        try:
            while data := self._inner.recv(65536):
                self._connection.send(data)
            self._connection.say_end()
        except OSError:
            pass
        self._connection.close()

    def close(self) -> None:
        """The connection is closed: the library reads the end."""
        self._writable.stop()
        self._writable.close()
        self._inner.close()
