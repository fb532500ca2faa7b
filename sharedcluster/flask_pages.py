"""Cached pages that are answered before Flask builds a request: its dispatch is most of what a cached view costs."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask import Flask, request
from flask.signals import request_finished, request_started

from sharedcluster.state.cache import Cache
from sharedcluster.state.cache_store import CacheEntry

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_HOT_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class _HotPage:
    """A finished answer, good for as long as the near cache still holds the very entry it was made from."""

    name: str
    entry: CacheEntry
    status: str
    headers: list[tuple[str, str]]
    body: bytes


class HotPages:
    """A WSGI wrapper that answers hot pages itself.

    It answers only what Flask would have answered with the same bytes: GET, the same host, path and query, the near
    entry unchanged and fresh, the view function being the cached one itself (no login check around it), no hooks in
    the application or its blueprints, no receivers of request signals, no middleware inside us, and an answer that
    neither sets a cookie nor varies.
    """

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._inner: WSGIApplication = app.wsgi_app
        self._pages: OrderedDict[tuple[str, ...], _HotPage] = OrderedDict()
        self._cache: Cache | None = None
        self._has_offers = False  # until a view offers its page, nobody's answers need to be watched
        self.hits = 0
        self._is_plain = getattr(app.wsgi_app, "__func__", None) is Flask.wsgi_app and all(
            getattr(type(app), name) is getattr(Flask, name)
            for name in ("full_dispatch_request", "dispatch_request", "preprocess_request", "process_response")
        )

    def install(self, app: Flask) -> None:
        """Wrap the application, unless that could never help or was forbidden by SHAREDCLUSTER_EARLY_CACHE=False."""
        if self._is_plain and app.config.get("SHAREDCLUSTER_EARLY_CACHE", True):
            app.wsgi_app = self  # type: ignore[method-assign]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a hot page, or let Flask answer and see whether the page becomes hot."""
        if not self._has_offers or environ["REQUEST_METHOD"] != "GET":
            return self._inner(environ, start_response)
        page = self._pages.get(_page_key(environ))
        if page is not None and self._is_current(page):
            self.hits += 1
            start_response(page.status, list(page.headers))
            return [page.body]
        return self._watch(environ, start_response)

    def _is_current(self, page: _HotPage) -> bool:
        cache = self._cache
        if cache is None:
            return False
        near = cache.near.get(page.name)
        # A page that is about to become stale goes the long way, where early refresh is decided.
        return near is not None and near.value is page.entry and page.entry.fresh_until - time.monotonic() > 1.0

    def _watch(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        started: list[Any] = []

        def remember(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            started[:] = [status, headers]
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        body = self._inner(environ, remember)
        offered = environ.get("sharedcluster.hot")
        if offered is None or not started or not _is_same_for_all(*started):
            return body
        name, entry = offered
        try:
            data = b"".join(body)
        finally:
            if (close := getattr(body, "close", None)) is not None:
                close()
        if len(self._pages) >= _HOT_LIMIT:
            self._pages.popitem(last=False)
        self._pages[_page_key(environ)] = _HotPage(name, entry, started[0], list(started[1]), data)
        return [data]

    def offer(self, view: Callable[..., Any], cache: Cache, key: str) -> None:
        """A cached view has just answered under this cache key."""
        if not self._is_safe(view):
            return
        near = cache.near.get(cache.name_of(key))
        if near is not None:
            self._cache = cache
            self._has_offers = True
            request.environ["sharedcluster.hot"] = (cache.name_of(key), near.value)

    def _is_safe(self, view: Callable[..., Any]) -> bool:
        app = self._app
        # teardown_appcontext is not among them: what no context was made for needs no tearing down.
        hooks = (
            app.before_request_funcs,
            app.after_request_funcs,
            app.teardown_request_funcs,
            app.url_value_preprocessors,
        )
        return (
            app.view_functions.get(request.endpoint or "") is view
            and not any(any(group.values()) for group in hooks)
            and not request_started.receivers
            and not request_finished.receivers
        )


def _page_key(environ: WSGIEnvironment) -> tuple[str, ...]:
    return (
        environ.get("PATH_INFO", ""),
        environ.get("QUERY_STRING", ""),
        environ.get("HTTP_HOST", ""),
        environ.get("SCRIPT_NAME", ""),
        environ["wsgi.url_scheme"],
    )


def _is_same_for_all(status: str, headers: list[tuple[str, str]]) -> bool:
    return status.startswith("200") and not any(name.lower() in ("set-cookie", "vary") for name, _ in headers)
