"""Request bodies: `wsgi.input` and what stands behind it.

A small body is read before the application runs and is a BytesIO. A larger one, or one the client wants to be asked
for (`Expect: 100-continue`), is a `BodyStream`: it takes from the socket only what the application reads, so the
kernel's window holds the client back. A body that breaks a rule raises; it never ends early as if it were whole.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sharedcluster.http import policy
from sharedcluster.http.chunked import ChunkedDecoder
from sharedcluster.http.policy import Refused, Rule
from sharedcluster.http.settings import HttpSettings

if TYPE_CHECKING:
    from sharedcluster.http.connection import Connection

LIMIT_DROPPED = 65536
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class BodyError(Refused, OSError):
    """Raised in `wsgi.input`: the body broke `rule`, stopped, or was cut off. To an application it is an OSError."""

    def __init__(self, rule: Rule, detail: str = "") -> None:
        Refused.__init__(self, rule, detail)


class EmptyInput(io.RawIOBase):
    """The `wsgi.input` of all requests without a body. It has no state, so one serves all."""

    def read(self, size: int = -1, /) -> bytes:
        """No bytes: the body is at its end."""
        return b""

    def readinto(self, buffer: object, /) -> int:
        """As `read`."""
        return 0

    def readable(self) -> bool:
        """True: it can be read, there just is nothing."""
        return True

    def close(self) -> None:
        """Stay open for the next request."""


class IncomingBody:
    """The framing of one body: turns bytes of the wire into bytes of the body until it is whole."""

    __slots__ = ("_decoder", "_left", "_limit", "_taken", "rest")

    def __init__(self, length: int, settings: HttpSettings) -> None:
        self._decoder = ChunkedDecoder(settings.limit_head, settings.limit_fields) if length < 0 else None
        self._left = length
        self._limit = settings.limit_body
        self._taken = 0
        self.rest = b""
        """What followed the end of the body."""

    @property
    def is_whole(self) -> bool:
        """Whether the end has been seen."""
        return self._left == 0 if self._decoder is None else self._decoder.done

    @property
    def unread(self) -> int | None:
        """Bytes still to come; None where only the client knows."""
        if self._decoder is not None:
            return 0 if self._decoder.done else None
        return self._left

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the wire, return those of the body.

        Raises:
            Refused: They break the coding, or are more than limit_body.
        """
        if self._decoder is None:
            piece, self.rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            return piece
        piece = self._decoder.feed(data)
        self.rest = self._decoder.rest
        self._taken += len(piece)
        if self._limit and self._taken > self._limit:
            raise Refused(policy.BODY_TOO_LARGE)
        return piece


class BodyStream(io.RawIOBase):
    """A body that is read from its connection as the application reads it.

    The application gets it behind an `io.BufferedReader`, which has the whole file interface and whose `read(n)` does
    not return before it has n bytes or the end.

    Args:
        connection: Where the bytes come from.
        body: The framing of what is still to come.
        ready: Body bytes that have been read already.
        asks: Whether the client waits for 100 Continue.
    """

    def __init__(self, connection: Connection, body: IncomingBody, ready: bytes, *, asks: bool) -> None:
        self._connection = connection
        self._body = body
        self._ready = ready
        self._asks = asks
        self.failure: Refused | None = None

    @property
    def unread(self) -> int | None:
        """Bytes that have not been taken from the socket; None where only the client knows."""
        return None if self._asks else self._body.unread

    @property
    def is_nearly_read(self) -> bool:
        """Whether what is unread is known and little, so that reading and dropping it keeps the connection."""
        unread = self.unread
        return unread is not None and unread <= LIMIT_DROPPED and self.failure is None

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]  # any buffer in typeshed
        """Fill `buffer` with what there is; wait for at least one byte unless the body is at its end."""
        data = self._ready or self.take()
        size = min(len(data), len(buffer))
        buffer[:size] = data[:size]
        self._ready = data[size:]
        return size

    def take(self) -> bytes:
        """The next piece of the body, b"" at its end.

        Raises:
            BodyError: The body broke a rule; every later call raises it again.
        """
        if self.failure is not None:
            raise BodyError(self.failure.rule, self.failure.detail)
        try:
            return self._take()
        except Refused as refused:
            self.failure = refused
            raise BodyError(refused.rule, refused.detail) from None

    def _take(self) -> bytes:
        body = self._body
        while not body.is_whole:
            if self._asks:
                self._asks = False
                self._connection.send(CONTINUE)
            data = self._connection.pull()
            if not data:
                raise Refused(policy.BODY_CUT)
            piece = body.feed(data)
            if body.rest:
                self._connection.push_back(body.rest)
            if piece:
                return piece
        return b""
