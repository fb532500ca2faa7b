"""Enough of HTTP/1.1 to tell where an answer ends, what it decides about the connection, and its cookies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MORE: Final = -1
UNTIL_CLOSE: Final = -2


@dataclass(slots=True)
class Head:
    """What a client needs of a head."""

    status: int
    closes: bool
    cookies: tuple[tuple[bytes, bytes], ...]
    end: int
    length: int  # of the body; MORE for chunked, UNTIL_CLOSE without a length


def parse_head(data: bytes) -> Head | None:
    """The head at the start of `data`, or None as long as it is not whole."""
    at = data.find(b"\r\n\r\n")
    if at < 0:
        return None
    lower = data[:at].lower()
    start = lower.find(b"\r\ncontent-length:")
    if start >= 0:
        stop = lower.find(b"\r\n", start + 2)
        length = int(lower[start + 17 : stop if stop >= 0 else at])
    else:
        length = MORE if b"\r\ntransfer-encoding: chunked" in lower else UNTIL_CLOSE
    cookies = _cookies(data[:at]) if b"\r\nset-cookie:" in lower else ()
    return Head(int(data[9:12]), b"\r\nconnection: close" in lower, cookies, at + 4, length)


def is_whole(data: bytes, head: Head) -> bool:
    """Whether the answer that begins with `head` is all there."""
    if head.length >= 0:
        return len(data) >= head.end + head.length
    return head.length == MORE and data.endswith(b"0\r\n\r\n")


def _cookies(head: bytes) -> tuple[tuple[bytes, bytes], ...]:
    found = []
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"set-cookie":
            key, _, content = value.strip().split(b";", 1)[0].partition(b"=")
            found.append((key, content))
    return tuple(found)
