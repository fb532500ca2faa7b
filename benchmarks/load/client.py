"""Our own load client, for what wrk cannot do: cookies per client, think time, a rate, and a strict account.

Strict means: what a proxy with a pool of connections does. A client that pauses does not watch its connection; it
writes its next request, and if the server had closed meanwhile that request is counted as `dropped`. Nothing is
retried, and every `Connection: close` is counted.

One thread, epoll, about 20 µs of CPU per request (each result says what it was). Run as a process of its own:
`python -m benchmarks.load.client PLAN`; it says READY, waits for a line, runs, and prints an `Outcome` as JSON.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
import select
import socket
import sys
import time
from collections import deque

from benchmarks.load.answers import Head, is_whole, parse_head
from benchmarks.load.outcome import Outcome
from benchmarks.load.plan import Plan
from benchmarks.ratios import percentile

RECEIVE = 262144


class Client:
    """One client with one connection and its cookies."""

    __slots__ = ("asked_at", "connection", "cookies", "data", "head", "request")

    def __init__(self) -> None:
        self.connection: socket.socket | None = None
        self.cookies: dict[bytes, bytes] = {}
        self.request = b""
        self.data = b""
        self.head: Head | None = None
        self.asked_at = 0.0


class Load:
    """All clients of one plan and what they have seen."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clients = [Client() for _ in range(plan.connections)]
        self.by_fd: dict[int, Client] = {}
        self.epoll = select.epoll()
        self.waits: list[float] = []
        self.failed = self.dropped = self.told_to_close = self.received = 0
        self.due: list[tuple[float, int, Client]] = []  # pausing clients, by when they ask again
        self.overdue: deque[float] = deque()  # requests of a rate that no client was free for
        self.free: deque[Client] = deque()

    # -- before the measurement ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Connect, and log each client in if the plan says so."""
        for client in self.clients:
            if self.plan.login:
                self._log_in(client)
            self._build(client)
            if not self.plan.new_connection:
                self._connect(client)

    def _log_in(self, client: Client) -> None:
        with socket.create_connection(("127.0.0.1", self.plan.port), timeout=10) as connection:
            connection.sendall(
                f"POST {self.plan.login} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode()
            )
            data = b""
            head = None
            while head is None or not is_whole(data, head):
                piece = connection.recv(RECEIVE)
                if not piece:
                    break
                data += piece
                head = head or parse_head(data)
            if head is None or head.status >= 400 or not head.cookies:
                raise SystemExit(f"client: {self.plan.login} gave no session: {data[:300]!r}")
            client.cookies.update(head.cookies)

    def _build(self, client: Client) -> None:
        """The request's bytes, made again only when a cookie changed."""
        plan = self.plan
        lines = [f"{plan.method} {plan.path} HTTP/1.1".encode(), b"Host: 127.0.0.1"]
        lines += [b"Connection: close"] if plan.new_connection else []
        lines += [b"Content-Length: 0"] if plan.method == "POST" else []
        if client.cookies:
            lines.append(b"Cookie: " + b"; ".join(k + b"=" + v for k, v in client.cookies.items()))
        client.request = b"\r\n".join(lines) + b"\r\n\r\n"

    # -- the measurement -------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Load for the plan's seconds."""
        start, cpu = time.perf_counter(), time.process_time()
        end = start + self.plan.seconds
        self._begin(start)
        sent = 0
        while (now := time.perf_counter()) < end:
            if self.plan.rate:
                while sent / self.plan.rate <= now - start:
                    self._ask_at(start + sent / self.plan.rate)
                    sent += 1
                timeout = start + sent / self.plan.rate - now
            else:
                timeout = self._wake(now)
            for fd, _events in self.epoll.poll(max(0.0, min(timeout, end - now))):
                self._readable(self.by_fd[fd])
        seconds = time.perf_counter() - start
        return self._outcome(seconds, time.process_time() - cpu)

    def _begin(self, start: float) -> None:
        if self.plan.rate:
            self.free.extend(self.clients)
        elif self.plan.think:
            for index, client in enumerate(self.clients):
                heapq.heappush(self.due, (start + self.plan.think * index / len(self.clients), index, client))
                self._unwatch(client)
        else:
            for client in self.clients:
                self._ask(client, start)

    def _wake(self, now: float) -> float:
        """Let those ask whose pause is over; seconds until the next one."""
        while self.due and self.due[0][0] <= now:
            self._ask(heapq.heappop(self.due)[2], now)
        return self.due[0][0] - now if self.due else 1.0

    def _ask_at(self, due: float) -> None:
        if self.free:
            self._ask(self.free.popleft(), due)
        else:
            self.overdue.append(due)

    def _ask(self, client: Client, asked_at: float) -> None:
        client.asked_at = asked_at
        client.data = b""
        client.head = None
        if client.connection is None:
            self._connect(client)
        elif self.plan.think:
            self._watch(client)
        assert client.connection is not None
        try:
            client.connection.send(client.request)
        except OSError:
            self._ended(client)

    def _readable(self, client: Client) -> None:
        assert client.connection is not None
        try:
            piece = client.connection.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._ended(client)
            return
        client.data = client.data + piece if client.data else piece
        head = client.head or parse_head(client.data)
        client.head = head
        if head is not None and is_whole(client.data, head):
            self._answered(client, head)

    def _answered(self, client: Client, head: Head) -> None:
        now = time.perf_counter()
        if head.status >= 400:
            self.failed += 1
        else:
            self.waits.append(now - client.asked_at)
        self.received += len(client.data)
        if head.cookies:
            client.cookies.update(head.cookies)
            self._build(client)
        if head.closes:
            self.told_to_close += not self.plan.new_connection
            self._disconnect(client)
        self._next(client, now)

    def _ended(self, client: Client) -> None:
        """The server closed: fine if that is how this answer ends, else a request is lost."""
        head = client.head
        self._disconnect(client)
        if head is not None and head.length < 0 and client.data:
            head.closes = True
            self._answered(client, head)
            return
        self.dropped += 1
        self._next(client, time.perf_counter())

    def _next(self, client: Client, now: float) -> None:
        if self.plan.rate:
            if self.overdue:
                self._ask(client, self.overdue.popleft())
            else:
                self.free.append(client)
        elif self.plan.think:
            pause = self.plan.think * random.uniform(0.5, 1.5)
            heapq.heappush(self.due, (now + pause, id(client), client))
            self._unwatch(client)
        else:
            self._ask(client, now)

    # -- connections -----------------------------------------------------------------------------------------------

    def _connect(self, client: Client) -> None:
        connection = socket.socket()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.perf_counter() + 5
        while True:
            try:
                connection.connect(("127.0.0.1", self.plan.port))
                break
            except OSError:  # restarting, or the backlog is full: a client would try again
                self.failed += 1
                if time.perf_counter() > deadline:
                    raise SystemExit("client: nobody listens any more") from None
                time.sleep(0.01)
        connection.setblocking(False)
        client.connection = connection
        self.by_fd[connection.fileno()] = client
        self.epoll.register(connection.fileno(), select.EPOLLIN)

    def _disconnect(self, client: Client) -> None:
        if client.connection is not None:
            self._unwatch(client)
            client.connection.close()
            client.connection = None

    def _watch(self, client: Client) -> None:
        assert client.connection is not None
        fd = client.connection.fileno()
        if fd not in self.by_fd:
            self.by_fd[fd] = client
            self.epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, client: Client) -> None:
        if client.connection is not None and client.connection.fileno() in self.by_fd:
            del self.by_fd[client.connection.fileno()]
            self.epoll.unregister(client.connection.fileno())

    def _closed_idle(self) -> int:
        """Connections of pausing clients that the server has closed and that nobody wrote to since."""
        count = 0
        for _, _, client in self.due:
            try:
                if client.connection is not None:
                    count += client.connection.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                continue
            except OSError:
                count += 1
        return count

    def _still_waiting(self) -> list[float]:
        """With a rate: what was due and is not answered yet has waited at least until now."""
        if not self.plan.rate:
            return []
        now = time.perf_counter()
        free = set(map(id, self.free))
        return [now - due for due in self.overdue] + [now - c.asked_at for c in self.clients if id(c) not in free]

    def _outcome(self, seconds: float, cpu: float) -> Outcome:
        answered = len(self.waits)
        waits = sorted(self.waits + self._still_waiting()) or [0.0]
        return Outcome(
            requests=answered, seconds=seconds, failed=self.failed, dropped=self.dropped,
            told_to_close=self.told_to_close, closed_idle=self._closed_idle(), p50=percentile(waits, 0.5),
            p99=percentile(waits, 0.99), highest=waits[-1], client_cpu=cpu, received=self.received,
        )  # fmt: skip


def main() -> None:
    """Prepare, wait for the word, run, report."""
    load = Load(Plan.loads(sys.argv[1]))
    load.prepare()
    print("READY", flush=True)
    sys.stdin.readline()
    print(json.dumps(dataclasses.asdict(load.run())), flush=True)


if __name__ == "__main__":
    main()
