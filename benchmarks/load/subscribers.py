"""Subscribe many clients to server-sent events, publish, and see when each event has come to each of them.

`python -m benchmarks.load.subscribers PORT COUNT EVENTS PER_SECOND`: says READY when all are subscribed, waits for a
line, publishes EVENTS events by `POST /publish/<text>` at a fixed rate, and reports what was delivered. An event's
text is the moment it was due, so a publisher that is held up does not hide the delay.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from typing import Final

from benchmarks.load.answers import is_whole, parse_head
from benchmarks.ratios import percentile

EVENT: Final = re.compile(rb"data: ?\"?(\d{6,})\"?\n")
LAST_EVENTS: Final = 10.0
"""Seconds after the last one was published in which an event is late and not lost."""


def main() -> None:
    """Subscribe, publish, count."""
    port, count, events, rate = (int(argument) for argument in sys.argv[1:5])
    epoll = select.epoll()
    waits: list[float] = []
    rests: dict[int, bytes] = {}
    subscribers = [_subscribe(port) for _ in range(count)]
    by_fd = {each.fileno(): each for each in subscribers}
    for fd in by_fd:
        epoll.register(fd, select.EPOLLIN)

    def read(timeout: float) -> None:
        for fd, _mask in epoll.poll(timeout):
            try:
                piece = by_fd[fd].recv(65536)
            except OSError:
                piece = b""
            if not piece:
                epoll.unregister(fd)
                continue
            data = rests.get(fd, b"") + piece
            now = time.perf_counter_ns()
            cut = data.rfind(b"\n") + 1
            waits.extend((now - int(found)) / 1e9 for found in EVENT.findall(data[:cut]))
            rests[fd] = data[cut:]

    read(0.5)  # what a server says first: comments, retry
    print("READY", flush=True)
    sys.stdin.readline()
    publisher = socket.create_connection(("127.0.0.1", port))
    start, cpu = time.perf_counter_ns(), time.process_time()
    for number in range(events):
        due = start + number * 1_000_000_000 // rate
        while (left := (due - time.perf_counter_ns()) / 1e9) > 0:
            read(left)
        _publish(publisher, due)
    end = time.perf_counter() + LAST_EVENTS
    while len(waits) < count * events and time.perf_counter() < end:
        read(0.05)
    waits.sort()
    report = {
        "expected": count * events, "delivered": len(waits), "client_cpu": time.process_time() - cpu,
        "p50": percentile(waits, 0.5) if waits else 0.0, "p99": percentile(waits, 0.99) if waits else 0.0,
    }  # fmt: skip
    print(json.dumps(report), flush=True)


def _subscribe(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")
    connection.setblocking(False)
    return connection


def _publish(connection: socket.socket, due: int) -> None:
    request = f"POST /publish/{due} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
    connection.sendall(request.encode())
    answer = b""
    head = None
    while head is None or not is_whole(answer, head):  # some servers send head and body apart
        piece = connection.recv(65536)
        if not piece:
            raise SystemExit("client: the connection of the publisher was closed")
        answer += piece
        head = head or parse_head(answer)
    if head.status != 200:
        raise SystemExit(f"client: an event was not published: {answer[:120]!r}")


if __name__ == "__main__":
    main()
