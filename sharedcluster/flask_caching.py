"""`shared.cache` with what needs a request: cached views, and cached pages answered before Flask builds a request.

The names and meanings are Flask-Caching's where it has them.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flask import Flask, current_app, has_request_context, request
from flask.signals import request_finished, request_started
from werkzeug.wrappers import Response

from sharedcluster.state import SharedState
from sharedcluster.state.cache import Cache, CacheEntry
from sharedcluster.state.memo import call_key, function_name

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

F = TypeVar("F", bound=Callable[..., Any])

_RESPONSE = " response"  # names a stored Response; starts like a codec's tag so that no application's dict does
_HOT_LIMIT = 1000
_MISSING = object()


class Owner(Protocol):
    """What the cache needs of `flask.AppState`."""

    hot_pages: HotPages

    @property
    def state(self) -> SharedState:
        """This process's shared state."""


class ViewCache:
    """`shared.cache`."""

    def __init__(self, owner: Callable[[], Owner]) -> None:
        self._owner = owner

    @property
    def shared(self) -> Cache:
        """The cache itself, without Flask."""
        return self._owner().state.cache

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self.shared.get(key)

    def set(self, key: str, value: Any, timeout: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value for `timeout` seconds (None: CACHE_DEFAULT_TIMEOUT, 0: for ever)."""
        return self.shared.set(key, value, timeout, tags=tags)

    def add(self, key: str, value: Any, timeout: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value if there is none."""
        return self.shared.add(key, value, timeout, tags=tags)

    def has(self, key: str) -> bool:
        """True if there is a value."""
        return self.shared.has(key)

    def delete(self, key: str) -> bool:
        """Delete a value in every worker; True if there was one."""
        return self.shared.delete(key)

    def get_many(self, *keys: str) -> list[Any]:
        """The values in order, None where there is none."""
        return self.shared.get_many(*keys)

    def get_dict(self, *keys: str) -> dict[str, Any]:
        """The values by key."""
        return self.shared.get_dict(*keys)

    def set_many(self, mapping: Mapping[str, Any], timeout: float | None = None) -> list[str]:
        """Store several values; returns the keys stored."""
        return self.shared.set_many(mapping, timeout)

    def delete_many(self, *keys: str) -> list[str]:
        """Delete several values; returns the keys that were there."""
        return self.shared.delete_many(*keys)

    def clear(self) -> bool:
        """Invalidate everything."""
        return self.shared.clear()

    def invalidate_tag(self, *tags: str) -> bool:
        """Invalidate every value with one of these tags."""
        return self.shared.invalidate_tag(*tags)

    # -- views -----------------------------------------------------------------------------------------------------

    def cached(
        self,
        timeout: float | None = None,
        key_prefix: str | Callable[[], str] = "view/%s",
        unless: Callable[..., bool] | None = None,
        forced_update: Callable[..., bool] | bool | None = None,
        response_filter: Callable[[Any], bool] | None = None,
        query_string: bool = False,
        cache_none: bool = False,
        make_cache_key: Callable[..., str] | None = None,
        *,
        tags: Iterable[str] = (),
        stale: float = 0.0,
    ) -> Callable[[F], F]:
        """Cache what a view returns, by the path it is asked for; or a function's value under a fixed key.

        Args:
            timeout: Seconds it is fresh (None: CACHE_DEFAULT_TIMEOUT, 0: for ever).
            key_prefix: ``%s`` in it becomes the request's path; without it, it is the key; or a function for it.
            unless: Called before each use; true bypasses the cache.
            forced_update: True, or a function whose truth makes the value be computed anew.
            response_filter: Called with the value; false keeps it out of the cache.
            query_string: Whether the query's arguments, in any order, are part of the key.
            cache_none: Whether None is kept.
            make_cache_key: Called with the view's arguments, makes the key.
            tags: For `invalidate_tag`.
            stale: Seconds after `timeout` for which the value is served on while one worker computes it anew.
        """
        tags = tuple(tags)
        conditions = (unless, forced_update, response_filter, make_cache_key)
        is_plain = isinstance(key_prefix, str) and not any(condition is not None for condition in conditions)

        def decorate(function: F) -> F:
            def make_key(*args: Any, **kwargs: Any) -> str:
                if make_cache_key is not None:
                    return make_cache_key(*args, **kwargs)
                prefix = key_prefix() if callable(key_prefix) else key_prefix
                key = prefix.replace("%s", request.path) if "%s" in prefix else prefix
                if query_string and has_request_context():
                    key += "?" + "&".join(sorted(f"{k}={v}" for k, v in request.args.items(multi=True)))
                return key

            def keep(value: Any) -> bool:
                if value is None and not cache_none:
                    return False
                return response_filter is None or bool(response_filter(_unpack(value)))

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if unless is not None and unless():
                    return function(*args, **kwargs)
                own, key = self._owner(), make_key(*args, **kwargs)
                cache = own.state.cache
                if forced_update is True or (callable(forced_update) and forced_update()):
                    value = _pack(function(*args, **kwargs))
                    if keep(value):
                        cache.set(key, value, timeout, tags=tags)
                    return _unpack(value)
                compute = _bind_context(lambda: _pack(function(*args, **kwargs)))
                value = cache.get_or_compute(key, compute, timeout, tags=tags, stale=stale, keep=keep)
                if is_plain and has_request_context():
                    own.hot_pages.offer(wrapper, cache, key)
                return _unpack(value)

            return _decorated(wrapper, function, make_key, timeout)

        return decorate

    def memoize(
        self,
        timeout: float | None = None,
        make_name: Callable[[str], str] | None = None,
        unless: Callable[..., bool] | None = None,
        forced_update: Callable[..., bool] | bool | None = None,
        response_filter: Callable[[Any], bool] | None = None,
        cache_none: bool = False,
        args_to_ignore: Iterable[str] = (),
        *,
        tags: Iterable[str] = (),
        stale: float = 0.0,
    ) -> Callable[[F], F]:
        """Cache a function's value by its arguments; for the rest see `cached`.

        Args:
            timeout: Seconds a value is fresh.
            make_name: Gets the function's name and makes the one that is used.
            unless: True bypasses the cache.
            forced_update: True, or a function whose truth makes the value be computed anew.
            response_filter: Called with the value; false keeps it out of the cache.
            cache_none: Whether None is kept.
            args_to_ignore: Parameters that do not matter for the key.
            tags: For `invalidate_tag`.
            stale: Seconds after `timeout` for which the value is served on while one worker computes it anew.

        An argument that is an object of your own needs a method `__cache_key__`; it is never told apart by its `repr`.
        """
        ignore, given_tags = frozenset(args_to_ignore), tuple(tags)

        def decorate(function: F) -> F:
            name = make_name(function_name(function)) if make_name else function_name(function)
            all_tags = (_function_tag(name), *given_tags)

            def make_key(*args: Any, **kwargs: Any) -> str:
                key = call_key(function, args, kwargs, ignore=ignore)
                return f"{name}|{key}" if make_name else key

            def keep(value: Any) -> bool:
                if value is None and not cache_none:
                    return False
                return response_filter is None or bool(response_filter(_unpack(value)))

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if unless is not None and unless():
                    return function(*args, **kwargs)
                cache, key = self._owner().state.cache, make_key(*args, **kwargs)
                if forced_update is True or (callable(forced_update) and forced_update()):
                    value = _pack(function(*args, **kwargs))
                    if keep(value):
                        cache.set(key, value, timeout, tags=all_tags)
                    return _unpack(value)
                compute = _bind_context(lambda: _pack(function(*args, **kwargs)))
                return _unpack(cache.get_or_compute(key, compute, timeout, tags=all_tags, stale=stale, keep=keep))

            wrapper.function_tag = _function_tag(name)  # type: ignore[attr-defined]
            return _decorated(wrapper, function, make_key, timeout)

        return decorate

    def delete_memoized(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Forget what a memoized function returned: for these arguments, or without any for all.

        For a method give the class or the object as the first argument.
        """
        make_key = getattr(function, "make_cache_key", None)
        if make_key is None:
            raise TypeError(f"{function_name(function)} is not memoized")
        if args or kwargs:
            return bool(self.shared.delete_many(make_key(*args, **kwargs)))
        return self.shared.invalidate_tag(function.function_tag)  # type: ignore[attr-defined]


def _function_tag(name: str) -> str:
    return f"f:{name}"


def _decorated(wrapper: Any, function: F, make_key: Callable[..., str], timeout: float | None) -> F:
    """The names Flask-Caching gives to what hangs on a cached function."""
    wrapper.uncached = function
    wrapper.make_cache_key = make_key
    wrapper.cache_timeout = timeout
    decorated: F = wrapper
    return decorated


def _bind_context(compute: Callable[[], Any]) -> Callable[[], Any]:
    """A view that is computed anew in the background still finds its request and its application."""
    if not has_request_context():
        return compute
    home = threading.get_ident()
    from flask import copy_current_request_context

    elsewhere = copy_current_request_context(compute)
    return lambda: compute() if threading.get_ident() == home else elsewhere()


def _pack(value: Any) -> Any:
    """A Response as something a codec can store; everything else as it is."""
    if not isinstance(value, Response):
        return value
    value.make_sequence()
    return {_RESPONSE: [value.status, list(value.headers), value.get_data()]}


def _unpack(value: Any) -> Any:
    if type(value) is dict and len(value) == 1 and (packed := value.get(_RESPONSE)) is not None:
        status, headers, body = packed
        return current_app.response_class(body, status, [tuple(header) for header in headers])
    return value


# -- pages answered before Flask builds a request ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _HotPage:
    """A finished answer, good for as long as the near cache still holds the very entry it was made from."""

    name: str
    entry: CacheEntry
    status: str
    headers: list[tuple[str, str]]
    body: bytes


class HotPages:
    """A WSGI wrapper that answers hot pages itself: Flask's own dispatch is most of what a cached view costs.

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
        if self._pages and environ["REQUEST_METHOD"] == "GET":
            page = self._pages.get(_page_key(environ))
            if page is not None and self._is_current(page):
                self.hits += 1
                start_response(page.status, list(page.headers))
                return [page.body]
        if environ["REQUEST_METHOD"] != "GET":
            return self._inner(environ, start_response)
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
            request.environ["sharedcluster.hot"] = (cache.name_of(key), near.value)

    def _is_safe(self, view: Callable[..., Any]) -> bool:
        app = self._app
        hooks = (
            app.before_request_funcs,
            app.after_request_funcs,
            app.teardown_request_funcs,
            app.url_value_preprocessors,
            app.teardown_appcontext_funcs,
        )
        return (
            app.view_functions.get(request.endpoint or "") is view
            and not any(any(group.values()) if isinstance(group, dict) else group for group in hooks)
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
