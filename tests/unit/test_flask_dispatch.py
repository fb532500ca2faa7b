"""A request's way through Flask with steps left out: everything that is called, said and left behind is the same."""

from __future__ import annotations

import contextvars
import copy
import functools
import io
import logging
import pickle
import pkgutil
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import date
from decimal import Decimal
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar

import flask
import pytest
import werkzeug
from flask import Blueprint, Flask, g, request, session, signals
from flask.ctx import AppContext, RequestContext
from flask.globals import _cv_app, _cv_request
from flask.json.provider import DefaultJSONProvider
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface, SessionInterface, SessionMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.datastructures import Headers
from werkzeug.routing import Map, MapAdapter, Rule

from sharedcluster.flask_shortcuts import STEPS, take_shortcuts, texts
from sharedcluster.flask_shortcuts.contexts import _make_request
from sharedcluster.flask_shortcuts.dispatch import Dispatch
from sharedcluster.flask_shortcuts.responses import Response, Unmade, text_response
from sharedcluster.flask_shortcuts.rules import LENGTH_LIMIT, PATHS_LIMIT, Rules

SIGNALS = {
    "started": signals.request_started,
    "finished": signals.request_finished,
    "tearing down": signals.request_tearing_down,
    "pushed": signals.appcontext_pushed,
    "popped": signals.appcontext_popped,
    "app tearing down": signals.appcontext_tearing_down,
    "exception": signals.got_request_exception,
}
HOOKS = (
    "before",
    "before answers",
    "before raises",
    "before of the blueprint",
    "values",
    "values of the blueprint",
    "after",
    "after raises",
    "after of the blueprint",
    "teardown",
    "teardown raises",
    "teardown of the blueprint",
    "teardown of the app",
    "teardown of the app raises",
    "handler of 404",
    "handler of ValueError",
    "handler of all",
)
WAYS = (
    "with a secret",
    "cannot open a session",
    "cannot save a session",
    "no session at all",
    "request class",
    "request class that closes",
    "response class",
    "propagates",
    "tests",
    "traps",
    "subdomains",
    "hosts",
    "g of its own",
    "another host is trusted",
    "debug",
    "wide",
    "compact",
    "unsorted",
    "not only ASCII",
    "a JSON type of its own",
    "a default of its own",
    "a provider of its own",
    "dumps of its own",
)
JSON_WAYS: tuple[set[str], ...] = tuple({way} for way in WAYS[WAYS.index("debug") :])
PATHS = (
    "/", "/text", "/text/", "//text", "/dir", "/dir/", "/tuple", "/dict", "/none", "/raises", "/exits", "/aborts",
    "/item/7", "/item/x", "/session", "/form", "/stream", "/nested", "/copied", "/async", "/after", "/own-options",
    "/bp/page", "/bp/raises", "/missing", "/caf\xc3\xa9", "/args/a%20b", "/defaults/", "/defaults/1", "/response", "",
    "/left-open", "/app-left-open", "/list", "/unjsonable", "/own-dict", "/json-tuple",
)  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "get", "BREW")
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\nContent-Type: text/plain\r\n\r\nabc\r\n'
    b"--x--\r\n"
)


class Log(list[Any]):
    """What happened, in order."""

    def note(self, what: str, *more: Any) -> None:
        """With everything that can be seen of the contexts at this moment."""
        seen: tuple[Any, ...] = ()
        if flask.has_request_context():
            seen = (
                request.method, request.path, request.endpoint, request.view_args, request.blueprints,
                type(request.routing_exception), repr(_cv_request.get()), len(_cv_request.get()._cv_tokens),
                request.host, request.url, request.server, request.remote_addr, request.query_string,
            )  # fmt: skip
        if flask.has_app_context():
            seen += (flask.current_app.name, sorted(vars(g)), type(g).__name__, len(_cv_app.get()._cv_tokens))
        self.append((what, *more, *seen))


class OwnRequest(flask.Request):
    """As an application has one."""

    parameter_storage_class = dict  # type: ignore[assignment]


class ClosingRequest(flask.Request):
    """One that has something to close."""

    closed: ClassVar[list[str]] = []

    def close(self) -> None:
        """Note it."""
        self.closed.append(self.path)
        super().close()


class OwnResponse(flask.Response):
    """As an application has one."""

    default_mimetype = "text/x-own"


class Globals(flask.ctx._AppCtxGlobals):
    """A `g` of an application's own."""


class Broken(SecureCookieSessionInterface):
    """Sessions that fail, or are none."""

    def __init__(self, where: str) -> None:
        self.where = where

    def open_session(self, app: Flask, request: flask.Request) -> Any:
        """Fail if that is what it is for."""
        if self.where == "open":
            raise ValueError("no session")
        return None if self.where == "none" else super().open_session(app, request)

    def save_session(self, app: Flask, session: SessionMixin, response: flask.Response) -> None:
        """Fail if that is what it is for."""
        if self.where == "save":
            raise ValueError("not saved")
        super().save_session(app, session, response)


def make_app(ways: set[str], log: Log) -> Flask:
    """An application with all kinds of views."""
    app = Flask("dispatch", subdomain_matching="subdomains" in ways, host_matching="hosts" in ways, static_folder=None)
    if "with a secret" in ways:
        app.secret_key = "secret"
    for way, where in (
        ("cannot open a session", "open"),
        ("cannot save a session", "save"),
        ("no session at all", "none"),
    ):
        if way in ways:
            app.session_interface = Broken(where)
    if "request class" in ways:
        app.request_class = OwnRequest
    if "request class that closes" in ways:
        app.request_class = ClosingRequest
    if "response class" in ways:
        app.response_class = OwnResponse
    if "g of its own" in ways:
        app.app_ctx_globals_class = Globals
    app.config["PROPAGATE_EXCEPTIONS"] = True if "propagates" in ways else None
    app.config["TRAP_HTTP_EXCEPTIONS"] = "traps" in ways
    app.testing = "tests" in ways
    app.debug = "debug" in ways
    set_json(app, ways)
    app.config["TRUSTED_HOSTS"] = ["example.com"] if "another host is trusted" in ways else None
    app.logger.disabled = True
    host: dict[str, Any] = {"host": "example.org:80"} if "hosts" in ways else {}
    add_views(app, log, host)
    return app


def set_json(app: Flask, ways: set[str]) -> None:
    """How the application writes JSON."""
    if "a provider of its own" in ways:
        app.json = type("Own", (DefaultJSONProvider,), {"dumps": lambda self, value, **_: "own"})(app)
    provider: Any = app.json
    if "wide" in ways or "compact" in ways:
        provider.compact = "compact" in ways
    if "unsorted" in ways:
        provider.sort_keys = False
    if "not only ASCII" in ways:
        provider.ensure_ascii = False
    if "a JSON type of its own" in ways:
        provider.mimetype = "application/x-own"
    if "a default of its own" in ways:
        provider.default = lambda value: f"default of {type(value).__name__}"
    if "dumps of its own" in ways:
        provider.dumps = lambda value, **_: "own"


def add_views(app: Flask, log: Log, host: dict[str, Any]) -> None:
    """One for each thing a view can do."""

    def text(**values: Any) -> str:
        log.note("view", values)
        g.seen = 1
        return "grüße"

    def raises() -> str:
        raise ValueError("from the view")

    def exits() -> str:
        raise SystemExit(3)

    def keeps() -> str:
        session["n"] = session.get("n", 0) + 1
        return str(session["n"])

    def form() -> str:
        kept.append(request.files["f"].stream)
        return request.files["f"].filename or ""

    def stream() -> flask.Response:
        def pieces() -> Iterator[str]:
            for piece in "ab":
                log.note("piece")
                yield piece

        return app.response_class(flask.stream_with_context(pieces()))

    def nested() -> str:
        with app.app_context():
            log.note("inside")
        with app.test_request_context("/text", environ_overrides={"REMOTE_ADDR": "::9"}):
            log.note("inside a request")
        with _cv_request.get():
            log.note("once more")
        return "nested"

    def leaves_open() -> str:
        app.test_request_context("/text").push()
        return "left open"

    def leaves_app_open() -> str:
        _cv_app.get().push()
        return "left open"

    def copied() -> str:
        mine = _cv_request.get()._session

        @flask.copy_current_request_context
        def inside() -> None:
            log.note("in a copy", _cv_request.get()._session is mine)

        inside()
        contextvars.Context().run(inside)  # as in a greenlet of its own
        return "copied"

    async def later() -> str:
        log.note("async view")
        return "later"

    def after() -> str:
        def change(response: flask.Response) -> flask.Response:
            log.note("after this request")
            response.headers["X-After"] = "1"
            return response

        flask.after_this_request(change)
        return "after"

    kept: list[Any] = []
    app.extensions["kept"] = kept
    views: dict[str, Callable[..., Any]] = {
        "/": text,
        "/text": text,
        "/dir/": text,
        "/tuple": lambda: ("tuple", 201, {"X-A": "1"}),
        "/dict": lambda: {"ü": [1, None, 1.5, date(2026, 11, 28)], "a": Markup("<b>")},
        "/list": lambda: [Decimal("1.5"), {"b": 1, "a": float("nan")}],
        "/unjsonable": lambda: {"a": object()},
        "/own-dict": lambda: OrderedDict(b=1, a=2),
        "/json-tuple": lambda: ({"a": 1}, 201, {"X-A": "1"}),
        "/none": lambda: None,
        "/raises": raises,
        "/exits": exits,
        "/aborts": lambda: flask.abort(404),
        "/item/<int:number>": text,
        "/session": keeps,
        "/form": form,
        "/stream": stream,
        "/nested": nested,
        "/left-open": leaves_open,
        "/app-left-open": leaves_app_open,
        "/copied": copied,
        "/async": later,
        "/after": after,
        "/args/<path:what>": text,
        "/response": lambda: app.response_class("made", mimetype="text/plain"),
        "/caf\xe9": text,
    }
    for path, view in views.items():
        app.add_url_rule(path, path.replace("<", "").replace(".", ""), view, methods=["GET", "POST"], **host)
    app.add_url_rule("/own-options", "own options", text, methods=["GET", "OPTIONS"], **host)
    app.add_url_rule("/defaults/", "defaults", text, defaults={"number": 1}, **host)
    app.add_url_rule("/defaults/<int:number>", "defaults", text, **host)
    blueprint = Blueprint("bp", __name__, url_prefix="/bp")
    blueprint.add_url_rule("/page", "page", text, **host)
    blueprint.add_url_rule("/raises", "raises", raises, **host)
    app.extensions["blueprint"] = blueprint


def add_hook(app: Flask, log: Log, name: str) -> None:
    """Register what the name says."""
    blueprint: Blueprint = app.extensions["blueprint"]
    where: Any = blueprint if "of the blueprint" in name else app
    kind = name.split(" ")[0]
    if kind == "before":

        def before() -> Any:
            log.note(name)
            if "raises" in name:
                raise ValueError("before")
            return "before" if "answers" in name and request.path == "/text" else None

        where.before_request(before)
    elif kind == "values":
        where.url_value_preprocessor(lambda endpoint, values: log.note(name, endpoint, values))
    elif kind == "after":

        def after(response: flask.Response) -> flask.Response:
            log.note(name, response.status)
            if "raises" in name:
                raise ValueError("after")
            return response

        where.after_request(after)
    elif kind == "teardown":

        def teardown(error: BaseException | None) -> None:
            log.note(name, repr(error))
            if "raises" in name and request:
                raise ValueError("teardown")

        (app.teardown_appcontext if "of the app" in name else where.teardown_request)(teardown)
    else:

        def handle(error: Exception) -> tuple[str, int]:
            log.note(name, repr(error))
            return name, 418

        kinds: dict[str, Any] = {"404": 404, "ValueError": ValueError, "all": Exception}
        app.register_error_handler(kinds[name.split(" ")[-1]], handle)


def serve(app: Flask, log: Log, path: str, method: str) -> None:
    """One request, as a server sends it, and all that can be seen of it afterwards."""
    path, _, query = path.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "HTTP_HOST": "example.org",
        "REMOTE_ADDR": "192.0.2.1",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(FORM if path == "/form" else b""),
        "wsgi.errors": io.StringIO(),
        "HTTP_COOKIE": "; ".join(app.extensions.get("cookies", [])),
    }
    if path == "/form":
        environ |= {"CONTENT_TYPE": "multipart/form-data; boundary=x", "CONTENT_LENGTH": str(len(FORM))}
    started: list[Any] = []
    try:
        body = app.wsgi_app(environ, lambda *said: started.append(said))  # type: ignore[arg-type]
        log.append(("body", b"".join(body)))
        if hasattr(body, "close"):
            body.close()
    except (Exception, SystemExit) as error:
        log.append(("raised", type(error), re.sub("0x[0-9a-f]+", "", str(error))))
    for status, fields, *_ in started:
        app.extensions["cookies"] = [value.split(";")[0] for name, value in fields if name == "Set-Cookie"]
        # A session's signature has the second in it.
        log.append((status, [field if field[0] != "Set-Cookie" else "a cookie" for field in fields]))
    log.append(("left", repr(environ["werkzeug.request"]), [stream.closed for stream in app.extensions["kept"]]))
    log.append(
        (type(_cv_app.get(None)), repr(_cv_request.get(None)), app._got_first_request, ClosingRequest.closed[:])
    )


def both(check: Callable[[Flask, Log], None], ways: set[str]) -> None:
    """Do the same with and without shortcuts, and compare."""
    logs = []
    for is_short in (False, True):
        log = Log()
        app = make_app(ways, log)
        if is_short:
            take_shortcuts(app)
            assert isinstance(app.full_dispatch_request, Dispatch) == KNOWN
        ClosingRequest.closed.clear()
        contextvars.copy_context().run(check, app, log)  # where a teardown has raised, Flask leaves a context behind
        logs.append(log)
        for stream in app.extensions["kept"]:
            stream.close()
    assert logs[0] == logs[1]


KNOWN = not texts.unknown(texts.DISPATCH)
"""Whether the Flask that is installed is one of those that have been read."""

some_requests = st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(METHODS)), min_size=1, max_size=6)
"""Some twice, so that what is remembered is used."""


@given(
    st.sets(st.sampled_from(WAYS), max_size=3),
    st.sets(st.sampled_from(HOOKS), max_size=4),
    st.sets(st.sampled_from(sorted(SIGNALS)), max_size=2),
    some_requests,
)
@settings(max_examples=100)
def test_the_same(ways: set[str], hooks: set[str], heard: set[str], asked: list[tuple[str, str]]) -> None:
    """Any hooks, signals, classes and sessions: the same functions are called in the same order, seeing the same."""

    def check(app: Flask, log: Log) -> None:
        for hook in sorted(hooks):
            add_hook(app, log, hook)
        app.register_blueprint(app.extensions["blueprint"])
        with ExitStack() as listening:
            for name in sorted(heard):
                listening.enter_context(SIGNALS[name].connected_to(functools.partial(hear, log, name), app))
            for path, method in [*asked, *asked]:
                serve(app, log, path, method)

    both(check, ways)


def hear(log: Log, name: str, sender: Flask, **more: Any) -> None:
    """Note a signal."""
    log.note(name, sender.name, sorted(more))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_each_view(path: str, method: str) -> None:
    """Without any hook, which is when most is left out, and with a session."""

    def check(app: Flask, log: Log) -> None:
        app.register_blueprint(app.extensions["blueprint"])
        for _ in range(3):
            serve(app, log, path, method)

    both(check, set())
    both(check, {"with a secret"})
    both(check, {"another host is trusted"})


@pytest.mark.parametrize("ways", JSON_WAYS, ids=lambda ways: next(iter(ways)))
@pytest.mark.parametrize("path", ["/dict", "/list", "/unjsonable", "/own-dict", "/json-tuple"])
def test_the_same_json(path: str, ways: set[str]) -> None:
    """Whatever is set on the provider, or whichever it is: the same bytes, type and errors."""

    def check(app: Flask, log: Log) -> None:
        serve(app, log, path, "GET")
        app.json.sort_keys = not app.json.sort_keys  # type: ignore[attr-defined]
        serve(app, log, path, "GET")

    both(check, ways)


@pytest.mark.parametrize("late", [*HOOKS, *sorted(SIGNALS)])
@pytest.mark.parametrize("path", ["/text", "/bp/page", "/raises", "/missing", "/form"])
def test_who_comes_late_is_heard(path: str, late: str) -> None:
    """A hook or a receiver that is added after requests have been served is called from then on."""

    def check(app: Flask, log: Log) -> None:
        app.register_blueprint(app.extensions["blueprint"])
        serve(app, log, path, "POST")
        app._got_first_request = False  # Flask would refuse the hook
        app.extensions["blueprint"]._got_registered_once = False
        with ExitStack() as listening:
            if late in SIGNALS:
                listening.enter_context(SIGNALS[late].connected_to(functools.partial(hear, log, late), app))
            elif "of the blueprint" in late:
                table = {"before": "before_request", "values": "url_value_preprocessor", "after": "after_request"}
                registry = table.get(late.split(" ")[0], "teardown_request")
                functions = getattr(app, f"{registry}s" if registry.endswith("or") else f"{registry}_funcs")
                functions["bp"].append(functools.partial(passes, log, late))
            else:
                add_hook(app, log, late)
            serve(app, log, path, "POST")

    both(check, {"tests"} if late == "exception" else set())


def passes(log: Log, name: str, *given: Any) -> Any:
    """A hook of any kind that changes nothing."""
    log.note(name, len(given))
    return given[0] if name.startswith("after") else None


def test_rules_that_come_late() -> None:
    """A rule that is added later and goes before the one that was found, by the application or on the map."""

    def check(app: Flask, log: Log) -> None:
        for add in (app.add_url_rule, lambda path, endpoint: app.url_map.add(Rule(path, endpoint=endpoint))):
            name = "one" if add == app.add_url_rule else "two"
            path = f"/{name}/page"
            app._got_first_request = False
            app.view_functions.update({name: lambda: "exactly", f"any {name}": lambda what: what})
            app.url_map.add(Rule(f"/{name}/<what>", endpoint=f"any {name}"))
            serve(app, log, path, "GET")
            serve(app, log, f"/{name}", "GET")
            app._got_first_request = False
            add(path, name)
            serve(app, log, path, "GET")
            app.url_map.add(Rule(f"/{name}", endpoint=name, methods=["POST"]))
            serve(app, log, f"/{name}", "GET")
            serve(app, log, f"/{name}", "POST")

    both(check, set())


def test_the_default_of_the_class() -> None:
    """What all providers do with an unknown type may be changed at any time."""

    def check(app: Flask, log: Log) -> None:
        serve(app, log, "/list", "GET")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DefaultJSONProvider, "default", staticmethod(lambda value: "changed"))
            serve(app, log, "/list", "GET")

    both(check, set())


def matches(adapter: MapAdapter, rules: Rules | None) -> Any:
    """What is found, or how it is refused."""
    try:
        return rules.match(adapter) if rules is not None else adapter.match(return_rule=True)
    except werkzeug.exceptions.HTTPException as error:
        return type(error), getattr(error, "new_url", None), getattr(error, "valid_methods", None)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("/", "/a", "/a/", "//a", "/b", "/b/", "/c/1", "/old", "/ws", "", "/a//b", "/moved/1")),
            st.sampled_from(("GET", "POST", "get")),
            st.sampled_from(("http", "ws")),
            st.sampled_from(("example.org", "other.org")),
            st.sampled_from(("", "www")),
            st.sampled_from(("host_matching", "redirect_defaults", "merge_slashes", "")),
        ),
        max_size=12,
    )
)
def test_the_same_rules(asked: list[tuple[str, ...]]) -> None:
    """Whatever a match depends on is part of what it is remembered under; what redirects is not remembered."""
    found: list[list[Any]] = []
    for remembers in (False, True):
        url_map = Map(
            [
                Rule("/", endpoint="root"),
                Rule("/a", endpoint="a"),
                Rule("/a", endpoint="a of www", subdomain="www"),
                Rule("/b/", endpoint="b"),
                Rule("/c/<int:number>", endpoint="c"),
                Rule("/c/", endpoint="c", defaults={"number": 1}),
                Rule("/old", redirect_to="a", endpoint="old"),
                Rule("/ws", endpoint="ws", websocket=True),
                Rule("/a", endpoint="post", methods=["POST"]),
                Rule("/moved/<int:number>", endpoint="a", alias=True),
            ]
        )
        rules = Rules(url_map) if remembers else None
        answers: list[Any] = []
        for path, method, scheme, server, subdomain, switch in asked:
            if switch:
                setattr(url_map, switch, not getattr(url_map, switch))
            adapter = MapAdapter(url_map, server, "/", subdomain, scheme, path, method)
            answer = matches(adapter, rules)
            if isinstance(answer[0], Rule):
                answer = answer[0].endpoint, dict(answer[1])
            answers.append(answer)
        found.append(answers)
    assert found[0] == found[1]


def test_what_is_remembered_of_rules() -> None:
    """Paths without values, so many and so long; each request gets values of its own; other maps are not mixed up."""
    url_map = Map([Rule("/a", endpoint="a"), Rule("/b/<what>", endpoint="b")])
    rules = Rules(url_map)
    first, second = (rules.match(url_map.bind("x", path_info="/a")) for _ in range(2))
    assert first[0] is second[0]
    assert first[1] is not second[1]
    rules.match(url_map.bind("x", path_info="/b/1"))
    rules.match(url_map.bind("x", path_info="/" * LENGTH_LIMIT + "a"))
    rules.match(url_map.bind(".".join(["x" * 60] * 9), path_info="/a"))
    assert len(rules._known) == 1
    for number in range(PATHS_LIMIT + 10):
        rules.match(url_map.bind("x", path_info="/a", default_method="GET", script_name=str(number)))
        rules.match(url_map.bind(f"host{number}", path_info="/a"))
    assert len(rules._known) <= PATHS_LIMIT
    other = Map([Rule("/a", endpoint="of another map")])
    assert rules.match(other.bind("x", path_info="/a"))[0].endpoint == "of another map"
    assert rules.match(url_map.bind("x", path_info="/a"))[0].endpoint == "a"


USUAL: dict[str, Any] = {
    "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/item/7", "QUERY_STRING": "a=1", "REMOTE_ADDR": "::1",
    "SERVER_NAME": "localhost", "SERVER_PORT": "8000", "wsgi.url_scheme": "http", "HTTP_HOST": "a", "HTTP_X_A": "b",
}  # fmt: skip
CHANGES: dict[str, tuple[Any, ...]] = {
    "REQUEST_METHOD": ("POST", "get", None),
    "SCRIPT_NAME": ("/shop", "/shop/", "/caf\xc3\xa9", None),
    "PATH_INFO": ("", "/", "//x//", "x", "/caf\xc3\xa9", "/\xff", None),
    "QUERY_STRING": ("", "caf\xc3\xa9", "\xff", None),
    "REMOTE_ADDR": (None,),
    "SERVER_NAME": (None, "::1"),
    "SERVER_PORT": (None, "", "x", "80", 80),
    "wsgi.url_scheme": ("https", None),
}


@given(
    st.lists(
        st.sampled_from(sorted(CHANGES)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(CHANGES[key]))),
        max_size=3,
    )
)
def test_a_request_is_what_flask_makes(changes: list[tuple[str, Any]]) -> None:
    """Of any environ: all attributes, and what is left in the environ."""
    environ = {key: value for key, value in (USUAL | dict(changes)).items() if value is not None}
    made = []
    app = flask.Flask(__name__)
    for make in (flask.Request, functools.partial(_make_request, app)):
        given = dict(environ)
        request = make(given)
        request.json_module = app.json  # as Flask does with each
        assert type(request) is flask.Request
        assert given.pop("werkzeug.request") is request
        facts = dict(vars(request))
        assert facts.pop("environ") is given
        made.append((facts, given, request.url, dict(request.headers)))
    made[0][0]["headers"] = made[1][0]["headers"] = None  # equal only for one and the same environ; looked at above
    assert made[0] == made[1]


SWITCHES: dict[str, Callable[[Flask], None]] = {
    "server name": lambda app: app.config.update(SERVER_NAME=None if app.config["SERVER_NAME"] else "a"),
    "trusted hosts": lambda app: app.config.update(TRUSTED_HOSTS=None if app.config["TRUSTED_HOSTS"] else ["a"]),
    "trusted hosts of the class": lambda app: setattr(flask.Request, "trusted_hosts", ["b", "a:80"]),
    "subdomains": lambda app: setattr(app, "subdomain_matching", not app.subdomain_matching),
    "default subdomain": lambda app: setattr(app.url_map, "default_subdomain", app.url_map.default_subdomain + "x"),
    "redirects": lambda app: setattr(app.url_map, "redirect_defaults", not app.url_map.redirect_defaults),
    "another rule": lambda app: app.url_map.add(Rule("/item/7", endpoint="late", methods=["GET", "POST"])),
    "another map": lambda app: setattr(app, "url_map", Map([Rule("/item/7", endpoint="of another map")])),
    "class of requests": lambda app: setattr(app, "request_class", type("Own", (flask.Request,), {})),
    "own adapters": lambda app: setattr(app, "create_url_adapter", lambda request: app.url_map.bind("own")),
}
"""What may change between two requests."""


def changed(keys: Iterable[str]) -> st.SearchStrategy[tuple[str, Any]]:
    """Another value, or none, for one of the keys."""
    return st.sampled_from(sorted(keys)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(CHANGES[key])))


@pytest.mark.skipif(not KNOWN, reason="all steps are taken")
@given(
    st.lists(
        st.one_of(
            st.sampled_from(sorted(SWITCHES)),
            st.lists(changed({*CHANGES} - {"QUERY_STRING"}), max_size=1),
            st.lists(changed(CHANGES), max_size=2),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=300)
def test_a_known_request_begins_as_any(steps: list[str | list[tuple[str, Any]]]) -> None:
    """Whatever came before: the attributes, the adapter, the rule and the values are those that Flask makes."""
    seen = []
    for takes in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flask.Request, "trusted_hosts", None)  # what a step sets is undone
            seen.append(notes_of(takes, steps))
    assert seen[0] == seen[1]


def notes_of(takes: bool, steps: list[str | list[tuple[str, Any]]]) -> list[Any]:
    """What an application, with or without shortcuts, knows of each request."""
    app = Flask("known")
    for path in ("/", "/item/7", "/item/<int:number>", "/x/", "/caf\xe9"):
        app.add_url_rule(path, path, methods=["GET", "POST"])
    app.add_url_rule("/default", "default", defaults={"page": 1})
    if takes:
        take_shortcuts(app)
    notes: list[Any] = []
    for step in [*steps, *steps, [], []]:
        if isinstance(step, str):
            SWITCHES[step](app)
            continue
        given = USUAL | {"QUERY_STRING": ""} | dict(step)
        notes.append(begun(app, {key: value for key, value in given.items() if value is not None}))
    return notes


def begun(app: Flask, environ: dict[str, Any]) -> Any:
    """What is known of a request when its context has been entered."""
    given = dict(environ)
    try:
        context = app.request_context(given)
    except Exception as error:
        return repr(error)
    context.push()
    try:
        request, adapter = context.request, context.url_adapter
        facts = {name: value for name, value in vars(request).items() if name not in ("environ", "headers")}
        facts["json_module"] = facts.pop("json_module") is app.json
        facts["routing_exception"] = repr(facts.pop("routing_exception", None))
        facts["url_rule"] = repr(facts.pop("url_rule", None))
        ways = None if adapter is None else {k: v for k, v in vars(adapter).items() if k != "map"}
        is_its_own = given["werkzeug.request"] is request and request.environ is given
        outer = None if (of_app := _cv_app.get().url_adapter) is None else of_app.server_name
        is_on_map = adapter is None or adapter.map is app.url_map
        return facts, ways, outer, is_its_own, is_on_map, dict(request.headers), request.url
    finally:
        context.pop()


@pytest.mark.skipif(not KNOWN, reason="all steps are taken")
def test_a_session_interface_that_changes_a_request_changes_no_other() -> None:
    """What the next request begins with is made anew, not taken from one that somebody has had in hands."""

    class Meddling(SecureCookieSessionInterface):
        def open_session(self, app: Flask, request: flask.Request) -> Any:
            request.method, request.path = "BAD", "/bad"
            return super().open_session(app, request)

    app = Flask("meddling")
    app.add_url_rule("/item/7", "item", lambda: "")
    app.session_interface = Meddling()
    take_shortcuts(app)
    for _ in range(3):
        context = app.request_context(USUAL | {"QUERY_STRING": ""})
        assert (context.request.method, context.request.path) == ("GET", "/item/7")
        context.push()
        context.pop()


@pytest.mark.skipif(not KNOWN, reason="all steps are taken")
def test_which_requests_are_known() -> None:
    """Those for paths without values and queries; so many, and none that is long."""
    app = Flask("known")
    for path in ("/a", "/b/<number>", "/" + "x" * LENGTH_LIMIT):
        app.add_url_rule(path, path)
    take_shortcuts(app)
    known: dict[Any, Any] = app.request_context(dict(USUAL)).rules.requests  # type: ignore[attr-defined]

    def ask(**more: Any) -> int:
        context = app.request_context(USUAL | {"QUERY_STRING": ""} | more)
        context.push()
        context.pop()
        return len(known)

    assert ask(PATH_INFO="/a", QUERY_STRING="x=1") == 0
    assert ask(PATH_INFO="/b/1") == 0
    assert ask(PATH_INFO="/missing") == 0
    assert ask(PATH_INFO="/" + "x" * LENGTH_LIMIT) == 0
    assert ask(PATH_INFO="/a", HTTP_UPGRADE="websocket") == 0
    assert ask(PATH_INFO="/a") == 1
    assert ask(PATH_INFO="/a") == 1
    assert max(ask(PATH_INFO="/a", HTTP_HOST=f"host{number}") for number in range(PATHS_LIMIT + 10)) <= PATHS_LIMIT


def test_a_view_may_be_replaced_at_any_time() -> None:
    """By another function, by what cannot be looked up in a set, by a coroutine function."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self) -> str:
            return "unhashable"

    async def waits() -> str:
        return "waited"

    app = Flask("replaced")
    app.add_url_rule("/", "view", lambda: "first")
    take_shortcuts(app)
    client = app.test_client()
    assert [client.get("/").text for _ in range(2)] == ["first"] * 2
    for view, answer in ((lambda: "second", "second"), (Unhashable(), "unhashable"), (waits, "waited")):
        app.view_functions["view"] = view
        if view is waits and find_spec("asgiref") is None:
            assert client.get("/").status_code == 500  # Flask says that it needs asgiref
        else:
            assert [client.get("/").text for _ in range(2)] == [answer] * 2


def test_an_application_that_runs_its_views_in_a_way_of_its_own() -> None:
    """It is asked for each request, whatever it said of a view before."""
    asked: list[str] = []

    class Own(Flask):
        def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
            asked.append(func.__name__)
            return func if len(asked) % 2 else lambda: "run otherwise"

    app = Own("own")
    app.add_url_rule("/", "view", lambda: "as it is")
    take_shortcuts(app)
    client = app.test_client()
    assert [client.get("/").text for _ in range(4)] == ["as it is", "run otherwise"] * 2


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["Content-Length", "content-length", "Location", "LOCATION", "Content-Location", "Vary", "X-A"]
            ),
            st.sampled_from(["5", "/there", "http://a/b", "caf\xe9"]),
        ),
        max_size=4,
    ),
    st.sampled_from((200, 204, 304, 302, 100, 404)),
    st.sampled_from(("GET", "HEAD")),
)
def test_a_response_has_the_fields_that_werkzeug_gives_it(
    fields: list[tuple[str, str]], status: int, method: str
) -> None:
    """Of any names in any spelling: twice, so that what is remembered of the names is used."""
    environ = USUAL | {"REQUEST_METHOD": method}
    for _ in range(2):
        made = []
        for kind in (flask.Response, Response):
            body, line, headers = kind("hello", status, fields, mimetype="text/plain").get_wsgi_response(dict(environ))
            made.append((b"".join(body), line, headers))
        assert made[0] == made[1]


@given(
    st.text(),
    st.sampled_from(("text/html", "application/json", "x", None)),
    st.sampled_from((200, 418, 999)),
    st.booleans(),
)
def test_a_text_response_is_what_flask_makes(text: str, mimetype: Any, status: int, counts: bool) -> None:
    """Of any text, whatever the class says of types, statuses and lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flask.Response, "default_mimetype", mimetype)
        patch.setattr(flask.Response, "default_status", status)
        patch.setattr(flask.Response, "automatically_set_content_length", counts)
        try:
            made = text_response(text)
        except UnicodeEncodeError:
            with pytest.raises(UnicodeEncodeError):
                Response(text)
            return
        expected = Response(text)
    assert made.direct_passthrough is False  # which is a look at it
    assert type(made) is Response
    assert vars(made) == vars(expected)
    assert made.headers.to_wsgi_list() == expected.headers.to_wsgi_list()
    made.headers["X-Own"] = "1"
    assert "X-Own" not in text_response("another").headers


def _set_a_header(response: Any) -> Any:
    response.headers["X-Own"] = "1"
    return response


def _set_a_cookie(response: Any) -> Any:
    response.set_cookie("name", "value")
    return response


def _set_the_text(response: Any) -> Any:
    response.data = "another"
    return response


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    def change(response: Any) -> Any:
        setattr(response, name, value)
        return response

    return change


def _drop_own_type(response: Any) -> Any:
    response.default_mimetype = "own"
    del response.default_mimetype
    return response


def _drop_the_headers(response: Any) -> Any:
    del response.headers
    response.headers = Headers({"X-Own": "1"})
    return response


def _be_forced(response: Any) -> Any:
    return Response.force_type(response)


def _note_the_end(response: Any) -> Any:
    response.call_on_close(lambda: None)
    return response


def _ask_for_what_is_not_there(response: Any) -> Any:
    assert not hasattr(response, "no_such_name")
    return response


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "look",
    [
        lambda response: response,
        lambda response: pickle.loads(pickle.dumps(response)),
        copy.copy,
        copy.deepcopy,
        _set_a_header,
        _set_a_cookie,
        _set_the_text,
        _set("status_code", 404),
        _set("status", "418 I am"),
        _set("status_code", 204),
        _set("response", ["an", "other"]),
        _set("direct_passthrough", True),
        _set("headers", Headers({"X-Own": "1"})),
        _set("own", "value"),
        _drop_own_type,
        _drop_the_headers,
        _be_forced,
        _note_the_end,
        _ask_for_what_is_not_there,
    ],
)
def test_whoever_looks_at_a_response_finds_flask_s(look: Callable[[Any], Any], method: str) -> None:
    """Whatever the first look is, and whatever is done by it: the same attributes, and the same answer."""
    answers = []
    for make in (text_response, Response):
        response = look(make("hello"))
        environ = USUAL | {"REQUEST_METHOD": method}
        begun: list[Any] = []
        body = b"".join(response(environ, lambda *given: begun.append(given)))  # noqa: B023
        headers = response.headers.to_wsgi_list()  # at the latest now somebody has looked
        assert type(response) in (Response, flask.Response)  # the second where it was pickled
        answers.append((body, begun, response.status, headers, vars(response).keys(), len(response._on_close)))
    assert answers[0] == answers[1]


def test_an_answer_can_be_given_twice() -> None:
    """Whoever was given the headers may change them: they are his own."""
    response = text_response("hello")
    begun: list[Any] = []

    def begin(status: str, headers: list[tuple[str, str]], *_: object) -> Any:
        begun.append((status, tuple(headers)))
        headers.clear()

    assert [b"".join(response(USUAL, begin)) for _ in range(2)] == [b"hello", b"hello"]
    assert begun[0] == begun[1]
    assert len(begun[0][1]) == 2


@pytest.mark.skipif(not KNOWN, reason="all steps are taken")
def test_requests_for_one_path_share_nothing_that_can_be_changed() -> None:
    """What a request does to itself, or to its URL adapter, the next one for that path does not see."""
    app = Flask("shared")
    app.add_url_rule("/here", "here", lambda: "")
    take_shortcuts(app)
    known = []
    for _ in range(4):
        with app.test_request_context("/here"):
            context: Any = _cv_request.get()
            known.append(context.known is not None)
            assert (request.path, context.url_adapter.server_name) == ("/here", "localhost")
            assert not hasattr(request, "own")
            assert not hasattr(context.url_adapter, "own")
            for each in (context.request, context.url_adapter):
                each.own = each.path = each.server_name = "changed"
    assert known == [False, True, True, True]


@pytest.mark.skipif(not KNOWN, reason="all steps are taken")
def test_nobody_looks_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and JSON of plain views go to the server as they are; a hook gets a response, and what it does counts."""
    made: list[object] = []
    original = Unmade.make

    def make(response: Unmade) -> None:
        made.append(response)
        original(response)

    monkeypatch.setattr(Unmade, "make", make)
    app = Flask("plain")
    app.add_url_rule("/text", "text", lambda: "text")
    app.add_url_rule("/json", "json", lambda: {"a": 1})
    take_shortcuts(app)
    client = app.test_client()
    assert [client.get(path).text for path in ("/text", "/json")] == ["text", '{"a":1}\n']
    assert made == []
    with app.test_request_context("/text"):
        response = app.full_dispatch_request()
        assert isinstance(response, flask.Response)
        assert response.status_code == 200
    assert made == [response]
    made.clear()
    assert client.head("/text").headers["Content-Length"] == "4"
    assert len(made) == 1

    def hook(response: flask.Response) -> flask.Response:
        response.headers["X-Hook"] = response.get_data(as_text=True)
        response.status_code = 202
        return response

    app.after_request_funcs[None] = [hook]
    answer = client.get("/text")
    assert (answer.status_code, answer.headers["X-Hook"], answer.text) == (202, "text", "text")


def test_a_session_interface_of_somebody_else_s_gets_a_response() -> None:
    """It may do with it what it does with any, where a session of ours is nobody's."""

    class Own(SessionInterface):
        def open_session(self, app: Flask, request: flask.Request) -> Any:
            return SecureCookieSession()

        def save_session(self, app: Flask, session: Any, response: flask.Response) -> None:
            response.vary.add("Cookie")
            response.set_cookie("own", str(len(response.get_data())))

    app = Flask("own")
    app.session_interface = Own()
    app.add_url_rule("/", "view", lambda: "hello")
    take_shortcuts(app)
    answer = app.test_client().get("/")
    assert (answer.text, answer.headers["Vary"], answer.headers["Set-Cookie"]) == ("hello", "Cookie", "own=5; Path=/")


# -- which Flask ---------------------------------------------------------------------------------------------------


READ = {"flask": {"3.1.3"}, "werkzeug": {f"3.1.{patch}" for patch in range(4, 10)}}


def test_the_releases_that_were_read_are_known() -> None:
    """A digest is of the text that is there. With another release, read what has changed, and add its digest."""
    if any(version(name) not in read for name, read in READ.items()):
        pytest.skip("another release of Flask or Werkzeug: its steps are all taken until it has been read")
    assert texts.unknown(texts.DISPATCH) == []


def test_all_that_is_left_out_is_read() -> None:
    """Who stands in for a method of the application has read it."""
    assert set(STEPS) <= set(texts.DISPATCH["flask.app:Flask"])


@pytest.mark.parametrize("name", STEPS)
def test_an_application_with_a_step_of_its_own(name: str) -> None:
    """By a subclass or on the application: it takes all of them."""
    own = type("Own", (Flask,), {name: lambda self, *given, **named: getattr(Flask, name)(self, *given, **named)})
    app: Flask = own("own")
    take_shortcuts(app)
    assert "full_dispatch_request" not in vars(app)
    assert "request_context" not in vars(app)
    app = Flask("own")
    mine = functools.partial(getattr(Flask, name), app)
    setattr(app, name, mine)
    take_shortcuts(app)
    assert vars(app)[name] is mine
    assert not isinstance(app.full_dispatch_request, Dispatch)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, functions in texts.DISPATCH.items() for name in functions],
)
def test_who_is_traced_is_left_alone(owner: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Tools that trace an application put functions of theirs in Flask's place: those are called, and it is said."""
    place = pkgutil.resolve_name(owner)
    if not hasattr(place, name):
        pytest.skip("this Flask has no such function")
    original = getattr(place, name)
    function: Any = original.fget if type(original) is property else original

    @functools.wraps(function)
    def traced(*given: Any, **named: Any) -> Any:
        return function(*given, **named)

    app = Flask("traced")
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "sharedcluster"):
        patch.setattr(place, name, property(traced) if type(original) is property else traced)
        take_shortcuts(app)
    assert "full_dispatch_request" not in vars(app)
    assert "request_context" not in vars(app)
    assert f"{owner.rpartition(':')[2]}.{name}" in caplog.text


def test_what_cannot_be_read_is_not_known() -> None:
    """No text, no shortcut: a compiled function, one without a file."""
    namespace: dict[str, Any] = {}
    exec("def nowhere(): pass", namespace)
    assert texts.digest(namespace["nowhere"]) == ""
    assert texts.digest(len) == ""
    known: dict[str, dict[str, tuple[str, ...]]] = {
        "io": {"StringIO": (), "nothing": ()},
        "no.module:Flask": {"x": ()},
    }
    assert texts.unknown(known) == ["io.StringIO", "io.nothing", "Flask.x"]


def test_a_flask_without_what_we_need() -> None:
    """A release that has lost a class or a name of its insides: nothing breaks, and all its steps are taken."""
    code = """
import flask.ctx, flask.globals
app = flask.Flask("later")
app.add_url_rule("/", "index", lambda: "later")
del flask.ctx.RequestContext, flask.globals._cv_request
from sharedcluster.flask_shortcuts import take_shortcuts
take_shortcuts(app)
print(app.test_client().get("/").text, "full_dispatch_request" in vars(app))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "later False\n"


def test_the_objects_are_flask_s() -> None:
    """What an application sees of its contexts has Flask's types and names."""
    app = Flask("objects")
    take_shortcuts(app)
    with app.test_request_context("/x") as context:
        assert isinstance(context, RequestContext)
        assert repr(context) == "<RequestContext 'http://localhost/x' [GET] of objects>"
        assert type(flask.current_app._get_current_object()) is Flask  # type: ignore[attr-defined]
        assert type(_cv_app.get()) is AppContext
        assert type(context.request) is flask.Request
        assert type(context.copy()) is type(context)
        assert context.request.json_module is app.json


def test_a_map_of_its_own_is_left_alone() -> None:
    """One whose `add` is somebody else's, or of a class of its own."""
    app = Flask("own")
    app.url_map.add = lambda rulefactory: Map.add(app.url_map, rulefactory)  # type: ignore[method-assign]
    take_shortcuts(app)
    assert "request_context" not in vars(app)
    app = Flask("own")
    app.url_map = type("OwnMap", (Map,), {})()
    take_shortcuts(app)
    assert "request_context" not in vars(app)
