"""Sessions under our own engine: stored behind the end of a request and before its answer, and nobody sees that."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flask
import gevent
import pytest
from flask import Flask, session, signals
from gevent.monkey import get_original, is_module_patched

from sharedcluster import SharedCluster
from sharedcluster.flask_sessions import SharedSessionInterface
from sharedcluster.flask_shortcuts import take_shortcuts
from sharedcluster.http.server import Server
from sharedcluster.http.settings import HttpSettings, ListenerFacts
from sharedcluster.state.sessions import SessionStore
from tests.redis_process import RedisProcess
from tests.state.link import Link
from tests.state.test_flask import MakeApp, make_app

pytestmark = pytest.mark.skipif(not is_module_patched("socket"), reason="our engine runs in patched processes")
__all__ = ["make_app"]


class Client:
    """One connection to an engine in this process, and one cookie."""

    def __init__(self, site: Site) -> None:
        self.socket, theirs = get_original("socket", "socketpair")()
        self.socket.setblocking(False)
        self.cookie = ""
        self.site = site
        site.loop.run_callback(site.server.serve, theirs.detach(), 0, ("127.0.0.1", 40000))

    def ask(self, path: str, method: str = "POST") -> None:
        """Send a request."""
        cookie = f"Cookie: session={self.cookie}\r\n" if self.cookie else ""
        self.socket.send(f"{method} {path} HTTP/1.1\r\nHost: test\r\n{cookie}\r\n".encode())

    def peek(self) -> bytes:
        """What has arrived, if anything."""
        try:
            data: bytes = self.socket.recv(65536, socket.MSG_PEEK)
        except BlockingIOError:
            return b""
        return data

    def answer(self) -> Answer:
        """Wait for the answer, and keep its cookie."""
        with gevent.Timeout(10):
            while not self.peek():
                gevent.sleep(0.001)
        answer = Answer(self.socket.recv(65536))
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].split(";")[0].partition("=")[2]
        return answer

    def post(self, path: str) -> Answer:
        """Both."""
        self.ask(path)
        return self.answer()


class Answer:
    """What a client was told."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split(" ")[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


class Site:
    """An application as a worker serves it."""

    def __init__(self, app: Flask, shared: SharedCluster, **settings: Any) -> None:
        take_shortcuts(app)
        self.shared = shared
        self.server = Server(app, HttpSettings(**settings))
        self.server.add_listener(0, ListenerFacts("test", 80))
        self.loop: Any = gevent.get_hub().loop
        self.clients: list[Client] = []

    def connect(self, count: int = 1) -> list[Client]:
        """Clients of this site."""
        made = [Client(self) for _ in range(count)]
        self.clients += made
        gevent.sleep(0)
        return made

    def close(self) -> None:
        """Cut everything."""
        self.server.close()
        for client in self.clients:
            client.socket.close()


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(make_app: MakeApp) -> Iterator[MakeSite]:
    """Make sites that are closed in the end; `change` is given the application before it is served."""
    made: list[Site] = []

    def make(change: Callable[[Flask, SharedCluster], object] = lambda *_: None, **config: Any) -> Site:
        app, shared = make_app(**config)
        change(app, shared)
        made.append(Site(app, shared))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was not waited for, in order."""
    found: list[object] = []
    original = SessionStore.submit

    def submit(store: SessionStore, *args: Any, **named: Any) -> Any:
        outcome = original(store, *args, **named)
        found.append(outcome)
        return outcome

    monkeypatch.setattr(SessionStore, "submit", submit)
    return found


def test_a_crowd_writes_without_a_greenlet_each(make_site: MakeSite, submitted: list[object]) -> None:
    """Forty clients write ten times each; each counts to ten by itself, in few trips, all in one greenlet."""
    site = make_site()
    assert site.shared.state.wait_ready(10)
    clients = site.connect(40)
    exchanges = 0
    for turn in range(1, 11):
        if turn == 3:  # from now on every session is near
            site.server.parked.clear()
            exchanges = site.shared.state.commit.exchanges
        for client in clients:
            client.ask("/counter")
        for client in clients:
            answer = client.answer()
            assert (answer.status, answer.body.strip()) == (200, b'{"count":%d}' % turn)
            assert answer.headers["vary"] == "Cookie"
    assert len(submitted) == 400
    assert len(site.server.parked) == 1
    assert site.shared.state.commit.exchanges - exchanges <= 8 * 3 + 2  # a heartbeat may have come between
    assert site.server.in_flight == 0


def test_a_request_leaves_nothing_to_the_collector(make_site: MakeSite) -> None:
    """What served a request is free when it is answered, not when the collector comes by: that finds nothing of ours.

    Such circles made a session write a tenth dearer, most of it by leaving the CPU's caches to what nobody needs.
    """
    site = make_site()
    assert site.shared.state.wait_ready(10)
    clients = site.connect(4)

    def ask_all() -> None:
        for method, path in (("POST", "/counter"), ("GET", "/count"), ("GET", "/plain")):
            for client in clients:
                client.ask(path, method)
            assert [client.answer().status for client in clients] == [200] * 4

    ask_all()  # a path that is new is looked for by Werkzeug, whose search is a circle
    ask_all()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        ask_all()
        gc.collect()
        found = {f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage}
        environs = [each for each in gc.garbage if isinstance(each, dict) and "PATH_INFO" in each]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert [name for name in found if name.startswith(("sharedcluster.", "flask.", "werkzeug."))] == []
    assert environs == []


def test_the_answer_leaves_when_redis_has_it_and_not_before(make_site: MakeSite, own_redis: RedisProcess) -> None:
    """Redis stands still: the request is over, its client waits; Redis goes on, and the client hears it."""
    site = make_site(SHAREDCLUSTER_REDIS_URL=own_redis.url, SHAREDCLUSTER_SOCKET_TIMEOUT=20.0)
    assert site.shared.state.wait_ready(10)
    (client,) = site.connect()
    assert [client.post("/counter").status for _ in range(2)] == [200, 200]
    own_redis.signal(signal.SIGSTOP)
    client.ask("/counter")
    with gevent.Timeout(10):
        while not site.server.parked or not site.server.in_flight:
            gevent.sleep(0.001)
        for _ in range(20):  # turns of the loop
            gevent.sleep(0)
    assert client.peek() == b""
    own_redis.signal(signal.SIGCONT)
    assert client.answer().body.strip() == b'{"count":3}'


@pytest.mark.parametrize("policy", ["503", "anonymous"])
def test_redis_breaks_between_the_view_and_the_answer(make_site: MakeSite, redis_url: str, policy: str) -> None:
    """The finished response becomes a 503 without its headers; or it stays and sets no cookie, if so configured."""
    with Link(redis_url) as link:

        def change(app: Flask, _: SharedCluster) -> None:
            @app.post("/write")
            def write() -> str:
                session["x"] = 1
                link.mode = "black hole"
                return "written"

        site = make_site(change, SHAREDCLUSTER_REDIS_URL=link.url, SHAREDCLUSTER_SESSION_ON_ERROR=policy)
        (client,) = site.connect()
        assert client.post("/counter").status == 200
        answer = client.post("/write")
        assert answer.status == (503 if policy == "503" else 200)
        assert "set-cookie" not in answer.headers
        assert ("retry-after" in answer.headers) == (policy == "503")
        assert (answer.body == b"written") == (policy == "anonymous")
        assert site.server.in_flight == 0


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("handles", [True, False])
def test_what_redis_refuses_is_the_application_s_to_handle(
    make_site: MakeSite, namespace: str, caplog: pytest.LogCaptureFixture, *, shortcuts: bool, handles: bool
) -> None:
    """An error from saving reaches the handler, the log and the signal as it does in Flask without any of this."""
    heard: list[str] = []
    kept: list[SharedCluster] = []

    def listen(sender: Flask, exception: BaseException, **_: Any) -> None:
        heard.append(type(exception).__name__)

    def change(app: Flask, shared: SharedCluster) -> None:
        kept.append(shared)
        signals.got_request_exception.connect(listen, app)
        if handles:

            @app.errorhandler(500)
            def handle(error: Any) -> tuple[str, int]:
                return f"{type(error.original_exception).__name__} {flask.request.path}", 500

    site = make_site(change, SHAREDCLUSTER_SHORTCUTS=shortcuts)
    (client,) = site.connect()
    assert client.post("/counter").status == 200
    state = kept[0].state
    (key,) = state.commit.call("KEYS", f"{namespace}:s:*")
    assert state.wait_ready(10)
    client.post("/counter")  # the near copy is believed from now on
    state.commit.call("SET", key, "no hash")
    answer = client.post("/counter")
    assert answer.status == 500
    assert "set-cookie" not in answer.headers
    assert (answer.body == b"ReplyError /counter") == handles
    assert heard == ["ReplyError"]
    assert "WRONGTYPE" in caplog.text
    assert client.post("/plain").status == 405  # the connection goes on


HOOKS = (
    "after_request", "teardown_request", "teardown_appcontext", "request_finished", "request_tearing_down",
    "appcontext_tearing_down", "appcontext_popped", "call_on_close", "after_this_request",
)  # fmt: skip


@pytest.mark.parametrize("hook", [*HOOKS, "serialize", "generator"])
def test_who_could_see_it_finds_it_stored(
    make_site: MakeSite, namespace: str, submitted: list[object], request: pytest.FixtureRequest, hook: str
) -> None:
    """Whatever runs between the view and the answer finds the session in Redis where Flask would have put it."""
    kept: list[SharedCluster] = []
    seen: list[int] = []

    def look(*args: Any, **_: Any) -> Any:
        call = kept[0].state.commit.call
        seen.append(sum(1 for key in call("KEYS", f"{namespace}:s:*") if call("HEXISTS", key, "hooked")))
        return args[0] if args else None

    def change(app: Flask, shared: SharedCluster) -> None:
        kept.append(shared)
        if hook in ("after_request", "teardown_request", "teardown_appcontext"):
            getattr(app, hook)(look)
        elif hasattr(signals, hook):
            request.addfinalizer(lambda: getattr(signals, hook).disconnect(look))
            getattr(signals, hook).connect(look, app)

        def view() -> Any:
            session["hooked"] = 1
            if hook == "after_this_request":
                flask.after_this_request(look)
            if hook == "generator":
                return flask.Response(flask.stream_with_context(iter(["whole"])))
            response = flask.make_response("whole")
            if hook == "call_on_close":
                response.call_on_close(look)
            return response

        app.post("/hooked")(shared.sessions.serialize()(view) if hook == "serialize" else view)

    site = make_site(change)
    (client,) = site.connect()
    client.post("/counter")
    seen.clear()
    submitted.clear()
    answer = client.post("/hooked")
    assert (answer.status, answer.body.endswith(b"whole") or b"whole" in answer.body) == (200, True)
    assert "set-cookie" in answer.headers
    with gevent.Timeout(10):
        while site.server.in_flight:
            gevent.sleep(0.001)
    before_saving = hook in ("after_request", "after_this_request")
    assert seen == ([] if hook in ("serialize", "generator") else [0] if before_saving else [1])
    assert submitted == []


def test_an_interface_of_the_application_s_own_is_asked(make_site: MakeSite, submitted: list[object]) -> None:
    """Who has written `save_session` anew, in a class or on the object, is called."""
    called: list[str] = []

    class Own(SharedSessionInterface):
        def save_session(self, app: Flask, session: Any, response: Any) -> None:
            called.append("class")
            super().save_session(app, session, response)

    def change(app: Flask, shared: SharedCluster) -> None:
        app.session_interface = Own(shared._app_state())

    site = make_site(change)
    (client,) = site.connect()
    assert client.post("/counter").status == 200

    def change_object(app: Flask, _: SharedCluster) -> None:
        interface: Any = app.session_interface
        original = interface.save_session

        def save(*args: Any) -> None:
            called.append("object")
            original(*args)

        interface.save_session = save

    other = make_site(change_object)
    (client,) = other.connect()
    assert client.post("/counter").status == 200
    assert called == ["class", "object"]
    assert submitted == []


def test_a_middleware_sees_the_status_and_the_cookie(make_site: MakeSite) -> None:
    """It stands between Flask and the server, so the answer is whole when it gets it: start_response was called."""
    seen: list[tuple[str, bool, bytes]] = []

    def change(app: Flask, _: SharedCluster) -> None:
        inner = app.wsgi_app

        def middleware(environ: Any, start_response: Any) -> Iterable[bytes]:
            started: list[Any] = []

            def start(status: str, headers: Any, exc_info: Any = None) -> Any:
                started[:] = status, headers
                return start_response(status, headers, exc_info)

            body = inner(environ, start)
            status, headers = started  # as many do, though PEP 3333 lets it come with the first piece of the body
            pieces = list(body)
            seen.append((status, "Set-Cookie" in dict(headers), b"".join(pieces)))
            return pieces

        app.wsgi_app = middleware  # type: ignore[method-assign]

    site = make_site(change)
    (client,) = site.connect()
    for turn in (1, 2):
        assert client.post("/counter").body.strip() == b'{"count":%d}' % turn
    assert seen == [("200 OK", True, b'{"count":%d}\n' % turn) for turn in (1, 2)]


def test_all_that_is_done_with_a_session(make_site: MakeSite, submitted: list[object]) -> None:
    """Login, its rotation, reading, and logout, as a browser has them."""
    site = make_site()
    (client,) = site.connect()
    client.post("/counter")
    first = client.cookie
    assert client.post("/login").body == b"in"
    assert client.cookie.split(".")[1] != first.split(".")[1]
    client.ask("/count", "GET")
    assert client.answer().body.strip() == b'{"count":1}'
    assert client.post("/logout").body == b"out"
    assert client.cookie == ""
    client.cookie = first
    client.ask("/count", "GET")
    assert client.answer().body.strip() == b'{"count":0}'
    client.ask("/count", "HEAD")
    head = client.answer()
    assert (head.status, head.headers["content-length"], head.body) == (200, "12", b"")
    assert len(submitted) >= 4


def test_flask_s_test_client_in_a_worker(make_site: MakeSite) -> None:
    """An application that asks itself is answered whole, though the server is not the one that listens."""

    def change(app: Flask, _: SharedCluster) -> None:
        @app.post("/asks")
        def asks() -> str:
            client = app.test_client()
            return " ".join(str(client.post("/counter").get_json()["count"]) for _ in range(3))

    site = make_site(change)
    (client,) = site.connect()
    assert client.post("/asks").body == b"1 2 3"


def test_what_cannot_be_stored_is_told_at_once(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    """A value without an encoding is an error of the view's request, as ever."""

    def change(app: Flask, _: SharedCluster) -> None:
        @app.post("/bad")
        def bad() -> str:
            session["x"] = object()
            return "bad"

    site = make_site(change)
    (client,) = site.connect()
    assert client.post("/bad").status == 500
    assert "session['x'] cannot be stored" in caplog.text
