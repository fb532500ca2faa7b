"""`shared.cache` with what needs a request: cached views and functions.

The names and meanings are Flask-Caching's where it has them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

from flask import Flask, copy_current_request_context, current_app, has_request_context, request
from flask.globals import request_ctx
from werkzeug.wrappers import Response

from sharedcluster.errors import ConfigError
from sharedcluster.flask_pages import HotPages
from sharedcluster.state import SharedState
from sharedcluster.state.cache import Cache
from sharedcluster.state.memo import call_key, function_name

log = logging.getLogger("sharedcluster")

F = TypeVar("F", bound=Callable[..., Any])

_RESPONSE = " response"  # names a stored Response; starts like a codec's tag so that no application's dict does


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

        A view that looks at the session is not cached under its path alone, because everybody would get the page of
        whoever came first: give it a `make_cache_key` or a function as `key_prefix` that tells users apart.

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
        tells_users_apart = make_cache_key is not None or callable(key_prefix)
        policy = _Policy(
            timeout, unless, forced_update, response_filter, cache_none, tuple(tags), stale, not tells_users_apart
        )
        may_be_hot = not tells_users_apart and unless is forced_update is response_filter is None

        def make_key(*args: Any, **kwargs: Any) -> str:
            if make_cache_key is not None:
                return make_cache_key(*args, **kwargs)
            prefix = key_prefix() if callable(key_prefix) else key_prefix
            key = prefix.replace("%s", request.path) if "%s" in prefix else prefix
            if query_string and has_request_context():
                key += "?" + urlencode(sorted(request.args.items(multi=True)))
            return key

        def decorate(function: F) -> F:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if unless is not None and unless():
                    return function(*args, **kwargs)
                own, key = self._owner(), make_key(*args, **kwargs)
                value = _answer(own.state.cache, key, policy, function, lambda: function(*args, **kwargs))
                if may_be_hot and has_request_context():
                    own.hot_pages.offer(wrapper, own.state.cache, key)
                return value

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
            policy = _Policy(timeout, unless, forced_update, response_filter, cache_none, all_tags, stale, False)

            def make_key(*args: Any, **kwargs: Any) -> str:
                key = call_key(function, args, kwargs, ignore=ignore)
                return f"{name}|{key}" if make_name else key

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if unless is not None and unless():
                    return function(*args, **kwargs)
                cache, key = self._owner().state.cache, make_key(*args, **kwargs)
                return _answer(cache, key, policy, function, lambda: function(*args, **kwargs))

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


@dataclass(frozen=True, slots=True)
class _Policy:
    """What the arguments of `cached` or `memoize` say."""

    timeout: float | None
    unless: Callable[..., bool] | None
    forced_update: Callable[..., bool] | bool | None
    response_filter: Callable[[Any], bool] | None
    cache_none: bool
    tags: tuple[str, ...]
    stale: float
    refuses_sessions: bool

    def keeps(self, value: Any) -> bool:
        """Whether a computed value is to be stored."""
        if value is None and not self.cache_none:
            return False
        return self.response_filter is None or bool(self.response_filter(_unpack(value)))

    def is_forced(self) -> bool:
        """Whether the value is to be computed anew in any case."""
        return self.forced_update is True or (callable(self.forced_update) and bool(self.forced_update()))


def _answer(cache: Cache, key: str, policy: _Policy, function: Callable[..., Any], call: Callable[[], Any]) -> Any:
    """The function's value, from the cache or computed."""
    watch = _SessionWatch(function) if policy.refuses_sessions and has_request_context() else None
    if watch is not None and watch.is_known:
        return call()  # nothing of it is shared, so nobody has to wait for anybody

    def compute() -> Any:
        return _pack(call() if watch is None else watch.run(call))

    def keeps(value: Any) -> bool:
        return not (watch is not None and watch.was_touched) and policy.keeps(value)

    if policy.is_forced():
        value = compute()
        if keeps(value):
            cache.set(key, value, policy.timeout, tags=policy.tags)
    else:
        value = cache.get_or_compute(
            key, compute, policy.timeout, tags=policy.tags, stale=policy.stale, keep=keeps, carry=_bind_context
        )
    return _unpack(value)


class _SessionWatch:
    """Sees whether a view looks at the session while it makes a page that is meant for everybody."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.was_touched = False
        self._name = function_name(function)

    @property
    def is_known(self) -> bool:
        """True if this view has looked at a session before."""
        return self._name in _TOLD

    def run(self, call: Callable[[], Any]) -> Any:
        session = _unmarked_session()
        before = session.accessed
        session.accessed = False
        try:
            return call()
        finally:
            if session.accessed:
                self.was_touched = True
                if self._name not in _TOLD:
                    _TOLD.add(self._name)
                    log.warning(
                        "%s looks at the session, so it is not cached: everybody would get the page of whoever came"
                        " first. Give `cached` a make_cache_key that tells users apart.",
                        self._name,
                    )
            session.accessed = session.accessed or before


def _unmarked_session() -> Any:
    """The request's session, without this very look counting as one where Flask (3.1.3) has a place for it."""
    context = request_ctx._get_current_object()  # type: ignore[attr-defined]
    session = getattr(context, "_session", None)
    return context.session if session is None else session


_TOLD: set[str] = set()


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
    return copy_current_request_context(compute) if has_request_context() else compute


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


class ClusterCache:
    """The shared cache for Flask-Caching itself: CACHE_TYPE = "sharedcluster.flask_caching.ClusterCache".

    For code that keeps Flask-Caching's own decorators. Values are what a session may hold too, and whole responses;
    there is no pickle. The application needs `SharedCluster(app)` before `Cache(app)`.
    """

    def __init__(self, app: Flask, config: Mapping[str, Any], args: list[Any], options: Mapping[str, Any]) -> None:
        if "sharedcluster" not in app.extensions:
            raise ConfigError(
                "CACHE_TYPE names the shared cache, and the application has none.",
                advice="Call SharedCluster(app) first.",
            )
        self.default_timeout = int(options.get("default_timeout") or 300)
        self.key_prefix = str(config.get("CACHE_KEY_PREFIX") or "")
        self.ignore_errors = bool(config.get("CACHE_IGNORE_ERRORS"))
        self._owner: Owner = app.extensions["sharedcluster"]

    @property
    def _shared(self) -> Cache:
        return self._owner.state.cache

    def _timeout(self, timeout: float | None) -> float:
        return self.default_timeout if timeout is None else timeout

    def get(self, key: str) -> Any:
        """The value or None."""
        return _unpack(self._shared.get(self.key_prefix + key))

    def get_many(self, *keys: str) -> list[Any]:
        """The values in order."""
        return [_unpack(value) for value in self._shared.get_many(*(self.key_prefix + key for key in keys))]

    def get_dict(self, *keys: str) -> dict[str, Any]:
        """The values by key."""
        return dict(zip(keys, self.get_many(*keys), strict=True))

    def has(self, key: str) -> bool:
        """True if there is a value."""
        return self._shared.has(self.key_prefix + key)

    def set(self, key: str, value: Any, timeout: float | None = None) -> bool:
        """Store a value."""
        return self._shared.set(self.key_prefix + key, _pack(value), self._timeout(timeout))

    def add(self, key: str, value: Any, timeout: float | None = None) -> bool:
        """Store a value if there is none."""
        return self._shared.add(self.key_prefix + key, _pack(value), self._timeout(timeout))

    def set_many(self, mapping: Mapping[str, Any], timeout: float | None = None) -> list[str]:
        """Store several values."""
        packed = {self.key_prefix + key: _pack(value) for key, value in mapping.items()}
        stored = self._shared.set_many(packed, self._timeout(timeout))
        return [key[len(self.key_prefix) :] for key in stored]

    def delete(self, key: str) -> bool:
        """Delete a value."""
        return self._shared.delete(self.key_prefix + key)

    def delete_many(self, *keys: str) -> list[str]:
        """Delete several values."""
        found = self._shared.delete_many(*(self.key_prefix + key for key in keys))
        return [key[len(self.key_prefix) :] for key in found]

    def unlink(self, *keys: str) -> list[str]:
        """As `delete_many`."""
        return self.delete_many(*keys)

    def clear(self) -> bool:
        """Invalidate everything."""
        return self._shared.clear()
