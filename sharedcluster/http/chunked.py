"""The chunked coding of RFC 9112 7.1, read strictly and without waiting: bytes in, body bytes out.

llhttp could do this too, but it neither says where a message ends within a buffer nor bounds extensions and trailers,
so the ten states of this format are ours. The tests hold it against llhttp and h11 at every split.
"""

from __future__ import annotations

import re

from sharedcluster.http import policy
from sharedcluster.http.policy import Refused

LIMIT_LINE = 256
"""Bytes of one chunk's size line, extensions included."""
LIMIT_EXTENSIONS = 16384
"""Bytes of all extensions of one body (CVE-2024-21647, CVE-2023-39326: reading them costs, and they carry nothing)."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
EXTENSION = (
    rb";" + TOKEN + rb"(?:=(?:" + TOKEN + rb'|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"))?'
)
SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})((?:" + EXTENSION + rb")*)\r\n")
SIZE_START = re.compile(rb"[0-9A-Fa-f]{0,16}(?:;[^\n\r\x00]*)?\r?")
TRAILER = re.compile(rb"(" + TOKEN + rb"):[\t \x21-\x7e\x80-\xff]*\r\n")

_SIZE, _DATA, _DATA_END, _TRAILERS = range(4)


class ChunkedDecoder:
    """Decodes one body. `done` turns true at its end, and `rest` then holds what followed it."""

    __slots__ = (
        "_buffer",
        "_extensions",
        "_left",
        "_limit_fields",
        "_limit_head",
        "_state",
        "_trailers",
        "done",
        "rest",
    )

    def __init__(self, limit_head: int = 65536, limit_fields: int = 100) -> None:
        self.done = False
        self.rest = b""
        self._buffer = b""
        self._left = 0
        self._state = _SIZE
        self._extensions = 0
        self._trailers: list[int] = []
        self._limit_head = limit_head
        self._limit_fields = limit_fields

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the wire and return the body bytes they complete.

        Raises:
            Refused: With the rule the coding breaks; the decoder is of no more use then.
        """
        buffer = self._buffer + data if self._buffer else data
        position = 0
        pieces: list[bytes] = []
        while not self.done:
            if self._state == _DATA:
                piece = buffer[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._state = _DATA_END
            elif self._state == _DATA_END:
                ending = buffer[position : position + 2]
                if ending != b"\r\n":
                    if ending in (b"", b"\r"):
                        break
                    raise Refused(policy.CHUNK_BAD, "no CRLF after the data")
                position += 2
                self._state = _SIZE
            elif (line := self._take_line(buffer, position)) is None:
                break
            else:
                position += len(line)
                self._take(line)
        self._buffer = b"" if self.done else buffer[position:]
        if self.done:
            self.rest = buffer[position:]
        return b"".join(pieces)

    def _take_line(self, buffer: bytes, position: int) -> bytes | None:
        """The next line with its end, or None if it is incomplete (and may still become a good one)."""
        end = buffer.find(b"\n", position) + 1
        line = buffer[position:end] if end else buffer[position:]
        if self._state == _SIZE:
            if len(line) > LIMIT_LINE:
                raise Refused(policy.CHUNK_TOO_LARGE)
            if not end and SIZE_START.fullmatch(line) is None:
                raise Refused(policy.CHUNK_BAD, "size line")
        elif sum(self._trailers) + len(line) > self._limit_head:
            raise Refused(policy.TRAILER_TOO_LARGE)
        return line if end else None

    def _take(self, line: bytes) -> None:
        if self._state == _SIZE:
            match = SIZE_LINE.fullmatch(line)
            if match is None:
                raise Refused(policy.CHUNK_BAD, "size line")
            self._extensions += len(match[2])
            if self._extensions > LIMIT_EXTENSIONS:
                raise Refused(policy.CHUNK_TOO_LARGE)
            self._left = int(match[1], 16)
            self._state = _DATA if self._left else _TRAILERS
        elif line == b"\r\n":
            self.done = True
        else:
            match = TRAILER.fullmatch(line)
            if match is None or match[1].lower() in policy.FORBIDDEN_TRAILERS:
                raise Refused(policy.TRAILER_BAD, line[:40].decode("latin-1"))
            self._trailers.append(len(line))
            if len(self._trailers) > self._limit_fields:
                raise Refused(policy.TRAILER_TOO_LARGE)
