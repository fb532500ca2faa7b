"""One listening socket, what waits in the kernel behind it, and its pending queue.

Where workers accept in turns (`turns`) the primary only looks how many wait (`look`); elsewhere, and before the socket
is closed, it accepts them itself into the pending queue.

Laws:

1. A listener is bound before the first worker is forked and stays open until the cluster stops: no reload, crash or
   recycling ever refuses a connection.
2. What was accepted and not yet handed off waits in `pending`, and `pending` is bounded. At the bound the listener
   stops accepting, and the kernel's backlog pushes back on the clients.
3. Out of descriptors (EMFILE, ENFILE) means: stop accepting for a moment. It neither crashes nor spins. Accepting
   stops a little earlier than that, so that connections that come back from workers, operators and new workers still
   find descriptors: a connection given back would else be lost with its descriptor.
4. Everything the kernel has already promised to clients is accepted before the socket is closed, because closing a
   socket with a non-empty backlog resets those connections.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import stat
import struct
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from sharedcluster.cluster.messages import Connection, Peer
from sharedcluster.config import BindAddress
from sharedcluster.errors import BindError, Bug

ACCEPT_BATCH: Final = 64
"""Connections taken per turn of the loop, so that messages of workers are read in between."""
PAUSE_AFTER_EMFILE: Final = 0.25
RESERVE: Final = 64
"""Descriptors that accepting leaves free (a quarter of them all, where there are few)."""
_TCP_INFO: Final = 28
"""Bytes of `struct tcp_info` (linux/tcp.h) up to and with `tcpi_unacked`: of a listening socket it is the number of
connections that wait to be accepted, and the field after it how many may."""
_TRANSIENT: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH})
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """A bound socket in the primary. With `is_lent` another program (systemd, a primary before or after this one) has
    it open too, and it is not ours to end.
    """

    def __init__(
        self, index: int, address: BindAddress, bound: socket.socket, *, limit: int, is_lent: bool = False
    ) -> None:
        bound.setblocking(False)
        self.index = index
        self.socket = bound
        self.address = address
        self.pending: deque[Connection] = deque()
        self.limit = limit
        self.is_lent = is_lent or address.fd is not None
        self.accepted = 0
        self.waiting = 0
        self.paused_until = 0.0
        self._batch = 1
        self._ceiling = 0
        self._look_for_ceiling()
        self._is_open = True
        self._file = _identity(address.path)

    @property
    def is_full(self) -> bool:
        """Whether the pending queue is at its bound."""
        return len(self.pending) >= self.limit

    def can_look(self) -> bool:
        """Whether the kernel tells how many wait in its backlog: TCP only, and not where a sandbox is the kernel."""
        if self.socket.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        try:
            facts = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO + 4)
        except OSError:
            return False
        return len(facts) == _TCP_INFO + 4 and struct.unpack_from("I", facts, _TCP_INFO)[0] > 0

    def look(self) -> int:
        """Note, and return, how many connections wait in the kernel to be accepted."""
        facts = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)
        self.waiting = int.from_bytes(facts[_TCP_INFO - 4 :], sys.byteorder)
        return self.waiting

    def accept(self, now: float) -> int:
        """Take what the kernel has, up to the batch and the bound, into `pending`; returns how many.

        The batch grows while it is filled and shrinks when it is not: so a call that finds nothing (EAGAIN) is rare,
        whether clients come one by one or by the hundred. What is left makes the socket readable again at once.
        """
        taken = 0
        room = min(self._batch, self.limit - len(self.pending))
        while taken < room:
            try:
                # The private twin of socket.accept(): the same system call without a socket object to build, which
                # nobody here would use, since only the descriptor travels on.
                fd, address = self.socket._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self.paused_until = now + PAUSE_AFTER_EMFILE
                    break
                if error.errno in _TRANSIENT:
                    continue  # the client gave up between its connect and our accept
                raise
            self.pending.append(Connection(fd, self.index, _peer(address)))
            taken += 1
            if fd >= self._ceiling and fd >= self._look_for_ceiling():
                self.paused_until = now + PAUSE_AFTER_EMFILE
                break
        self._batch = min(2 * self._batch, ACCEPT_BATCH) if taken == self._batch else max(1, taken)
        self.accepted += taken
        return taken

    def _look_for_ceiling(self) -> int:
        """The descriptor from which on few are left: the kernel gives the lowest free number. The limit may change."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._ceiling = most - min(RESERVE, most // 4)
        return self._ceiling

    def give_back(self, connections: list[Connection]) -> None:
        """Connections that a worker did not take go to the head of the queue: they have waited longest."""
        self.pending.extendleft(reversed(connections))

    def refuse_newcomers(self) -> None:
        """Let handshakes that have begun be completed and begin no new ones: the first half of closing without loss.

        A filter on the socket drops SYNs, so a newcomer's kernel tries again a second later and is then refused (or
        served by whoever has the port by then), instead of being promised a connection that the close would reset.
        A unix socket's file is removed; whoever has connected is in the backlog, and nobody can join them.
        """
        if self.socket.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):
                _drop_new_handshakes(self.socket)
        else:
            self._remove_file()

    def close_in_child(self, *, keep_socket: bool = False) -> None:
        """Close the descriptors that a forked worker must not keep; the file stays."""
        if not keep_socket:
            self.socket.close()
        for connection in self.pending:
            os.close(connection.fd)

    def close(self, *, keep_file: bool = False) -> None:
        """Close the socket, and remove its file if it is still ours and nobody else serves on it.

        One that is ours alone stops listening at once, also if a worker that stands still has it open yet: its clients
        are refused instead of waiting for nobody, and its port is free for whoever comes next.
        """
        if not self._is_open:
            return
        self._is_open = False
        self.waiting = 0
        if not keep_file and not self.is_lent:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        if not keep_file:
            self._remove_file()

    def _remove_file(self) -> None:
        """Remove the socket's file, if it is still ours and was made by us."""
        if self.address.path and not self.address.path.startswith("\0"):
            with suppress(OSError):
                if _identity(self.address.path) == self._file:
                    os.unlink(self.address.path)

    def cut_pending(self) -> int:
        """Close what is still pending; returns how many."""
        cut = len(self.pending)
        while self.pending:
            os.close(self.pending.popleft().fd)
        return cut

    @property
    def is_open(self) -> bool:
        """Whether it still listens."""
        return self._is_open


def _identity(path: str) -> tuple[int, int] | None:
    """Which file it is; the number alone is not enough, a new file may get that of one that was removed."""
    if not path or path.startswith("\0"):
        return None
    facts = os.stat(path)
    return facts.st_ino, facts.st_ctime_ns


def _peer(address: object) -> Peer:
    if isinstance(address, tuple) and address:
        return address[0], address[1]
    return None


# -- binding ----------------------------------------------------------------------------------------------------


def bind(address: BindAddress, *, backlog: int) -> socket.socket:
    """Make the listening socket for an address.

    Raises:
        BindError: With the reason and what to do; who holds a port is found by the caller (it takes psutil).
    """
    try:
        if address.fd is not None:
            return _inherited(address.fd)
        if address.path:
            return _unix(address.path, backlog)
        return _tcp(address, backlog)
    except OSError as error:
        raise bind_error(address, error) from error


def _inherited(fd: int) -> socket.socket:
    bound = socket.socket(fileno=fd)
    with _closed_on_error(bound):
        if not bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise BindError(f"Descriptor {fd} is a socket, but not one that listens.")
        os.set_inheritable(fd, False)
    return bound


@contextmanager
def _closed_on_error(bound: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        bound.close()
        raise


def _unix(path: str, backlog: int) -> socket.socket:
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _closed_on_error(bound):
        # sun_path holds 107 bytes: a longer path is bound by its name relative to the folder it is in.
        if len(os.fsencode(path)) <= 107:
            bound.bind(path)
        else:
            folder = os.open(os.path.dirname(path) or ".", os.O_DIRECTORY)
            try:
                bound.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
            finally:
                os.close(folder)
        bound.listen(backlog)
    return bound


def _remove_stale(path: str) -> None:
    """Remove a socket file nobody listens on any more; any other file stays and fails the bind."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return


def _tcp(address: BindAddress, backlog: int) -> socket.socket:
    family, kind, proto, _, where = socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, proto)
    with _closed_on_error(bound):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by every connection
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if where[0] == "::" else 1)
        bound.bind(where)
        bound.listen(backlog)
    return bound


def bind_error(address: BindAddress, error: OSError) -> BindError:
    """The block of text for a socket that could not be bound."""
    what = f"Cannot listen on {address}"
    if error.errno == errno.EACCES and address.path:
        return BindError(f"{what}: permission denied.", fact=f"The folder of {address.path} is not writable.")
    if error.errno == errno.EACCES:
        return BindError(
            f"{what}: permission denied for port {address.port}.",
            advice=(
                "Use a port above 1023: --port 8000",
                "Or, under systemd: AmbientCapabilities=CAP_NET_BIND_SERVICE",
            ),
        )
    if error.errno == errno.EADDRINUSE:
        kind = "a file of that name is there already" if address.path else "the port is in use"
        return BindError(f"{what}: {kind}.", advice="Choose another: --bind ADDRESS or --port N")
    if isinstance(error, socket.gaierror):
        return BindError(f"{what}: the name does not resolve.", fact=str(error.strerror))
    if error.errno in (errno.EBADF, errno.ENOTSOCK):
        return BindError(f"{what}: descriptor {address.fd} is not an open socket.")
    return BindError(f"{what}: {error.strerror or error}.")


_SO_ATTACH_FILTER: Final = 26


def _drop_new_handshakes(bound: socket.socket) -> None:
    """Attach a classic BPF program: a segment with SYN and without ACK is dropped, all others pass (linux/filter.h).

    At a TCP socket the program sees the segment from its TCP header on; byte 13 holds the flags (RFC 9293 §3.1).
    """
    program = (
        struct.pack("HBBI", 0x30, 0, 0, 13)  # A = byte 13
        + struct.pack("HBBI", 0x54, 0, 0, 0x12)  # A &= SYN | ACK
        + struct.pack("HBBI", 0x15, 0, 1, 0x02)  # if A != SYN skip one
        + struct.pack("HBBI", 0x06, 0, 0, 0)  # drop
        + struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF)  # pass
    )
    buffer = ctypes.create_string_buffer(program)
    if len(program) % 8:
        raise Bug("a BPF instruction has eight bytes")
    fprog = struct.pack("HL", len(program) // 8, ctypes.addressof(buffer))
    bound.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
