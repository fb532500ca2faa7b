"""A request's head: from bytes to the environ of PEP 3333, or to the rule it breaks.

Theory of operation. A reader speaks for one listener and one trust. A head is judged whole, once its empty line has
arrived: llhttp runs over it without one call back into Python, so its strict grammar costs 0.1 us on a small head and
0.4 us on a browser's. What it accepts holds no bare CR or LF and no folded line, so that splitting at CRLF and at the
first colon reads exactly the fields llhttp saw. The rules llhttp leaves open are applied to the result (`policy`).

Laws:
- One parser serves all connections, because it is fed whole heads only and never waits inside one. After any head that
  could leave it within a body, closed or upgraded, it is thrown away; and nobody is refused by a used one.
- Nothing here waits, reads a clock or touches a socket.
- What a `Head` says is never changed: whoever sends the same bytes again is served from it, on any connection of the
  listener. So it says nothing of a client but what a proxy said of one; `environ_for` adds who sent it.
"""

from __future__ import annotations

import re
from typing import Any

import httptools

from sharedcluster.http import policy
from sharedcluster.http.forwarded import AllowList, Forwarding
from sharedcluster.http.grammar import explain_request_line, is_target, refuse_coding, refuse_odd_length, unescape
from sharedcluster.http.policy import Refused
from sharedcluster.http.response import ResponseHead
from sharedcluster.http.settings import Environ, Extra, HttpSettings

DROP = ""
"""The environ key of fields that never reach the application."""

CHUNKED = -1
"""The `length` of a body that says its own length."""

VERSIONS = ("HTTP/1.1", "HTTP/1.0")
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+;=%-]+)(?::([0-9]{0,5}))?")
ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
FORWARDING = frozenset({"HTTP_FORWARDED", "HTTP_X_REAL_IP", "HTTP_X_CLIENT_IP", "HTTP_X_SCHEME", "HTTP_X_URL_SCHEME"})

COOKIE = b"\r\nCookie: "
PRINTABLE = bytes(range(0x20, 0x7F))
"""What a cookie's value may hold without more being said about it. Looked for with `translate`: a pattern takes ten
times as many instructions."""

SPACE = 0x20

KNOWN_NAMES = 512
"""How many spellings of field names, and of hosts, are remembered; beyond it each is worked out anew."""

FIRST_HEADS = 256
"""How many heads that began a connection are remembered; when they are more, all are forgotten and learned anew."""
SHORT_HEAD = 2048
"""Bytes of a head that is worth remembering."""


class LastResponse:
    """The last response head that answered a request, kept with it because the next one is mostly the same."""

    __slots__ = ("head",)

    def __init__(self) -> None:
        self.head: ResponseHead | None = None


class Head:
    """What the engine must know of a request: its environ (a template, to be copied) and its framing.

    A head that differs from the one before only in its cookie shares the template: `cookie` then stands in for the
    template's, and `around` is what stands before and behind the cookie in the bytes of both.
    """

    __slots__ = (
        "around",
        "cookie",
        "environ",
        "expects_continue",
        "is_head",
        "is_http10",
        "keep_alive",
        "last",
        "length",
        "names_client",
        "upgrade",
    )

    def __init__(self, environ: Environ, length: int, is_head: bool, last: LastResponse) -> None:
        self.environ = environ
        self.length = length
        self.is_head = is_head
        self.last = last
        self.is_http10 = self.expects_continue = self.upgrade = self.names_client = False
        self.keep_alive = True
        self.cookie: str | None = None
        self.around: tuple[bytes, bytes] | None = None

    def environ_for(self, address: str, port: str) -> Environ:
        """The environ of one request, whose client is there ("", "" on a unix socket) unless a proxy has named it."""
        environ = self.environ.copy()
        if self.cookie is not None:
            environ["HTTP_COOKIE"] = self.cookie
        if not self.names_client:
            environ["REMOTE_ADDR"] = address
            if port:
                environ["REMOTE_PORT"] = port
            else:
                del environ["REMOTE_PORT"]
        return environ


class HeadReader:
    """Reads heads for all connections of one listener and one trust.

    Args:
        settings: Limits, and which forwarding fields count.
        site: What the listener says to every environ.
        allowed: Given for peers that may speak for others; without it their forwarding fields are dropped.
    """

    def __init__(self, settings: HttpSettings, site: Extra, allowed: AllowList | None = None) -> None:
        # The keys of the client have their place from the start: to set one later may make a copied dict grow.
        self._template: Environ = {**site, "REMOTE_ADDR": "", "REMOTE_PORT": ""}
        self._limit_head = settings.limit_head
        self._limit_line = settings.limit_line
        self._limit_fields = settings.limit_fields
        self._forwarding = None
        if allowed is not None:
            self._forwarding = Forwarding(allowed, settings.forwarded_headers, self._is_host)
        self._keys: dict[str, str] = {}
        self._hosts: set[str] = set()
        self._tokens: dict[object, tuple[bool, bool, bool]] = {}
        self._first: dict[bytes, Head] = {}
        self.newest: tuple[bytes | None, Head | None] = (None, None)
        """The last head that began a connection and is remembered: most probably the next one says the same."""
        self._renew()

    def _renew(self) -> None:
        self._parser = httptools.HttpRequestParser(self)  # this object has no on_... method, so nothing is called back

    def read(self, head: bytes) -> Head:
        """Judge one head, its final empty line included.

        Args:
            head: From the request line's first byte to the end of the empty line.

        Raises:
            Refused: With the first rule the head breaks.
        """
        if len(head) > self._limit_head:
            raise Refused(policy.HEAD_TOO_LARGE)
        text = head[:-4].decode("latin-1")
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._renew()
        except httptools.HttpParserError:
            self._judge_anew(head)
        lines = text.split("\r\n")
        try:
            return self._read_lines(lines, len(text) > self._limit_line)
        except Refused:
            self._renew()
            raise

    def read_first(self, head: bytes) -> Head:
        """As `read`, for the head that begins a connection: what one client says there, others have often said before.

        Clients without keep-alive (health checks, proxies, scripts) send the same bytes on one connection after the
        other; judging them was a third of what such a connection cost here. What a proxy says of somebody is not kept.
        """
        found = self._first.get(head)
        if found is None:
            found = self.read(head)
            is_plain = not (found.length or found.upgrade or found.expects_continue)
            speaks_for_others = self._forwarding is not None and self._forwarding.concerns(found.environ)
            if not is_plain or speaks_for_others or len(head) > SHORT_HEAD:
                return found
            if len(self._first) >= FIRST_HEADS:
                self._first.clear()
            self._first[head] = found
        self.newest = (head, found)
        return found

    def read_line(self, data: bytes, fields: bytes, last: Head) -> Head | None:
        """Read a head whose end, from the first CRLF on, is that of `last`: a client mostly repeats its fields.

        They have been judged, and nothing in a field depends on the request line (an absolute target, of which Host
        could differ, is not read here). Returns None where the whole head must be judged.
        """
        if len(data) > self._limit_head or len(data) - len(fields) > self._limit_line:
            return None
        parts = data[: -len(fields)].decode("latin-1").split(" ")
        before = last.environ
        if len(parts) != 3 or parts[2] != before["SERVER_PROTOCOL"] or parts[0] not in policy.METHODS:
            return None
        method, target, _ = parts
        if target[:1] != "/" or not is_target(target) or "%" in target:
            return None
        environ = before.copy()
        if last.cookie is not None:
            environ["HTTP_COOKIE"] = last.cookie
        environ["REQUEST_METHOD"] = method
        environ["REQUEST_URI"] = environ["RAW_URI"] = target
        environ["PATH_INFO"], _, environ["QUERY_STRING"] = target.partition("?")
        return self._vary(last, environ, method == "HEAD")

    def read_cookie(self, data: bytes, before: bytes, last: Head) -> Head | None:
        """Read a head that says what `last` did, whose bytes are `before`, but for the value of its only Cookie field.

        So does a client whose session changes with each of its requests. Nothing but the environ's entry depends on
        that value. Returns None where the whole head must be judged.
        """
        around = last.around or self._around_cookie(before, last)
        if around is None:
            return None
        start, rest = around
        if not data.startswith(start) or not data.endswith(rest) or len(data) > self._limit_head:
            return None
        value = data[len(start) : -len(rest)]
        # What the two have in common would leave nothing here if they overlapped.
        if value.translate(None, PRINTABLE) or not value or value[0] == SPACE or value[-1] == SPACE:
            return None
        if len(COOKIE) + len(value) > self._limit_line:
            return None
        head = self._vary(last, last.environ, last.is_head)
        head.cookie = value.decode("latin-1")
        head.around = around
        return head

    @staticmethod
    def _around_cookie(head: bytes, read: Head) -> tuple[bytes, bytes] | None:
        """What stands before and behind the value of a head's only Cookie field; None if there is not one."""
        start = head.find(COOKIE) + len(COOKIE)
        if start < len(COOKIE):
            return None
        end = head.find(b"\r\n", start)
        # A second field would have been joined with the first.
        if read.environ["HTTP_COOKIE"] != head[start:end].decode("latin-1"):
            return None
        return head[:start], head[end:]

    def _vary(self, last: Head, environ: Environ, is_head: bool) -> Head:
        """A head that is framed as `last` is."""
        head = Head(environ, 0, is_head, last.last if is_head is last.is_head else LastResponse())
        if last.is_http10:
            head.is_http10 = True
        if not last.keep_alive:
            head.keep_alive = False
        if last.names_client:
            head.names_client = True
        return head

    def _judge_anew(self, head: bytes) -> None:
        """Let a fresh parser judge what the shared one refused: it may have thought its connection closed."""
        self._renew()
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._renew()
        except httptools.HttpParserError as error:
            self._renew()
            raise self.explain(head, str(error)) from None

    def _read_lines(self, lines: list[str], is_long: bool) -> Head:
        """The hot path: everything that follows costs what it touches, so nothing is looked at twice."""
        rest = iter(lines)
        environ = self._template.copy()
        self._read_request_line(next(rest), environ)
        expected = len(environ) + len(lines) - 1
        keys = self._keys
        for line in rest:
            name, _, value = line.partition(":")
            key = keys.get(name)
            if key is None:
                key = self._learn(name)
            environ[key] = value.strip(" \t")
        # One comparison finds a repeated field, for a dict has each key once; dropped ones share the key "".
        if len(environ) != expected or DROP in environ:
            self._read_again(lines, environ)
        if "CONTENT_LENGTH" in environ:
            refuse_odd_length(lines)
        if len(lines) > self._limit_fields + 1:
            raise Refused(policy.TOO_MANY_FIELDS)
        if is_long and max(map(len, lines)) > self._limit_line:
            raise Refused(policy.FIELD_TOO_LARGE)
        return self._frame(environ)

    def _read_request_line(self, line: str, environ: Environ) -> None:
        if len(line) > self._limit_line:
            raise Refused(policy.LINE_TOO_LONG if " " in line[:33] else policy.REQUEST_LINE)
        parts = line.split(" ")
        if len(parts) != 3 or parts[2] not in VERSIONS or parts[0] not in policy.METHODS or not parts[1]:
            raise explain_request_line(line)
        method, target, version = parts
        if not is_target(target):
            raise Refused(policy.TARGET_BYTES)
        environ["REQUEST_METHOD"] = method
        environ["SERVER_PROTOCOL"] = version
        environ["REQUEST_URI"] = environ["RAW_URI"] = target
        if target[0] != "/":
            target = self._other_form(method, target, environ)
        path, _, query = target.partition("?")
        environ["PATH_INFO"] = unescape(path) if "%" in path else path
        environ["QUERY_STRING"] = query

    def _other_form(self, method: str, target: str, environ: Environ) -> str:
        """RFC 9112 3.2.2 and 3.2.4: an absolute target, or `*` for OPTIONS. Returns the path and query."""
        if target == "*" and method == "OPTIONS":
            return "*"
        match = ABSOLUTE.fullmatch(target)
        if match is None or not self._is_host(match[1]):
            raise Refused(policy.TARGET_FORM, target)
        environ["sharedcluster.authority"] = match[1]  # compared with Host, and removed, by _frame
        return match[2] if match[2].startswith("/") else "/" + match[2]

    def _learn(self, name: str) -> str:
        """The environ key of a field name, which llhttp has found to be a token."""
        if "_" in name:
            key = DROP  # would be a second spelling of a field with hyphens: CVE-2024-45614 and its kin
        else:
            key = "HTTP_" + name.upper().replace("-", "_")
            if key in ("HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"):
                key = key[5:]
            elif self._forwarding is None and (key in FORWARDING or key.startswith("HTTP_X_FORWARDED_")):
                key = DROP
        if len(self._keys) < KNOWN_NAMES and len(name) <= 64:
            self._keys[name] = key
        return key

    def _read_again(self, lines: list[str], environ: Environ) -> None:
        """Fields were repeated or dropped: join the first as lists, remove the second."""
        environ.pop(DROP, None)
        seen: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            key = self._keys.get(name) or self._learn(name)
            if key == DROP:
                continue
            value = value.strip(" \t")
            if key in seen:
                if key in policy.SINGLETONS:
                    raise Refused(policy.FIELD_REPEATED, name)
                value = f"{seen[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
            seen[key] = value
        environ.update(seen)

    def _is_host(self, host: str) -> bool:
        if host in self._hosts:
            return True
        match = HOST.fullmatch(host)
        if match is None or int(match[1] or 0) > 65535:
            return False
        if len(self._hosts) < KNOWN_NAMES and len(host) <= 255:
            self._hosts.add(host)
        return True

    def _frame(self, environ: Environ) -> Head:
        """Apply the rules on Host, length, coding, Connection and Expect."""
        get = environ.get
        is_http10 = environ["SERVER_PROTOCOL"] == "HTTP/1.0"
        host = get("HTTP_HOST")
        if host is None:
            if not is_http10:
                raise Refused(policy.HOST_MISSING)
        elif host not in self._hosts and not self._is_host(str(host)):
            raise Refused(policy.HOST_BAD, str(host))
        authority = environ.pop("sharedcluster.authority", None)
        if authority is not None and host is not None and str(authority).lower() != str(host).lower():
            raise Refused(policy.HOST_DIFFERS)
        length = self._body_length(get("CONTENT_LENGTH"), get("HTTP_TRANSFER_ENCODING"), is_http10)
        head = Head(environ, length, environ["REQUEST_METHOD"] == "HEAD", LastResponse())
        connection = get("HTTP_CONNECTION")
        if connection is not None or is_http10:
            head.is_http10 = is_http10
            closes, keeps, upgrades = self._tokens.get(connection) or self._read_connection(str(connection or ""))
            head.keep_alive = not closes and (keeps or not is_http10)
            head.upgrade = upgrades and not is_http10 and "HTTP_UPGRADE" in environ
            if head.upgrade and get("HTTP_SEC_WEBSOCKET_VERSION", "13") != "13":
                raise Refused(policy.WEBSOCKET_VERSION)
        if length or not head.keep_alive or is_http10 or head.upgrade:
            self._renew()  # llhttp may now be within a body, or have closed
        expect = get("HTTP_EXPECT")
        if expect is not None and not is_http10:
            if str(expect).lower() != "100-continue":
                raise Refused(policy.EXPECT_UNKNOWN, str(expect))
            head.expects_continue = length != 0
        if self._forwarding is not None:
            head.names_client = self._forwarding.apply(environ)
        return head

    def _read_connection(self, value: str) -> tuple[bool, bool, bool]:
        """Whether `Connection` has the tokens close, keep-alive and upgrade."""
        tokens = [token.strip(" \t") for token in value.lower().split(",")]
        found = "close" in tokens, "keep-alive" in tokens, "upgrade" in tokens
        if len(self._tokens) < KNOWN_NAMES and len(value) <= 64:
            self._tokens[value] = found
        return found

    def _body_length(self, length: object, coding: object, is_http10: bool) -> int:
        if coding is not None:
            if is_http10:
                raise Refused(policy.CODING_IN_10)
            if length is not None:
                raise Refused(policy.LENGTH_AND_CODING)
            if str(coding).lower() != "chunked":
                raise refuse_coding(str(coding))
            return CHUNKED
        if length is None:
            return 0
        digits = str(length)
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 19) or (digits[0] == "0" and digits != "0"):
            raise Refused(policy.LENGTH_BAD, digits)
        return int(digits)

    def limit(self, data: bytes) -> None:
        """Refuse a beginning that is longer than a whole may be."""
        if len(data) > self._limit_head:
            raise Refused(policy.HEAD_TOO_LARGE)
        if len(data) > self._limit_line and b"\r\n" not in data:
            raise Refused(policy.LINE_TOO_LONG if b" " in data[:33] else policy.REQUEST_LINE)

    def explain(self, data: bytes, reason: str) -> Refused:
        """Why llhttp refused `data`, a head or the beginning of one: the rule with the most telling status."""
        lines = data.decode("latin-1").split("\r\n")
        try:
            self._read_request_line(lines[0], {})
        except Refused as refused:
            return refused
        names = [line.partition(":")[0].lower() for line in lines[1:]]
        if names.count("transfer-encoding") == 1 and "content-length" not in names:
            value = lines[1 + names.index("transfer-encoding")].partition(":")[2].strip(" \t")
            if value.lower() != "chunked" and value.isprintable():
                return refuse_coding(value)
        return Refused(policy.SYNTAX, reason)


class PartialHead:
    """A head whose end has not come. What is wrong with it is said at once, not when its time is up."""

    __slots__ = ("_parser", "_reader")

    def __init__(self, reader: HeadReader) -> None:
        self._reader = reader
        self._parser: Any = None

    def look(self, data: bytes, seen: int) -> None:
        """`data` is all of it so far, the first `seen` bytes of which have been looked at before.

        Raises:
            Refused: It can no longer become a head.
        """
        self._reader.limit(data)
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
            seen = 0
        try:
            self._parser.feed_data(data[seen:])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._parser = None
            # Before the end of the request line the rule, and so the status, may not be known yet.
            if b"\n" in data or not chr(data[0]).isalpha():
                raise self._reader.explain(data, str(error)) from None
