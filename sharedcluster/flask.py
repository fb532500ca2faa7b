"""The Flask extension: `flask.session` shared by all workers, `shared.cache`, messages, locks.

    shared = SharedCluster(app)          # or SharedCluster() and init_app(app) in a factory

It works under any WSGI server; `sharedcluster run` merely sets SHAREDCLUSTER_REDIS_URL for its workers. Nothing is
connected before the first use, because an application is often imported before the fork.

This file adapts; the rules are in `sharedcluster.state`.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flask import Flask, Request, Response, current_app, has_app_context, request
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.http import dump_cookie, http_date

from sharedcluster import readiness
from sharedcluster.errors import ConfigError, RedisNeededError, StateUnavailableError
from sharedcluster.flask_caching import ViewCache
from sharedcluster.flask_pages import HotPages
from sharedcluster.state import SharedState, StateSettings, process_id
from sharedcluster.state.codec import Codec
from sharedcluster.state.cookie import Cookie, CookieSigner
from sharedcluster.state.primitives import Counter, Lock, LockLostError, RateLimit, RateLimitedError, SharedDict
from sharedcluster.state.session import Session, SessionRecord
from sharedcluster.state.sessions import CookieAction, SaveOutcome, SessionInfo, verify_first

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger("sharedcluster")

F = TypeVar("F", bound=Callable[..., Any])

_OWN_KEYS = ("REDIS_URL", "NAMESPACE", "SESSIONS", "SESSION_ON_ERROR", "EARLY_CACHE")
_SETTINGS = {f"SHAREDCLUSTER_{item.name.upper()}": item.name for item in fields(StateSettings)}
NO_SECRET_KEY = ConfigError(
    "SECRET_KEY is not set, so sessions cannot be signed.",
    advice=(
        "Make one:  python -c 'import secrets; print(secrets.token_hex(32))'",
        "and set it as app.config['SECRET_KEY'] or in the environment, the same for every worker and node.",
    ),
)


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
                state = SharedState(self._find_url(), namespace, StateSettings(**given))
                self._state = state
                state.start()
                for starter in self.starters:
                    starter(state)
            return self._state

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
        app.register_error_handler(StateUnavailableError, _answer_unavailable)
        app.register_error_handler(RateLimitedError, _answer_limited)
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


def _answer_unavailable(error: StateUnavailableError) -> Response:
    log.warning("answered 503: %s", error)
    headers = {"Retry-After": str(max(1, round(error.retry_after)))}
    return Response(
        "The shared state is not available at the moment. Try again soon.\n", 503, headers, mimetype="text/plain"
    )


# -- sessions ---------------------------------------------------------------------------------------------------------


class SharedSession(Session, SessionMixin):
    """`flask.session`: Flask's own interface on a session that lives in Redis."""

    serial_lock: Lock | None = None
    accesses = 0  # how often the request context has handed it out

    @property
    def accessed(self) -> bool:
        """True if the request has looked at it; Flask then adds Vary: Cookie."""
        return self.accesses > 0

    @accessed.setter
    def accessed(self, value: bool) -> None:
        self.accesses = self.accesses + 1 if value else 0

    def end_serial(self) -> None:
        """Let the next request of this session in; see `Sessions.serialize`."""
        lock, self.serial_lock = self.serial_lock, None
        if lock is not None:
            with suppress(LockLostError):
                lock.release()

    modified = Session.modified  # SessionMixin declares attributes, ours are properties
    new = Session.new


class _RequestSource:
    """A request's session source; finds Redis on first use, so that an application can be made where there is none."""

    __slots__ = ("_app", "_environ", "_idle", "_interface")

    def __init__(self, interface: SharedSessionInterface, app: Flask, environ: WSGIEnvironment) -> None:
        self._interface = interface
        self._app = app
        self._environ = environ
        self._idle = 0.0

    @property
    def codec(self) -> Codec:
        return self._interface.own.state.sessions.codec

    @property
    def idle(self) -> float:
        if not self._idle:
            self._idle = self._app.permanent_session_lifetime.total_seconds()
        return self._idle

    def fetch(self, *, fresh: bool = False) -> tuple[Cookie | None, SessionRecord | None]:
        interface, app = self._interface, self._app
        values = read_cookies(self._environ, app.config["SESSION_COOKIE_NAME"])
        cookie = verify_first(interface.signer_of(app), values)
        if cookie is None:
            return None, None
        try:
            return cookie, interface.own.state.sessions.load(cookie, self.idle, fresh=fresh)
        except StateUnavailableError:
            if not interface.own.is_anonymous_without_redis:
                raise
            return None, None


def read_cookies(environ: WSGIEnvironment, name: str) -> Iterator[str]:
    """All values of a cookie; a fraction of what `request.cookies` costs, because ours need no unquoting."""
    for part in environ.get("HTTP_COOKIE", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            yield value


_COOKIE_KEYS = (
    "SESSION_COOKIE_NAME",
    "SESSION_COOKIE_DOMAIN",
    "SESSION_COOKIE_PATH",
    "APPLICATION_ROOT",
    "SESSION_COOKIE_SECURE",
    "SESSION_COOKIE_HTTPONLY",
    "SESSION_COOKIE_SAMESITE",
    "SESSION_COOKIE_PARTITIONED",
)


class SharedSessionInterface(SessionInterface):
    """Flask's door to `state.sessions.SessionStore`. Every SESSION_COOKIE_ key means what it means in Flask."""

    session_class = SharedSession

    def __init__(self, own: AppState) -> None:
        self.own = own
        self._has_told = False
        self._signer: CookieSigner | None = None
        self._signer_keys: tuple[Any, Any] = (None, None)
        self._cookie_facts: list[Any] = []
        self._cookie_parts = ("", "")
        self._expires: tuple[int, str] = (0, "")

    def open_session(self, app: Flask, request: Request) -> SharedSession | None:
        """A session that is not loaded yet; None, as Flask wants it, without a SECRET_KEY."""
        if not app.secret_key:
            if not self._has_told:
                self._has_told = True
                log.error("%s", NO_SECRET_KEY)
            return None
        return self.session_class(_RequestSource(self, app, request.environ))

    def signer_of(self, app: Flask) -> CookieSigner:
        """The signer for the application's present keys."""
        key, fallbacks = app.secret_key, app.config.get("SECRET_KEY_FALLBACKS")
        if self._signer is None or (key, fallbacks) != self._signer_keys:
            given = [each for each in (key, *(fallbacks or ())) if each]
            self._signer, self._signer_keys = CookieSigner(given), (key, fallbacks)
        return self._signer

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Store what changed and set the cookie if that is due. Without Redis the response becomes a 503."""
        if not isinstance(session, SharedSession) or not (session.accessed or session._is_loaded):
            return
        _vary_by_cookie(response)
        if not session._is_loaded:
            return
        try:
            outcome = self.own.state.sessions.save(
                session,
                self.signer_of(app),
                refresh=app.config["SESSION_REFRESH_EACH_REQUEST"],
            )
        except StateUnavailableError as error:
            if not self.own.is_anonymous_without_redis:
                _become(response, _answer_unavailable(error))
            return
        finally:
            session.end_serial()
        if outcome.action is not CookieAction.KEEP:
            response.headers.add("Set-Cookie", self._cookie_header(app, session, outcome))

    def _cookie_header(self, app: Flask, session: SharedSession, outcome: SaveOutcome) -> str:
        # Werkzeug makes the header once per configuration; from then on only value and date are put in.
        facts = [app.config[key] for key in _COOKIE_KEYS]
        if facts != self._cookie_facts:
            self._cookie_parts, self._cookie_facts = self._make_cookie_parts(app), facts
        start, end = self._cookie_parts
        if outcome.action is CookieAction.DELETE:
            return f"{start}; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0{end}"
        if not session.get("_permanent"):
            return start + outcome.value + end
        now = int(time.time())
        if self._expires[0] != now:
            self._expires = (now, http_date(now + app.permanent_session_lifetime.total_seconds()))
        return f"{start}{outcome.value}; Expires={self._expires[1]}{end}"

    def _make_cookie_parts(self, app: Flask) -> tuple[str, str]:
        text = dump_cookie(
            self.get_cookie_name(app),
            "@",
            domain=self.get_cookie_domain(app),
            path=self.get_cookie_path(app),
            secure=self.get_cookie_secure(app),
            httponly=self.get_cookie_httponly(app),
            samesite=self.get_cookie_samesite(app),
            partitioned=self.get_cookie_partitioned(app),
        )
        start, end = text.split("=@", 1)
        return start + "=", end

    def regenerate(self, session: SessionMixin) -> None:
        """Flask-Session's name for `shared.sessions.rotate`."""
        if isinstance(session, SharedSession):
            session.rotate()


def _vary_by_cookie(response: Response) -> None:
    # `in` would raise and catch an HTTP exception inside Werkzeug, with every request that looks at its session.
    if any(name.lower() == "vary" for name, _ in response.headers):
        response.vary.add("Cookie")
    else:
        response.headers.add("Vary", "Cookie")


def _become(response: Response, other: Response) -> None:
    """Turn a finished response into another one; what it would have sent is let go."""
    with suppress(Exception):
        response.close()
    response.status_code = other.status_code
    response.headers.clear()
    response.headers.update(other.headers)
    response.direct_passthrough = False
    response.set_data(other.get_data())


class Sessions:
    """`shared.sessions`: what Flask's own session has no word for."""

    def __init__(self, extension: SharedCluster) -> None:
        self._extension = extension

    @staticmethod
    def _current() -> SharedSession:
        from flask import session as proxy

        session = proxy._get_current_object()  # type: ignore[attr-defined]
        if not isinstance(session, SharedSession):
            raise NO_SECRET_KEY
        return session

    def rotate(self) -> None:
        """Give this session a new id; do it whenever somebody logs in."""
        self._current().rotate()

    def serialize(self, wait: float = 10.0, timeout: float = 30.0) -> Callable[[F], F]:
        """Let requests of one session that reach the decorated view go one after another.

        For what must be read, decided and written without anybody in between; without it parallel requests lose
        nothing they write to different keys. It wraps the view function, under `@app.route`.

        Args:
            wait: Seconds a request waits for the one before it; then LockTimeoutError.
            timeout: Seconds after which the lock of a worker that died is free.
        """

        def decorate(view: F) -> F:
            @functools.wraps(view)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                session = self._current()
                if session.sid is not None and session.serial_lock is None:
                    name = f"session:{Cookie(session.sid, 0, 0).name}"
                    lock = self._extension.state.lock(name, timeout=timeout, wait=wait)
                    lock.__enter__()
                    session.serial_lock = lock
                    session.reload()
                try:
                    return view(*args, **kwargs)
                except BaseException:
                    session.end_serial()
                    raise

            wrapped: Any = wrapper
            return cast(F, wrapped)

        return decorate

    def bind_user(self, user: object) -> None:
        """Note whose session this is, so that it can be listed and revoked."""
        self._current().bind_user(str(user))

    def revoke(self, session_id: str) -> bool:
        """End one session, by its `sid` or the `id` that `list_user` tells; True if there was one."""
        return self._extension.state.sessions.revoke(session_id)

    def revoke_user(self, user: object, *, keep_current: bool = False) -> int:
        """End all sessions of a user, everywhere; with `keep_current` all but this one. Returns how many."""
        keep = (self._current().sid or "") if keep_current else ""
        return self._extension.state.sessions.revoke_user(str(user), keep=keep)

    def list_user(self, user: object) -> Iterable[SessionInfo]:
        """The live sessions of a user, oldest first."""
        return self._extension.state.sessions.list_user(str(user))
