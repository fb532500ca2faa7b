"""The contexts of a request, entered and left without asking those who do not listen.

Whatever could call somebody (a receiver of a signal, a function for the teardown, a form whose files are to be closed)
or is not the usual case (a context inside another one, or left in another order) is Flask's to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Final

from flask import Flask, Request
from flask.ctx import AppContext, RequestContext, _sentinel
from flask.globals import _cv_app, _cv_request
from flask.signals import appcontext_popped, appcontext_pushed, appcontext_tearing_down, request_tearing_down
from werkzeug.datastructures import EnvironHeaders
from werkzeug.exceptions import HTTPException
from werkzeug.routing import MapAdapter, Rule
from werkzeug.wsgi import _get_server

from sharedcluster.flask_shortcuts.hosts import UrlAdapters
from sharedcluster.flask_shortcuts.rules import LENGTH_LIMIT, PATHS_LIMIT, KnownRequest, Rules

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from flask.sessions import SessionMixin


# A method of what was imported is looked up and bound anew with each call.
_app_context, _set_app_context, _reset_app_context = _cv_app.get, _cv_app.set, _cv_app.reset
_request_context, _set_request_context, _reset_request_context = _cv_request.get, _cv_request.set, _cv_request.reset

RECEIVERS_OF_THE_END = (
    request_tearing_down.receivers,
    appcontext_tearing_down.receivers,
    appcontext_popped.receivers,
)
"""Who is connected now: a signal fills and empties one dict."""


def context_maker(app: Flask) -> Callable[[WSGIEnvironment], RequestContext]:
    """`Flask.request_context` for one application."""
    named = {"rules": Rules(app.url_map), "__doc__": RequestContext.__doc__, "__module__": RequestContext.__module__}
    return functools.partial(type(RequestContext.__name__, (_Context,), named), app)


class _Context(RequestContext):
    rules: ClassVar[Rules]
    facts: tuple[Any, ...] | None
    known: KnownRequest | None

    def __init__(
        self,
        app: Flask,
        environ: WSGIEnvironment,
        request: Request | None = None,
        session: SessionMixin | None = None,
    ) -> None:
        self.facts = self.known = None
        if request is not None or app.request_class is not Request:
            super().__init__(app, environ, request, session)
            return
        self.app = app
        facts = _facts_of(app, environ)
        if facts is not None:
            rules = self.rules
            self.known = known = rules.requests.get(facts) if app.url_map is rules.map else None
            if known is None:
                self.facts = facts
        else:
            known = None
        if known is not None:
            self.request = request = Request.__new__(Request)
            # A copy costs half of what filling the dict that is there does.
            request.__dict__ = own = known.request.copy()
            _connect(request, own, app, environ, environ.get("REMOTE_ADDR"))
            self.url_adapter = adapter = MapAdapter.__new__(MapAdapter)
            adapter.__dict__ = known.adapter.copy()
        else:
            self.request = request = _make_request(app, environ)
            self.url_adapter = None
            try:
                self.url_adapter = app.create_url_adapter(request)
            except HTTPException as error:
                request.routing_exception = error
        self.flashes = None
        self._session = session
        self._after_request_functions = []
        self._cv_tokens = []

    def push(self) -> None:
        if _app_context(None) is not None or appcontext_pushed.receivers:
            super().push()
            return
        app, request = self.app, self.request
        # What `app.app_context()` makes.
        app_ctx = AppContext.__new__(AppContext)
        app_ctx.app = app
        make_adapter = app.create_url_adapter
        is_flask_s = type(make_adapter) is UrlAdapters
        app_ctx.url_adapter = None if is_flask_s and app.config["SERVER_NAME"] is None else make_adapter(None)
        app_ctx.g = app.app_ctx_globals_class()
        app_ctx._cv_tokens = [_set_app_context(app_ctx)]
        self._cv_tokens.append((_set_request_context(self), app_ctx))
        if self._session is None:
            interface = app.session_interface
            session = interface.open_session(app, request)
            self._session = interface.make_null_session(app) if session is None else session
        if self.known is not None:
            own = vars(request)
            own["url_rule"] = self.known.rule
            own["view_args"] = {}
        elif self.url_adapter is not None:
            self.match_request()

    def match_request(self) -> None:
        request = self.request
        try:
            request.url_rule, request.view_args = self.rules.match(self.url_adapter)  # type: ignore[arg-type]
        except HTTPException as error:
            request.routing_exception = error
            return
        if self.facts is not None and not request.view_args:
            self._remember(self.facts, request.url_rule)

    def _remember(self, facts: tuple[Any, ...], rule: Rule) -> None:
        """What the next request with the same facts need not work out.

        A session interface has seen this one, so what others are to have is made anew.
        """
        app, environ = self.app, self.request.environ.copy()
        rules = self.rules
        if app.url_map is not rules.map or _facts_of(app, environ) != facts or len(str(facts[0])) > LENGTH_LIMIT:
            return
        request = _make_request(app, environ)
        adapter = app.create_url_adapter(request)
        if type(adapter) is not MapAdapter:
            return
        if len(rules.requests) >= PATHS_LIMIT:
            rules.requests.clear()
        shared = {name: value for name, value in vars(request).items() if name not in _OF_ONE_REQUEST}
        rules.requests[facts] = KnownRequest(shared, vars(adapter), rule)

    def pop(self, exc: Any = _sentinel) -> None:
        app, request = self.app, self.request
        tokens = self._cv_tokens
        app_ctx = _app_context(None)
        if (
            app_ctx is not None
            and len(tokens) == 1
            and tokens[0][1] is app_ctx
            and _request_context(None) is self
            and not app.teardown_request_funcs
            and not app.teardown_appcontext_funcs
            and not any(RECEIVERS_OF_THE_END)
            and (type(request) is Request or type(request).close is Request.close)
            and "files" not in vars(request)
        ):
            _reset_request_context(tokens.pop()[0])
            request.environ["werkzeug.request"] = None
            _reset_app_context(app_ctx._cv_tokens.pop())
        else:
            super().pop(exc)


_taken_from = itemgetter(
    "PATH_INFO",
    "SCRIPT_NAME",
    "QUERY_STRING",
    "REQUEST_METHOD",
    "wsgi.url_scheme",
    "SERVER_NAME",
    "SERVER_PORT",
    "HTTP_HOST",
)
_of_map = attrgetter("host_matching", "redirect_defaults", "default_subdomain")

_OF_ONE_REQUEST: Final = frozenset({"environ", "headers", "remote_addr", "json_module"})


def _facts_of(app: Flask, environ: WSGIEnvironment) -> tuple[Any, ...] | None:
    """All that attributes, URL adapter and rule of a request depend on; None where they are to be worked out anew."""
    config = app.config
    if (
        config["TRUSTED_HOSTS"] is not None
        or Request.trusted_hosts is not None
        or "HTTP_UPGRADE" in environ
        or type(app.create_url_adapter) is not UrlAdapters
    ):
        return None
    try:
        taken = _taken_from(environ)
    except KeyError:  # HTTP/1.0 without a Host, or a server that leaves out what may be
        return None
    if taken[2]:  # there is no end of query strings
        return None
    return taken, config["SERVER_NAME"], app.subdomain_matching, _of_map(app.url_map)


def _make_request(app: Flask, environ: WSGIEnvironment) -> Request:
    """What `Request(environ)` makes, made at once from what is usual."""
    try:
        path, root, query = environ["PATH_INFO"], environ["SCRIPT_NAME"], environ["QUERY_STRING"]
        method, scheme, address = environ["REQUEST_METHOD"], environ["wsgi.url_scheme"], environ["REMOTE_ADDR"]
    except KeyError:
        path = ""
    if not path or not path.isascii() or root:
        request = Request(environ)
        request.json_module = app.json
        return request
    request = Request.__new__(Request)
    request.method = method.upper()
    request.scheme = scheme
    request.server = _get_server(environ)
    request.root_path = ""
    request.path = "/" + path.lstrip("/")
    request.query_string = query.encode("latin1")
    request.shallow = False
    _connect(request, vars(request), app, environ, address)
    return request


def _connect(request: Request, own: dict[str, Any], app: Flask, environ: WSGIEnvironment, address: str | None) -> None:
    """What is each request's own; by way of its dict, for what its class has too is dear to set."""
    own["headers"] = headers = EnvironHeaders.__new__(EnvironHeaders)
    headers._list = []
    headers.environ = environ
    own["remote_addr"] = address
    own["environ"] = environ
    own["json_module"] = app.json
    environ["werkzeug.request"] = request
