"""Requests that arrive in one pass of the loop: all are read, then served; what one does is nothing to the others."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import gevent
import pytest
from gevent.event import Event
from greenlet import getcurrent

from sharedcluster.http.connection import Connection
from sharedcluster.http.server import Server
from sharedcluster.http.settings import HttpSettings, ListenerFacts

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
View = Callable[[str], object]

LEFT_BEHIND: ContextVar[str] = ContextVar("LEFT_BEHIND")


class Site:
    """An engine in this process, with connections that wait for their first request in this pass."""

    def __init__(self, view: View, clients: int, **settings: Any) -> None:
        self.seen: list[str] = []

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
            self.seen.append(environ["PATH_INFO"])
            view(environ["PATH_INFO"])
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]

        self.server = Server(application, HttpSettings(**settings))
        self.server.add_listener(0, ListenerFacts("127.0.0.1", 8000))
        self.clients = [self.connect() for _ in range(clients)]
        gevent.sleep(0)

    def connect(self) -> socket.socket:
        """A client whose connection is served from the next turn of the hub on."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        gevent.get_hub().loop.run_callback(self.server.serve, theirs.detach(), 0, ("127.0.0.1", 40000))
        return ours

    def close(self) -> None:
        """Cut everything."""
        self.server.close()
        for client in self.clients:
            client.close()

    def ask_all(self) -> None:
        """A request on each connection, all before the loop looks."""
        for number, client in enumerate(self.clients):
            client.send(b"GET /%d HTTP/1.1\r\nHost: test\r\n\r\n" % number)

    def answers(self) -> list[bytes]:
        """What each client was told; b"" is the end of its connection."""
        found: list[bytes] = []
        for client in self.clients:
            with gevent.Timeout(10):
                while True:
                    try:
                        found.append(client.recv(65536))
                        break
                    except BlockingIOError:
                        gevent.sleep(0.001)
        return found


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeSite]:
    """Make sites that are closed in the end. For what is held back no time passes, however busy the machine is."""
    monkeypatch.setattr("sharedcluster.http.greenlets.monotonic_ns", lambda: 0)
    made: list[Site] = []

    def make(view: View, clients: int, **settings: Any) -> Site:
        made.append(Site(view, clients, **settings))
        return made[-1]

    yield make
    for site in made:
        site.close()


def assert_served(answers: list[bytes]) -> None:
    """Everybody got the application's answer."""
    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers), answers


def test_all_are_read_before_the_first_is_served(make_site: MakeSite) -> None:
    """The first request that is served finds all others in flight, and they go through one greenlet."""
    in_flight: list[int] = []
    greenlets: list[object] = []

    def view(_: str) -> None:
        in_flight.append(site.server.in_flight)
        greenlets.append(getcurrent())

    site = make_site(view, 6)
    site.ask_all()
    assert_served(site.answers())
    assert sorted(site.seen) == [f"/{number}" for number in range(6)]
    assert in_flight == [6] * 6  # for their answers leave together
    assert len(set(map(id, greenlets))) == 1
    assert site.server.in_flight == 0


def test_a_view_that_waits_holds_up_nobody(make_site: MakeSite) -> None:
    """Whichever request waits, those behind it are served while it does."""
    others_are_done = Event()

    def view(_: str) -> None:
        if len(site.seen) in (1, 3):
            assert others_are_done.wait(10)
        elif len(site.seen) == 5:
            others_are_done.set()

    site = make_site(view, 5)
    site.ask_all()
    assert_served(site.answers())


def test_each_request_starts_in_an_empty_context(make_site: MakeSite) -> None:
    """What one request leaves in a context variable is not there for the next in the same greenlet."""
    found: list[object] = []

    def view(path: str) -> None:
        found.append(LEFT_BEHIND.get(None))
        LEFT_BEHIND.set(path)

    site = make_site(view, 4)
    site.ask_all()
    assert_served(site.answers())
    assert found == [None] * 4


def test_an_error_in_one_is_its_own(make_site: MakeSite) -> None:
    """A view that raises costs its client a 500, and the others nothing."""

    def view(_: str) -> None:
        if len(site.seen) == 2:
            raise ValueError("in a view")

    site = make_site(view, 4)
    site.ask_all()
    assert sorted(answer[9:12] for answer in site.answers()) == [b"200", b"200", b"200", b"500"]


def test_who_is_cut_before_it_begins_never_begins(make_site: MakeSite) -> None:
    """The server is closed by the first request: the others are cut, unbegun, and nothing stays in flight."""

    def view(_: str) -> None:
        site.server.close()

    site = make_site(view, 4)
    site.ask_all()
    assert site.answers() == [b""] * 4
    gevent.sleep(0)
    assert len(site.seen) == 1
    assert site.server.in_flight == 0
    assert site.server.connections == 0


def test_who_is_out_of_time_before_it_begins_is_answered_for(make_site: MakeSite) -> None:
    """The first one computes for so long that the others' time is up: they hear it, and are not begun."""

    def view(_: str) -> None:
        time.sleep(0.2)
        connections: set[Any] = set(site.server._connections)
        for connection in connections:
            if connection._exchange.greenlet is None:
                connection.expire(time.monotonic())

    site = make_site(view, 3, request_timeout=0.1)
    site.ask_all()
    assert sorted(answer[9:12] for answer in site.answers()) == [b"200", b"503", b"503"]
    gevent.sleep(0)
    assert len(site.seen) == 1
    assert site.server.in_flight == 0


@pytest.mark.parametrize("pending", [0, 1])
def test_a_new_connection_is_served_at_once(make_site: MakeSite, pending: int) -> None:
    """Its first request has begun when `serve` returns, whatever else has come: it does not stand in line."""
    site = make_site(lambda _: None, 0)
    begun: list[tuple[int, int]] = []
    doors = [socket.socketpair() for _ in range(2)]
    loop = gevent.get_hub().loop

    def on_door(ours: socket.socket) -> None:
        ours.recv(1)
        if loop.pendingcnt == pending:
            client, theirs = socket.socketpair()
            site.clients.append(client)
            client.send(b"GET /new HTTP/1.1\r\nHost: test\r\n\r\n")
            before = len(site.seen)
            site.server.serve(theirs.detach(), 0, ("127.0.0.1", 40000))
            begun.append((before, len(site.seen)))

    watchers = [loop.io(ours.fileno(), 1) for ours, _ in doors]
    for watcher, (ours, theirs) in zip(watchers, doors, strict=True):
        watcher.start(on_door, ours)
        theirs.send(b"x")
    with gevent.Timeout(10):
        while not begun:
            gevent.sleep(0)
    for watcher in watchers:
        watcher.stop()
        watcher.close()
    for end in (end for door in doors for end in door):
        end.close()
    assert begun == [(0, 1)]


def test_answers_leave_together_also_to_clients_that_are_slow(make_site: MakeSite) -> None:
    """What a client does not take at once is sent to it later, whole, and keeps nobody else's answer."""
    size = 60_000
    started: list[int] = []

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        started.append(site.server.in_flight)
        start_response("200 OK", [("Content-Length", str(size))])
        return [b"x" * size]

    site = make_site(lambda _: None, 0)
    site.server.application = application
    for slow in (True, False, True):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096 if slow else 1 << 20)
        gevent.get_hub().loop.run_callback(site.server.serve, theirs.detach(), 0, ("127.0.0.1", 40000))
        site.clients.append(ours)
    gevent.sleep(0)
    site.ask_all()
    with gevent.Timeout(10):
        while site.server.in_flight != 2:
            gevent.sleep(0.001)
    assert started == [3, 3, 3]
    for client in site.clients:
        got = b""
        with gevent.Timeout(10):
            while not got.endswith(b"x") or len(got.partition(b"\r\n\r\n")[2]) < size:
                try:
                    got += client.recv(65536)
                except BlockingIOError:
                    gevent.sleep(0.001)
    with gevent.Timeout(10):
        while site.server.in_flight:
            gevent.sleep(0.001)
    assert site.server.counters.requests == 3
    site.ask_all()  # the connections go on
    with gevent.Timeout(10):
        while len(started) < 6:
            gevent.sleep(0.001)


def test_a_client_that_has_left_when_the_answers_do(make_site: MakeSite) -> None:
    """Its own answer is dropped, and nothing else."""

    def view(path: str) -> None:
        if path == "/2":
            leaver.close()

    site = make_site(view, 3)
    leaver = site.clients[0]
    site.ask_all()
    site.clients.remove(leaver)
    assert_served(site.answers())
    with gevent.Timeout(10):
        while site.server.in_flight:
            gevent.sleep(0.001)
    assert leaver.fileno() == -1
    assert site.server.counters.requests == 3


@pytest.mark.parametrize("has_work", [True, False])
def test_an_answer_leaves_before_what_is_done_behind_it(make_site: MakeSite, has_work: bool) -> None:
    """Who has something to do when an answer has left does it then; an answer behind which nothing is done is held."""
    had_left: list[bool] = []

    class Body(list[bytes]):
        on_close = (print,) if has_work else ()

        def close(self) -> None:
            had_left.append(bool(self.peek()))

        def peek(self) -> bytes:
            try:
                return first.recv(10, socket.MSG_PEEK)
            except BlockingIOError:
                return b""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return Body([b"ok"]) if environ["PATH_INFO"] == "/0" else [b"ok"]

    site = make_site(lambda _: None, 3)
    first = site.clients[0]
    site.server.application = application
    # The loop may begin with any of them, so it is asked until the first one was not the last.
    with gevent.Timeout(10):
        while not had_left or (has_work is False and had_left[-1]):
            site.ask_all()
            assert_served(site.answers())
            if has_work:
                break
    assert had_left[-1] is has_work


def test_who_is_ended_while_its_answer_is_held_ends_nobody_else(make_site: MakeSite) -> None:
    """Its greenlet serves another request by then, which must not be thrown out of it."""

    def view(_: str) -> None:
        if len(site.seen) == 2:
            for connection in set(site.server._connections):
                if connection._exchange is not None and connection._exchange._held is not None:  # type: ignore[union-attr]
                    connection._exchange.end(None)  # type: ignore[union-attr]

    site = make_site(view, 3)
    site.ask_all()
    answers = site.answers()
    assert sorted(answer[9:12] for answer in answers) == [b"", b"200", b"200"]
    gevent.sleep(0)
    assert site.server.in_flight == 0


def test_an_answer_to_a_body_that_was_not_read_is_not_held(make_site: MakeSite) -> None:
    """What is left of the body has to be read by a greenlet that may wait; the others' answers are held."""
    held: list[bool] = []

    def view(_: str) -> None:
        held.append(any(c._exchange is not None and c._exchange._held is not None for c in site.server._connections))  # type: ignore[union-attr]

    site = make_site(view, 2, buffer_body=1)
    for number, client in enumerate(site.clients):
        client.send(b"POST /%d HTTP/1.1\r\nHost: test\r\nContent-Length: 20000\r\n\r\n" % number + b"x" * 10000)
    with gevent.Timeout(10):
        while len(held) < 2:
            gevent.sleep(0.001)
    assert_served(site.answers())
    assert held == [False, False]


def test_a_connection_that_cannot_send_at_once_is_not_held(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that encrypts; everybody else's answer is."""
    held: list[bool] = []

    def view(_: str) -> None:
        held.append(any(c._exchange is not None and c._exchange._held is not None for c in site.server._connections))  # type: ignore[union-attr]

    site = make_site(view, 3)
    site.ask_all()
    assert_served(site.answers())
    assert held == [False, True, True]
    monkeypatch.setattr(Connection, "sends_now", False)
    site.ask_all()
    assert_served(site.answers())
    assert held[3:] == [False, False, False]


def test_a_request_whose_time_is_up_while_its_client_takes_the_rest(make_site: MakeSite) -> None:
    """Its connection is cut, the others go on, and nothing stays in flight: a drain need not wait for it."""
    size = 60_000

    def application(_: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Length", str(size))])
        return [b"x" * size]

    site = make_site(lambda _: None, 0, request_timeout=0.05)
    site.server.application = application
    for _ in range(3):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        gevent.get_hub().loop.run_callback(site.server.serve, theirs.detach(), 0, ("127.0.0.1", 40000))
        site.clients.append(ours)
    gevent.sleep(0)
    site.ask_all()
    with gevent.Timeout(10):
        while sum(c._waiter is not None for c in site.server._connections) < 3:  # type: ignore[union-attr]
            gevent.sleep(0.001)
        while site.server.in_flight:
            gevent.sleep(0.001)
    assert site.server.connections == 0
    assert site.server.counters.requests == 3
