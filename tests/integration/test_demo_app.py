"""One state whichever worker answers: the demo's routes on a real cluster, from outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.cluster_process import Answer, Cluster, request
from tests.conftest import StartCluster
from tests.redis_process import RedisProcess, find_redis_server
from tests.waiting import wait_until

WORKERS = 4
ENVIRONMENT = {"SECRET_KEY": "a key of this test"}


class Client:
    """Somebody with a cookie jar who opens a new connection for each request."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cookie = ""

    def ask(self, method: str, path: str, **form: str) -> Answer:
        """One request; the session cookie of the answer is kept."""
        headers = {"Cookie": self.cookie} if self.cookie else {}
        if form:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        answer = request(self.port, method, path, body=urlencode(form).encode() if form else None, headers=headers)
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    def post(self, path: str, **form: str) -> Any:
        """The JSON of a POST that has to succeed."""
        answer = self.ask("POST", path, **form)
        assert answer.status == 200, answer
        return answer.json

    def get(self, path: str) -> Any:
        """The JSON of a GET that has to succeed."""
        answer = self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.json


class Listener:
    """A client of /events on a connection of its own."""

    def __init__(self, port: int, last_event_id: str = "") -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self.connection.request("GET", "/events", headers={"Last-Event-ID": last_event_id} if last_event_id else {})
        self.answer = self.connection.getresponse()
        assert self.answer.headers["Content-Type"].startswith("text/event-stream")
        self.last_event_id = last_event_id
        self.read_event()  # the greeting: from here on nothing is missed

    def read_event(self) -> dict[str, str]:
        """The fields of the next event."""
        fields: dict[str, str] = {}
        while line := self.answer.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            fields[name] = value
        self.last_event_id = fields.get("id", self.last_event_id)
        return fields

    def read_texts(self, number: int) -> list[str]:
        """The texts of the next messages."""
        texts: list[str] = []
        while len(texts) < number:
            fields = self.read_event()
            assert fields.get("event") != "reset"
            if "data" in fields:
                texts.append(json.loads(fields["data"])["text"])
        return texts

    def close(self) -> None:
        """Go away."""
        self.connection.close()
        self.answer.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[Cluster]:
    """One cluster of four with a private Redis."""
    find_redis_server()
    cluster = Cluster("demo_app", "-w", str(WORKERS), env=ENVIRONMENT)
    try:
        yield cluster.start()
        assert cluster.stop() == 0, cluster.output()
    finally:
        cluster.close()


@pytest.fixture
def client(demo: Cluster) -> Client:
    """A new visitor."""
    return Client(demo.port)


def test_whoami_names_slot_and_process(demo: Cluster, client: Client) -> None:
    """What the route says is what the status says."""
    said = {(answer["worker"], answer["pid"]) for answer in (client.get("/whoami") for _ in range(2 * WORKERS))}
    assert said == {(worker["slot"], worker["pid"]) for worker in demo.workers()}


def test_a_session_counts_over_all_workers(client: Client) -> None:
    """40 clicks on new connections with one jar: the counts are 1 to 40, and every worker answered ten of them."""
    answers = [client.post("/counter") for _ in range(40)]
    assert [answer["count"] for answer in answers] == list(range(1, 41))
    assert Counter(answer["worker"] for answer in answers) == dict.fromkeys(range(WORKERS), 10)


def test_forty_visitors_at_once_each_keep_their_count(demo: Cluster) -> None:
    """400 clicks, 40 jars in parallel: each jar ends at its own number of clicks."""
    port = demo.port

    def click(number: int) -> int:
        visitor = Client(port)
        return [int(visitor.post("/counter")["count"]) for _ in range(number)][-1]

    numbers = [8 + i % 5 for i in range(40)]
    assert sum(numbers) == 400
    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(click, numbers)) == numbers


def test_login_and_logout_leave_no_way_back(demo: Cluster, client: Client) -> None:
    """After the login the old cookie is nobody's, after the logout the new one is; on every worker."""
    client.post("/counter")
    before = client.cookie
    assert client.post("/login", user="ada") | {"worker": 0} == {"user": "ada", "count": 1, "worker": 0}
    during = client.cookie
    assert client.get("/me")["user"] == "ada"
    assert client.post("/logout")["user"] is None
    for cookie in (before, during):
        for _ in range(WORKERS):
            visitor = Client(demo.port)
            visitor.cookie = cookie
            answer = visitor.get("/me")
            assert (answer["user"], answer["count"]) == (None, 0)


def test_a_page_that_asks_for_no_session_gets_no_cookie(client: Client) -> None:
    """/whoami and /healthz touch no session: no cookie, and no Redis needed."""
    for path in ("/whoami", "/healthz", "/"):
        assert "set-cookie" not in client.ask("GET", path).headers


def test_the_cached_value_is_computed_once(client: Client, demo: Cluster) -> None:
    """Twenty readers at once, on all workers: one value, computed by one of them."""
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: Client(demo.port).get("/cached"), range(20)))
    assert len({(answer["value"], answer["computed_by"]) for answer in answers}) == 1
    assert re.fullmatch("#[0-9a-f]{6}", answers[0]["value"])
    assert answers[0]["computed_by"] in range(WORKERS)


def test_messages_reach_the_clients_of_all_workers_once_and_in_order(demo: Cluster, client: Client) -> None:
    """Eight streams on four workers; twenty messages, each posted to the next worker."""
    listeners = [Listener(demo.port) for _ in range(2 * WORKERS)]
    texts = [f"message {i}" for i in range(20)]
    posted_by = {client.post("/broadcast", text=text)["worker"] for text in texts}
    assert posted_by == set(range(WORKERS))
    for listener in listeners:
        assert listener.read_texts(20) == texts
        listener.close()


def test_a_stream_that_comes_back_gets_what_it_missed(demo: Cluster, client: Client) -> None:
    """Last-Event-ID, on whichever worker: everything since, once."""
    first = Listener(demo.port)
    client.post("/broadcast", text="heard")
    assert first.read_texts(1) == ["heard"]
    first.close()
    for text in ("missed 1", "missed 2"):
        client.post("/broadcast", text=text)
    second = Listener(demo.port, first.last_event_id)
    client.post("/broadcast", text="heard again")
    assert second.read_texts(3) == ["missed 1", "missed 2", "heard again"]
    second.close()


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/login", {}),
        ("/login", {"user": "  "}),
        ("/login", {"user": "x" * 41}),
        ("/broadcast", {"text": ""}),
        ("/broadcast", {"text": "x" * 501}),
    ],
)
def test_bad_forms_get_400_and_a_reason(client: Client, path: str, form: dict[str, str]) -> None:
    """Missing, empty and too long fields are named."""
    answer = client.ask("POST", path, **form)
    assert answer.status == 400
    assert "characters" in answer.json["error"]


def test_a_worker_finishes_with_its_session_after_the_primary_was_killed(start_cluster: StartCluster) -> None:
    """`kill -9` of the primary: a request half received is answered from the private Redis; then all go."""
    find_redis_server()
    cluster = start_cluster("demo_app", "-w", "2", env=ENVIRONMENT)
    cluster.note_processes()
    visitor = Client(cluster.port)
    visitor.post("/login", user="ada")
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=10) as connection:
        head = f"POST /broadcast HTTP/1.1\r\nHost: x\r\nCookie: {visitor.cookie}\r\nContent-Length: 10\r\n"
        connection.sendall((head + "Content-Type: application/x-www-form-urlencoded\r\n\r\ntext=").encode())
        wait_until(lambda: sum(worker["connections"] for worker in cluster.workers()) == 1, "a worker has it")
        assert cluster.process is not None
        cluster.process.kill()
        cluster.process.wait()
        connection.sendall(b"still")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["user"]) == (200, "ada")
    wait_until(lambda: cluster.left_over() == [], "no process is left")


def test_what_needs_no_redis_works_without_it(start_cluster: StartCluster, own_redis: RedisProcess) -> None:
    """Redis away: health, page and cache go on; sessions and messages say 503 and when to come back."""
    cluster = start_cluster("demo_app", "-w", "2", env=ENVIRONMENT | {"REDIS_URL": own_redis.url})
    visitor = Client(cluster.port)
    visitor.post("/login", user="ada")
    own_redis.kill()
    for path in ("/healthz", "/whoami", "/", "/cached"):
        assert visitor.ask("GET", path).status == 200
    for _ in range(4):
        assert visitor.ask("POST", "/counter").status == 503
    answer = visitor.ask("POST", "/broadcast", text="hello")
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1


def test_without_a_key_of_its_own_the_page_says_so(start_cluster: StartCluster, redis_url: str) -> None:
    """The development key is the same in all workers, and visible as such."""
    cluster = start_cluster("demo_app", "-w", "2", env={"REDIS_URL": redis_url, "SECRET_KEY": ""})
    assert b"Development key" in cluster.get("/").body
    visitor = Client(cluster.port)
    assert [visitor.post("/counter")["count"] for _ in range(4)] == [1, 2, 3, 4]


def test_a_killed_worker_takes_no_session_along(start_cluster: StartCluster) -> None:
    """All workers are killed with -9: their replacements know who is logged in."""
    find_redis_server()
    cluster = start_cluster("demo_app", "-w", "2", env=ENVIRONMENT)
    visitor = Client(cluster.port)
    visitor.post("/login", user="ada")
    for worker in cluster.workers():
        os.kill(worker["pid"], signal.SIGKILL)
    assert visitor.get("/me")["user"] == "ada"
