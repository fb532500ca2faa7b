"""Clients that forgive nothing: each request is answered, or its loss is put on record with what was seen.

They speak on raw sockets, do not look for the server's FIN before they write (as a proxy with a pool does not), and
never try twice.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

numbers = itertools.count(1)


@dataclass
class Account:
    """What became of a client's requests."""

    answered: list[int] = field(default_factory=list)
    """Numbers of the requests that got 200 and all of their body."""
    lost: list[tuple[int, str]] = field(default_factory=list)
    """Numbers of those that did not, and what was seen."""
    refused: int = 0
    closed_by_server: int = 0
    """Keep-alive connections that the server announced to close, or closed."""
    longest: float = 0.0
    """Seconds of the slowest answer."""


class BrokenAnswerError(OSError):
    """The answer is not what was asked for."""


class Client(threading.Thread):
    """One client, a request after another until `over` is set.

    Args:
        address: Host and port, or the path of a unix socket.
        account: What it adds to.
        keep_alive: One connection for all requests, or one each.
        target: The path; `{n}` becomes the request's number.
        body: Sent with POST.
        pause: Seconds between two requests.
        bite: Bytes read at a time, with `chew` seconds in between: a slow reader.
        source: The local address.
        wrap: Makes TLS of the connected socket.
    """

    def __init__(
        self,
        address: tuple[str, int] | str,
        *,
        keep_alive: bool = True,
        target: str = "/?n={n}",
        body: bytes = b"",
        pause: float = 0.002,
        bite: int = 65536,
        chew: float = 0.0,
        source: str = "",
        wrap: Callable[[socket.socket], socket.socket] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.account = Account()
        self.over = threading.Event()
        self._address = address
        self.keep_alive = keep_alive
        self._target = target
        self._body = body
        self._digest = hashlib.sha256(body).hexdigest().encode()
        self._pause = pause
        self._bite = bite
        self._chew = chew
        self._source = source
        self._wrap = wrap
        self._connection: socket.socket | None = None

    def run(self) -> None:
        """Ask until it is over."""
        while not self.over.wait(self._pause):
            self.ask()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def ask(self) -> bytes:
        """One request; its body, b"" if it got none."""
        number = next(numbers)
        start = time.monotonic()
        try:
            if self._connection is None:
                self._connection = self._connect()
        except ConnectionRefusedError:
            self.account.refused += 1
            return b""
        except OSError as error:
            self.account.lost.append((number, f"connecting: {error!r}"))
            return b""
        try:
            head, body = self._exchange(self._connection, number)
        except OSError as error:
            self.account.lost.append((number, repr(error)))
            self.account.closed_by_server += self.keep_alive
            self.hang_up()
            return b""
        self.account.longest = max(self.account.longest, time.monotonic() - start)
        self.account.answered.append(number)
        if b"connection: close" in head.lower():
            self.account.closed_by_server += self.keep_alive
            self.hang_up()
        return body

    def _connect(self) -> socket.socket:
        if isinstance(self._address, str):
            connection = socket.socket(socket.AF_UNIX)
        else:
            connection = socket.socket(socket.AF_INET)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._source:
                connection.bind((self._source, 0))
        connection.settimeout(30)
        try:
            connection.connect(self._address)
            return self._wrap(connection) if self._wrap else connection
        except BaseException:
            connection.close()
            raise

    def _exchange(self, connection: socket.socket, number: int) -> tuple[bytes, bytes]:
        close = "" if self.keep_alive else "Connection: close\r\n"
        method = f"POST {self._target}" if self._body else f"GET {self._target}"
        length = f"Content-Length: {len(self._body)}\r\n" if self._body else ""
        head = f"{method} HTTP/1.1\r\nHost: x\r\n{close}{length}\r\n".replace("{n}", str(number))
        connection.sendall(head.encode() + self._body)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._some(connection, answer)
        fields, _, body = answer.partition(b"\r\n\r\n")
        if not fields.startswith(b"HTTP/1.1 200"):
            raise BrokenAnswerError(f"answered {fields[:60]!r}")
        wanted = int(fields.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        pieces, have = [body], len(body)
        while have < wanted:
            pieces.append(self._some(connection, fields))
            have += len(pieces[-1])
        body = b"".join(pieces)
        if self._body and self._digest not in body:
            raise BrokenAnswerError("the body did not arrive as it was sent")
        return fields, body

    def _some(self, connection: socket.socket, so_far: bytes) -> bytes:
        if self._chew:
            time.sleep(self._chew)
        data = connection.recv(self._bite)
        if not data:
            raise BrokenAnswerError(f"closed after {len(so_far)} bytes of the answer")
        return data


class Crowd:
    """Many clients; a context manager that starts them and ends them."""

    def __init__(self, *clients: Client) -> None:
        self.clients = clients

    def __enter__(self) -> Crowd:
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.over.set()
        for client in self.clients:
            client.join(60)

    @property
    def answered(self) -> int:
        """Requests answered so far."""
        return sum(len(c.account.answered) for c in self.clients)

    @property
    def lost(self) -> list[str]:
        """What was seen of lost requests."""
        return [what for c in self.clients for _, what in c.account.lost]

    @property
    def refused(self) -> int:
        """Connections refused."""
        return sum(c.account.refused for c in self.clients)

    @property
    def closed(self) -> int:
        """Keep-alive connections closed by the server."""
        return sum(c.account.closed_by_server for c in self.clients)

    def all_got(self, more: int) -> Callable[[], bool]:
        """A condition: from now on each client has had so many more answers."""
        before = [len(c.account.answered) for c in self.clients]
        return lambda: all(len(c.account.answered) >= n + more for c, n in zip(self.clients, before, strict=True))


class EventReader(Client):
    """Follows an event stream and comes back when it ends; an end in the middle of an event or a chunk is a loss."""

    def ask(self) -> bytes:
        """One stream, from its beginning to its end."""
        number = next(numbers)
        try:
            connection = self._connect()
        except ConnectionRefusedError:
            self.account.refused += 1
            return b""
        except OSError as error:
            self.account.lost.append((number, f"connecting: {error!r}"))
            return b""
        with connection:
            connection.settimeout(1)
            tail = b""
            try:
                connection.sendall(f"GET {self._target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                while not self.over.is_set():
                    try:
                        data = connection.recv(65536)
                    except TimeoutError:
                        continue
                    if not data:
                        break
                    tail = (tail + data)[-64:]
                    if tail.endswith(b"\r\n0\r\n\r\n"):
                        break
            except OSError as error:
                self.account.lost.append((number, repr(error)))
                return b""
            if self.over.is_set() or tail.endswith(b"\n\n\r\n0\r\n\r\n"):
                self.account.answered.append(number)
            else:
                self.account.lost.append((number, f"the stream ended with {tail[-20:]!r}"))
            return b""


def sixty_four(address: tuple[str, int]) -> list[Client]:
    """The crowd of the reload test: keep-alive, one request per connection, 1 MB uploads, slow readers, streams."""
    upload = bytes(range(256)) * 4096
    return [
        *[Client(address, pause=0.05) for _ in range(24)],
        *[Client(address, keep_alive=False, pause=0.05) for _ in range(16)],
        *[Client(address, target="/upload?n={n}", body=upload, pause=0.5) for _ in range(8)],
        *[Client(address, target="/big/512?n={n}", bite=32768, chew=0.05, pause=0.2) for _ in range(8)],
        *[EventReader(address, target="/events/100000") for _ in range(8)],
    ]
