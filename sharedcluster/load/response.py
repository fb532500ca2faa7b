"""Reading a response as little as a load generator has to: where it ends, and four of its fields.

Heads repeat (but for the Date of the second and the session's cookie), so what was read of one is kept under its
bytes: most responses cost one look into a dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CHUNKED: Final = -1
UNTIL_CLOSE: Final = -2


@dataclass(frozen=True, slots=True)
class Head:
    """`length` is the body's, CHUNKED or UNTIL_CLOSE."""

    status: int
    length: int
    keeps_alive: bool
    worker: str
    cookies: tuple[tuple[str, str], ...]


class BadResponseError(ValueError):
    """It is no HTTP/1.x response."""


def read_head(data: bytes, method: str) -> Head:
    """Read a head, all that stands before the empty line.

    Raises:
        BadResponseError: It is none.
    """
    line, *fields = data.split(b"\r\n")
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise BadResponseError(repr(line[:60]))
    status = int(parts[1])
    length, worker, connection = UNTIL_CLOSE, "", b""
    cookies: list[tuple[str, str]] = []
    for each in fields:
        name, _, value = each.partition(b":")
        name, value = name.strip().lower(), value.strip()
        if name == b"content-length" and length != CHUNKED:
            if not value.isdigit():
                raise BadResponseError(repr(each[:60]))
            length = int(value)
        elif name == b"transfer-encoding" and value.lower().endswith(b"chunked"):
            length = CHUNKED
        elif name == b"x-worker":
            worker = value.decode("latin-1")
        elif name == b"connection":
            connection = value.lower()
        elif name == b"set-cookie":
            key, _, content = value.partition(b";")[0].partition(b"=")
            cookies.append((key.decode("latin-1"), content.decode("latin-1")))
    if method == "HEAD" or status in (204, 304) or status < 200:
        length = 0
    keeps_alive = connection != b"close" and length != UNTIL_CLOSE and not parts[0].endswith(b"1.0")
    return Head(status, length, keeps_alive, worker, tuple(cookies))


def chunked_end(data: bytes | bytearray, start: int) -> int:
    """Where a chunked body that begins at `start` ends, or -1 if it is not all there.

    Raises:
        BadResponseError: A chunk has no size.
    """
    while True:
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return -1
        try:
            size = int(bytes(data[start:line_end]).split(b";")[0], 16)
        except ValueError as error:
            raise BadResponseError("a chunk without a size") from error
        if size == 0:
            end = data.find(b"\r\n\r\n", line_end)
            return -1 if end < 0 else end + 4
        start = line_end + 2 + size + 2
        if start > len(data):
            return -1


def chunked_body(data: bytes, start: int) -> bytes:
    """The content of a complete chunked body."""
    pieces: list[bytes] = []
    while True:
        line_end = data.index(b"\r\n", start)
        size = int(data[start:line_end].split(b";")[0], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(data[line_end + 2 : line_end + 2 + size])
        start = line_end + 2 + size + 2
