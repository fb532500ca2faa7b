"""The Flask extension as an application meets it."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import flask
import pytest
from flask import Flask, request, session
from flask.testing import FlaskClient

from sharedcluster import SharedCluster
from sharedcluster.errors import ConfigError, RedisNeededError, StateUnavailableError
from sharedcluster.flask import AppState
from sharedcluster.flask_pages import HotPages
from tests.redis_process import RedisProcess
from tests.state.link import Link
from tests.waiting import wait_until

MakeApp = Callable[..., tuple[Flask, SharedCluster]]


@pytest.fixture
def make_app(redis_url: str, namespace: str) -> Iterator[MakeApp]:
    """Make applications that share one namespace: each stands for a worker. Keyword arguments are config."""
    made: list[SharedCluster] = []

    def make(**config: Any) -> tuple[Flask, SharedCluster]:
        app = Flask("shop")
        app.config.update(SECRET_KEY="s", SHAREDCLUSTER_REDIS_URL=redis_url, SHAREDCLUSTER_NAMESPACE=namespace)
        app.config.update(config)
        shared = SharedCluster(app)
        made.append(shared)
        add_views(app, shared)
        return app, shared

    yield make
    for shared in made:
        for own in shared._states:
            if own._state is not None:
                own._state.close()


def add_views(app: Flask, shared: SharedCluster) -> None:
    """What a small application does."""

    @app.post("/counter")
    def counter() -> dict[str, int]:
        session["count"] = session.get("count", 0) + 1
        return {"count": session["count"]}

    @app.get("/count")
    def count() -> dict[str, int]:
        return {"count": session.get("count", 0)}

    @app.get("/plain")
    def plain() -> str:
        return "plain"

    @app.post("/login")
    def login() -> str:
        shared.sessions.rotate()
        shared.sessions.bind_user("ann")
        session["user"] = "ann"
        return "in"

    @app.post("/logout")
    def logout() -> str:
        session.clear()
        return "out"


def cookie_of(client: FlaskClient) -> str:
    """The session cookie a client holds; empty without one."""
    cookie = client.get_cookie("session")
    return cookie.value if cookie is not None else ""


# -- sessions -------------------------------------------------------------------------------------------------------


def test_forty_requests_count_to_forty_on_any_worker(make_app: MakeApp) -> None:
    """A client that goes from worker to worker counts without a gap."""
    apps = [make_app()[0] for _ in range(3)]
    clients = [app.test_client() for app in apps]
    cookie = ""
    for turn in range(1, 41):
        client = clients[turn % 3]
        if cookie:
            client.set_cookie("session", cookie)
        assert client.post("/counter").json == {"count": turn}
        cookie = cookie_of(client)


def test_a_permanent_session_stays_one(make_app: MakeApp) -> None:
    """Each later write gives its cookie an end, though nobody looks at `permanent` again, until it is taken back."""
    app, _ = make_app()

    @app.post("/keep/<int:value>")
    def keep(value: int) -> str:
        session.permanent = bool(value)
        return ""

    client = app.test_client()
    assert "Expires=" not in client.post("/counter").headers["Set-Cookie"]
    assert "Expires=" in client.post("/keep/1").headers["Set-Cookie"]
    for _ in range(2):
        assert "Expires=" in client.post("/counter").headers["Set-Cookie"]
    assert "Expires=" not in client.post("/keep/0").headers["Set-Cookie"]
    assert "Expires=" not in client.post("/counter").headers["Set-Cookie"]


def test_a_view_that_leaves_the_session_alone_sends_nothing_and_sets_nothing(make_app: MakeApp) -> None:
    """No command, no Set-Cookie, no Vary."""
    app, shared = make_app()
    client = app.test_client()
    client.post("/counter")
    assert shared.state.wait_ready(10)
    before = shared.state.commit.commands - shared.state.subscriber.beats
    response = client.get("/plain")
    assert shared.state.commit.commands - shared.state.subscriber.beats == before
    assert "Set-Cookie" not in response.headers
    assert "Vary" not in response.headers
    response = client.get("/count")
    assert response.headers["Vary"] == "Cookie"
    assert "Set-Cookie" not in response.headers


def test_every_cookie_flag_of_flask_counts(make_app: MakeApp) -> None:
    """Name, domain, path, Secure, HttpOnly, SameSite, Partitioned and lifetime are what Flask's own session sets."""
    config: dict[str, Any] = {
        "SESSION_COOKIE_NAME": "__Host-sid",
        "SESSION_COOKIE_PATH": "/",
        "SESSION_COOKIE_SECURE": True,
        "SESSION_COOKIE_HTTPONLY": False,
        "SESSION_COOKIE_SAMESITE": "Strict",
        "SESSION_COOKIE_PARTITIONED": True,
        "PERMANENT_SESSION_LIFETIME": timedelta(hours=1),
    }
    app, _ = make_app(**config)
    plain = Flask("plain")
    plain.config.update(config, SECRET_KEY="s")

    def remember() -> str:
        session.permanent = True
        session["x"] = 1
        return ""

    for each in (app, plain):
        each.add_url_rule("/remember", view_func=remember, methods=["POST"])
    ours, theirs = (each.test_client().post("/remember").headers["Set-Cookie"] for each in (app, plain))

    def attributes(header: str) -> list[str]:
        return sorted(re.sub(r"\d\d:\d\d:\d\d", "", part.strip()) for part in header.split(";")[1:])

    assert attributes(ours) == attributes(theirs)
    assert ours.startswith("__Host-sid=v1.")


def test_logout_removes_the_cookie_and_the_session(make_app: MakeApp) -> None:
    """session.clear() ends it for whoever still has the cookie."""
    app, shared = make_app()
    client = app.test_client()
    client.post("/counter")
    stolen = cookie_of(client)
    response = client.post("/logout")
    assert "Max-Age=0" in response.headers["Set-Cookie"]
    assert cookie_of(client) == ""
    client.set_cookie("session", stolen)
    assert client.get("/count").json == {"count": 0}
    assert shared.state.commit.call("KEYS", f"{shared.state.namespace}:s:*") == []


def test_login_rotates_and_keeps_the_cart(make_app: MakeApp) -> None:
    """The id changes, the data stays, the old id is dead, the user can be listed and revoked."""
    app, shared = make_app()
    client = app.test_client()
    client.post("/counter")
    before = cookie_of(client)
    client.post("/login")
    assert cookie_of(client).split(".")[1] != before.split(".")[1]
    assert client.get("/count").json == {"count": 1}
    thief = app.test_client()
    thief.set_cookie("session", before)
    assert thief.get("/count").json == {"count": 0}
    with app.app_context():
        assert [info.user for info in shared.sessions.list_user("ann")] == ["ann"]
        assert shared.sessions.revoke_user("ann") == 1
    assert client.get("/count").json == {"count": 0}


def test_flask_s_own_test_tools_work(make_app: MakeApp) -> None:
    """session_transaction, test_request_context, flash."""
    app, _ = make_app()

    @app.get("/flashes")
    def flashes() -> list[str]:
        return [str(message) for message in flask.get_flashed_messages()]

    client = app.test_client()
    with client.session_transaction() as transaction:
        transaction["count"] = 41
        transaction["_flashes"] = [("message", "hello")]
    assert client.post("/counter").json == {"count": 42}
    assert client.get("/flashes").json == ["hello"]
    assert client.get("/flashes").json == []
    with client:
        client.get("/count")
        assert session["count"] == 42
    with app.test_request_context():
        assert session.get("count") is None
        assert session.new


def test_two_cookies_of_one_name_do_not_hide_each_other(make_app: MakeApp) -> None:
    """A browser with cookies for two paths sends both: the one that is ours counts."""
    app, _ = make_app()
    client = app.test_client()
    client.post("/counter")
    header = f"session=stale; session={cookie_of(client)}; other=1"
    other = app.test_client(use_cookies=False)
    assert other.get("/count", headers={"Cookie": header}).json == {"count": 1}


def test_serialized_requests_of_one_session_do_not_overlap(make_app: MakeApp) -> None:
    """Read, decide, write: with serialize nothing gets between, on two workers."""
    apps = []
    for _ in range(2):
        app, shared = make_app()

        @app.post("/withdraw")
        @shared.sessions.serialize(wait=30)
        def withdraw() -> str:
            balance = session["balance"]
            time.sleep(0.01)
            session["balance"] = balance - 1
            return ""

        apps.append(app)
    first = apps[0].test_client()
    with first.session_transaction() as transaction:
        transaction["balance"] = 100
    cookie = cookie_of(first)

    def request(number: int) -> None:
        client = apps[number % 2].test_client()
        client.set_cookie("session", cookie)
        assert client.post("/withdraw").status_code == 200

    threads = [threading.Thread(target=request, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with first.session_transaction() as transaction:
        assert transaction["balance"] == 80


# -- Redis away -----------------------------------------------------------------------------------------------------


def test_redis_away_answers_503_only_where_the_session_is_touched(own_redis: RedisProcess, make_app: MakeApp) -> None:
    """Reading and writing answer 503 with Retry-After; a view without session is served; then all is as before."""
    app, shared = make_app(SHAREDCLUSTER_REDIS_URL=own_redis.url)
    client = app.test_client()
    client.post("/counter")
    assert shared.state.wait_ready(10)
    own_redis.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: not shared.state.subscriber.is_trusted(), "the loss is noticed")
        for method, path in (("GET", "/count"), ("POST", "/counter"), ("POST", "/login")):
            response = client.open(path, method=method)
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert "Set-Cookie" not in response.headers
        assert client.get("/plain").status_code == 200
    finally:
        own_redis.signal(signal.SIGCONT)
    wait_until(lambda: client.get("/count").status_code == 200, "Redis is back")
    assert client.get("/count").json == {"count": 1}


def test_a_write_that_cannot_be_stored_is_not_acknowledged(redis_url: str, make_app: MakeApp) -> None:
    """The link breaks after the view: the finished response becomes a 503, its body and headers are gone."""
    with Link(redis_url) as link:
        app, _ = make_app(SHAREDCLUSTER_REDIS_URL=link.url)

        @app.post("/write")
        def write() -> flask.Response:
            session["x"] = 1
            link.mode = "black hole"
            return flask.Response("written", headers={"X-Done": "1"})

        client = app.test_client()
        client.get("/count")
        response = client.post("/write")
        assert (response.status_code, b"written" in response.data) == (503, False)
        assert "X-Done" not in response.headers


def test_anonymous_without_redis_if_asked_for(own_redis: RedisProcess, make_app: MakeApp) -> None:
    """SHAREDCLUSTER_SESSION_ON_ERROR = "anonymous": an empty session for as long as Redis is away, cookie kept."""
    app, shared = make_app(SHAREDCLUSTER_REDIS_URL=own_redis.url, SHAREDCLUSTER_SESSION_ON_ERROR="anonymous")
    client = app.test_client()
    client.post("/counter")
    assert shared.state.wait_ready(10)
    own_redis.kill()
    wait_until(lambda: not shared.state.subscriber.is_trusted(), "the loss is noticed")
    response = client.get("/count")
    assert (response.status_code, response.json) == (200, {"count": 0})
    assert "Set-Cookie" not in response.headers


# -- configuration --------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_an_error_with_a_suggestion() -> None:
    """A typo in a setting is found at start."""
    app = Flask("x")
    app.config["SHAREDCLUSTER_REDIS_URI"] = "redis://"
    with pytest.raises(ConfigError, match="Did you mean SHAREDCLUSTER_REDIS_URL"):
        SharedCluster(app)


def test_no_redis_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application can be made without Redis; the first use says what is missing."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.delenv("SHAREDCLUSTER_REDIS_URL", raising=False)
    app = Flask("x")
    app.config["SECRET_KEY"] = "s"
    shared = SharedCluster(app)
    with pytest.raises(RedisNeededError, match=r"no Redis is configured"), app.app_context():
        shared.cache.get("k")


def test_requests_without_any_redis_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any Redis: views without state are served, the others are 503, the log says once what to type."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.delenv("SHAREDCLUSTER_REDIS_URL", raising=False)
    app = Flask(f"x{time.monotonic_ns()}")
    app.config["SECRET_KEY"] = "s"
    add_views(app, SharedCluster(app))
    client = app.test_client()
    with caplog.at_level(logging.ERROR):
        assert client.get("/plain").status_code == 200
        assert [client.get("/count").status_code for _ in range(3)] == [503] * 3
        assert [client.post("/counter").status_code for _ in range(3)] == [503] * 3
    assert sum("no Redis is configured" in record.message for record in caplog.records) == 1


def test_no_secret_key_is_one_clear_error(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """`check`, which `sharedcluster run` calls before it serves, refuses; requests without session work."""
    app, _ = make_app(SECRET_KEY=None)
    own = app.extensions["sharedcluster"]
    assert isinstance(own, AppState)
    with pytest.raises(ConfigError, match="SECRET_KEY is not set"):
        own.check()
    with caplog.at_level(logging.ERROR):
        assert app.test_client().get("/plain").status_code == 200
        assert app.test_client().get("/plain").status_code == 200
    assert sum("SECRET_KEY is not set" in record.message for record in caplog.records) == 1


def test_several_applications_in_one_process(redis_url: str) -> None:
    """One extension object, two applications: each has its own namespace; without a context it is an error."""
    shared = SharedCluster()
    apps = []
    for name in ("one", "two"):
        app = Flask(f"{name}-{time.monotonic_ns()}")
        app.config.update(SECRET_KEY="s", SHAREDCLUSTER_REDIS_URL=redis_url)
        shared.init_app(app)
        apps.append(app)
    with apps[0].app_context():
        shared.cache.set("k", 1)
    with apps[1].app_context():
        assert shared.cache.get("k") is None
    with pytest.raises(ConfigError, match="application context"):
        shared.cache.get("k")
    for app in apps:
        app.extensions["sharedcluster"].state.close()


# -- cached views ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cached_app(make_app: MakeApp) -> tuple[Flask, SharedCluster, list[str]]:
    """An application with cached views; the list tells which have run."""
    app, shared = make_app()
    ran: list[str] = []

    @app.get("/page")
    @shared.cache.cached(60)
    def page() -> str:
        ran.append("page")
        return f"page {len(ran)}"

    @app.get("/search")
    @shared.cache.cached(60, query_string=True)
    def search() -> dict[str, Any]:
        ran.append("search")
        return {"args": flask.request.args.to_dict(flat=False), "n": len(ran)}

    @app.get("/full")
    @shared.cache.cached(60)
    def full() -> flask.Response:
        ran.append("full")
        return flask.Response(b"\x00\xff", 200, {"X-Own": "1", "Content-Type": "application/x"})

    @app.get("/personal")
    @shared.cache.cached(60)
    def personal() -> str:
        ran.append("personal")
        session["seen"] = True
        return "personal"

    @app.get("/guarded")
    @require_token
    @shared.cache.cached(60)
    def guarded() -> str:
        ran.append("guarded")
        return "secret"

    assert shared.state.wait_ready(10)
    return app, shared, ran


def require_token(view: Callable[..., Any]) -> Callable[..., Any]:
    """A login check around a cached view, as people write them."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if flask.request.headers.get("X-Token") != "good":
            flask.abort(403)
        return view(*args, **kwargs)

    return wrapper


def hits(app: Flask) -> int:
    """How many pages were answered before Flask."""
    assert isinstance(app.wsgi_app, HotPages)
    return app.wsgi_app.hits


def test_a_hot_page_is_answered_before_flask(cached_app: tuple[Flask, SharedCluster, list[str]]) -> None:
    """The third request never reaches Flask, is byte for byte the same, and ends with the cache entry."""
    app, shared, ran = cached_app
    client = app.test_client()
    answers = [client.get("/page") for _ in range(5)]
    assert {(a.data, a.status, tuple(a.headers)) for a in answers} == {
        (b"page 1", "200 OK", (("Content-Type", "text/html; charset=utf-8"), ("Content-Length", "6")))
    }
    assert hits(app) >= 3
    assert ran == ["page"]
    with app.app_context():
        shared.cache.delete("view//page")
    assert client.get("/page").data == b"page 2"
    assert client.get("/page?x=1").data == b"page 2"  # without query_string the query does not count


def test_queries_count_if_asked_in_any_order(cached_app: tuple[Flask, SharedCluster, list[str]]) -> None:
    """query_string=True: same arguments, same entry; other arguments or values, another one."""
    app, _, ran = cached_app
    client = app.test_client()
    for _ in range(3):
        assert client.get("/search?a=1&b=2").json == client.get("/search?b=2&a=1").json
    assert ran == ["search"]
    client.get("/search?a=1&b=3")
    client.get("/search?a=1%26b%3D2")
    client.get("/search")
    assert len(ran) == 4


def test_whole_responses_are_kept(cached_app: tuple[Flask, SharedCluster, list[str]]) -> None:
    """Status, headers and binary bodies come back as they were."""
    app, _, ran = cached_app
    client = app.test_client()
    for _ in range(4):
        response = client.get("/full")
        assert (response.data, response.headers["X-Own"], response.mimetype) == (b"\x00\xff", "1", "application/x")
    assert ran == ["full"]


def test_what_is_personal_is_never_answered_before_flask(cached_app: tuple[Flask, SharedCluster, list[str]]) -> None:
    """A page that looks at the session is not cached at all; with a check around the view Flask always runs it."""
    app, _, ran = cached_app
    client = app.test_client()
    for _ in range(4):
        client.get("/personal")
    for _ in range(4):
        assert client.get("/guarded", headers={"X-Token": "good"}).data == b"secret"
        assert client.get("/guarded").status_code == 403
    assert ran == ["personal"] * 4 + ["guarded"]
    before = hits(app)
    client.get("/personal")
    client.get("/guarded", headers={"X-Token": "good"})
    assert hits(app) == before


def test_a_page_computed_in_the_background_has_its_request(make_app: MakeApp) -> None:
    """Past its time the old page is served, and another thread computes the new one from the request that came."""
    app, shared = make_app()
    made: list[tuple[str, int]] = []

    @app.get("/asks/<name>")
    @shared.cache.cached(0.3, stale=30)
    def asks(name: str) -> str:
        made.append((request.path, threading.get_ident()))
        return f"{request.path} {request.headers.get('X-Who')} {len(made)}"

    client = app.test_client()
    assert client.get("/asks/you", headers={"X-Who": "first"}).text == "/asks/you first 1"
    answers: list[str] = []

    def is_new() -> bool:
        answers.append(client.get("/asks/you", headers={"X-Who": "second"}).text)
        return answers[-1] != "/asks/you first 1"

    wait_until(is_new, "the page is computed anew")
    assert answers[-1].startswith("/asks/you second ")
    assert made[1][1] != threading.get_ident()


def test_nobody_waits_for_a_personal_page_and_gets_it(make_app: MakeApp) -> None:
    """Twenty requests at once for a view that turns out to be personal: each one gets its own."""
    app, shared = make_app()

    @app.get("/hello")
    @shared.cache.cached(60)
    def hello() -> str:
        time.sleep(0.05)
        return f"hello {session.get('user', 'nobody')} {flask.request.headers['X-Me']}"

    assert shared.state.wait_ready(10)
    answers: dict[int, bytes] = {}

    def ask(number: int) -> None:
        answers[number] = app.test_client().get("/hello", headers={"X-Me": str(number)}).data

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: f"hello nobody {number}".encode() for number in range(20)}


@pytest.mark.parametrize(
    "hook", ["before_request", "after_request", "teardown_request", "signal", "middleware", "setting"]
)
def test_anything_that_wants_to_see_requests_sees_them(make_app: MakeApp, hook: str) -> None:
    """Hooks, signal receivers and middleware are never passed by."""
    app, shared = make_app(SHAREDCLUSTER_EARLY_CACHE=hook != "setting")
    seen: list[int] = []

    @app.get("/page")
    @shared.cache.cached(60)
    def page() -> str:
        return "page"

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return args[0] if hook == "after_request" else None

    if hook == "signal":
        flask.request_started.connect(note, app)
    elif hook == "middleware":
        inner = app.wsgi_app

        def middleware(environ: Any, start_response: Any) -> Any:
            seen.append(1)
            return inner(environ, start_response)

        app.wsgi_app = middleware  # type: ignore[method-assign]
    elif hook != "setting":
        getattr(app, hook)(note)
    client = app.test_client()
    assert shared.state.wait_ready(10)
    for _ in range(4):
        assert client.get("/page").data == b"page"
    assert len(seen) == (0 if hook == "setting" else 4)
    if hook == "signal":
        flask.request_started.disconnect(note, app)


def test_cached_knows_flask_caching_s_options(make_app: MakeApp) -> None:
    """unless, forced_update, response_filter, cache_none, key_prefix on plain functions, make_cache_key."""
    app, shared = make_app()
    ran: list[str] = []
    switch = {"unless": True, "force": False}

    @shared.cache.cached(60, key_prefix="all_comments")
    def comments() -> list[int]:
        ran.append("comments")
        return [1, 2]

    @shared.cache.cached(60, key_prefix="u", unless=lambda: switch["unless"])
    def unless() -> str:
        ran.append("unless")
        return "x"

    @shared.cache.cached(60, key_prefix="f", forced_update=lambda: switch["force"])
    def forced() -> int:
        ran.append("forced")
        return ran.count("forced")

    @shared.cache.cached(60, key_prefix="r", response_filter=lambda value: value != "bad")
    def filtered() -> str:
        ran.append("filtered")
        return "bad"

    @shared.cache.cached(60, key_prefix="n")
    def none() -> None:
        ran.append("none")

    @shared.cache.cached(60, key_prefix="cn", cache_none=True)
    def kept_none() -> None:
        ran.append("kept_none")

    @shared.cache.cached(60, make_cache_key=lambda x: f"made {x}")
    def made(x: int) -> int:
        ran.append("made")
        return x

    with app.app_context():
        for _ in range(2):
            assert comments() == [1, 2]
            unless()
            filtered()
            none()
            kept_none()
            assert (made(1), made(2)) == (1, 2)
        assert [forced(), forced()] == [1, 1]
        switch["force"] = True
        assert forced() == 2
        switch["force"] = False
        assert forced() == 2
        assert shared.cache.get("all_comments") == [1, 2]
    assert {name: ran.count(name) for name in set(ran)} == {
        "comments": 1, "unless": 2, "forced": 2, "filtered": 2, "none": 2, "kept_none": 1, "made": 2,
    }  # fmt: skip


def test_memoize_and_its_deletion(make_app: MakeApp) -> None:
    """By arguments, however they are written; deleted for some arguments or for all, on every worker."""
    (app, shared), (other_app, other) = make_app(), make_app()
    ran: list[tuple[int, int]] = []

    def make(extension: SharedCluster) -> Callable[..., int]:
        @extension.cache.memoize(60, tags=["sums"])
        def add(a: int, b: int = 0) -> int:
            ran.append((a, b))
            return a + b

        return add

    one, two = make(shared), make(other)
    with app.app_context():
        assert (one(1, 2), one(1, b=2), one(a=1, b=2), one(3)) == (3, 3, 3, 3)
    with other_app.app_context():
        assert (two(1, 2), two(3, 0)) == (3, 3)
        assert ran == [(1, 2), (3, 0)]
        assert other.cache.delete_memoized(two, 1, 2)
        two(1, 2)
        two(3)
        assert ran[2:] == [(1, 2)]
        other.cache.delete_memoized(two)
        two(1, 2)
        two(3)
        assert ran[3:] == [(1, 2), (3, 0)]
        other.cache.invalidate_tag("sums")
        two(3)
        assert ran[5:] == [(3, 0)]
        with pytest.raises(TypeError, match="not memoized"):
            other.cache.delete_memoized(len)


# -- messages and primitives ----------------------------------------------------------------------------------------


def test_events_reach_every_worker_and_come_back_after_a_reconnect(make_app: MakeApp) -> None:
    """publish, @on and stream over two workers; Last-Event-ID is understood."""
    (app, shared), (other_app, other) = make_app(), make_app()
    heard: list[Any] = []
    other.on("chat")(lambda data: heard.append((data, flask.current_app.name)))
    for each, extension in ((app, shared), (other_app, other)):
        each.add_url_rule("/events", view_func=lambda extension=extension: extension.stream("chat"))
        assert extension.state.wait_ready(10)
    assert other.state.subscriber.wait_confirmed(f"{other.state.namespace}:b:chat", 5)
    with app.app_context():
        positions = [shared.publish("chat", {"n": n}, history=10) for n in range(3)]
    wait_until(lambda: heard == [({"n": n}, "shop") for n in range(3)], "the handler")
    headers = {"Last-Event-ID": positions[0] or ""}
    response = other_app.test_client().get("/events", headers=headers, buffered=False)
    assert response.mimetype == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store"
    chunks = iter(response.response)
    next(chunks)
    assert next(chunks) == f'id: {positions[1]}\ndata: {{"n":1}}\n\nid: {positions[2]}\ndata: {{"n":2}}\n\n'.encode()
    response.close()
    assert other.state.broadcast.clients == 1  # the handler's; the stream's is gone


def test_the_primitives_are_there(make_app: MakeApp) -> None:
    """lock, counter, dict, rate_limit, is_leader, every; a reached limit answers 429."""
    app, shared = make_app()
    runs: list[str] = []

    @shared.every(0.2)
    def job() -> None:
        runs.append(flask.current_app.name)

    @app.get("/limited")
    def limited() -> str:
        shared.rate_limit("r", 2, 60).require()
        return "ok"

    client = app.test_client()
    assert [client.get("/limited").status_code for _ in range(3)] == [200, 200, 429]
    assert 1 <= int(client.get("/limited").headers["Retry-After"]) <= 30
    with app.app_context():
        with shared.lock("l") as lock:
            assert lock.is_held
        assert shared.counter("c").add() == 1
        shared.dict("d")["a"] = 1
        assert shared.dict("d")["a"] == 1
        assert shared.is_leader
        assert shared.redis_url.startswith("redis://")
    wait_until(lambda: runs, "the job")
    assert set(runs) == {"shop"}


def test_an_unavailable_state_in_a_view_is_a_503(own_redis: RedisProcess, make_app: MakeApp) -> None:
    """Locks and limits fail closed, and the client is told when to come back."""
    app, shared = make_app(SHAREDCLUSTER_REDIS_URL=own_redis.url)

    @app.get("/locked")
    def locked() -> str:
        with shared.lock("l"):
            return "ok"

    client = app.test_client()
    assert client.get("/locked").status_code == 200
    own_redis.kill()
    response = client.get("/locked")
    assert (response.status_code, "Retry-After" in response.headers) == (503, True)
    with app.app_context(), pytest.raises(StateUnavailableError):
        shared.counter("c").add()
