"""The generator's pure parts: requests, responses, latencies, shares."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.errors import ConfigError
from sharedcluster.load.plan import Histogram, Plan, Tally, Target, share
from sharedcluster.load.report import as_json, notes, report
from sharedcluster.load.response import (
    CHUNKED,
    UNTIL_CLOSE,
    BadResponseError,
    chunked_body,
    chunked_end,
    read_head,
)
from sharedcluster.load.running import Outcome

TARGET = Target.from_url("http://127.0.0.1:8000/x?y=1")


def test_urls() -> None:
    """What is connected to and what is said; a name without a scheme is http."""
    assert Target("127.0.0.1", 8000, "/x?y=1", is_tls=False, authority="127.0.0.1:8000") == TARGET
    assert Target.from_url("https://user:pw@example.org").port == 443
    assert Target.from_url("https://user:pw@example.org").authority == "example.org"
    assert Target.from_url("[::1]:81").host == "::1"
    for wrong in ("ftp://x/", "http://", "http://x:99999/", "http://x/a b"):
        with pytest.raises(ConfigError):
            Target.from_url(wrong)


def test_requests() -> None:
    """Method, fields, cookies, a body and its length; what is given is not said twice."""
    plan = Plan(TARGET, 1, 0.0, 1, method="POST", body=b"a=1", headers=(("HOST", "other"),), cookies=("k=v",),
                keep_alive=False)  # fmt: skip
    lines = plan.head({"session": "s"}).decode().split("\r\n")
    assert lines[0] == "POST /x?y=1 HTTP/1.1"
    assert "HOST: other" in lines
    assert not any(line.startswith("Host:") for line in lines)
    assert "Cookie: k=v; session=s" in lines
    assert "Content-Length: 3" in lines
    assert "Connection: close" in lines
    assert lines[-2:] == ["", ""]


@pytest.mark.parametrize(
    ("head", "method", "length", "keeps_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5", "GET", 5, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length:5\r\nConnection: close", "GET", 5, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5", "GET", 5, False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", "GET", CHUNKED, True),
        (b"HTTP/1.1 200 OK", "GET", UNTIL_CLOSE, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5", "HEAD", 0, True),
        (b"HTTP/1.1 304 Not Modified", "GET", 0, True),
    ],
)
def test_where_a_response_ends(head: bytes, method: str, length: int, keeps_alive: bool) -> None:
    """RFC 9112, section 6.3, as far as a client of GET and POST needs it."""
    read = read_head(head, method)
    assert (read.length, read.keeps_alive) == (length, keeps_alive)


def test_fields_that_matter() -> None:
    """The worker's name and the cookies."""
    read = read_head(b"HTTP/1.1 200 OK\r\nX-Worker: 3\r\nSet-Cookie: a=b; Path=/\r\nSet-Cookie: c=d=e", "GET")
    assert read.worker == "3"
    assert read.cookies == (("a", "b"), ("c", "d=e"))
    for wrong in (b"SSH-2.0-x", b"HTTP/1.1 xx", b"HTTP/1.1 200 OK\r\nContent-Length: x"):
        with pytest.raises(BadResponseError):
            read_head(wrong, "GET")


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.integers(0, 400))
def test_chunks_end_where_they_end(chunks: list[bytes], cut: int) -> None:
    """Every beginning of a chunked body is incomplete, the whole is complete and gives the content back."""
    whole = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    assert chunked_end(whole, 0) == len(whole)
    assert chunked_body(whole, 0) == b"".join(chunks)
    if cut < len(whole):
        assert chunked_end(whole[:cut], 0) == -1


@given(st.lists(st.floats(1e-5, 30.0), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_within_a_percent(seconds: list[float], part: float) -> None:
    """Against sorting; the highest is exact."""
    histogram = Histogram()
    for each in seconds:
        histogram.add(each)
    exact = sorted(seconds)[max(0, math.ceil(part * len(seconds)) - 1)] * 1000
    assert histogram.percentile(part) == pytest.approx(exact, rel=0.011)
    assert histogram.highest == max(seconds) * 1e6


@given(st.integers(1, 9), st.integers(1, 100), st.integers(0, 1000))
def test_the_shares_are_the_whole(processes: int, clients: int, requests: int) -> None:
    """Nothing is sent twice and nothing is left out, however it divides."""
    plan = Plan(TARGET, requests, 0.0, clients, processes=processes)
    shares = [share(plan, index) for index in range(processes)]
    assert sum(c for c, _ in shares) == clients
    assert sum(n for _, n in shares) == requests


def tally(**changes: object) -> Tally:
    """What 100 answers look like."""
    made = Tally(sent=100, answered=100, seconds=1.0, cpu=[0.5], connections=4)
    made.workers.update({"0": 49, "1": 51})
    made.statuses.update({200: 100})
    for _ in range(100):
        made.latency.add(0.01)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_tally_crosses_the_pipe_and_merges() -> None:
    """As JSON and back, and two of them added."""
    one = Tally.from_json(json.loads(json.dumps(tally().to_json())))
    assert one.to_json() == tally().to_json()
    one.merge(tally(seconds=2.0, cpu=[0.7]))
    assert (one.answered, one.seconds, one.cpu) == (200, 2.0, [0.5, 0.7])
    assert one.workers == {"0": 98, "1": 102}
    assert one.latency.count == 200


def test_the_report_says_what_it_means() -> None:
    """Labels people can grep, requests by worker, lost sessions, and whether the generator was the limit."""
    plan = Plan(TARGET, 100, 0.0, 4, sessions=True)
    calm = Outcome(plan, tally(increments=100, lost=2), machine_busy=0.5, is_local=True)
    text = report(calm)
    assert "Workers    w0 49  w1 51   spread 4.0%" in text
    assert "Sessions   4 clients, 100 increments, 2 lost" in text
    assert "not the bottleneck" in text
    assert text.isascii()
    busy = Outcome(plan, tally(cpu=[0.97]), machine_busy=1.0, is_local=True)
    assert "THE BOTTLENECK" in report(busy)
    assert as_json(busy)["generator"]["is_bottleneck"] is True
    assert any("the server can do more" in note for note in notes(busy))
    few = Outcome(Plan(TARGET, 100, 0.0, 1), tally(connections=1), machine_busy=0.1, is_local=True)
    assert any("so few clients" in note for note in notes(few))
