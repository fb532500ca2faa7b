"""What Flask works out anew with each request although it comes to the same: a quarter of a small request.

- Its URL adapter. Flask reads the host out of the environ (twice), holds it against a pattern and the trusted hosts,
  encodes it for IDNA, and makes the `MapAdapter` that matches and builds URLs. All of that but path, query and method
  is the same for every request of a site.
- Whether the view is a coroutine function.
- A response's headers: whether there is a content type among none (by an exception), and a copy of all of them, each
  looked through for line breaks again, in which nothing is changed. And an iterator around a body of one piece.

Laws
----
1. Flask decides. What is remembered is what it answered, under everything that it read to come to that; and what it
   would have to do something about (a host that is bad or not trusted, an upgrade, a redirect, a body that is not
   counted yet) it is asked each time.
2. Requests share nothing that one of them could change.
3. Clients choose the Host field, so what is remembered is bounded, in number and length.
4. An application that does one of these things in a way of its own is left alone.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import flask
from flask import Flask, Request
from werkzeug.datastructures import Headers
from werkzeug.routing import Map, MapAdapter
from werkzeug.utils import get_content_type

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

HOSTS_LIMIT: Final = 256
HOST_LENGTH_LIMIT: Final = 255
"""No name is longer (RFC 1035 2.3.4), so what is has no business here."""
FUNCTIONS_LIMIT: Final = 1000
TELLS_TRUSTED_HOSTS: Final = "TRUSTED_HOSTS" in Flask.default_config
"""Since 3.1."""


def take_shortcuts(app: Flask) -> None:
    """Spare an application what it need not do again; all it does and says is what it was (the laws above).

    Not if its configuration says SHAREDCLUSTER_SHORTCUTS = False. Called twice it does nothing the second time.
    """
    if not app.config.get("SHAREDCLUSTER_SHORTCUTS", True):
        return
    if _is_flask_s_own(app, "create_url_adapter") and all(
        getattr(type(app.url_map), name) is getattr(Map, name) for name in ("bind", "bind_to_environ")
    ):
        app.create_url_adapter = UrlAdapters(app)  # type: ignore[method-assign]
    if _is_flask_s_own(app, "ensure_sync"):
        app.ensure_sync = PlainFunctions(app)  # type: ignore[method-assign]
    if _is_flask_s_own(app, "response_class"):
        app.response_class = Response


def _is_flask_s_own(app: Flask, name: str) -> bool:
    return getattr(type(app), name) is getattr(Flask, name) and name not in vars(app)


class UrlAdapters:
    """`Flask.create_url_adapter` of one application, which remembers hosts."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._make = app.create_url_adapter
        self._known: dict[tuple[Any, ...], tuple[str | None, MapAdapter]] = {}

    def __call__(self, request: Request | None) -> MapAdapter | None:
        """An adapter for a request, or outside of one. Raises what Flask raises."""
        if request is None:
            return self._make(None)
        app, environ = self._app, request.environ
        config, url_map = app.config, app.url_map
        if TELLS_TRUSTED_HOSTS and config["TRUSTED_HOSTS"] is not None:
            request.trusted_hosts = config["TRUSTED_HOSTS"]
        trusted: Any = request.trusted_hosts  # a list, or what else Werkzeug takes
        try:
            facts = (
                environ["HTTP_HOST"],
                environ["wsgi.url_scheme"],
                environ["SCRIPT_NAME"],
                environ["SERVER_NAME"],
                environ["SERVER_PORT"],
                config["SERVER_NAME"],
                trusted if trusted is None or isinstance(trusted, str) else tuple(trusted),
                app.subdomain_matching,
                url_map.host_matching,
                url_map.default_subdomain,
            )
            path, query, method = environ["PATH_INFO"], environ["QUERY_STRING"], environ["REQUEST_METHOD"]
        except KeyError:  # HTTP/1.0 without a Host, or a server that leaves out what may be
            return self._make(request)
        if "HTTP_UPGRADE" in environ:
            return self._make(request)
        known = self._known.get(facts)
        if known is None:
            return self._remember(request, facts)
        host, like = known
        if host is not None:
            request.host = host  # as Flask itself does
        return MapAdapter(
            url_map,
            like.server_name,
            like.script_name,
            like.subdomain,
            like.url_scheme,
            # PEP 3333: bytes that are written as Latin-1. Most are ASCII, which reads the same.
            path if path.isascii() else path.encode("latin1").decode(errors="replace"),
            method,
            query if query.isascii() else query.encode("latin1").decode(errors="replace"),
        )

    def _remember(self, request: Request, facts: tuple[Any, ...]) -> MapAdapter | None:
        adapter = self._make(request)
        if type(adapter) is MapAdapter and len(facts[0]) <= HOST_LENGTH_LIMIT:
            if len(self._known) >= HOSTS_LIMIT:
                self._known.clear()
            self._known[facts] = (vars(request).get("host"), copy.copy(adapter))
        return adapter


class PlainFunctions:
    """`Flask.ensure_sync` of one application, which asks once whether a function is a coroutine function."""

    def __init__(self, app: Flask) -> None:
        self._ensure = app.ensure_sync
        # By weak references, for some are made for one request (`after_this_request`).
        self._known: dict[int, weakref.ref[Callable[..., Any]]] = {}

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself, or what runs it and waits for it if it is a coroutine function."""
        known = self._known.get(id(func))
        if known is not None and known() is func:
            return func
        ensured = self._ensure(func)
        if ensured is func and type(func) is FunctionType:
            if len(self._known) >= FUNCTIONS_LIMIT:
                self._known.clear()
            self._known[id(func)] = weakref.ref(func)
        return ensured


class WholeBody:
    """A body that is there, and what is to be called when it has been sent (PEP 3333)."""

    __slots__ = ("_pieces", "close")

    def __init__(self, pieces: list[bytes], close: Callable[[], None]) -> None:
        self._pieces = pieces
        self.close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces)


class _AsFlaskResponse(type):
    """What is no `response_class`, Flask makes into one. Every `flask.Response` counts as one: those an application
    makes, of classes of its own too, stay what they are.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, flask.Response) if cls is Response else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, flask.Response) if cls is Response else super().__subclasscheck__(subclass)


class Response(flask.Response, metaclass=_AsFlaskResponse):
    """`flask.Response` for an application's `response_class`; it leaves no trace of its own when it is pickled."""

    def __init__(
        self,
        response: Any = None,
        status: Any = None,
        headers: Any = None,
        mimetype: str | None = None,
        content_type: str | None = None,
        direct_passthrough: bool = False,
    ) -> None:
        if content_type is None and mimetype is None and not headers and self.default_mimetype is not None:
            content_type = _content_type_of(self.default_mimetype)
        super().__init__(response, status, headers, mimetype, content_type, direct_passthrough)

    def get_wsgi_response(self, environ: WSGIEnvironment) -> tuple[Iterable[bytes], str, list[tuple[str, str]]]:
        """What goes to the server: the body, the status, the headers. See `werkzeug.Response.get_wsgi_response`."""
        headers = self.headers
        status = self.status_code
        if type(self) is Response and type(headers) is Headers and 200 <= status != 204 and status != 304:
            has_length = False
            for name, _ in headers:
                lower = name.lower()
                if lower == "content-length":
                    has_length = True
                elif lower == "location" or lower == "content-location":
                    break
            else:
                if has_length:
                    return self._iterable(environ), self.status, headers.to_wsgi_list()
        return super().get_wsgi_response(environ)

    def _iterable(self, environ: WSGIEnvironment) -> Iterable[bytes]:
        pieces = self.response
        if (
            type(pieces) is list
            and len(pieces) == 1
            and type(pieces[0]) is bytes
            and not self.direct_passthrough
            and environ["REQUEST_METHOD"] != "HEAD"
        ):
            return WholeBody(pieces, self.close)
        return self.get_app_iter(environ)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a `flask.Response`: what an application keeps of it must not depend on the server it had."""
        if type(self) is not Response:
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(1)
        make, arguments, state = reduced
        return make, (flask.Response, *arguments[1:]), state


_content_type_of = functools.lru_cache(16)(functools.partial(get_content_type, charset="utf-8"))
