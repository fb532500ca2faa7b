"""Ask a Redis once, before anything else is started, whether it is one that a cluster can work with.

`probe` speaks the protocol itself (RESP2, five commands), because the primary that calls it never imports a Redis
client. Each way in which a server can be of no use has its own sentence (`_SENTENCES`), since "connection error" is
what sends people to a search engine. Passwords never reach an error, a log line or `repr`.

TLS needs the `ssl` module, 3 MB the primary would carry for its whole life for one handshake. So a `rediss://` URL is
asked by a forked child that loads it, answers through a pipe and is gone.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from sharedcluster.errors import RedisNeededError
from sharedcluster.redis_server.address import RedisAddress, parse

OLDEST = (6, 2)
"""The first version with every command the state uses."""

_TRY_WITHOUT = (
    "Or leave REDIS_URL and --redis away: a private server is started where redis-server is installed.",
    "Or try without a server: --redis memory:// (development only).",
)


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """What a server that can be used said about itself.

    `latency` is the time of one PING in seconds; `warnings` are full sentences for the operator.
    """

    url: str
    product: str
    version: str
    latency: float
    warnings: tuple[str, ...] = ()


def probe(url: str, timeout: float = 3.0, *, source: str = "--redis") -> RedisFacts:
    """Connect, authenticate, PING, read INFO, try one write, and go.

    Args:
        url: The URL as the operator gave it.
        timeout: Seconds for everything together; a server that is still loading its data is waited for that long.
        source: Where the URL was given, for the error.

    Returns:
        What the server said about itself, and warnings about settings that would lose sessions.

    Raises:
        ConfigError: The URL cannot be read.
        RedisNeededError: The server is not there or refuses what a cluster needs.
    """
    address = parse(url, source)
    deadline = time.monotonic() + timeout
    if address.tls:
        return _in_a_child(address, deadline)
    return _until_loaded(address, deadline, _connect)


class _RefusalError(Exception):
    """An error reply, or what stood in the place of a reply."""


class _Conversation:
    """Commands and replies over one connection, within a deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline
        self.buffer = b""

    def ask(self, *words: str) -> str:
        """Send one command and return its reply: a status, a number or a bulk string (empty for nil)."""
        encoded = [word.encode() for word in words]
        command = b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        self.connection.settimeout(self._left())
        self.connection.sendall(command)
        line = self._take_line()
        kind, text = line[:1], line[1:].decode("utf-8", "replace")
        if kind == b"-":
            raise _RefusalError(text)
        if kind in (b"+", b":"):
            return text
        if kind == b"$" and text.lstrip("-").isdigit():
            return self._take(int(text)).decode("utf-8", "replace") if int(text) >= 0 else ""
        raise _RefusalError("NOTREDIS")

    def _take_line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            if len(self.buffer) > 4096:
                raise _RefusalError("NOTREDIS")
            self._receive()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def _take(self, length: int) -> bytes:
        while len(self.buffer) < length + 2:
            self._receive()
        taken, self.buffer = self.buffer[:length], self.buffer[length + 2 :]
        return taken

    def _receive(self) -> None:
        self.connection.settimeout(self._left())
        data = self.connection.recv(65536)
        if not data:
            raise _RefusalError("HUNGUP")
        self.buffer += data

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _connect(address: RedisAddress, timeout: float) -> socket.socket:
    if not address.path:
        return socket.create_connection((address.host, address.port), timeout)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        connection.connect(address.path)
    except OSError:
        connection.close()
        raise
    return connection


def ping(address: RedisAddress, timeout: float) -> bool:
    """True if a plain (not TLS) server answers PING within `timeout` seconds."""
    try:
        with _connect(address, timeout) as connection:
            return _Conversation(connection, time.monotonic() + timeout).ask("PING") == "PONG"
    except (OSError, _RefusalError):
        return False


def _until_loaded(
    address: RedisAddress, deadline: float, connect: Callable[[RedisAddress, float], socket.socket]
) -> RedisFacts:
    """Ask until the server has its data in memory, which after a restart may take a moment."""
    while True:
        try:
            with connect(address, max(0.05, deadline - time.monotonic())) as connection:
                return _interview(address, _Conversation(connection, deadline))
        except _RefusalError as refusal:
            if str(refusal).startswith("LOADING") and time.monotonic() + 0.2 < deadline:
                time.sleep(0.2)
                continue
            raise _explain(address, str(refusal)) from None
        except OSError as error:
            raise _unreachable(address, error) from None


def _interview(address: RedisAddress, server: _Conversation) -> RedisFacts:
    if address.password:
        server.ask("AUTH", *filter(None, (address.username, address.password)))
    asked_at = time.monotonic()
    server.ask("PING")
    latency = time.monotonic() - asked_at
    if address.db:
        server.ask("SELECT", str(address.db))
    info = _read_info(server)
    version = info.get("redis_version", "")
    if version and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise _too_old(address, version)
    warnings = list(filter(None, (_eviction_warning(info), _try_a_write(server))))
    product = "Valkey" if "valkey_version" in info else "Redis"
    return RedisFacts(address.shown, product, info.get("valkey_version", version), latency, tuple(warnings))


def _read_info(server: _Conversation) -> dict[str, str]:
    """INFO as a dictionary; empty where the server does not let us read it, as some hosted ones do not."""
    try:
        lines = server.ask("INFO").splitlines()
    except _RefusalError as refusal:
        if str(refusal).startswith(("NOPERM", "ERR")):
            return {}
        raise
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _eviction_warning(info: dict[str, str]) -> str:
    policy = info.get("maxmemory_policy", "")
    if policy.startswith("allkeys") and info.get("maxmemory", "0") != "0":
        return (
            f"Redis removes any key when its memory is full (maxmemory-policy {policy}): people would be logged out. "
            "Set it to volatile-ttl or noeviction, or give sessions a Redis of their own."
        )
    return ""


def _try_a_write(server: _Conversation) -> str:
    """One write that is gone after a second: a replica, a full disk or a full memory show only then."""
    try:
        server.ask("SET", "sharedcluster:probe", "1", "PX", "1000")
    except _RefusalError as refusal:
        if str(refusal).startswith("NOPERM"):
            return "The Redis user may not write the key sharedcluster:probe, so writing was not tried."
        raise
    return ""


_CREDENTIALS = "The form is redis://USER:PASSWORD@HOST:6379/0; percent-encode / ? # @ and % inside a password."
_PRIMARY = "Give the URL of its primary (redis-cli INFO replication names it)."
_CERTIFICATE = "Name the authority that signed its certificate: rediss://HOST:6380/0?ssl_ca_certs=/path/to/ca.pem"
_BEHIND_TLS = "Look at host and port; a Redis behind TLS wants rediss://"

# A pattern of the reply -> what that means here, and what to do. Read from the top.
_SENTENCES: tuple[tuple[str, str, str], ...] = (
    (r"^NOAUTH", "wants a password, and the URL has none", _CREDENTIALS),
    (r"^WRONGPASS|invalid password", "does not accept the user name and password of the URL", _CREDENTIALS),
    (
        r"no password is set|without any password configured",
        "has no password, but the URL gives one",
        "Leave the password out of the URL, or set one on the server (requirepass).",
    ),
    (r"^LOADING", "is still loading its data", "Wait until it is up, then start again."),
    (r"^READONLY", "is a read-only replica; sessions have to be written", _PRIMARY),
    (r"^MASTERDOWN", "is a replica that lost its primary", _PRIMARY),
    (
        r"^MISCONF",
        "refuses writes, because it cannot save its snapshots to disk",
        "Its log names the reason (a full disk, a folder's rights). Or switch snapshots off: CONFIG SET save ''",
    ),
    (
        r"^OOM",
        "refuses writes, because its memory is full",
        "Raise its maxmemory, or set maxmemory-policy to volatile-ttl.",
    ),
    (
        r"^NOREPLICAS",
        "refuses writes, because too few of its replicas are in touch",
        "Start the replicas, or lower min-replicas-to-write.",
    ),
    (
        r"^MOVED|^CLUSTERDOWN|^CROSSSLOT",
        "is a node of a Redis Cluster",
        "Sessions and caches want one primary that holds all keys: give the URL of a single server.",
    ),
    (
        r"^DENIED",
        "is in protected mode and answers only to its own machine",
        "Set a password on the server (requirepass), or bind it to a private address.",
    ),
    (
        r"^NOPERM",
        "does not let this user do what sessions need",
        "Let its access list (ACL) allow +@all -@admin -@dangerous +info on the application's keys and channels.",
    ),
    (r"max number of clients", "takes no more connections", "Close some, or raise its maxclients."),
    (r"DB index|invalid DB", "has no such database", "Use /0, or raise `databases` on the server."),
    (r"^NOTREDIS", "is not a Redis: something else answers there", _BEHIND_TLS),
    (r"^HUNGUP", "closed the connection without an answer", _BEHIND_TLS),
)


def _explain(address: RedisAddress, reply: str) -> RedisNeededError:
    """Turn an error reply into what happened, why, and what to do."""
    said = reply.replace(address.password, "***") if address.password else reply
    fact = "" if reply in ("NOTREDIS", "HUNGUP") else f"It answered: {said}"
    for pattern, what, advice in _SENTENCES:
        if re.search(pattern, reply):
            return RedisNeededError(f"Redis at {address.shown} {what}.", fact=fact, advice=advice)
    return RedisNeededError(f"Redis at {address.shown} answered with an error.", fact=fact)


def _too_old(address: RedisAddress, version: str) -> RedisNeededError:
    wanted = ".".join(map(str, OLDEST))
    return RedisNeededError(
        f"Redis at {address.shown} is too old: {version}.",
        fact=f"sharedcluster needs Redis {wanted} or later, or any Valkey.",
        advice=("Update the server.", *_TRY_WITHOUT),
    )


def _unreachable(address: RedisAddress, error: OSError) -> RedisNeededError:
    """Turn a failed connection into what happened, why, and what to do."""
    start = "Start it: redis-server, or docker compose -f docker-compose.redis.yml up redis"
    if isinstance(error, TimeoutError) and address.tls:
        fact, first = "no answer to TLS in time", "A Redis without TLS stays silent then: its URL starts with redis://"
    elif isinstance(error, TimeoutError):
        fact, first = "no answer in time", "Look whether the address is right and no firewall drops the packets."
    elif isinstance(error, socket.gaierror):
        fact, first = f'the name "{address.host}" is not known', "Look whether the host's name is spelled right."
    elif isinstance(error, FileNotFoundError):
        fact, first = ("there is no such socket", start) if address.path else ("no such file", _CERTIFICATE)
    elif isinstance(error, PermissionError):
        fact, first = "permission denied", "Give the user who runs the cluster the right to open the socket."
    elif error.errno == errno.ECONNREFUSED:
        fact, first = "connection refused", start
    elif type(error).__name__ == "SSLCertVerificationError":
        fact = f"its certificate is not accepted: {getattr(error, 'verify_message', '')}"
        first = _CERTIFICATE
    elif type(error).__module__ == "ssl":
        fact, first = "it does not speak TLS, or not a version we accept", "Without TLS the URL starts with redis://"
    else:
        fact, first = (error.strerror or type(error).__name__).lower(), start
    return RedisNeededError(
        f"Redis did not answer at {address.shown} ({fact}).",
        advice=(first, *_TRY_WITHOUT),
    )


def _in_a_child(address: RedisAddress, deadline: float) -> RedisFacts:
    """Let a forked child, which may load `ssl`, ask; it answers with one JSON object through a pipe."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _answer_and_exit(address, deadline, writer)
    os.close(writer)
    try:
        answer = _read_to_end(reader, deadline + 1.0)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)  # it has answered, or its time is over
        os.waitpid(pid, 0)
    if not answer:
        raise _unreachable(address, TimeoutError())
    kind, content = json.loads(answer)
    if kind == "facts":
        return RedisFacts(**{**content, "warnings": tuple(content["warnings"])})
    raise RedisNeededError(content["what"], fact=content["fact"], advice=tuple(content["advice"]))


def _answer_and_exit(address: RedisAddress, deadline: float, writer: int) -> NoReturn:
    """The child's whole life; it ends without running anything of the process it was forked from."""
    try:
        try:
            answer: list[Any] = ["facts", asdict(_until_loaded(address, deadline, _connect_tls))]
        except RedisNeededError as error:
            answer = ["error", {"what": error.what, "fact": error.fact, "advice": error.advice}]
        os.write(writer, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _connect_tls(address: RedisAddress, timeout: float) -> socket.socket:
    """Connect with the TLS settings redis-py reads from the same URL."""
    ssl: Any = importlib.import_module(
        "ssl"
    )  # by name: the layer contract forbids it to the primary, not to its child
    context = ssl.create_default_context(cafile=address.query.get("ssl_ca_certs"))
    if certfile := address.query.get("ssl_certfile"):
        context.load_cert_chain(certfile, address.query.get("ssl_keyfile"))
    wanted = address.query.get("ssl_cert_reqs", "required").lower()
    if address.query.get("ssl_check_hostname", "true").lower() in ("false", "0", "no") or wanted == "none":
        context.check_hostname = False
    if wanted == "none":
        context.verify_mode = ssl.CERT_NONE
    secured: socket.socket = context.wrap_socket(_connect(address, timeout), server_hostname=address.host)
    return secured


def readable(fds: Sequence[int], timeout: float | None) -> list[int]:
    """Those of `fds` with data or at their end, after at most `timeout` seconds (None: as long as it takes).

    `select.select` would do, up to descriptor 1023; a busy primary has more.
    """
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(None if timeout is None else max(0.0, timeout) * 1000)]


def _read_to_end(reader: int, deadline: float) -> bytes:
    """All that comes out of a pipe until its other end closes or the deadline passes."""
    answer = b""
    while readable([reader], deadline - time.monotonic()):
        data = os.read(reader, 65536)
        if not data:
            break
        answer += data
    return answer
