"""Shortcuts through Flask: what it would have said, each time."""

from __future__ import annotations

import asyncio
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import flask
import pytest
import werkzeug
from flask import Flask, Request, request, url_for
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, MapAdapter

from sharedcluster.flask_shortcuts import take_shortcuts
from sharedcluster.flask_shortcuts.functions import FUNCTIONS_LIMIT, PlainFunctions
from sharedcluster.flask_shortcuts.hosts import HOST_LENGTH_LIMIT, HOSTS_LIMIT, TELLS_TRUSTED_HOSTS, UrlAdapters
from sharedcluster.flask_shortcuts.responses import Response

HOSTS = (
    "example.org", "EXAMPLE.org", "example.org:80", "example.org:443", "example.org:8000", "www.example.org",
    "a.b.test", "127.0.0.1:8000", "[::1]:8000", "bücher.example", "b\xc3\xbccher.example", "x" * 300, "evil/", "a b",
    "", "..", "\xff",
)  # fmt: skip
NAMES = (None, "example.org", "example.org:80", "test:8000", "EXAMPLE.ORG")
TRUSTED: tuple[Any, ...] = (
    None,
    [],
    ["example.org"],
    [".example.org"],
    "example.org",
    ("a.b.test", "example.org"),
    ["bücher.example"],
)

USUAL = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/item/7",
    "QUERY_STRING": "",
    "wsgi.url_scheme": "http",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "8000",
    "HTTP_HOST": "example.org:80",
}
CHANGES: dict[str, tuple[Any, ...]] = {
    "REQUEST_METHOD": ("POST", "get", "OPTIONS"),
    "SCRIPT_NAME": ("/shop", "/shop/", "/caf\xc3\xa9", None),
    "PATH_INFO": ("/", "/caf\xc3\xa9", "/\xff", "//x", "", None),
    "QUERY_STRING": ("a=1&b=2", "a=caf\xc3\xa9", "\xff", None),
    "wsgi.url_scheme": ("https",),
    "SERVER_NAME": ("0.0.0.0", "::1", "/run/app.sock", None),
    "SERVER_PORT": ("80", "443", "", None),
    "HTTP_HOST": (*HOSTS, None),
    "HTTP_CONNECTION": ("keep-alive", "Upgrade", "upgrade, keep-alive"),
    "HTTP_UPGRADE": ("websocket", "WebSocket", "h2c"),
    "config SERVER_NAME": NAMES,
    "config TRUSTED_HOSTS": TRUSTED,
    "subdomain_matching": (True,),
    "host_matching": (True,),
    "default_subdomain": ("www",),
}
"""What may be another way with the next request; None: it is not there."""

changes = st.lists(
    st.sampled_from(sorted(CHANGES)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(CHANGES[key]))),
    max_size=3,
).map(dict)


def make_app() -> Flask:
    """An application with a route or two."""
    app = Flask("shortcuts")
    app.add_url_rule("/", "index", lambda: request.host)
    app.add_url_rule("/item/<int:number>", "item", lambda number: url_for("item", number=number, _external=True))
    return app


def answer(app: Flask, changed: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that can be told of the adapter an application makes, or how it refuses."""
    now = USUAL | changed
    app.config.update({name: now.pop(f"config {name}", None) for name in ("SERVER_NAME", "TRUSTED_HOSTS")})
    app.subdomain_matching = now.pop("subdomain_matching", False)
    app.url_map.host_matching = now.pop("host_matching", False)
    app.url_map.default_subdomain = now.pop("default_subdomain", "")
    made = Request({key: value for key, value in now.items() if value is not None})
    try:
        adapter = app.create_url_adapter(made)
    except (HTTPException, KeyError, RuntimeError) as error:
        return type(error), str(error)
    assert adapter is not None
    assert adapter.map is app.url_map
    facts = {key: value for key, value in vars(adapter).items() if key != "map"}
    try:
        matched: Any = adapter.match()
    except HTTPException as error:
        matched = type(error), error.code, getattr(error, "new_url", "")
    return facts, vars(made).get("host"), made.trusted_hosts, matched


def check(sequence: list[dict[str, Any]]) -> None:
    """Ask Flask and Flask with a memory the same."""
    plain, remembering = make_app(), make_app()
    take_shortcuts(remembering)
    assert isinstance(remembering.create_url_adapter, UrlAdapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a host is none of SERVER_NAME's
        for changed in sequence:
            assert answer(remembering, changed) == answer(plain, changed), changed


@given(changes, st.lists(changes, min_size=1, max_size=6))
def test_the_same_as_flask_s(usual: dict[str, Any], sequence: list[dict[str, Any]]) -> None:
    """Whatever is asked, and whatever the configuration says by then: adapters, hosts and errors are Flask's own."""
    check([usual, *({**usual, **changed} for changed in sequence)] * 2)


@pytest.mark.parametrize("key", sorted(CHANGES))
@pytest.mark.parametrize(
    "usual",
    [
        {},
        {"config SERVER_NAME": "example.org"},
        {"config SERVER_NAME": "example.org", "HTTP_HOST": "www.example.org"},
        {"HTTP_CONNECTION": "upgrade"},
    ],
)
def test_no_fact_is_missed(key: str, usual: dict[str, Any]) -> None:
    """One request after another that differs in one thing, and in that and the way subdomains are found."""
    for more in ({}, {"subdomain_matching": True, "config SERVER_NAME": "example.org"}):
        for value in CHANGES[key]:
            check([{**usual, **more}, {**usual, **more, key: value}, {**usual, **more}])


def test_an_adapter_of_its_own() -> None:
    """A request that changes its adapter changes nobody else's, the first as little as a later one."""
    app = make_app()
    take_shortcuts(app)
    for _ in range(3):
        with app.test_request_context("/item/7") as context:
            adapter = context.url_adapter
            assert adapter is not None
            assert adapter.script_name == "/"
            adapter.script_name = "/changed/"
            adapter.server_name = "changed"


# Before 3.1 Werkzeug warns of a request for another host than SERVER_NAME.
@pytest.mark.filterwarnings(f"{'error' if TELLS_TRUSTED_HOSTS else 'ignore'}:Current server name")
@pytest.mark.parametrize("name", [None, "example.org"])
def test_a_whole_application(name: str | None) -> None:
    """Views, redirects, refusals and URLs outside of a request are what they were."""
    plain, remembering = make_app(), make_app()
    take_shortcuts(remembering)
    said = []
    for app in (plain, remembering, remembering):
        app.config["SERVER_NAME"] = name
        client = app.test_client()
        answers = [
            client.get("/"),
            client.get("/item/7", base_url="https://www.test/shop"),
            client.get("//item/7"),
            client.post("/"),
            client.get("/nothing"),
            client.get("/", headers={"Host": "a b"}),
        ]
        said.append([(each.status, each.text, each.location) for each in answers])
        if name:
            with app.app_context():
                assert url_for("item", number=7) == "http://example.org/item/7"
    assert said[0] == said[1] == said[2]
    if name is None or TELLS_TRUSTED_HOSTS:  # Flask 3.0 finds nothing on a host that is not SERVER_NAME
        assert "/shop/item/7" in said[0][1][1]


def test_what_is_remembered_is_bounded() -> None:
    """Clients that make up hosts fill no memory."""
    app = make_app()
    take_shortcuts(app)
    adapters = app.create_url_adapter
    assert isinstance(adapters, UrlAdapters)
    client = app.test_client()
    for number in range(HOSTS_LIMIT + 10):
        assert client.get("/", headers={"Host": f"h{number}.test"}).status_code == 200
        assert 0 < len(adapters._known) <= HOSTS_LIMIT
    adapters._known.clear()
    assert client.get("/", headers={"Host": "h." * HOST_LENGTH_LIMIT + "h"}).status_code == 200
    told = "" if TELLS_TRUSTED_HOSTS else "bad host"  # Werkzeug tells of none since 3.1
    assert client.get("/", headers={"Host": "bad host"}).text == told
    assert len(adapters._known) == 1
    assert all(len(facts[0]) <= HOST_LENGTH_LIMIT for facts in adapters._known)


BODIES: dict[str, Callable[[type[flask.Response]], Any]] = {
    "text": lambda _: "grüße",
    "bytes": lambda _: b"\xff\x00",
    "nothing": lambda _: "",
    "dict": lambda _: {"a": 1},
    "list": lambda _: [1, 2],
    "iterator": lambda _: iter(["a", "b"]),
    "flask": lambda _: flask.Response("mine", mimetype="text/plain"),
    "flask, of a class of its own": lambda _: OwnFlaskResponse("mine"),
    "werkzeug": lambda _: werkzeug.Response("theirs"),
    "redirect": lambda _: flask.redirect("/caf\xe9"),
    "file": lambda _: flask.send_file(io.BytesIO(b"0123456789"), "text/plain"),
    "refusal": lambda _: flask.abort(418),
    "no body": lambda kind: kind(),
    "chunks": lambda kind: kind(["a", "bc"]),
    "mixed chunks": lambda kind: kind(list[Any]([b"a", "bc"]), headers={"Content-Length": "3"}),
    "one chunk": lambda kind: kind(["abc"], headers={"Content-Length": "3"}),
    "a stream": lambda kind: kind(iter([b"a", b"bc"]), direct_passthrough=True),
    "no headers": lambda kind: kind("text", headers=Headers()),
    "a content type": lambda kind: kind("text", content_type="text/x"),
    "a mimetype": lambda kind: kind("text", mimetype="text/x"),
    "headers": lambda kind: kind("text", headers=[("content-type", "text/x")]),
    "two types": lambda kind: kind("text", headers={"content-type": "text/x"}, mimetype="text/y"),
}
EXTRAS: tuple[dict[str, str], ...] = (
    {},
    {"X-A": "b", "Content-Type": "text/csv"},
    {"content-length": "3"},
    {"Location": "/\xe9"},
    {"Content-Location": "/\xe9"},
    {"Set-Cookie": "a=b", "Vary": "Cookie"},
    {"Content-Length": "3", "Location": "/\xe9"},
)


def change(response: flask.Response, how: str) -> flask.Response:
    """What an application may do to its response."""
    if how == "add":
        response.headers.add("X-Two", "1")
        response.headers.add("X-Two", "2")
    elif how == "replace":
        response.headers = Headers([("X-Only", "1")])
    elif how == "a list":
        response.headers = [("X-Only", "1"), ("Content-Length", "3")]  # type: ignore[assignment]
    elif how == "uncounted":
        response.headers.remove("Content-Length")
    elif how == "passthrough":
        response.direct_passthrough = True
    return response


class OwnResponse(Response):
    """What an application may make of the response class it is given."""

    def get_wsgi_headers(self, environ: Any) -> Headers:
        """One more."""
        headers = super().get_wsgi_headers(environ)
        headers["X-Own"] = "1"
        return headers


@pytest.mark.parametrize("status", [None, 200, "299 Fine", 204, 206, 301, 304, 404, 500, 103, "Odd"])
@pytest.mark.parametrize("body", sorted(BODIES))
@given(
    st.sampled_from(EXTRAS),
    st.sampled_from(("", "add", "replace", "a list", "uncounted", "passthrough")),
    st.sampled_from(("GET", "HEAD", "POST")),
    st.sampled_from(("text/html", "application/json", None)),
)
@settings(max_examples=6)
def test_the_same_responses(
    body: str, status: Any, extra: dict[str, str], how: str, method: str, mimetype: str | None
) -> None:
    """Whatever a view returns and a hook changes: status, fields in their order, and body are Flask's own."""
    said = []
    for kind in (flask.Response, Response):
        app = Flask("shortcuts")
        if kind is Response:
            take_shortcuts(app)

        def view(kind: type[flask.Response] = kind) -> Any:
            made = BODIES[body](kind)
            return (made, status, extra) if status else (made, extra)

        app.add_url_rule("/", "view", view, methods=["GET", "POST"])
        closed: list[bool] = []

        def finish(response: flask.Response, closed: list[bool] = closed) -> flask.Response:
            response.call_on_close(lambda: closed.append(True))
            return change(response, how)

        app.after_request(finish)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flask.Response, "default_mimetype", mimetype)
            said.append((serve(app, method), closed))
    assert said[0] == said[1]


def serve(app: Flask, method: str) -> tuple[Any, ...]:
    """What a server is given."""
    started: list[Any] = []
    environ = USUAL | {
        "REQUEST_METHOD": method,
        "PATH_INFO": "/",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    body = app.wsgi_app(environ, lambda *said: started.append(said))  # type: ignore[arg-type]
    pieces = list(body)
    if hasattr(body, "close"):
        body.close()
    for _, fields in started:
        fields[:] = [field for field in fields if field[0] != "Date"]  # that of a file is the present second
    return started, pieces


def test_the_copy_is_spared() -> None:
    """The usual response is told as it stands, and nobody can change it by what was told; others are Flask's."""
    app = Flask("shortcuts")
    take_shortcuts(app)
    with app.test_request_context("/") as context:
        response = app.make_response("text")
        assert type(response) is Response
        assert repr(response) == "<Response 4 bytes [200 OK]>"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(werkzeug.Response, "get_wsgi_headers", lambda *_: pytest.fail("a copy"))
            _, _, headers = response.get_wsgi_response(context.request.environ)
        headers.clear()
        assert response.headers["Content-Length"] == "4"
        own = OwnResponse("text")
        assert ("X-Own", "1") in own.get_wsgi_response(context.request.environ)[2]


def test_every_response_of_flask_s_counts() -> None:
    """`isinstance(response, app.response_class)` says what it said, and no response is made into another one."""
    app = Flask("shortcuts")
    take_shortcuts(app)
    theirs = [kind("text") for kind in (flask.Response, OwnFlaskResponse, Response, OwnResponse)]
    with app.test_request_context("/"):
        for response in theirs:
            assert isinstance(response, app.response_class)
            assert issubclass(type(response), app.response_class)
            kind = type(response)
            assert app.make_response(response) is response
            assert type(response) is kind
        werkzeug_s = werkzeug.Response("text")
        assert not isinstance(werkzeug_s, app.response_class)
        assert not issubclass(werkzeug.Response, app.response_class)
        assert isinstance(app.make_response(werkzeug_s), flask.Response)
    assert [isinstance(response, OwnResponse) for response in theirs] == [False, False, False, True]
    assert not issubclass(Response, OwnResponse)


def test_a_pickled_response_is_flask_s() -> None:
    """What a cache keeps of a response is read by other servers, too."""
    response = Response("kept", 201, {"X-A": "b"})
    again = pickle.loads(pickle.dumps(response))
    assert type(again) is flask.Response
    assert (again.status, again.data, again.headers) == (response.status, response.data, response.headers)
    assert type(pickle.loads(pickle.dumps(OwnResponse("kept")))) is OwnResponse


def test_coroutine_functions_are_found() -> None:
    """Plain functions are known by the second time, others are wrapped each time; none is kept alive."""

    class Running(Flask):
        """Runs coroutine functions without asgiref."""

        def async_to_sync(self, func: Any) -> Any:
            """In a loop of their own."""
            return lambda *args: asyncio.run(func(*args))

    app = Running("shortcuts")
    take_shortcuts(app)
    functions = app.ensure_sync
    assert isinstance(functions, PlainFunctions)

    def plain() -> int:
        return 1

    async def not_plain() -> int:
        return 2

    for _ in range(3):
        assert functions(plain) is plain
        assert functions(not_plain)() == 2
        assert functions(app.make_response) == app.make_response
    assert len(functions._known) == 1
    functions._known[id(not_plain)] = weakref.ref(plain)  # as if it had the place of one that is gone
    assert functions(not_plain)() == 2
    others: list[Callable[[], None]] = [lambda: None for _ in range(FUNCTIONS_LIMIT + 10)]
    assert all(functions(other) is other for other in others)
    assert len(functions._known) <= FUNCTIONS_LIMIT
    kept = weakref.ref(plain)
    functions(plain)
    del plain
    gc.collect()
    assert kept() is None


class OwnFlaskResponse(flask.Response):
    """What an application may have instead of Flask's."""

    default_mimetype = "text/own"

    def get_wsgi_headers(self, environ: Any) -> Headers:
        """One more."""
        headers = super().get_wsgi_headers(environ)
        headers["X-Own"] = "1"
        return headers


class OwnApp(Flask):
    """One that has a way of its own in everything."""

    response_class = OwnFlaskResponse

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """As Flask does."""
        return super().create_url_adapter(request)

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """As Flask does."""
        return super().ensure_sync(func)


class OwnMap(Map):
    """One that binds in a way of its own."""

    def bind(self, *args: Any, **options: Any) -> MapAdapter:
        """As Werkzeug does."""
        return super().bind(*args, **options)


class AppWithOwnMap(Flask):
    """One whose map is its own."""

    url_map_class = OwnMap


def test_a_way_of_their_own() -> None:
    """What an application or its map does in another way is left alone, the rest is not."""
    app = OwnApp("own")
    take_shortcuts(app)
    assert not vars(app).keys() & {"create_url_adapter", "ensure_sync", "response_class"}
    mapping = AppWithOwnMap("own")
    take_shortcuts(mapping)
    assert vars(mapping).keys() & {"create_url_adapter", "ensure_sync", "response_class"} == {
        "ensure_sync",
        "response_class",
    }
    set_later = make_app()
    set_later.response_class = OwnFlaskResponse
    take_shortcuts(set_later)
    assert set_later.response_class is OwnFlaskResponse


def test_it_can_be_switched_off_and_comes_once() -> None:
    """SHAREDCLUSTER_SHORTCUTS = False leaves Flask as it is; a second call changes nothing."""
    app = make_app()
    app.config["SHAREDCLUSTER_SHORTCUTS"] = False
    before = dict(vars(app))
    take_shortcuts(app)
    assert vars(app) == before
    app.config["SHAREDCLUSTER_SHORTCUTS"] = True
    take_shortcuts(app)
    taken = dict(vars(app))
    assert taken != before
    take_shortcuts(app)
    assert vars(app) == taken
