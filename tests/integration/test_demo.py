"""The demo on a real cluster: one state, whichever worker answers."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster_process import Cluster
from tests.conftest import StartCluster
from tests.waiting import wait_until

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Browser:
    """A cookie jar; every request is a new connection, so any worker may answer it."""

    def __init__(self, cluster: Cluster) -> None:
        self.port = cluster.port
        self.cookie = ""

    def ask(self, method: str, path: str, body: str = "") -> tuple[int, bytes]:
        """One request with the cookie; a new cookie is kept."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {**({"Cookie": self.cookie} if self.cookie else {}), **(FORM if body else {})}
        connection.request(method, path, body=body or None, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        if cookie := answer.getheader("set-cookie"):
            self.cookie = cookie.partition(";")[0]
        connection.close()
        return answer.status, content

    def count(self) -> tuple[int, int]:
        """POST /counter: the count and the worker."""
        import json

        status, content = self.ask("POST", "/counter")
        assert status == 200, content
        facts = json.loads(content)
        return facts["count"], facts["worker"]


@pytest.fixture
def demo(start_cluster: StartCluster) -> Cluster:
    """Four workers on a private Redis, as `make run` has it."""
    return start_cluster("demo_app", "-w", "4", env={"SECRET_KEY": "for this test"})


def test_a_session_counts_on_whichever_worker_answers(demo: Cluster) -> None:
    """40 sequential POST /counter with one jar: 1 to 40, and every worker answered equally often."""
    browser = Browser(demo)
    answers = [browser.count() for _ in range(40)]
    assert [count for count, _ in answers] == list(range(1, 41))
    assert Counter(worker for _, worker in answers) == {0: 10, 1: 10, 2: 10, 3: 10}


def test_many_sessions_at_once(demo: Cluster) -> None:
    """400 concurrent POST /counter over 40 jars, each jar's own requests in order: each ends at its own number."""
    browsers = [Browser(demo) for _ in range(40)]

    def ten(browser: Browser) -> int:
        return [browser.count()[0] for _ in range(10)][-1]

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ten, browsers)) == [10] * 40


class Listener(threading.Thread):
    """An EventSource: keeps the data of every message event."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.connection.request("GET", "/events", headers={"Accept": "text/event-stream"})
        self.answer = self.connection.getresponse()
        self.lines: list[str] = []

    def run(self) -> None:
        """Read until the stream ends."""
        try:
            while line := self.answer.fp.readline():
                if line.startswith(b"data:"):
                    self.lines.append(line[5:].strip().decode())
        except (OSError, ValueError, AttributeError):
            return


def test_a_message_reaches_every_worker_once_and_in_order(demo: Cluster) -> None:
    """Twelve SSE clients over four workers; 20 messages posted to whichever worker: each gets all, once, in order."""
    listeners = [Listener(demo.port) for _ in range(12)]
    for each in listeners:
        each.start()
    wait_until(lambda: sum(w["in_flight"] for w in demo.workers()) == 12, "all are connected")
    assert [w["in_flight"] for w in demo.workers()] == [3, 3, 3, 3]
    browser = Browser(demo)
    for number in range(20):
        status, _ = browser.ask("POST", "/broadcast", f"text=message-{number:02d}")
        assert status < 300
    wait_until(lambda: all(len(each.lines) >= 20 for each in listeners), "all have heard them")
    for each in listeners:
        heard = [next(n for n in range(20) if f"message-{n:02d}" in line) for line in each.lines]
        assert heard == list(range(20))


def test_login_is_seen_by_all_and_logout_too(demo: Cluster) -> None:
    """Logged in on one worker, known to the next ones; the session id changes; after the logout nobody knows it."""
    browser = Browser(demo)
    browser.count()
    before = browser.cookie
    assert browser.ask("POST", "/login", "user=ada")[0] < 400
    assert browser.cookie != before
    assert all(b"ada" in browser.ask("GET", "/me")[1] for _ in range(8))
    stolen = Browser(demo)
    stolen.cookie = browser.cookie
    assert browser.ask("POST", "/logout")[0] < 400
    assert b"ada" not in browser.ask("GET", "/me")[1]
    assert not any(b"ada" in stolen.ask("GET", "/me")[1] for _ in range(4))


def test_a_cached_value_is_computed_once(demo: Cluster) -> None:
    """GET /cached by 16 clients at once: one value, computed by one worker."""
    with ThreadPoolExecutor(16) as pool:
        bodies = set(pool.map(lambda _: demo.get("/cached").body, range(16)))
    assert len(bodies) == 1
