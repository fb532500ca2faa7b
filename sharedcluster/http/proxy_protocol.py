"""The PROXY protocol, versions 1 and 2: who connected to the proxy, said once, before anything else.

It is read only from allowed peers, only where it is switched on, and then it must be there: were it optional, a client
that reaches the port directly could say whom it pretends to be. It is looked for at the first byte of the connection
and nowhere else (Puma #3944 found one in the middle of a body).
"""

from __future__ import annotations

import ipaddress
import re
import struct
import time
from typing import TYPE_CHECKING, Any

from sharedcluster.errors import Bug
from sharedcluster.http import policy
from sharedcluster.http.forwarded import parse_address
from sharedcluster.http.policy import Refused
from sharedcluster.http.settings import Proxied, ReleasedConnection
from sharedcluster.http.transport import NEVER, READ, os_close, os_read

if TYPE_CHECKING:
    from sharedcluster.http.server import Server

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LIMIT_V1 = 107
LIMIT_V2 = 4096
LINE = re.compile(rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) ([0-9]{1,5}) ([0-9]{1,5})\r\n")


def read_proxy_head(data: bytes) -> tuple[Proxied, int] | None:
    """Read a PROXY head at the start of `data`.

    Returns:
        What it says and how many bytes it takes; None if more bytes are needed.

    Raises:
        Refused: There is none, or it is malformed.
    """
    if data[:12] == SIGNATURE[: len(data)]:
        return _read_v2(data)
    if data[:6] == b"PROXY "[: len(data)]:
        return _read_v1(data)
    raise Refused(policy.PROXY_HEAD_BAD, "no PROXY head")


def _read_v1(data: bytes) -> tuple[Proxied, int] | None:
    end = data.find(b"\n", 0, LIMIT_V1) + 1
    if not end:
        if len(data) >= LIMIT_V1:
            raise Refused(policy.PROXY_HEAD_BAD, "line beyond 107 bytes")
        return None
    line = data[:end]
    if line.startswith(b"PROXY UNKNOWN") and line.endswith(b"\r\n") and line[13:14] in (b"\r", b" "):
        return Proxied(None), end
    match = LINE.fullmatch(line)
    if match is None:
        raise Refused(policy.PROXY_HEAD_BAD, "line")
    address, port = match[2].decode(), int(match[4])
    version = 4 if match[1] == b"TCP4" else 6
    for text in (address, match[3].decode()):
        parsed = parse_address(text)
        if parsed is None or parsed.version != version:
            raise Refused(policy.PROXY_HEAD_BAD, f"address {text}")
    if port > 65535 or int(match[5]) > 65535:
        raise Refused(policy.PROXY_HEAD_BAD, "port")
    return Proxied((address, port)), end


def _read_v2(data: bytes) -> tuple[Proxied, int] | None:
    if len(data) < 16:
        return None
    version_command, family, length = struct.unpack_from("!BBH", data, 12)
    if version_command >> 4 != 2 or version_command & 15 > 1 or length > LIMIT_V2:
        raise Refused(policy.PROXY_HEAD_BAD, "version, command or length")
    end = 16 + length
    if len(data) < end:
        return None
    if version_command & 15 == 0 or family in (0x00, 0x31, 0x32):  # LOCAL, UNSPEC, unix sockets
        return Proxied(None), end
    size = {0x11: 4, 0x21: 16}.get(family)
    if size is None or length < 2 * size + 4:
        raise Refused(policy.PROXY_HEAD_BAD, "family or addresses")
    packed = data[16 : 16 + size]
    address = ipaddress.ip_address(packed)
    (port,) = struct.unpack_from("!H", data, 16 + 2 * size)
    return Proxied((str(address), port)), end


class Greeting:
    """A connection whose PROXY head is being read; it becomes a connection of the server with the last byte of that.

    Args:
        server: Whose connection it will be.
        fd: Owned by this object until then.
        index: Of its listener.
        peer: The proxy.
    """

    def __init__(self, server: Server, fd: int, index: int, peer: tuple[str, int] | None) -> None:
        self.expiry = time.monotonic() + (server.settings.head_timeout or NEVER)
        self.slot = -1
        self.is_releasable = False
        self._server = server
        self._fd = fd
        self._index = index
        self._peer = peer
        self._data = b""
        self._watcher: Any = server.loop.io(fd, 1)

    def open(self) -> None:
        """Begin to read."""
        self._server.wheel.add(self)
        self._watcher.start(self._on_readable)
        self._on_readable()

    def _on_readable(self) -> None:
        try:
            data = os_read(self._fd, READ)
            self._data += data
            found = read_proxy_head(self._data) if data else None
        except BlockingIOError:
            return
        except (OSError, Refused):
            self.cut()
            return
        if not data:
            self.cut()
        elif found is not None:
            proxied, end = found
            self._leave()
            self._server.begin(self._fd, self._index, self._peer, proxied, self._data[end:])

    def _leave(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self._server.forget(self)

    def cut(self) -> None:
        """Close. A peer that does not speak the protocol would not understand an answer either."""
        self._leave()
        os_close(self._fd)

    def expire(self, now: float) -> None:
        """The head did not come in time."""
        self.cut()

    def hurry(self) -> None:
        """The worker drains: a proxy that has just connected is about to speak; head_timeout bounds it."""

    def release(self) -> ReleasedConnection:
        """Never called: a connection that has not been greeted is not idle."""
        raise Bug("a greeting was released")
