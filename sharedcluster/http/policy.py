"""What is refused, with which status, and by which section: the whole table in one place.

llhttp (through httptools) judges the grammar of a head. This table holds what a server must decide on top of it; the
code that applies a rule names it, so `grep` leads from a row to its one use. The rows are printed in docs/http.md, and
a test holds the page against them.

Every refusal ends its connection: one answer at most, `Connection: close`, a half-close, a bounded linger so that no
reset eats the answer, and not one byte more is served from what the client sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharedcluster.errors import PeerError


@dataclass(frozen=True, slots=True)
class Rule:
    """One reason to refuse: its name, the status the client gets, where it is written, what is refused."""

    name: str
    status: int
    source: str
    refuses: str
    fields: str = ""
    """Further lines of the answer."""


class Refused(PeerError):  # noqa: N818 - what happened, in the glossary's word
    """A message broke `rule`; `detail` is for the log, never for the client."""

    def __init__(self, rule: Rule, detail: str = "") -> None:
        super().__init__(f"{rule.refuses}{': ' if detail else ''}{detail}")
        self.rule = rule
        self.detail = detail


# The request line.
SYNTAX = Rule("syntax", 400, "RFC 9112 2.2, 3, 5; RFC 9110 5.5", "what llhttp refuses: bare LF or CR, control bytes, "
              "a space before the colon, a folded field, a name that is no token")  # fmt: skip
LEADING_LINES = Rule("leading-lines", 400, "RFC 9112 2.2", "more than one empty line before the request line")
REQUEST_LINE = Rule("request-line", 400, "RFC 9112 3", "a request line that is not method SP target SP version")
METHOD_UNKNOWN = Rule("method-unknown", 501, "RFC 9110 9.1", "a method nobody has registered for HTTP")
METHOD_CONNECT = Rule("method-connect", 501, "RFC 9110 9.3.6", "CONNECT: this is no proxy")
TARGET_BYTES = Rule("target-bytes", 400, "RFC 9112 3.2; RFC 3986 2", "a target with bytes outside 0x21-0x7E, a `#` "
                    "or a backslash")  # fmt: skip
TARGET_CONTROL = Rule("target-control", 400, "RFC 3986 7.3", "a path with an escaped NUL, CR or LF, which "
                      "no file name, log or header survives")  # fmt: skip
TARGET_FORM = Rule("target-form", 400, "RFC 9112 3.2", "a target that is no origin-form or http absolute-form, or `*` "
                   "without OPTIONS")  # fmt: skip
VERSION_BAD = Rule("version-bad", 400, "RFC 9112 2.3", "HTTP/1.x other than 1.0 and 1.1, and anything malformed")
VERSION_MAJOR = Rule("version-major", 505, "RFC 9110 15.6.6", "a major version other than 1")
LINE_TOO_LONG = Rule("line-too-long", 414, "RFC 9112 3; RFC 9110 15.5.15", "a request line beyond limit_line")
# The fields.
FIELD_TOO_LARGE = Rule("field-too-large", 431, "RFC 6585 5", "one field line beyond limit_line")
HEAD_TOO_LARGE = Rule("head-too-large", 431, "RFC 6585 5", "a head beyond limit_head")
TOO_MANY_FIELDS = Rule("too-many-fields", 431, "RFC 6585 5", "more fields than limit_fields")
FIELD_REPEATED = Rule("field-repeated", 400, "RFC 9110 5.3, 8.3, 8.6; RFC 9112 3.2, 6.3",
                      "Host, Content-Length, Content-Type or Transfer-Encoding more than once")  # fmt: skip
HOST_MISSING = Rule("host-missing", 400, "RFC 9112 3.2", "HTTP/1.1 without Host")
HOST_BAD = Rule("host-bad", 400, "RFC 9112 3.2; RFC 3986 3.2.2", "a Host that is no host[:port]: empty, with user "
                "information, a path, a list, or a port beyond 65535")  # fmt: skip
HOST_DIFFERS = Rule("host-differs", 400, "RFC 9112 3.2.2", "an absolute target whose authority is not that of Host")
EXPECT_UNKNOWN = Rule("expect-unknown", 417, "RFC 9110 10.1.1", "an expectation other than 100-continue")
WEBSOCKET_VERSION = Rule("websocket-version", 426, "RFC 6455 4.2.2, 4.4", "a WebSocket handshake of a version other "
                         "than 13", "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n")  # fmt: skip
# The framing.
LENGTH_BAD = Rule("length-bad", 400, "RFC 9110 8.6; RFC 9112 6.3", "a Content-Length that is not 1 to 19 ASCII "
                  "digits behind at most one space, or has a leading zero, which some take for octal")  # fmt: skip
LENGTH_AND_CODING = Rule("length-and-coding", 400, "RFC 9112 6.1, 6.3, 11.2", "Content-Length with Transfer-Encoding")
CODING_IN_10 = Rule("coding-in-1.0", 400, "RFC 9112 6.1", "Transfer-Encoding in HTTP/1.0")
CODING_BAD = Rule("coding-bad", 400, "RFC 9112 6.1, 7", "a Transfer-Encoding that is empty, malformed, or has "
                  "`chunked` twice or not last")  # fmt: skip
CODING_UNKNOWN = Rule("coding-unknown", 501, "RFC 9112 6.1", "a transfer coding other than `chunked`")
CHUNK_BAD = Rule("chunk-bad", 400, "RFC 9112 7.1", "a chunk whose size is not 1 to 16 hex digits, whose extension "
                 "breaks the grammar, or whose data is not followed by CRLF")  # fmt: skip
CHUNK_TOO_LARGE = Rule("chunk-too-large", 400, "RFC 9112 7.1.1", "a chunk's line beyond 256 bytes, all beyond 16 KiB")
TRAILER_BAD = Rule("trailer-bad", 400, "RFC 9110 6.5.1", "a trailer field that is malformed or has no place there")
TRAILER_TOO_LARGE = Rule("trailer-too-large", 431, "RFC 6585 5", "trailers beyond limit_head or limit_fields")
BODY_TOO_LARGE = Rule("body-too-large", 413, "RFC 9110 15.5.14", "a body beyond limit_body")
BODY_CUT = Rule("body-cut", 400, "RFC 9112 8", "a message that ends before it is complete")
# Time, load, and the connection itself.
HEAD_TIMEOUT = Rule("head-timeout", 408, "RFC 9110 15.5.9", "a head that takes longer than head_timeout")
BODY_TIMEOUT = Rule("body-timeout", 408, "RFC 9110 15.5.9", "a body that makes no progress for body_timeout")
OVERLOADED = Rule("overloaded", 503, "RFC 9110 15.6.4", "a request beyond limit_concurrency",
                  "Retry-After: 1\r\n")  # fmt: skip
REQUEST_TIMEOUT = Rule("request-timeout", 503, "RFC 9110 15.6.4", "a request older than request_timeout")
FORWARDED_BAD = Rule("forwarded-bad", 400, "RFC 7239 4", "an allowed proxy's forwarding fields that contradict each "
                     "other or are malformed")  # fmt: skip
PROXY_HEAD_BAD = Rule("proxy-head-bad", 400, "PROXY protocol 2.1, 2.2", "a connection that must start with a PROXY "
                      "head and does not")  # fmt: skip

RULES: tuple[Rule, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Rule))

METHODS = frozenset({
    # RFC 9110 and 5789, the safe method with a body, then what WebDAV and its kin registered.
    "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "QUERY",
    "COPY", "LOCK", "MKCOL", "MOVE", "PROPFIND", "PROPPATCH", "UNLOCK", "BIND", "REBIND", "UNBIND", "ACL", "SEARCH",
    "REPORT", "MKACTIVITY", "CHECKOUT", "MERGE", "MKCALENDAR", "LINK", "UNLINK", "PURGE", "NOTIFY", "SUBSCRIBE",
    "UNSUBSCRIBE", "M-SEARCH",
})  # fmt: skip
"""What an application may be asked. llhttp also knows CONNECT, PRI, SOURCE and RTSP's, which stay out."""

SINGLETONS = frozenset({"HTTP_HOST", "CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_TRANSFER_ENCODING"})
"""Environ keys of fields that may stand once only."""

FORBIDDEN_TRAILERS = frozenset(
    b"transfer-encoding content-length content-type content-encoding content-range host trailer te connection "
    b"keep-alive upgrade expect max-forwards pragma cache-control range if-match if-none-match if-modified-since "
    b"if-unmodified-since if-range authorization proxy-authorization proxy-authenticate www-authenticate cookie "
    b"set-cookie age expires date location retry-after vary warning forwarded x-forwarded-for x-forwarded-proto "
    b"x-forwarded-host".split()
)
"""RFC 9110 6.5.1: framing, routing, request modifiers, authentication and controls have no place in trailers."""
