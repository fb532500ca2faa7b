"""One connection to Redis: where it is, how a command is written, how a reply is read.

Whose turn it is, what is tried again and what a failure means is decided by those who use it (`connection`, for all
commands of a worker; `subscriber`, for what is published).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
import redis
from redis.sentinel import Sentinel

from sharedcluster.errors import ConfigError
from sharedcluster.state.runtime import THREADS, Runtime
from sharedcluster.state.settings import StateSettings

Argument = str | bytes | int | float
Command = tuple[Argument, ...]


class _Lengths(dict[int, bytes]):
    """How an argument of each length begins. Formatting bytes is slow, and most arguments are short."""

    def __missing__(self, size: int) -> bytes:
        return b"$%d\r\n" % size


_LENGTHS = _Lengths((size, b"$%d\r\n" % size) for size in range(256))


class ReplyError(Exception):
    """Redis refused one command; `code` is the first word of what it said."""

    @property
    def code(self) -> str:
        """The error's kind: WRONGTYPE, NOSCRIPT, READONLY..."""
        return str(self).partition(" ")[0]


def pack(command: Command) -> bytes:
    """A command as it goes over the wire."""
    data: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # declared as a tuple of one
    return data


def pack_argument(value: bytes) -> bytes:
    """One argument as it stands in a command."""
    return b"%b%b\r\n" % (_LENGTHS[len(value)], value)


class Form:
    """Arguments of which only some differ from time to time: all between those is packed once.

    hiredis takes 2,000 instructions for an argument, and half of those of a session write never change.
    """

    def __init__(self, arguments: Sequence[bytes | None]) -> None:
        """None stands for an argument that differs."""
        self.count = len(arguments)
        self._pieces: list[bytes] = []
        text = b""
        for argument in arguments:
            if argument is None:
                self._pieces += (text, b"", b"")
                text = b"\r\n"
            else:
                text += pack_argument(argument)
        self._pieces.append(text)

    def fill(self, values: Sequence[bytes]) -> bytes:
        """The arguments as they go over the wire, with these in the place of the Nones.

        Raises:
            ValueError: They are not as many.
        """
        pieces = self._pieces.copy()  # text, length, value; text, length, value; ... text
        pieces[1::3] = [_LENGTHS[len(value)] for value in values]
        pieces[2::3] = values
        return b"".join(pieces)


class Address:
    """Where Redis is, read from a URL: redis://, rediss://, unix://, redis+sentinel://host,host/service/db.

    Raises:
        ConfigError: The URL cannot be understood.
    """

    def __init__(self, url: str, settings: StateSettings) -> None:
        self.url = url
        self._sentinel: Sentinel | None = None
        self._service = ""
        options: dict[str, Any] = {
            "protocol": 2,
            "socket_connect_timeout": settings.connect_timeout,
            "socket_timeout": settings.socket_timeout,
            "socket_keepalive": True,
        }
        # Without this redis-py sends CLIENT SETINFO twice, each with a round trip, on every connect.
        options |= {"driver_info": None} if int(redis.__version__.split(".")[0]) >= 8 else {"lib_name": None}
        try:
            if url.startswith("redis+sentinel://"):
                url = self._set_up_sentinel(url, options)
            pool = redis.ConnectionPool.from_url(url)
        except ValueError as error:
            raise ConfigError(
                f"The Redis URL {self.public} cannot be understood.",
                fact=str(error),
                advice="Use redis://host:6379/0, rediss://..., unix:///path?db=0 or redis+sentinel://h1,h2/service/0",
            ) from None
        self._class = pool.connection_class
        # What the URL says wins: ?socket_timeout=2 is how an operator asks for patience.
        self._options = options | pool.connection_kwargs
        if self._class is redis.UnixDomainSocketConnection:
            self._options.pop("socket_keepalive", None)

    def _set_up_sentinel(self, url: str, options: dict[str, Any]) -> str:
        """Read redis+sentinel://[user:password@]host[:port],host[:port]/service[/db] and ask those for the master."""
        rest = url.removeprefix("redis+sentinel://")
        login, _, rest = rest.rpartition("@")
        hosts, _, path = rest.partition("/")
        self._service, _, db = path.partition("/")
        if not self._service:
            raise ValueError("the sentinel URL names no service: redis+sentinel://host:26379/SERVICE/0")
        pairs = [(h.partition(":")[0], int(h.partition(":")[2] or 26379)) for h in hosts.split(",")]
        self._sentinel = Sentinel(  # type: ignore[no-untyped-call]
            pairs, sentinel_kwargs=dict(options), **options
        )
        return f"redis://{login + '@' if login else ''}localhost/{db or 0}"

    @property
    def public(self) -> str:
        """The URL without a password, fit for logs and status."""
        scheme, separator, rest = self.url.partition("://")
        login, at, place = rest.rpartition("@")
        user, colon, _ = login.partition(":")
        place = place.partition("?")[0] + ("?..." if "password" in place else place[len(place.partition("?")[0]) :])
        return f"{scheme}{separator}{user}{':***' if colon else ''}{at}{place}"

    def connect(self) -> redis.Connection:
        """A connected and authenticated redis-py connection."""
        options = dict(self._options)
        if self._sentinel is not None:
            options["host"], options["port"] = self._sentinel.discover_master(  # type: ignore[no-untyped-call]
                self._service
            )
        connection: redis.Connection = self._class(**options)
        connection.connect()  # type: ignore[no-untyped-call]
        return connection


class Wire:
    """One connection: packed commands out, replies in.

    redis-py connects, authenticates, speaks TLS and selects the database; from then on the socket and a hiredis reader
    are used directly, because `Connection.read_response` costs more than the parsing it wraps.
    One caller may send while another one reads; two may not do the same.
    """

    def __init__(self, address: Address, runtime: Runtime = THREADS) -> None:
        self._connection = address.connect()
        self._socket: socket.socket = self._connection._sock  # type: ignore[assignment]  # connected: it has one
        self._line = runtime.make_line(self._socket)
        self._reader = hiredis.Reader(replyError=ReplyError, notEnoughData=Wire)
        self.read_waiting: Callable[[], Any] = self._reader.gets
        """The next reply of those that have arrived with an earlier one, without asking the socket; else `Wire`."""
        self._buffer = bytearray(65536)
        self._view = memoryview(self._buffer)

    def send(self, data: bytes) -> None:
        """Write all of it or raise."""
        self._line.send(data)

    def settimeout(self, timeout: float) -> None:
        """How long one read may wait; `TimeoutError` after that."""
        self._line.settimeout(timeout)

    def read(self) -> Any:
        """The next reply; an error reply is returned, not raised."""
        while (reply := self.read_waiting()) is Wire:
            count = self._line.recv_into(self._buffer)
            if not count:
                raise ConnectionResetError("Redis closed the connection")
            self._reader.feed(self._buffer, 0, count)  # type: ignore[arg-type]  # any buffer will do
        return reply

    def is_stale(self) -> bool:
        """True if the other side has closed it, or has sent what nobody asked for."""
        timeout = self._socket.gettimeout()
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except ValueError:  # TLS sockets take no flags: a dead one is found by writing
            return False
        except OSError:
            return True
        finally:
            self._socket.settimeout(timeout)
        return True

    def close(self) -> None:
        """Close it, whoever waits on it."""
        self._line.stop()
        self._connection.disconnect()  # type: ignore[no-untyped-call]
