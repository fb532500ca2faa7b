"""What URL adapter a host has, remembered.

Flask reads the host out of the environ (twice), holds it against a pattern and the trusted hosts, encodes it for IDNA,
and makes the `MapAdapter` that matches and builds URLs. All of that but path, query and method is the same for every
request of a site.
"""

from __future__ import annotations

import copy
from operator import itemgetter
from typing import Any, Final

from flask import Flask, Request
from werkzeug.routing import MapAdapter

HOSTS_LIMIT: Final = 256
HOST_LENGTH_LIMIT: Final = 255
"""No name is longer (RFC 1035 2.3.4), so what is has no business here."""
TELLS_TRUSTED_HOSTS: Final = "TRUSTED_HOSTS" in Flask.default_config
"""Since 3.1."""

_taken_from = itemgetter(
    "HTTP_HOST",
    "wsgi.url_scheme",
    "SCRIPT_NAME",
    "SERVER_NAME",
    "SERVER_PORT",
    "PATH_INFO",
    "QUERY_STRING",
    "REQUEST_METHOD",
)


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
        if trusted is not None and not isinstance(trusted, str):
            trusted = tuple(trusted)
        try:
            host, scheme, root, name, port, path, query, method = _taken_from(environ)
        except KeyError:  # HTTP/1.0 without a Host, or a server that leaves out what may be
            return self._make(request)
        if "HTTP_UPGRADE" in environ:
            return self._make(request)
        facts = (
            host,
            scheme,
            root,
            name,
            port,
            config["SERVER_NAME"],
            trusted,
            app.subdomain_matching,
            url_map.host_matching,
            url_map.default_subdomain,
        )
        known = self._known.get(facts)
        if known is None:
            return self._remember(request, facts)
        told, like = known
        if told is not None:
            vars(request)["host"] = told  # a cached property, which Flask itself sets
        adapter = MapAdapter.__new__(MapAdapter)
        vars(adapter).update(vars(like))
        adapter.map = url_map  # which may be another one by now
        # PEP 3333: bytes that are written as Latin-1. Most are ASCII, which reads the same.
        adapter.path_info = path if path.isascii() else path.encode("latin1").decode(errors="replace")
        adapter.default_method = method
        adapter.query_args = query if query.isascii() else query.encode("latin1").decode(errors="replace")
        return adapter

    def _remember(self, request: Request, facts: tuple[Any, ...]) -> MapAdapter | None:
        adapter = self._make(request)
        if type(adapter) is MapAdapter and len(facts[0]) <= HOST_LENGTH_LIMIT:
            if len(self._known) >= HOSTS_LIMIT:
                self._known.clear()
            self._known[facts] = (vars(request).get("host"), copy.copy(adapter))
        return adapter
