"""Framing a response: from what an application said to start_response to the bytes of a head. Pure, no I/O.

Laws:
- Nothing an application says can inject a field or a second response: a name is a token, a value has no control
  byte, a status is three digits and a text. Anything else is the application's mistake and becomes a 500.
- The framing is the server's: hop-by-hop fields of an application are dropped (PEP 3333 forbids them), only
  `Connection: close` is heeded.
- Chunked goes to HTTP/1.1 only; to a 1.0 client a body without a length ends with the connection.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from http import HTTPStatus

from sharedcluster.errors import SharedClusterError
from sharedcluster.http.policy import Rule

STATUS = re.compile(r"([1-9][0-9][0-9]) [\t \x21-\x7e\x80-\xff]*")
NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
VALUE = re.compile(r"[\t \x21-\x7e\x80-\xff]*")
IN_A_VALUE = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
"""The same, to be looked for with `translate`: a pattern takes ten times as many instructions."""

KNOWN = 1024
"""How many statuses and fields are remembered as valid. When they are more they are forgotten, and learned anew."""
SHORT = 256
"""Characters of a field that is worth remembering."""

_OURS = frozenset({"transfer-encoding", "keep-alive", "te", "trailer", "upgrade", "proxy-connection"})
_VOLATILE = frozenset({"set-cookie", "etag", "last-modified", "location", "expires", "date"})

_statuses: dict[str, tuple[int, str]] = {}
_fields: dict[tuple[str, str], str | int | Special] = {}

UNKNOWN_LENGTH = -1


class BadResponseError(SharedClusterError):
    """The application broke PEP 3333 or tried to send what no response may hold."""


class ResponseHead:
    """The bytes of a head and what they promise about the body. Never changed, so that equal responses share one.

    `length` is the number of body bytes that must follow, or UNKNOWN_LENGTH; `chunked` says how those are framed;
    `has_body` is false for HEAD, 1xx, 204 and 304; `kind` is the first digit of
    `code`; `source` is what it was made of.
    """

    __slots__ = ("chunked", "code", "data", "has_body", "keep_alive", "kind", "length", "source")

    def __init__(self, data: bytes, code: int, length: int, chunked: bool, has_body: bool, keep_alive: bool) -> None:
        self.data = data
        self.code = code
        self.kind = code // 100
        self.length = length
        self.chunked = chunked
        self.has_body = has_body
        self.keep_alive = keep_alive
        self.source: tuple[object, ...] = ()

    def with_cookie(self, value: str) -> bytes:
        """The bytes with one Set-Cookie more, which may differ from response to response: no framing depends on it.

        Raises:
            BadResponseError: The value holds a byte no field may hold.
        """
        try:
            line = value.encode("latin-1")
        except (AttributeError, UnicodeEncodeError):
            line = b"\0"
        if type(value) is not str or line.translate(None, IN_A_VALUE):
            check_value("Set-Cookie", value)
        return b"%bSet-Cookie: %b\r\n\r\n" % (self.data[:-2], line)


class Special:
    """A field that says something to the server: whether it ends the connection, or is a date."""

    __slots__ = ("closes", "line")

    def __init__(self, line: str, *, closes: bool) -> None:
        self.line = line
        self.closes = closes


def learn_status(status: str) -> tuple[int, str]:
    """Check a status line's text and return its code and the line up to the Date field."""
    if not isinstance(status, str) or STATUS.fullmatch(status) is None or status[0] == "1":
        raise BadResponseError(f"status {status!r} is no final status code and text")
    if len(_statuses) >= KNOWN:
        _statuses.clear()
    _statuses[status] = entry = (int(status[:3]), f"HTTP/1.1 {status}\r\n")
    return entry


def learn_field(field: tuple[str, str]) -> str | int | Special:
    """Check a field and return its line, a Content-Length as a number, or what else the framing must know.

    Raises:
        BadResponseError: The name is no token, or the value holds a byte no field may hold.
    """
    name, value = field
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise BadResponseError(f"field name {name!r} is no token")
    check_value(name, value)
    kind = name.lower()
    entry: str | int | Special = f"{name}: {value}\r\n"
    if kind == "content-length":
        if not (value.isascii() and value.isdigit() and len(value) <= 19):
            raise BadResponseError(f"Content-Length {value!r} is no number of bytes")
        entry = int(value)
    elif kind == "date":
        entry = Special(f"{name}: {value}\r\n", closes=False)
    elif kind == "connection" or kind in _OURS:
        entry = Special("", closes=kind == "connection" and "close" in value.lower())
    if kind not in _VOLATILE and len(name) + len(value) <= SHORT:
        if len(_fields) >= KNOWN:
            _fields.clear()
        _fields[field] = entry
    return entry


def check_value(name: str, value: str) -> None:
    """Raises BadResponseError if a field of that name may not hold `value`."""
    if not isinstance(value, str) or not ((value.isascii() and value.isprintable()) or VALUE.fullmatch(value)):
        raise BadResponseError(f"the value of {name} holds what no field may hold: {value!r}")


def frame(
    status: str,
    fields: Iterable[tuple[str, str]],
    standing: str,
    keep_alive: bool,
    is_head: bool,
    is_http10: bool,
    body_length: int = UNKNOWN_LENGTH,
) -> ResponseHead:
    """Build the head of a response.

    Args:
        status: As given to start_response: "200 OK".
        fields: As given to start_response.
        standing: Field lines every response carries, each with its CRLF; the first is Date.
        keep_alive: Whether the connection could live on.
        is_head: The request was HEAD.
        is_http10: The request was HTTP/1.0.
        body_length: Bytes of the body if they are known although the application did not say.

    Raises:
        BadResponseError: The application's status or fields cannot be sent.
    """
    code, text = _statuses.get(status) or learn_status(status)
    length = UNKNOWN_LENGTH
    has_date = False
    known = _fields.get
    for field in fields:
        entry = known(field)
        if entry is None:
            entry = learn_field(field)
        if type(entry) is str:
            text += entry
        elif type(entry) is int:
            if length not in (UNKNOWN_LENGTH, entry):
                raise BadResponseError("two Content-Lengths that differ")
            length = entry
        else:
            assert type(entry) is Special
            if entry.line:
                text += entry.line
                has_date = True
            keep_alive = keep_alive and not entry.closes
    text += standing[standing.index("\n") + 1 :] if has_date else standing
    has_body = not is_head
    chunked = False
    if code == 204 or code == 304:
        has_body = False
        if code == 304 and length >= 0:
            text += f"Content-Length: {length}\r\n"
    else:
        if length < 0 <= body_length and (body_length or not is_head):  # no body for HEAD says nothing of GET's
            length = body_length
        if length >= 0:
            text += f"Content-Length: {length}\r\n"
        elif not is_http10:
            chunked = has_body
            text += "Transfer-Encoding: chunked\r\n"
        elif has_body:
            keep_alive = False
    if not keep_alive:
        text += "Connection: close\r\n\r\n"
    elif is_http10:
        text += "Connection: keep-alive\r\n\r\n"
    else:
        text += "\r\n"
    return ResponseHead(text.encode("latin-1"), code, length, chunked, has_body, keep_alive)


def standing_fields(now: float, *, worker: str | None) -> str:
    """The lines every response carries; made once per second.

    Args:
        now: Seconds since the epoch.
        worker: What X-Worker says, if anything.
    """
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now))
    return f"Date: {date}\r\n" + (f"X-Worker: {worker}\r\n" if worker else "")


def refusal(rule: Rule, standing: str, *, is_head: bool = False) -> bytes:
    """The whole answer to a message that is refused; it closes its connection."""
    phrase = HTTPStatus(rule.status).phrase
    body = f"{rule.status} {phrase}\n"
    head = (
        f"HTTP/1.1 {rule.status} {phrase}\r\n{standing}Content-Type: text/plain\r\n{rule.fields}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return (head + ("" if is_head else body)).encode("latin-1")


SERVER_ERROR = Rule("application", 500, "RFC 9110 15.6.1", "an application that raised, or broke PEP 3333")
