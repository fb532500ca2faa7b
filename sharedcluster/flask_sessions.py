"""`flask.session` over `state.sessions`: what Flask asks of a session interface, and `shared.sessions`.

This file adapts; the rules are in `sharedcluster.state.sessions`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeGuard, TypeVar, cast

from flask import Flask, Request, Response
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.datastructures import Headers
from werkzeug.http import dump_cookie, http_date

from sharedcluster.errors import ConfigError, StateUnavailableError
from sharedcluster.flask_shortcuts.responses import Unmade, add_field
from sharedcluster.state.codec import Codec
from sharedcluster.state.cookie import Cookie, CookieSigner
from sharedcluster.state.primitives import Lock, LockLostError
from sharedcluster.state.session import Session, SessionRecord
from sharedcluster.state.sessions import (
    CookieAction,
    SaveOutcome,
    Saving,
    SessionInfo,
    SessionStore,
    verify_first,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from sharedcluster.flask import AppState, SharedCluster

log = logging.getLogger("sharedcluster")

F = TypeVar("F", bound=Callable[..., Any])

NO_SECRET_KEY = ConfigError(
    "SECRET_KEY is not set, so sessions cannot be signed.",
    advice=(
        "Make one:  python -c 'import secrets; print(secrets.token_hex(32))'",
        "and set it as app.config['SECRET_KEY'] or in the environment, the same for every worker and node.",
    ),
)


def answer_unavailable(error: StateUnavailableError) -> Response:
    """503, with when to come back."""
    log.warning("answered 503: %s", error)
    headers = {"Retry-After": str(max(1, round(error.retry_after)))}
    return Response(
        "The shared state is not available at the moment. Try again soon.\n", 503, headers, mimetype="text/plain"
    )


class SharedSession(Session, SessionMixin):
    """`flask.session`: Flask's own interface on a session that lives in Redis."""

    serial_lock: Lock | None = None
    accessed = False  # True if the request has looked at it; Flask then adds Vary: Cookie

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

    __slots__ = ("_app", "_environ", "_interface", "_key", "codec", "idle", "signer", "store")

    # Set by `fetch`, which comes before everything else.
    codec: Codec
    idle: float
    signer: CookieSigner
    store: SessionStore

    def __init__(self, interface: SharedSessionInterface, app: Flask, environ: WSGIEnvironment, key: Any) -> None:
        self._interface = interface
        self._app = app
        self._environ = environ
        self._key = key

    def fetch(self, *, fresh: bool = False) -> tuple[Cookie | None, SessionRecord | None]:
        interface, app = self._interface, self._app
        self.store = store = interface.own.state.sessions
        self.codec = store.codec
        config = app.config
        facts = (self._key, config.get("SECRET_KEY_FALLBACKS"), config["PERMANENT_SESSION_LIFETIME"])
        if facts != interface.facts:
            interface.learn(app, facts)
        self.idle = idle = interface.idle
        self.signer = signer = interface.signer
        cookie = read_cookie(self._environ.get("HTTP_COOKIE", ""), config["SESSION_COOKIE_NAME"], signer)
        if cookie is None:
            return None, None
        try:
            return cookie, store.load(cookie, idle, fresh=fresh)
        except StateUnavailableError:
            if not interface.own.is_anonymous_without_redis:
                raise
            return None, None


def read_cookie(header: str, name: str, signer: CookieSigner) -> Cookie | None:
    """The session's cookie out of a Cookie header: the first one of that name that is ours.

    A fraction of what `request.cookies` costs, because ours need no unquoting.
    """
    start = name + "="
    if header.startswith(start) and ";" not in header:  # most clients have one cookie
        return signer.verify(header[len(start) :].strip())
    parts = [part.strip().partition("=") for part in header.split(";")]
    return verify_first(signer, [value for key, _, value in parts if key == name])


TELLS_PARTITIONED: Final = "SESSION_COOKIE_PARTITIONED" in Flask.default_config
"""Since 3.1."""

_cookie_facts = itemgetter(
    "SESSION_COOKIE_NAME",
    "SESSION_COOKIE_DOMAIN",
    "SESSION_COOKIE_PATH",
    "APPLICATION_ROOT",
    "SESSION_COOKIE_SECURE",
    "SESSION_COOKIE_HTTPONLY",
    "SESSION_COOKIE_SAMESITE",
    *(["SESSION_COOKIE_PARTITIONED"] if TELLS_PARTITIONED else []),
)


class SharedSessionInterface(SessionInterface):
    """Flask's door to `state.sessions.SessionStore`. Every SESSION_COOKIE_ key means what it means in Flask."""

    session_class = SharedSession

    def __init__(self, own: AppState) -> None:
        self.own = own
        self._has_told = False
        # Set by `learn`: the signer for the application's keys, and the seconds a session lives without being used.
        self.signer: CookieSigner
        self.idle = 0.0
        self.facts: tuple[Any, ...] = ()
        self._cookie_facts: tuple[Any, ...] = ()
        self._cookie_parts = ("", "")
        self._expires: tuple[int, str] = (0, "")

    def open_session(self, app: Flask, request: Request) -> SharedSession | None:
        """A session that is not loaded yet; None, as Flask wants it, without a SECRET_KEY."""
        key = app.secret_key
        if not key:
            if not self._has_told:
                self._has_told = True
                log.error("%s", NO_SECRET_KEY)
            return None
        return self.session_class(_RequestSource(self, app, request.environ, key))

    def learn(self, app: Flask, facts: tuple[Any, ...]) -> None:
        """Make what belongs to the present secret key, its fallbacks, and the lifetime of sessions.

        Once: Flask converts the lifetime with every request, and a signer costs more to make than to use.
        """
        key, fallbacks, _ = facts
        self.signer = CookieSigner([each for each in (key, *(fallbacks or ())) if each])
        self.idle = app.permanent_session_lifetime.total_seconds()
        self.facts = facts

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Store what changed and set the cookie if that is due. Without Redis the response becomes a 503."""
        if not self._looks_at(session, response):
            return
        source: Any = session._source
        try:
            outcome = source.store.save(session, source.signer, refresh=app.config["SESSION_REFRESH_EACH_REQUEST"])
        except StateUnavailableError as error:
            self._say_unavailable(response, error)
            return
        finally:
            if session.serial_lock is not None:
                session.end_serial()
        self._set_cookie(app, session, response, outcome)

    @property
    def can_submit(self) -> bool:
        """Whether `submit_session` does what `save_session` does, and tells its thread when it is done.

        Not if somebody has put something of their own there, nor where callers are threads.
        """
        is_ours = type(self) is SharedSessionInterface and not {"save_session", "is_null_session"} & vars(self).keys()
        return is_ours and self.own.has_homes

    def submit_session(self, app: Flask, session: SessionMixin, response: Response) -> Saved | None:
        """As `save_session`, but without waiting for Redis: what is left to do, or None if that is nothing."""
        if not self._looks_at(session, response):
            return None
        if session.serial_lock is not None:  # the next request of this session comes after all of this one
            self.save_session(app, session, response)
            return None
        source: Any = session._source
        try:
            saving = source.store.submit(session, source.signer, refresh=app.config["SESSION_REFRESH_EACH_REQUEST"])
        except StateUnavailableError as error:
            self._say_unavailable(response, error)
            return None
        if type(saving) is SaveOutcome:
            self._set_cookie(app, session, response, saving)
            return None
        return Saved(self, app, session, response, saving)

    @staticmethod
    def _looks_at(session: SessionMixin, response: Response) -> TypeGuard[SharedSession]:
        """Whether there may be something to store; a response whose request has looked at it varies."""
        if not isinstance(session, SharedSession) or not (session.accessed or session._is_loaded):
            return False
        if type(response) is Unmade:  # it has a type and a length so far
            add_field(response, _VARY)
            return session._is_loaded
        # `in` would raise and catch an HTTP exception inside Werkzeug, with every request that looks at its session.
        headers = response.headers
        fields = headers._list if type(headers) is Headers else headers  # what its iterator goes through
        if "vary" in map(str.lower, map(_first, fields)):
            response.vary.add("Cookie")
        else:
            add_field(response, _VARY)
        return session._is_loaded

    def _set_cookie(self, app: Flask, session: SharedSession, response: Response, outcome: SaveOutcome) -> None:
        if outcome.action is not _KEEP:
            add_field(response, ("Set-Cookie", self._cookie_header(app, session, outcome)))

    def _say_unavailable(self, response: Response, error: StateUnavailableError) -> None:
        if not self.own.is_anonymous_without_redis:
            _become(response, answer_unavailable(error))

    def _cookie_header(self, app: Flask, session: SharedSession, outcome: SaveOutcome) -> str:
        # Werkzeug makes the header once per configuration; from then on only value and date are put in.
        facts = _cookie_facts(app.config)
        if facts != self._cookie_facts:
            self._cookie_parts, self._cookie_facts = self._make_cookie_parts(app), facts
        start, end = self._cookie_parts
        if outcome.action is _DELETE:
            return f"{start}; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0{end}"
        # Asked for by name first, which is no method: few are.
        if not (("_permanent" in session._values or "_permanent" in session._stored) and session.get("_permanent")):
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
            **({"partitioned": self.get_cookie_partitioned(app)} if TELLS_PARTITIONED else {}),
        )
        start, end = text.split("=@", 1)
        return start + "=", end

    def regenerate(self, session: SessionMixin) -> None:
        """Flask-Session's name for `shared.sessions.rotate`."""
        if isinstance(session, SharedSession):
            session.rotate()


class Saved:
    """A session on its way to Redis, and the response that waits for it."""

    __slots__ = ("_interface", "_response", "_saving", "_session", "app", "when_done")

    def __init__(
        self,
        interface: SharedSessionInterface,
        app: Flask,
        session: SharedSession,
        response: Response,
        saving: Saving,
    ) -> None:
        assert saving.submitted is not None
        self.app = app
        self._interface = interface
        self._session = session
        self._response = response
        self._saving = saving
        self.when_done = saving.submitted.when_done
        """See `state.connection.Submitted.when_done`: then `settle` need not wait."""

    def settle(self) -> None:
        """Make the response what it is when Redis has answered; waits if it has not yet."""
        interface, session, response = self._interface, self._session, self._response
        source: Any = session._source
        try:
            outcome = source.store.settle(self._saving)
        except StateUnavailableError as error:
            interface._say_unavailable(response, error)
        else:
            interface._set_cookie(self.app, session, response, outcome)


_VARY = ("Vary", "Cookie")
# An enum is asked for its members by name each time.
_KEEP, _DELETE = CookieAction.KEEP, CookieAction.DELETE
_first: Callable[[tuple[str, str]], str] = itemgetter(0)


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
