"""How callers wait, for Redis and for each other: what `state` needs of the process it runs in.

With threads it is what `threading` and `socket` offer (`ThreadRuntime`). They work under gevent too, once patched, but
cost a worker more there than what they guard: a lock 4,000 instructions, a wait on a socket 40,000 and three system
calls. Whoever knows gevent brings a runtime that is made for it, see `sharedcluster.gevent_runtime`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Parking(Protocol):
    """Where one caller sleeps until another one wakes it. May be used again after `park` has returned."""

    def park(self) -> object:
        """Sleep until `unpark` has been called, or return at once if it was called before."""

    def unpark(self) -> None:
        """Wake who sleeps here or is about to; once per `park`."""


class Line(Protocol):
    """A connected socket. One may send while another one reads; two may not do the same."""

    def send(self, data: bytes) -> None:
        """Write all of it or raise OSError."""

    def recv_into(self, buffer: bytearray) -> int:
        """Wait for bytes, read them; 0 at the end. OSError; TimeoutError after the time set."""

    def settimeout(self, timeout: float) -> object:
        """How long one read may wait."""

    def stop(self) -> None:
        """It is about to be closed: who reads gets an OSError by then."""


class Home(Protocol):
    """The thread in which somebody goes on when what was sent for has come."""

    def is_here(self) -> bool:
        """Whether the caller runs in it."""

    def call(self, function: Callable[[], object]) -> object:
        """From any thread: run what neither waits nor raises, at once if this is the thread."""

    def spawn(self, function: Callable[[], object]) -> object:
        """From any thread: run what may wait, after those who can run now."""


class Runtime(Protocol):
    """What a process offers to those who wait."""

    has_homes: bool
    """Whether a home is one thread, in which what it is told runs between other things."""

    def make_home(self) -> Home:
        """The caller's."""

    def make_lock(self) -> AbstractContextManager[Any]:
        """For sections in which nobody waits for anything."""

    def make_parking(self) -> Parking:
        """See `Parking`."""

    def unpark_all(self, parkings: Sequence[Parking]) -> None:
        """Wake those who sleep in these: what `unpark` does for each, at less cost."""

    def yield_turn(self) -> None:
        """Let those run who can, once each, where callers take turns."""

    def make_line(self, sock: socket.socket) -> Line:
        """See `Line`."""


class _LockParking:
    """A lock that is held whenever nobody has been woken."""

    __slots__ = ("park", "unpark")

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self.park, self.unpark = lock.acquire, lock.release


class _SocketLine:
    """The socket as it is; closing it wakes its reader."""

    __slots__ = ("recv_into", "send", "settimeout")

    def __init__(self, sock: socket.socket) -> None:
        self.send, self.recv_into, self.settimeout = sock.sendall, sock.recv_into, sock.settimeout

    def stop(self) -> None:
        """See `Line`."""


class _AnyThread:
    """Threads are all alike."""

    def is_here(self) -> bool:
        """See `Home`."""
        return True

    def call(self, function: Callable[[], object]) -> None:
        """See `Home`."""
        function()

    def spawn(self, function: Callable[[], object]) -> None:
        """See `Home`."""
        threading.Thread(target=function, name="sharedcluster-commit", daemon=True).start()


class ThreadRuntime:
    """`threading` and `socket` as they are."""

    has_homes = False

    def make_home(self) -> Home:
        """See `Runtime`."""
        return _AnyThread()

    def make_lock(self) -> AbstractContextManager[Any]:
        """See `Runtime`."""
        return threading.Lock()

    def make_parking(self) -> Parking:
        """See `Runtime`."""
        return _LockParking()

    def unpark_all(self, parkings: Sequence[Parking]) -> None:
        """See `Runtime`; threads run when they like."""
        for parking in parkings:
            parking.unpark()

    def yield_turn(self) -> None:
        """See `Runtime`; threads take none."""

    def make_line(self, sock: socket.socket) -> Line:
        """See `Runtime`."""
        return _SocketLine(sock)


THREADS: Runtime = ThreadRuntime()
