"""Fuzzing the whole engine: mutated conversations over real sockets, with h11 as the judge of every one.

Run alone for longer, with coverage guidance if atheris is installed, or with a seed:

    python -m tests.slow.test_http_fuzz [SECONDS] [SEED]
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent.socket
import h11
import pytest

from sharedcluster.http.server import Server
from sharedcluster.http.settings import HttpSettings, ListenerFacts

SECONDS = 40.0
SEEDS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /a?b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX-A: b\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\nX_Y: z\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n",
    b"GET http://a/b HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n",
]
TOKENS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b"\x00",
        b"\x0b",
        b"\x7f",
        b"\xa0",
        b"\xff",
        b":",
        b",",
        b";",
        b"=",
    ),
    *(
        b'"',
        b"0",
        b"5",
        b"+",
        b"-",
        b"_",
        b"0x",
        b"chunked",
        b"gzip",
        b"close",
        b"keep-alive",
        b"%00",
        b"*",
        b"#",
        b"\r\n ",
    ),
    *(
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"Content-Length: ",
        b"Transfer-Encoding: ",
        b"Connection: ",
        b"Host: a\r\n",
    ),
    *(
        b"Expect: 100-continue\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"0\r\n\r\n",
        b"ffffffffffffffff",
        b"A" * 300,
    ),
]


def mutate(rng: random.Random) -> bytes:
    """A conversation: one to three messages, damaged in up to six places."""
    data = bytearray(b"".join(rng.choice(SEEDS) for _ in range(rng.randint(1, 3))))
    for _ in range(rng.randint(0, 6)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[place:place] = rng.choice(TOKENS)
        elif kind == 2:
            del data[place : place + rng.randint(1, 8)]
        elif kind == 3:
            end = place + rng.randint(1, 30)
            data[place:place] = data[place:end]
        elif kind == 4:
            data[place : place + rng.randint(1, 4)] = rng.choice(TOKENS)
        else:
            other = rng.randrange(len(data) + 1)
            data[place:place] = data[other : other + rng.randint(1, 40)]
    return bytes(data)


def application(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
    """Says what it was asked, so that the judge can compare."""
    body = environ["wsgi.input"].read()
    start("200 OK", [("Content-Type", "text/plain")])
    return [repr((environ["REQUEST_METHOD"], environ["RAW_URI"], body)).encode("latin-1")]


class Harness:
    """An engine in this process, and a judge."""

    def __init__(self) -> None:
        self.server = Server(application, HttpSettings())
        self.server.add_listener(0, ListenerFacts("127.0.0.1", 80))
        self.bugs: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.bugs.append(handler.format(record))  # type: ignore[method-assign]
        logging.getLogger("sharedcluster.http").addHandler(handler)
        logging.getLogger("sharedcluster.http").setLevel(logging.WARNING)
        self.executions = 0
        self.served = 0

    def converse(self, pieces: Iterable[bytes]) -> bytes:
        """Send the pieces one after the other, then the end; returns all that was answered."""
        ours, theirs = gevent.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # one send is one read
        self.server.loop.run_callback(self.server.serve, theirs.detach(), 0, ("192.0.2.1", 1), None)
        answer = b""
        with contextlib.suppress(OSError):
            for piece in pieces:
                ours.send(piece)
            ours.shutdown(socket.SHUT_WR)
        with contextlib.closing(ours), contextlib.suppress(ConnectionResetError):
            ours.settimeout(5)
            while data := ours.recv(65536):
                answer += data
        return answer

    def run(self, data: bytes, cuts: list[int]) -> None:
        """One execution: the invariants of the engine must hold, and h11 must agree with what was served."""
        places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        answer = self.converse([data[start:end] for start, end in itertools.pairwise(places)])
        self.executions += 1
        assert not self.bugs, (data, self.bugs)
        served = read_responses(answer, data)
        self.served += len(served)
        expected = judge(data, len(served))
        assert served == expected[: len(served)], (data, served, expected)


def read_responses(answer: bytes, data: bytes) -> list[str]:
    """The bodies of the 200s; after anything else nothing may follow."""
    found: list[str] = []
    while answer:
        match = re.match(rb"HTTP/1\.1 (\d\d\d) [^\r\n]*\r\n(?:[^\r\n:]+: [^\r\n]*\r\n)*\r\n", answer)
        assert match is not None, (data, answer)
        head, answer = answer[: match.end()], answer[match.end() :]
        if match[1] == b"100":
            continue
        length = re.search(rb"\r\nContent-Length: (\d+)\r\n", head)
        assert length is not None, (data, head)
        if answer and not answer.startswith(b"HTTP/1.1 "):
            body, answer = answer[: int(length[1])], answer[int(length[1]) :]
            assert len(body) == int(length[1]), (data, answer)
        else:
            body = b"('HEAD'"
        if match[1] == b"200":
            found.append(body.decode("latin-1"))
        if b"\r\nConnection: close\r\n" in head:
            assert not answer, (data, answer)
    return found


def judge(data: bytes, at_most: int) -> list[str]:
    """What h11 would have handed to an application."""
    found: list[str] = []
    while data and len(found) < at_most:
        data = data.removeprefix(b"\r\n")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data)
        body = b""
        request: h11.Request | None = None
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    return found
        except h11.RemoteProtocolError:
            return found
        if request is None:
            return found
        if request.method == b"HEAD":
            found.append("('HEAD'")
        else:
            found.append(repr((request.method.decode(), request.target.decode(), body)))
        data = connection.trailing_data[0]
    return found


@pytest.mark.timeout(SECONDS * 3)
def test_fuzz() -> None:
    """Whatever arrives: no bug of ours, no response that is none, no request served that h11 does not see too."""
    seed = time.time_ns()
    harness = fuzz(SECONDS, seed)
    print(f"\nseed {seed}: {harness.executions} executions, {harness.served} requests served, no failure")
    assert harness.executions > 1000
    assert harness.served > 100


def fuzz(seconds: float, seed: int) -> Harness:
    """Run mutated conversations for some seconds."""
    harness = Harness()
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(100):
            harness.run(mutate(rng), [rng.randrange(500) for _ in range(rng.randint(0, 3))])
    return harness


def fuzz_guided(seconds: float) -> None:
    """The same target under atheris (libFuzzer with Python coverage)."""
    import atheris

    atheris.instrument_all()
    harness = Harness()
    corpus = tempfile.mkdtemp()
    for number, seed in enumerate(SEEDS):
        Path(corpus, str(number)).write_bytes(b"\x00\x00" + seed)

    def target(data: bytes) -> None:
        cut, data = data[:2], data[2:]
        harness.run(data, [byte * 3 for byte in cut])

    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}", "-max_len=1000", corpus], target)
    atheris.Fuzz()


if __name__ == "__main__":
    duration = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    if len(sys.argv) > 2 and sys.argv[2] == "guided":
        fuzz_guided(duration)
    else:
        result = fuzz(duration, int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns())
        print(f"{result.executions} executions, {result.served} requests served")
