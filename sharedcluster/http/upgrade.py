"""WebSocket: the connection itself for an application that asks for it, as `environ["werkzeug.socket"]`.

The key is set on requests with an `Upgrade` field. It is a promise only: as long as nothing is asked of it, the
request is like any other. At its first use the engine gives the connection up: what has been read behind the head is
put in front of what comes, and the library (simple-websocket under flask-sock) speaks for itself.

A drain sends the close frame 1001 in the library's place, for the library knows of no drain; the client answers it,
and the library ends as it does when a client leaves. No frame is sent into the middle of another.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import gevent.socket
from gevent import get_hub

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


class TakenTlsSocket:
    """An encrypted connection as what WebSocket libraries use of a socket."""

    def __init__(self, connection: Any, prefix: bytes) -> None:
        self._connection = connection
        self._prefix = prefix
        self._senders = 0
        self._was_told = False
        self._timeout: float | None = None

    def fileno(self) -> int:
        """The descriptor. What it says about readiness is about the wire, not about what has been decrypted."""
        fd: int = self._connection.fd
        return fd

    def settimeout(self, seconds: float | None) -> None:
        """Seconds a recv may wait."""
        self._timeout = seconds

    def gettimeout(self) -> float | None:
        """What settimeout was told."""
        return self._timeout

    def recv(self, size: int) -> bytes:
        """Wait for bytes; b"" at the end."""
        while not self._prefix:
            try:
                data = self._connection.receive()
                if not data:
                    return b""
                self._prefix = data
            except BlockingIOError:
                self._wait_readable()
            except ssl.SSLError:
                return b""
        data, self._prefix = self._prefix[:size], self._prefix[size:]
        return data

    def _wait_readable(self) -> None:
        watcher = get_hub().loop.io(self._connection.fd, 1)
        try:
            if self._timeout is None:
                get_hub().wait(watcher)
            else:
                with gevent.Timeout(self._timeout, TimeoutError("timed out")):
                    get_hub().wait(watcher)
        finally:
            watcher.close()

    def send(self, data: Any) -> int:
        """All of `data`."""
        self._senders += 1
        try:
            self._connection.send(bytes(data))
        finally:
            self._senders -= 1
        return len(data)

    sendall = send

    def shutdown(self, how: int) -> None:
        """Say the end of what is sent."""
        self._connection.say_end()

    def close(self) -> None:
        """Nothing: the engine closes the connection when the request ends."""

    def say_goodbye(self) -> None:
        """As TakenSocket's."""
        if not self._senders and not self._was_told:
            self._was_told = True
            with contextlib.suppress(OSError):
                self._connection.answer(GOING_AWAY)
