"""Answers that come later: nobody waits for them in a greenlet, and a client sees nothing of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import gevent
import pytest
from gevent.monkey import get_original

from sharedcluster.http import policy
from sharedcluster.http.exchange import Later
from tests.unit.http.test_one_pass import MakeSite, Site, assert_served, make_site

__all__ = ["make_site"]


class Kitchen:
    """An application whose answers are ready when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []
        self.answered = 0
        self.closed = 0
        self.fails = False
        self.is_done = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer later, as a body of one piece, or of two for /two."""
        later = environ["sharedcluster.later"]
        assert later is Later
        assert Later.is_for(start_response)

        def answer() -> Iterable[bytes]:
            if self.fails:
                raise ValueError("in the answer")
            self.answered += 1
            start_response("200 OK", [("Content-Length", "2")])
            return Body(self, [b"o", b"k"] if environ["PATH_INFO"] == "/two" else [b"ok"])

        return Later(self.when_done, answer)

    def when_done(self, function: Callable[[], object]) -> None:
        """As a `Submitted` does."""
        if self.is_done:
            function()
        else:
            self.waiting.append(function)

    def serve(self) -> None:
        """All that waits is ready; from the loop."""
        waiting, self.waiting = self.waiting, []
        for function in waiting:
            gevent.get_hub().loop.run_callback(function)


class Body(list[bytes]):
    """A body that notes when it is closed."""

    def __init__(self, kitchen: Kitchen, pieces: list[bytes]) -> None:
        super().__init__(pieces)
        self.kitchen = kitchen

    def close(self) -> None:
        """Note it."""
        self.kitchen.closed += 1


def cook(make_site: MakeSite, clients: int, **settings: Any) -> tuple[Kitchen, Site]:
    """A site of which all clients have asked, and wait."""
    kitchen = Kitchen()
    site = make_site(lambda _: None, clients, **settings)
    site.server.application = kitchen
    site.ask_all()
    with gevent.Timeout(10):
        while len(kitchen.waiting) < clients:
            gevent.sleep(0.001)
    return kitchen, site


def idle(site: Site) -> None:
    """Wait until nothing is in flight."""
    with gevent.Timeout(10):
        while site.server.in_flight:
            gevent.sleep(0.001)


def test_no_greenlet_waits(make_site: MakeSite) -> None:
    """Twenty requests wait at once, their greenlet serves others meanwhile, and each gets its answer in the end."""
    kitchen, site = cook(make_site, 20)
    assert site.server.in_flight == 20
    assert len(site.server.parked) == 1
    assert kitchen.answered == 0
    kitchen.serve()
    assert_served(site.answers())
    idle(site)
    assert (kitchen.answered, kitchen.closed, len(site.server.parked)) == (20, 20, 1)
    site.ask_all()  # the connections go on
    kitchen.is_done = True
    kitchen.serve()
    with gevent.Timeout(10):
        while kitchen.answered < 40:
            kitchen.serve()
            gevent.sleep(0.001)
    assert_served(site.answers())


def test_what_is_ready_at_once_is_answered_at_once(make_site: MakeSite) -> None:
    """`when_done` may call back before it returns."""
    kitchen = Kitchen()
    kitchen.is_done = True
    site = make_site(lambda _: None, 3)
    site.server.application = kitchen
    site.ask_all()
    assert_served(site.answers())
    assert site.server.counters.requests == 3


def test_a_client_that_leaves_meanwhile(make_site: MakeSite) -> None:
    """Its answer is made, closed and dropped; the others get theirs."""
    kitchen, site = cook(make_site, 3)
    site.clients.pop().close()
    gevent.sleep(0.01)
    kitchen.serve()
    assert_served(site.answers())
    idle(site)
    assert (kitchen.answered, kitchen.closed) == (3, 3)


def test_a_request_whose_time_is_up_while_it_waits(make_site: MakeSite) -> None:
    """It is answered for; what comes later is closed and sent to nobody."""
    kitchen, site = cook(make_site, 1, request_timeout=0.05)
    (connection,) = site.server._connections
    gevent.sleep(0.06)
    connection.expire(time.monotonic())
    (answer,) = site.answers()
    assert answer.startswith(b"HTTP/1.1 %d" % policy.REQUEST_TIMEOUT.status)
    kitchen.serve()
    idle(site)
    assert kitchen.closed == 1


def test_a_server_that_is_closed_while_they_wait(make_site: MakeSite) -> None:
    """They are cut; nothing stays in flight when what they waited for has come."""
    kitchen, site = cook(make_site, 3)
    site.server.close()
    assert site.answers() == [b""] * 3
    kitchen.serve()
    idle(site)
    assert kitchen.closed == 3


def test_a_drain_waits_for_them(make_site: MakeSite) -> None:
    """A worker that drains is not drained before they are answered; they are told that their connection ends."""
    kitchen, site = cook(make_site, 2, drain_linger=0.05)
    site.server.drain()
    assert not site.server.is_drained()
    kitchen.serve()
    answers = site.answers()
    assert_served(answers)
    assert all(b"Connection: close" in answer for answer in answers)


def test_an_error_in_the_answer_is_a_500(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    """As one in the application: told, counted, and the connection goes on."""
    kitchen, site = cook(make_site, 1)
    kitchen.fails = True
    kitchen.serve()
    (answer,) = site.answers()
    assert answer.startswith(b"HTTP/1.1 500")
    idle(site)
    assert "in the answer" in caplog.text


def test_a_body_of_several_pieces(make_site: MakeSite) -> None:
    """Any body will do."""
    kitchen = Kitchen()
    site = make_site(lambda _: None, 1)
    site.server.application = kitchen
    site.clients[0].send(b"GET /two HTTP/1.1\r\nHost: test\r\n\r\n")
    with gevent.Timeout(10):
        while not kitchen.waiting:
            gevent.sleep(0.001)
    kitchen.serve()
    assert site.answers()[0].endswith(b"\r\n\r\nok")
    idle(site)
    assert kitchen.closed == 1


def test_whoever_stands_between_reads_it_as_a_body(make_site: MakeSite) -> None:
    """A middleware that knows nothing of it gets pieces, after start_response was called, and may close it."""
    kitchen = Kitchen()
    read: list[bytes] = []

    def middleware(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        body: Any = kitchen(environ, start_response)
        try:
            read.extend(body)
        finally:
            body.close()
        return [b"".join(read).upper()]

    site = make_site(lambda _: None, 1)
    site.server.application = middleware
    site.ask_all()
    assert site.answers()[0].endswith(b"\r\n\r\nOK")
    assert (read, kitchen.closed) == ([b"ok"], 1)
    assert not Later.is_for(lambda *_: None)
    Later(kitchen.when_done, list).close()  # nobody has read it: nothing to close


def test_it_is_in_the_access_log_with_its_whole_time(make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    """From its head to its answer, as if a greenlet had waited."""
    lines: list[str] = []
    kitchen, site = cook(make_site, 1, access_log=lines.append, access_log_format="json")
    gevent.sleep(0.05)
    kitchen.serve()
    assert_served(site.answers())
    idle(site)
    (line,) = lines
    assert '"status": 200' in line or '"status":200' in line
    assert sum(site.server.counters.latency[:15]) == 0  # none was quicker than 2^15 us


def test_told_from_another_thread_by_way_of_the_loop(make_site: MakeSite) -> None:
    """What is waited for may come from anywhere, as long as it is told in the loop's thread."""
    kitchen, site = cook(make_site, 1)
    loop = gevent.get_hub().loop
    (function,) = kitchen.waiting
    thread: Any = get_original("threading", "Thread")(target=lambda: loop.run_callback_threadsafe(function))
    thread.start()
    assert_served(site.answers())
    assert threading.current_thread() is threading.main_thread()
    assert logging.getLogger("sharedcluster.http") is not None
