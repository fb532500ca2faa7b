"""How callers of the shared state wait in a gevent process; the counterpart of `state.runtime.ThreadRuntime`.

Laws
----
1. A socket's watcher is registered with the loop once, for as long as the connection lasts. Registering it for each
   wait, with a timer and after a read that was bound to fail, cost three system calls and 40,000 instructions.
2. A greenlet is switched to only by what it waits for: it notes itself before it leaves, and takes the note away
   however it comes back (killed, too). Whoever is switched to by mistake looks again and goes on waiting.
3. A line that is stopped, or silent for longer than its timeout, wakes its reader with an OSError.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import gevent
import gevent.monkey
import gevent.socket
from gevent.hub import get_hub
from greenlet import getcurrent, greenlet

from sharedcluster.state import process_id
from sharedcluster.state.runtime import THREADS, Home, Line, Parking

_allocate_lock = gevent.monkey.get_original("_thread", "allocate_lock")
_select = gevent.monkey.get_original("select", "select")


ALONE = 20_000
"""Nanoseconds within which `sched_yield` comes back if nobody else wanted the CPU (a switch takes longer)."""


class _Lock:
    """The interpreter's own lock, for sections in which no greenlet switches.

    Only a finalizer that the garbage collector runs in there could switch, or another native thread hold it: then it
    is asked for again after the others have had their turn, and nobody blocks the loop.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = _allocate_lock()
        self._acquire, self._release = lock.acquire, lock.release

    def __enter__(self) -> None:
        while not self._acquire(False):
            gevent.sleep(0)

    def __exit__(self, *error: object) -> None:
        self._release()


class _Parking:
    """See `state.runtime.Parking`; costs its sleeper one switch to the hub, and the hub one back."""

    __slots__ = ("_hub", "_is_open", "_sleeper")

    def __init__(self) -> None:
        self._is_open = False
        self._sleeper: greenlet | None = None
        self._hub: Any = None

    def park(self) -> None:
        """See `Parking`."""
        hub = self._hub = get_hub()
        # Noted before it is looked: another thread's `unpark` sets first and looks for a sleeper then.
        self._sleeper = getcurrent()
        try:
            while not self._is_open:
                hub.switch()
        finally:
            self._sleeper = None
        self._is_open = False

    def unpark(self) -> None:
        """See `Parking`."""
        self._is_open = True
        if self._sleeper is not None:
            loop = self._hub.loop
            (loop.run_callback if get_hub() is self._hub else loop.run_callback_threadsafe)(self._wake)

    def _wake(self) -> None:
        if self._sleeper is not None:
            self._sleeper.switch()

    def release(self) -> None:
        """From the loop: `unpark`, at once."""
        self._is_open = True
        self._wake()


def _wake_all(hub: Any, parkings: deque[_Parking]) -> None:
    """From the loop: one callback for a group costs a tenth of one for each."""
    try:
        while parkings:
            parkings.popleft()._wake()
    finally:
        if parkings:  # a bug has come through a sleeper: the others must not wait for ever
            hub.loop.run_callback(_wake_all, hub, parkings)


def _yield_cpu(loop: Any, parking: _Parking) -> None:
    """From the loop, behind what is scheduled: if others want the CPU let them have it, and look what has come then.

    If nobody wants it the caller must not wait for what may come: a worker with its own core would idle, and answer
    a tenth fewer requests.
    """
    before = time.monotonic_ns()
    os.sched_yield()
    if time.monotonic_ns() - before < ALONE:
        parking.release()
        return
    timer = loop.timer(0)  # due when the loop has looked, and before what it has read there is run

    def wait_for_what_was_read() -> None:
        timer.close()
        loop.run_callback(loop.run_callback, parking.release)

    timer.start(wait_for_what_was_read)


class _Line:
    """See `state.runtime.Line`; a plain socket with one watcher for its whole life and a timer per timeout."""

    def __init__(self, sock: Any) -> None:
        self._patched = sock
        self._sock: socket.socket = sock._sock  # never waits
        self._timeout: float = sock.gettimeout() or 1e9
        self._hub: Any = get_hub()
        self._watcher = self._hub.loop.io(sock.fileno(), 1)
        self._is_watched = False
        self._timer: Any = None
        self._deadline = 0.0
        self._reader: greenlet | None = None
        self._news: OSError | bool = False  # True: bytes, or the end
        self._is_stopped = False
        self._pid = process_id()

    def send(self, data: bytes) -> None:
        """See `Line`."""
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._patched.sendall(memoryview(data)[sent:])

    def recv_into(self, buffer: bytearray) -> int:
        """See `Line`. What was asked for is never there at once, so it waits first and reads then."""
        while True:
            self._wait()
            try:
                return self._sock.recv_into(buffer)
            except BlockingIOError:
                continue

    def settimeout(self, timeout: float) -> None:
        """See `Line`."""
        self._timeout = timeout
        self._drop_timer()  # it may be set to a later time than the next deadline

    def stop(self) -> None:
        """See `Line`."""
        self._is_stopped = True
        self._drop_timer()
        self._watcher.close()
        if self._reader is not None:
            self._hub.loop.run_callback(self._tell, ConnectionAbortedError("the connection was closed here"))

    def _wait(self) -> None:
        if self._is_stopped:
            raise ConnectionAbortedError("the connection was closed here")
        if get_hub() is not self._hub:
            # Another native thread, as of gevent's pool: it may block, and cannot switch to this hub.
            if not _select([self._sock], [], [], min(self._timeout, 1e6))[0]:
                raise TimeoutError("timed out")
            return
        if not self._is_watched:
            self._is_watched = True
            self._watcher.start(self._hear)
        self._deadline = time.monotonic() + self._timeout
        if self._timer is None:
            self._start_timer(self._timeout)
        self._news = False
        self._reader = getcurrent()
        try:
            while self._news is False:
                self._hub.switch()
        finally:
            self._reader = None
        if self._news is not True:
            raise self._news

    # -- in the hub ------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        if self._reader is None or self._pid != process_id():
            # Nobody waits for this, or a child of this process has inherited the loop: it must not read from its
            # parent's connection. The loop would say so again and again.
            self._watcher.stop()
            self._is_watched = False
            return
        # Not switched to here: what else has come in this pass of the loop is read first, so that requests that were
        # read together are begun together, and those whose replies came together end together.
        if self._news is False:
            self._news = True
            self._hub.loop.run_callback(self._go_on)

    def _go_on(self) -> None:
        if self._reader is not None:
            self._reader.switch()

    def _tell(self, error: OSError) -> None:
        if self._reader is not None:
            self._news = error
            self._reader.switch()

    def _start_timer(self, seconds: float) -> None:
        self._timer = self._hub.loop.timer(seconds)
        self._timer.start(self._note_time)

    def _note_time(self) -> None:
        # One timer serves all waits within one timeout: each wait only moves the deadline.
        self._drop_timer()
        if self._reader is None:
            return
        rest = self._deadline - time.monotonic()
        if rest > 0:
            self._start_timer(rest)
        else:
            self._tell(TimeoutError("timed out"))

    def _drop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()


class _Home:
    """See `state.runtime.Home`; a hub's thread, for each has its own loop."""

    def __init__(self) -> None:
        self._hub: Any = get_hub()
        self._parked: list[greenlet] = []  # one at most: a new one begins with memory from the kernel

    def is_here(self) -> bool:
        """See `Home`."""
        return get_hub() is self._hub

    def call(self, function: Callable[[], object]) -> None:
        """See `Home`."""
        if get_hub() is self._hub:
            function()
        else:
            self._hub.loop.run_callback_threadsafe(function)

    def spawn(self, function: Callable[[], object]) -> None:
        """See `Home`."""
        loop = self._hub.loop
        (loop.run_callback if self.is_here() else loop.run_callback_threadsafe)(self._start, function)

    def _start(self, function: Callable[[], object]) -> None:
        worker = self._parked.pop() if self._parked else greenlet(self._serve, self._hub)
        worker.switch(function)

    def _serve(self, function: Callable[[], object] | None) -> None:
        while True:
            if function is not None:  # else it was switched to by mistake
                function()
                if self._parked:
                    return
                self._parked.append(getcurrent())
            function = self._hub.switch()


class GeventRuntime:
    """For a process whose sockets and threads gevent has patched."""

    has_homes = True

    def make_home(self) -> Home:
        """See `Runtime`."""
        return _Home()

    def make_lock(self) -> AbstractContextManager[Any]:
        """See `Runtime`."""
        return _Lock()

    def make_parking(self) -> Parking:
        """See `Runtime`."""
        return _Parking()

    def unpark_all(self, parkings: Sequence[Any]) -> None:
        """See `Runtime`."""
        hub = get_hub()
        here: deque[_Parking] = deque()
        for parking in parkings:
            parking._is_open = True
            if parking._sleeper is None or parking._hub is not hub:
                parking.unpark()
            else:
                here.append(parking)
        if here:
            hub.loop.run_callback(_wake_all, hub, here)

    def yield_turn(self) -> None:
        """See `Runtime`: the loop runs what is scheduled in this turn; then whoever else wants this CPU has it, which
        is often who is about to send something; that is read and run, and then the caller goes on.
        """
        parking = _Parking()
        loop = get_hub().loop
        loop.run_callback(_yield_cpu, loop, parking)
        parking.park()

    def make_line(self, sock: socket.socket) -> Line:
        """See `Runtime`. What TLS has read ahead no watcher sees, so such a socket waits for itself."""
        return _Line(sock) if type(sock) is gevent.socket.socket else THREADS.make_line(sock)
