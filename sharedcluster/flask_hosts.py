"""URL adapters of hosts that are known: a sixth of what Flask does for a small request is to work out its host again.

With each request Flask reads the host out of the environ (twice), holds it against a pattern and the trusted hosts,
encodes it for IDNA, and makes the `MapAdapter` that matches and builds URLs. All of that but path, query and method is
the same for every request of a site.

Laws
----
1. Flask decides: what is remembered is an adapter that it made, under everything that it read to make it. What it
   refuses (a bad or untrusted host) and what is rare (an upgrade) it is asked each time.
2. Nothing is kept from one request to the next but what law 1 names; each request gets an adapter of its own, for
   applications may change theirs.
3. Clients choose the Host field, so what is remembered is bounded, in number and length.
4. An application or a map of URLs that does this in a way of its own is left alone.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from flask import Flask, Request
from werkzeug.routing import Map, MapAdapter

HOSTS_LIMIT: Final = 256
HOST_LENGTH_LIMIT: Final = 255
"""No name is longer (RFC 1035 2.3.4), so what is has no business here."""
TELLS_TRUSTED_HOSTS: Final = "TRUSTED_HOSTS" in Flask.default_config
"""Since 3.1."""


def remember_hosts(app: Flask) -> None:
    """Have the application make its URL adapters from those of hosts that it has seen.

    Not if its configuration says SHAREDCLUSTER_REMEMBER_HOSTS = False, and not if it, or its `url_map`, makes them in
    another way than Flask (law 4). Called twice it does nothing the second time.
    """
    is_plain = (
        type(app).create_url_adapter is Flask.create_url_adapter
        and "create_url_adapter" not in vars(app)
        and all(getattr(type(app.url_map), name) is getattr(Map, name) for name in ("bind", "bind_to_environ"))
    )
    if is_plain and app.config.get("SHAREDCLUSTER_REMEMBER_HOSTS", True):
        app.create_url_adapter = UrlAdapters(app)  # type: ignore[method-assign]


class UrlAdapters:
    """`Flask.create_url_adapter` of one application, with a memory."""

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
