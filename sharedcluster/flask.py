"""The Flask extension: `flask.session` shared by all workers, `shared.cache`, messages, locks.

    shared = SharedCluster(app)          # or SharedCluster() and init_app(app) in a factory

It works under any WSGI server; `sharedcluster run` merely sets SHAREDCLUSTER_REDIS_URL for its workers. Nothing is
connected before the first use, because an application is often imported before the fork.

This file adapts; the rules are in `sharedcluster.state`.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from flask import Flask, Response, current_app, has_app_context, request

from sharedcluster import readiness
from sharedcluster.errors import ConfigError, RedisNeededError, StateUnavailableError
from sharedcluster.flask_caching import ViewCache
from sharedcluster.flask_pages import HotPages
from sharedcluster.flask_sessions import NO_SECRET_KEY, Sessions, SharedSessionInterface, answer_unavailable
from sharedcluster.state import SharedState, StateSettings, process_id
from sharedcluster.state.primitives import Counter, Lock, RateLimit, RateLimitedError, SharedDict
from sharedcluster.state.runtime import THREADS, Runtime

log = logging.getLogger("sharedcluster")

_OWN_KEYS = ("REDIS_URL", "NAMESPACE", "SESSIONS", "SESSION_ON_ERROR", "EARLY_CACHE", "SHORTCUTS")
_SETTINGS = {f"SHAREDCLUSTER_{item.name.upper()}": item.name for item in fields(StateSettings)}


def find_redis_url(app: Flask) -> str:
    """The Redis an application shares its state over.

    In order: config SHAREDCLUSTER_REDIS_URL, environment SHAREDCLUSTER_REDIS_URL, environment REDIS_URL, config
    SESSION_REDIS (Flask-Session's) if it is a URL.

    Raises:
        RedisNeededError: None of them is set.
    """
    candidates = (
        app.config.get("SHAREDCLUSTER_REDIS_URL"),
        os.environ.get("SHAREDCLUSTER_REDIS_URL"),
        os.environ.get("REDIS_URL"),
        app.config.get("SESSION_REDIS"),
    )
    for candidate in candidates:
        if isinstance(candidate, str) and candidate:
            return candidate
    raise RedisNeededError(
        f'"{app.name}" shares its state over Redis, and no Redis is configured.',
        fact="Neither SHAREDCLUSTER_REDIS_URL nor REDIS_URL is set.",
        advice=(
            "Let the cluster start one:  sharedcluster run",
            "Or start one:               docker run -p 6379:6379 redis:8",
            "and name it:                REDIS_URL=redis://127.0.0.1:6379/0",
        ),
    )


def find_runtime() -> Runtime:
    """How this process waits: as greenlets if gevent has patched it, as threads otherwise."""
    monkey = sys.modules.get("gevent.monkey")  # who patches has imported it; nobody else needs to have gevent
    if monkey is None or not (monkey.is_module_patched("socket") and monkey.is_module_patched("threading")):
        return THREADS
    from sharedcluster.gevent_runtime import GeventRuntime

    return GeventRuntime()


class AppState:
    """What the extension keeps for one application; in `app.extensions["sharedcluster"]`."""

    def __init__(self, app: Flask) -> None:
        _check_keys(app)
        self.name = app.name
        self.hot_pages = HotPages(app)
        self.starters: list[Callable[[SharedState], object]] = []  # run on each new SharedState: handlers, jobs
        self.is_anonymous_without_redis = app.config.get("SHAREDCLUSTER_SESSION_ON_ERROR", "503") == "anonymous"
        self._state: SharedState | None = None
        self._pid = 0
        self._lock = threading.Lock()
        self._find_url: Callable[[], str] = lambda: find_redis_url(app)
        self._config = app.config
        self.app_context = app.app_context
        self.needs_secret_key: Callable[[], bool] = lambda: (
            isinstance(app.session_interface, SharedSessionInterface) and not app.secret_key
        )

    @property
    def state(self) -> SharedState:
        """This process's shared state, made on first use. After a fork the child makes its own."""
        if self._state is None or self._pid != process_id():
            return self._make()
        return self._state

    def _make(self) -> SharedState:
        if self._pid != process_id():
            self._pid, self._lock, self._state = process_id(), threading.Lock(), None
        with self._lock:
            if self._state is None:
                given = {name: self._config[key] for key, name in _SETTINGS.items() if key in self._config}
                if "CACHE_DEFAULT_TIMEOUT" in self._config:  # Flask-Caching's name for it
                    given.setdefault("cache_timeout", self._config["CACHE_DEFAULT_TIMEOUT"])
                namespace = self._config.get("SHAREDCLUSTER_NAMESPACE") or self.name
                state = SharedState(self._find_url(), namespace, StateSettings(**given), find_runtime())
                self._state = state
                state.start()
                for starter in self.starters:
                    starter(state)
            return self._state

    @property
    def has_homes(self) -> bool:
        """See `state.runtime.Runtime.has_homes`."""
        return find_runtime().has_homes

    def is_of(self, state: SharedState) -> bool:
        """True if this application uses that state."""
        return self._state is state

    def check(self) -> list[str]:
        """What `sharedcluster run` asks before it serves: warnings, or an error that says what to do.

        Raises:
            ConfigError: Sessions are on and there is no SECRET_KEY.
            RedisNeededError: Redis is not configured, does not answer, or refuses us.
        """
        if self.needs_secret_key():
            raise NO_SECRET_KEY
        return self.state.check()

    def add_starter(self, starter: Callable[[SharedState], object]) -> None:
        """Run `starter` with every state made from now on, and with the one that exists already."""
        self.starters.append(starter)
        if self._state is not None and self._pid == process_id():
            starter(self._state)


def _check_keys(app: Flask) -> None:
    if app.config.get("SHAREDCLUSTER_SESSION_ON_ERROR", "503") not in ("503", "anonymous"):
        raise ConfigError('SHAREDCLUSTER_SESSION_ON_ERROR is "503" or "anonymous".')
    known = [f"SHAREDCLUSTER_{key}" for key in _OWN_KEYS] + list(_SETTINGS)
    for key in app.config:
        if key.startswith("SHAREDCLUSTER_") and key not in known:
            close = difflib.get_close_matches(key, known, 1)
            advice = f"Did you mean {close[0]}?" if close else f"Known are: {', '.join(sorted(known))}"
            raise ConfigError(f"The configuration key {key} is unknown.", advice=advice)


class SharedCluster:
    """The extension. One object may serve several applications; which one follows from the application context."""

    def __init__(self, app: Flask | None = None) -> None:
        self._states: list[AppState] = []
        self._starters: list[Callable[[SharedState], object]] = []
        self.cache = ViewCache(lambda: self._app_state())
        self.sessions = Sessions(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Make an application's sessions shared and the rest available.

        Raises:
            ConfigError: A SHAREDCLUSTER_ key is unknown.
        """
        own = app.extensions["sharedcluster"] = AppState(app)
        self._states.append(own)
        for starter in self._starters:
            own.add_starter(starter)
        if app.config.get("SHAREDCLUSTER_SESSIONS", True):
            app.session_interface = SharedSessionInterface(own)
        app.register_error_handler(StateUnavailableError, answer_unavailable)
        app.register_error_handler(RateLimitedError, _answer_limited)
        app.register_error_handler(RedisNeededError, _answer_needed)
        own.hot_pages.install(app)

    def _app_state(self) -> AppState:
        if has_app_context():
            own = current_app.extensions.get("sharedcluster")
            if isinstance(own, AppState):
                return own
        if len(self._states) == 1:
            return self._states[0]
        raise ConfigError(
            "The shared state was used outside an application context, and it is not clear whose is meant.",
            advice="Use it inside `with app.app_context():`" if self._states else "Call shared.init_app(app) first.",
        )

    @property
    def state(self) -> SharedState:
        """The shared state of the current application in this process."""
        return self._app_state().state

    @property
    def redis_url(self) -> str:
        """Where Redis is, for other libraries: Limiter(storage_uri=shared.redis_url)."""
        return self.state.address.url

    # -- messages --------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Say that this worker may serve, where `wait_ready` waits for it; elsewhere it means nothing."""
        readiness.say()

    def publish(self, channel: str, data: Any, history: int = 0, *, once: str = "") -> str | None:
        """Send a message to every worker and every stream; see `state.broadcast.Broadcast.publish`."""
        position = self.state.broadcast.publish(channel, data, history, once=once)
        return str(position) if position is not None else None

    def on(self, channel: str) -> Callable[[Callable[[Any], object]], Callable[[Any], object]]:
        """Call the decorated function in every worker with each message of a channel."""

        def register(listener: Callable[[Any], object]) -> Callable[[Any], object]:
            self._add_starter(lambda state: state.broadcast.on(channel)(self._in_context(state, listener)))
            return listener

        return register

    def stream(self, channel: str, *, member: str = "", info: Any = None) -> Response:
        """A response of server-sent events; a browser's EventSource that comes back gets what it missed.

        Args:
            channel: Its name.
            member: Counts as present on the channel while the stream is open, see `presence`.
            info: What `presence` tells about the member.
        """
        last_event_id = request.headers.get("Last-Event-ID", "") or request.args.get("lastEventId", "")
        state = self.state
        body = state.broadcast.stream(channel, last_event_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = Response(body, mimetype="text/event-stream", headers=headers)
        if member:
            state.presence.join(channel, member, info)
            response.call_on_close(lambda: state.presence.leave(channel, member))
        return response

    def presence(self, channel: str) -> Mapping[str, Any]:
        """Who has a stream of this channel open, on any worker, and what was told about them."""
        return self.state.presence.members(channel)

    # -- primitives ------------------------------------------------------------------------------------------------

    def lock(self, name: str, *, timeout: float = 10.0, wait: float | None = 10.0) -> Lock:
        """At most one holder in the cluster; see `state.primitives.Lock`."""
        return self.state.lock(name, timeout=timeout, wait=wait)

    def counter(self, name: str) -> Counter:
        """A number all workers add to; see `state.primitives.Counter`."""
        return self.state.counter(name)

    def dict(self, name: str) -> SharedDict:
        """A dict all workers see; see `state.primitives.SharedDict`."""
        return self.state.dict(name)

    def rate_limit(self, name: str, limit: int, per: float) -> RateLimit:
        """At most `limit` events per `per` seconds in the cluster; see `state.primitives.RateLimit`."""
        return self.state.rate_limit(name, limit, per)

    @property
    def is_leader(self) -> bool:
        """True in exactly one worker of the cluster."""
        return self.state.leader.is_leader

    def every(self, seconds: float, name: str = "") -> Callable[[Callable[[], object]], Callable[[], object]]:
        """Run the decorated function every so many seconds, on one worker of the cluster; at most once per tick.

        It runs in an application context. Register it where the application is made, so that every worker knows it.
        """

        def register(job: Callable[[], object]) -> Callable[[], object]:
            job_name = name or f"{job.__module__}.{job.__qualname__}"
            self._add_starter(lambda state: state.schedule.every(seconds, job_name, self._in_context(state, job)))
            return job

        return register

    def _in_context(self, state: SharedState, function: Callable[..., object]) -> Callable[..., object]:
        """The function, run with the application whose shared state this is."""

        def run(*args: Any) -> object:
            for own in self._states:
                if own.is_of(state):
                    with own.app_context():
                        return function(*args)
            return function(*args)

        return run

    def _add_starter(self, starter: Callable[[SharedState], object]) -> None:
        self._starters.append(starter)
        for own in self._states:
            own.add_starter(starter)


def _answer_limited(error: RateLimitedError) -> Response:
    headers = {} if error.retry_after == float("inf") else {"Retry-After": str(math.ceil(error.retry_after))}
    return Response("Too many requests. Try again later.\n", 429, headers, mimetype="text/plain")


_TOLD: set[str] = set()


def _answer_needed(error: RedisNeededError) -> Response:
    """Told once, in words, instead of as a traceback per request."""
    if str(error) not in _TOLD:
        _TOLD.add(str(error))
        log.error("%s", error)
    return answer_unavailable(StateUnavailableError(error.what))
