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


class BodyStream(io.RawIOBase):
    """A body that is read from its connection as the application reads it.

    Args:
        connection: Where the bytes come from.
        left: Bytes still to come, for a body with a Content-Length.
        decoder: For a chunked one.
        ready: Body bytes that have been read (and decoded) already.
        limit: `limit_body` of the settings.
        asks: Whether the client waits for 100 Continue.
    """

    def __init__(
        self,
        connection: Connection,
        left: int,
        decoder: ChunkedDecoder | None,
        ready: bytes,
        limit: int,
        *,
        asks: bool,
    ) -> None:
        self._connection = connection
        self._left = left - len(ready)
        self._decoder = decoder
        self._ready = ready
        self._taken = len(ready)
        self._limit = limit
        self._asks = asks
        self.failure: Refused | None = None

    @property
    def unread(self) -> int | None:
        """Bytes that have not been taken from the socket; None where only the client knows."""
        if self._decoder is not None:
            return 0 if self._decoder.done else None
        return None if self._asks and self._left else self._left

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
        decoder = self._decoder
        while decoder is None or not decoder.done:
            if decoder is None and not self._left:
                return b""
            if self._asks:
                self._asks = False
                self._connection.send(CONTINUE)
            data = self._connection.pull()
            if not data:
                raise Refused(policy.BODY_CUT)
            if decoder is None:
                piece, rest = data[: self._left], data[self._left :]
                self._left -= len(piece)
            else:
                piece = decoder.feed(data)
                rest = decoder.rest
            if rest:
                self._connection.push_back(rest)
            self._taken += len(piece)
            if self._limit and self._taken > self._limit:
                raise Refused(policy.BODY_TOO_LARGE)
            if piece:
                return piece
        return b""
