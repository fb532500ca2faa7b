"""Reading heads: what the environ holds, and h11 as a judge of what may be accepted at all."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedcluster.http import policy
from sharedcluster.http.forwarded import REMEMBERED, AllowList
from sharedcluster.http.policy import Refused
from sharedcluster.http.request import CHUNKED, FIRST_HEADS, SHORT_HEAD, Head, HeadReader
from sharedcluster.http.server import Readers
from sharedcluster.http.settings import HttpSettings

SITE: dict[str, object] = {"SCRIPT_NAME": "", "wsgi.url_scheme": "http"}


def read(head: bytes, reader: HeadReader | None = None) -> Head:
    """Read one head with a reader that nobody has used before, unless one is given."""
    return (reader or HeadReader(HttpSettings(), SITE)).read(head)


def test_the_template_is_not_touched() -> None:
    """Every head gets an environ of its own."""
    before = dict(SITE)
    reader = HeadReader(HttpSettings(), SITE)
    assert read(b"GET /a HTTP/1.1\r\nHost: x\r\nX: y\r\n\r\n", reader).environ["PATH_INFO"] == "/a"
    assert "HTTP_X" not in read(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", reader).environ
    assert before == SITE


@pytest.mark.parametrize(
    ("fields", "length", "keep_alive", "expects", "upgrade"),
    [
        ("", 0, True, False, False),
        ("Content-Length: 7\r\n", 7, True, False, False),
        ("Content-Length: 0\r\n", 0, True, False, False),
        ("Transfer-Encoding: Chunked\r\n", CHUNKED, True, False, False),
        ("Connection: close\r\n", 0, False, False, False),
        ("Connection: Keep-Alive, CLOSE\r\n", 0, False, False, False),
        ("Connection: x\r\nConnection: close\r\n", 0, False, False, False),
        ("Expect: 100-Continue\r\nContent-Length: 7\r\n", 7, True, True, False),
        ("Expect: 100-continue\r\n", 0, True, False, False),
        ("Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n", 0, True, False, True),
        ("Upgrade: websocket\r\n", 0, True, False, False),
        ("Connection: Upgrade\r\n", 0, True, False, False),
    ],
)
def test_framing(fields: str, length: int, keep_alive: bool, expects: bool, upgrade: bool) -> None:
    """What the engine does next follows from the head alone."""
    head = read(f"POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode())
    assert (head.length, head.keep_alive, head.expects_continue, head.upgrade) == (
        length,
        keep_alive,
        expects,
        upgrade,
    )


HEADS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /x?y HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA : b\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 5\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nProxy-Connection: close\r\n\r\n",
]


def verdict(head: bytes, reader: HeadReader) -> object:
    """The environ, or the rule that was broken."""
    try:
        return read(head, reader).environ
    except Refused as refused:
        return refused.rule


@settings(max_examples=300)
@given(st.lists(st.sampled_from(HEADS), max_size=12))
def test_one_head_says_nothing_about_the_next(heads: list[bytes]) -> None:
    """The parser is shared by all connections: whatever was read before, a head is judged as by a fresh reader."""
    shared = HeadReader(HttpSettings(), SITE)
    for head in heads:
        assert verdict(head, shared) == verdict(head, HeadReader(HttpSettings(), SITE))


PIECES = st.sampled_from(
    [
        b"GET",
        b"POST",
        b"HEAD",
        b" ",
        b"  ",
        b"\t",
        b"/",
        b"/a?b",
        b"*",
        b"http://a/",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/1.2",
        b"\r\n",
        b"\n",
        b"\r",
        b":",
        b": ",
        b",",
        b";",
        b"Host",
        b"a",
        b"a:80",
        b"Content-Length",
        b"5",
        b"+5",
        b"0",
        b"Transfer-Encoding",
        b"chunked",
        b"gzip",
        b"Connection",
        b"close",
        b"X-A",
        b"X_A",
        b"\x00",
        b"\x0b",
        b"\x7f",
        b"\xa0",
        b"\xff",
        b'"',
        b"(",
        b"Expect",
        b"100-continue",
        b"#",
        b"%00",
        b"\r\nHost: a\r\n",
        b"\r\nContent-Length: 5",
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good head with a few pieces put in, cut out or replaced; always ended by an empty line."""
    head = bytearray(draw(st.sampled_from(HEADS))[:-4])
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(head)))
        end = min(len(head), start + draw(st.integers(0, 6)))
        head[start:end] = draw(PIECES)
    return bytes(head).replace(b"\r\n\r\n", b"\r\n") + b"\r\n\r\n"


@settings(max_examples=1500)
@given(mutated())
def test_what_we_accept_h11_accepts_and_reads_alike(head: bytes) -> None:
    """No head is accepted that h11 refuses, and none is read as another request."""
    try:
        ours = read(head)
    except Refused:
        return
    judge = h11.Connection(h11.SERVER)
    judge.receive_data(head)
    event = judge.next_event()
    assert isinstance(event, h11.Request), event
    environ = ours.environ
    assert event.method.decode() == environ["REQUEST_METHOD"]
    assert event.target.decode() == environ["RAW_URI"]
    fields: dict[str, list[str]] = {}
    for raw_name, value in event.headers:
        if b"_" not in raw_name:
            fields.setdefault(raw_name.decode().upper().replace("-", "_"), []).append(value.decode("latin-1"))
    for name, values in fields.items():
        key = name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}"
        if not name.startswith(("X_FORWARDED", "FORWARDED")):
            assert environ[key] == ("; " if name == "COOKIE" else ",").join(values)
    judge.receive_data(b"5\r\nhello\r\n0\r\n\r\n" if ours.length == CHUNKED else b"x" * max(ours.length, 0))
    if ours.length == 0:
        assert isinstance(judge.next_event(), h11.EndOfMessage)
    else:
        body = judge.next_event()
        assert isinstance(body, h11.Data)
        assert len(body.data) == (5 if ours.length == CHUNKED else ours.length)


@settings(max_examples=500)
@given(st.sampled_from(HEADS), mutated())
def test_a_repeated_end_is_read_as_the_whole(first: bytes, second: bytes) -> None:
    """Where only the request line is read, the environ is the one that reading the whole head gives."""
    reader = HeadReader(HttpSettings(), SITE)
    fields = first[first.index(b"\r\n") :]
    data = second.partition(b"\r\n")[0] + fields
    try:
        last = read(first, reader)
    except Refused:
        return
    head = None if last.length or last.upgrade else reader.read_line(data, fields, last)
    if head is not None:
        whole = read(data)
        assert head.environ == whole.environ
        assert all(
            getattr(head, name) == getattr(whole, name)
            for name in ("length", "is_head", "is_http10", "keep_alive", "expects_continue", "upgrade")
        )


WITH_COOKIE = [
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: session=abc; theme=dark\r\nAccept: */*\r\n\r\n",
    b"POST /x HTTP/1.1\r\nCookie: a\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"HEAD / HTTP/1.0\r\nCookie: a=b\r\nConnection: keep-alive\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nCookie: \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie:  a=b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\ncookie: a=b\r\nX-Cookie: z\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: a=b\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n",
]
COOKIES = st.one_of(
    st.sampled_from([b"session=xyz", b"", b" a=b", b"a=b ", b"a=b\r\nCookie: c=d", b"a\r\n\r\nGET / HTTP/1.1"]),
    st.binary(max_size=8),
    st.text("ab=; \t\r\n", max_size=12).map(str.encode),
    st.integers(1, 80).map(lambda size: b"a" * size),
)


@settings(max_examples=1500)
@given(st.sampled_from(WITH_COOKIE), COOKIES, mutated(), st.booleans())
def test_a_changed_cookie_is_read_as_the_whole(first: bytes, value: bytes, other: bytes, is_other: bool) -> None:
    """Where only the cookie is read, environ and framing are those of reading the whole head, limits and all."""
    limits = HttpSettings(limit_line=70, limit_head=100)
    allowed = AllowList(["127.0.0.1"])
    reader = HeadReader(limits, SITE, allowed)
    last = read(first, reader)
    start, _, rest = first.partition(b"ookie: ")
    data = other if is_other else start + b"ookie: " + value + rest[rest.index(b"\r\n") :]
    head = reader.read_cookie(data, first, last)
    if head is not None:
        whole = read(data, HeadReader(limits, SITE, allowed))
        for client in CLIENTS:
            assert head.environ_for(*client) == whole.environ_for(*client)
        assert all(
            getattr(head, name) == getattr(whole, name)
            for name in ("length", "is_head", "is_http10", "keep_alive", "expects_continue", "upgrade")
        )


@settings(max_examples=500)
@given(st.sampled_from(WITH_COOKIE), st.lists(st.tuples(COOKIES, st.sampled_from(["", "/y?z", "POST"])), max_size=6))
def test_a_chain_of_changes_is_read_as_the_whole(first: bytes, changes: list[tuple[bytes, str]]) -> None:
    """A cookie that changes again and again, with lines that change in between: each is what it says, as are those
    before it.
    """
    reader = HeadReader(HttpSettings(), SITE)
    last, head = first, read(first, reader)
    start, _, rest = first.partition(b"ookie: ")
    seen = [(first, head)]
    for value, line in changes:
        data = start + b"ookie: " + value + rest[rest.index(b"\r\n") :]
        found = reader.read_cookie(data, last, head)
        if found is not None:
            last, head = data, found
            seen.append((last, head))
        if line:
            method, target, version = last.partition(b"\r\n")[0].split(b" ")
            method, target = (b"POST", target) if line == "POST" else (method, line.encode())
            fields = last[last.index(b"\r\n") :]
            data = b" ".join((method, target, version)) + fields
            found = reader.read_line(data, fields, head)
            if found is not None:
                last, head = data, found
                seen.append((last, head))
                start, _, rest = last.partition(b"ookie: ")
    for data, found in seen:
        whole = read(data)
        assert found.environ_for("127.0.0.1", "1") == whole.environ_for("127.0.0.1", "1")
        assert (found.is_head, found.is_http10, found.keep_alive) == (whole.is_head, whole.is_http10, whole.keep_alive)


@pytest.mark.parametrize(("first", "is_known"), [*zip(WITH_COOKIE, (1, 1, 1, 0, 1, 0, 0, 1), strict=True)])
def test_which_cookies_are_read_alone(first: bytes, is_known: int) -> None:
    """The only Cookie field of a head, as everybody spells it; not two of them, nor one that needs stripping."""
    reader = HeadReader(HttpSettings(), SITE)
    start, _, rest = first.partition(b"ookie: ")
    data = start + b"ookie: another=one" + rest[rest.index(b"\r\n") :]
    head = reader.read_cookie(data, first, read(first, reader))
    assert (head is not None) == bool(is_known)
    assert head is None or head.environ_for("", "")["HTTP_COOKIE"] == "another=one"


CLIENTS = [("127.0.0.1", "1"), ("127.0.0.1", "2"), ("", "")]
SPOKEN_FOR = [
    b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: b:1\r\n\r\n",
]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(HEADS + SPOKEN_FOR), st.sampled_from(CLIENTS)), max_size=12), st.booleans())
def test_a_remembered_first_head_is_read_as_a_new_one(heads: list[tuple[bytes, tuple[str, str]]], proxy: bool) -> None:
    """Whoever said the same before, a client's first head gives the environ and framing that reading it gives."""
    allowed = AllowList(["127.0.0.1"]) if proxy else None
    reader = HeadReader(HttpSettings(), SITE, allowed)
    for data, client in heads:
        try:
            whole = HeadReader(HttpSettings(), SITE, allowed).read(data)
        except Refused:
            with pytest.raises(Refused):
                reader.read_first(data)
            continue
        known, newest = reader.newest
        for head in (reader.read_first(data), newest if data == known else None):
            if head is not None:
                assert head.environ_for(*client) == whole.environ_for(*client)
                assert all(
                    getattr(head, name) == getattr(whole, name)
                    for name in ("length", "is_head", "is_http10", "keep_alive", "expects_continue", "upgrade")
                )


@pytest.mark.parametrize("spoken", ["", "X-Forwarded-For: 192.0.2.7\r\n"])
def test_each_client_sees_its_own_address(spoken: str) -> None:
    """A head that many have said names the one who said it now, or whom its proxy names; never somebody before."""
    reader = HeadReader(HttpSettings(), SITE, AllowList(["127.0.0.1"]))
    data = f"GET / HTTP/1.1\r\nHost: a\r\n{spoken}\r\n".encode()
    for address, port in (*CLIENTS, *CLIENTS):
        environ = reader.read_first(data).environ_for(address, port)
        assert environ["REMOTE_ADDR"] == ("192.0.2.7" if spoken else address)
        assert environ.get("REMOTE_PORT", "") == ("" if spoken else port)
        assert ("REMOTE_PORT" in environ) is bool(port and not spoken)


def test_what_a_proxy_says_of_somebody_is_not_remembered() -> None:
    """Nor offered to the next connection as what it may begin with; nor is a message that has a body."""
    reader = HeadReader(HttpSettings(), SITE, AllowList(["127.0.0.1"]))
    for data in (*SPOKEN_FOR, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"):
        reader.read_first(data)
        assert reader.newest == (None, None)
        assert not reader._first


def test_a_first_head_is_remembered_for_its_listener_and_trust_alone() -> None:
    """What a listener says of itself, and whom it believes, does not travel to another one with the same bytes."""
    allowed = AllowList(["127.0.0.1"])
    both = [Readers(HttpSettings(), {**SITE, "SERVER_PORT": port}, allowed) for port in ("8000", "8001")]
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Host: b\r\n\r\n"
    for _ in range(2):
        for port, readers in zip(("8000", "8001"), both, strict=True):
            stranger, proxy = readers["192.0.2.1"].read_first(head), readers["127.0.0.1"].read_first(head)
            assert stranger.environ["SERVER_PORT"] == proxy.environ["SERVER_PORT"] == port
            assert "HTTP_X_FORWARDED_HOST" not in stranger.environ
            assert "HTTP_X_FORWARDED_HOST" in proxy.environ


def test_remembered_trust_is_bounded() -> None:
    """Clients from everywhere fill no memory."""
    readers = Readers(HttpSettings(), SITE, AllowList(["10.0.0.0/8"]))
    for number in range(3000):
        assert readers[f"192.0.{number // 256}.{number % 256}"] is not readers["10.0.0.1"]
    assert len(readers) <= REMEMBERED


def test_a_changed_environ_is_not_remembered() -> None:
    """What one request's environ is made into does not show in the next one's."""
    reader = HeadReader(HttpSettings(), SITE)
    head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for _ in range(3):
        environ = reader.read_first(head).environ_for(*CLIENTS[0])
        assert "secret" not in environ
        assert environ["REMOTE_ADDR"] == "127.0.0.1"
        environ["secret"] = environ["REMOTE_ADDR"] = "x"


def test_remembered_first_heads_are_bounded() -> None:
    """Clients that never say the same twice, or much, fill no memory."""
    reader = HeadReader(HttpSettings(), SITE)
    for number in range(2000):
        reader.read_first(f"GET /{number} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert len(reader._first) <= FIRST_HEADS
    reader._first.clear()
    reader.read_first(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * SHORT_HEAD + b"\r\n\r\n")
    assert not reader._first


def test_forwarding_fields_are_dropped_for_strangers_in_any_spelling() -> None:
    """Case, underscores and repetition do not carry a forwarding field through."""
    names = ["X-Forwarded-For", "x-forwarded-FOR", "X_Forwarded_For", "X-Forwarded-Anything", "Forwarded", "X-Real-Ip"]
    for name in names:
        for times in (1, 2):
            environ = read(
                b"GET / HTTP/1.1\r\nHost: a\r\n" + f"{name}: 1.2.3.4\r\n".encode() * times + b"\r\n"
            ).environ
            assert "1.2.3.4" not in str(environ)


def test_remembered_names_are_bounded() -> None:
    """A client that invents names fills no memory."""
    reader = HeadReader(HttpSettings(), SITE)
    for number in range(2000):
        fields = f"Host: host{number}\r\nX-{number}: a\r\nConnection: x{number}\r\n"
        read(f"GET / HTTP/1.1\r\n{fields}\r\n".encode(), reader)
    assert all(len(cache) <= 512 for cache in (reader._keys, reader._hosts, reader._tokens))


def test_every_rule_is_named_once() -> None:
    """Names are what docs and logs speak of."""
    names = [rule.name for rule in policy.RULES]
    assert len(names) == len(set(names)) >= 35
    assert all(rule.status >= 400 and rule.source and rule.refuses for rule in policy.RULES)
