"""The contexts of a request, entered and left without asking those who do not listen.

Whatever could call somebody (a receiver of a signal, a function for the teardown, a form whose files are to be closed)
or is not the usual case (a context inside another one, or left in another order) is Flask's to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import flask
from flask import Flask
from flask.ctx import AppContext, RequestContext, _sentinel
from flask.globals import _cv_app, _cv_request
from flask.signals import appcontext_popped, appcontext_pushed, appcontext_tearing_down, request_tearing_down
from werkzeug.datastructures import EnvironHeaders
from werkzeug.exceptions import HTTPException
from werkzeug.wsgi import _get_server

from sharedcluster.flask_shortcuts.rules import Rules

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from flask.sessions import SessionMixin


_RECEIVERS_OF_THE_END = (
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

    def __init__(
        self,
        app: Flask,
        environ: WSGIEnvironment,
        request: flask.Request | None = None,
        session: SessionMixin | None = None,
    ) -> None:
        if request is not None or app.request_class is not flask.Request:
            super().__init__(app, environ, request, session)
            return
        self.app = app
        self.request = request = _make_request(environ)
        request.json_module = app.json
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
        if _cv_app.get(None) is not None or appcontext_pushed.receivers:
            super().push()
            return
        app, request = self.app, self.request
        app_ctx = _make_app_context(app)
        app_ctx._cv_tokens.append(_cv_app.set(app_ctx))
        self._cv_tokens.append((_cv_request.set(self), app_ctx))
        if self._session is None:
            interface = app.session_interface
            session = interface.open_session(app, request)
            self._session = interface.make_null_session(app) if session is None else session
        adapter = self.url_adapter
        if adapter is not None:
            try:
                request.url_rule, request.view_args = self.rules.match(adapter)
            except HTTPException as error:
                request.routing_exception = error

    def pop(self, exc: Any = _sentinel) -> None:
        app, request = self.app, self.request
        tokens = self._cv_tokens
        app_ctx = _cv_app.get(None)
        if (
            app_ctx is not None
            and len(tokens) == 1
            and tokens[0][1] is app_ctx
            and _cv_request.get(None) is self
            and not app.teardown_request_funcs
            and not app.teardown_appcontext_funcs
            and not any(_RECEIVERS_OF_THE_END)
            and (type(request) is flask.Request or type(request).close is flask.Request.close)
            and "files" not in vars(request)
        ):
            _cv_request.reset(tokens.pop()[0])
            request.environ["werkzeug.request"] = None
            _cv_app.reset(app_ctx._cv_tokens.pop())
        else:
            super().pop(exc)


def _make_app_context(app: Flask) -> AppContext:
    """What `app.app_context()` makes."""
    context = AppContext.__new__(AppContext)
    context.app = app
    context.url_adapter = None if app.config["SERVER_NAME"] is None else app.create_url_adapter(None)
    context.g = app.app_ctx_globals_class()
    context._cv_tokens = []
    return context


_taken_from = itemgetter(
    "PATH_INFO",
    "SCRIPT_NAME",
    "QUERY_STRING",
    "REQUEST_METHOD",
    "wsgi.url_scheme",
    "REMOTE_ADDR",
    "SERVER_NAME",
    "SERVER_PORT",
)


def _make_request(environ: WSGIEnvironment) -> flask.Request:
    """What `flask.Request(environ)` makes, made at once from what is usual."""
    try:
        path, root, query, method, scheme, address, name, port = _taken_from(environ)
    except KeyError:
        return flask.Request(environ)
    if not path.isascii() or root:
        return flask.Request(environ)
    request = flask.Request.__new__(flask.Request)
    request.method = method.upper()
    request.scheme = scheme
    request.server = _server_of(name, port)
    request.root_path = ""
    request.path = "/" + path.lstrip("/")
    request.query_string = query.encode("latin1")
    request.headers = headers = EnvironHeaders.__new__(EnvironHeaders)
    headers._list = []
    headers.environ = environ
    request.remote_addr = address
    request.environ = environ
    request.shallow = False
    environ["werkzeug.request"] = request
    return request


@functools.lru_cache(16)
def _server_of(name: str, port: str) -> tuple[str, int | None] | None:
    return _get_server({"SERVER_NAME": name, "SERVER_PORT": port})
