"""A worker's side of what comes from the primary, on gevent's loop: messages, connections, shared listening sockets.

Both kinds of worker use it: that of `sharedcluster run` (`worker`) and that of a program (`program.this_worker`).

Laws:

1. A connection's number is on the board before its first byte is read: if this process dies, the primary gives what
   is not there to others, so nothing is lost and nothing is served twice. `Accepted` follows once per turn.
2. Messages leave in the order in which they were said; a descriptor that goes with one is closed here once it has
   left, and also if there is nobody left to take it.
"""

from __future__ import annotations

import _socket
import os
import posix  # its close is not gevent's, which waits for a turn of the loop
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import gevent

from sharedcluster.cluster.board import Row
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.listener import EXHAUSTED, PAUSE_AFTER_EMFILE
from sharedcluster.cluster.messages import Accepted, Exhausted, GivenBack, Message, NewConnection, Peer, Returned
from sharedcluster.http.settings import Proxied, ReleasedConnection
from sharedcluster.log import logger

LAST_WORDS: Final = 0.5
"""Seconds that the last messages may take to leave."""

Handler = Callable[[Any, int | None], None]
"""Called in the hub with a message and the descriptor that came with it."""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the application sees as `environ["sharedcluster.worker"]`."""

    slot: int
    id: int
    generation: int


class Wire:
    """Hands what the primary says to `handlers`, and sends what the worker says.

    Args:
        channel: The worker's end of the message socket.
        row: The worker's row of the board.
        handlers: What to call for each type of message.
        when_closed: Called once, when the primary is gone.
    """

    def __init__(
        self,
        channel: MessageSocket,
        row: Row,
        handlers: Mapping[type[Message], Handler],
        when_closed: Callable[[], None],
    ) -> None:
        self._channel = channel
        self.row = row
        self._handlers = handlers
        self._when_closed = when_closed
        loop = gevent.get_hub().loop
        self._readable = loop.io(channel.fileno(), 1)
        self._writable = loop.io(channel.fileno(), 2)
        self._outbox: deque[tuple[Message, int | None]] = deque()
        self._accepted = self._told = 0
        self.is_open = True

    def start(self) -> None:
        """Listen to the primary from now on."""
        self._readable.start(self._on_readable)

    # -- connections -----------------------------------------------------------------------------------------------

    def accept(self, message: NewConnection) -> None:
        """The connection is this worker's from now on; called before its first byte is read (law 1)."""
        self.row.accepts(message.seq)
        self._accepted = message.seq

    def refuse(self, message: NewConnection, fd: int | None) -> None:
        """Leave a connection with the primary, which has kept its copy of the descriptor."""
        self.tell_accepted()  # `Accepted` speaks of everything up to its number: first the others
        self.say(Returned(message.seq))
        if fd is not None:
            posix.close(fd)

    def tell_used(self) -> None:
        """Have the primary look at the board: the turns it asked about are used up."""
        self._told = self._accepted
        self.say(Accepted(self._accepted))

    def tell_accepted(self) -> None:
        """Say how far this worker has come; called when its loop is about to wait."""
        if self._accepted != self._told:
            self._told = self._accepted
            self.say(Accepted(self._accepted))

    def give_back(self, released: ReleasedConnection) -> None:
        """Hand an idle connection to the primary. Called in the hub or in a request's greenlet."""
        self.say(GivenBack(released.listener, released.peer, proxied_as_text(released.proxied)), released.fd)

    # -- messages --------------------------------------------------------------------------------------------------

    def say(self, message: Message, fd: int | None = None) -> None:
        """Send a message, in order; a descriptor that goes with it is closed here once it has left."""
        self._outbox.append((message, fd))
        if len(self._outbox) == 1:
            self._flush()

    def last_words(self, patience: float = LAST_WORDS) -> None:
        """Wait, in a greenlet, for what was said to leave."""
        end = time.monotonic() + patience
        while self._outbox and time.monotonic() < end:
            gevent.sleep(0.01)

    def _on_readable(self) -> None:
        try:
            # One message a call: the loop calls again while there is more, which costs less than to find nothing.
            if (received := self._channel.receive()) is not None:
                message, fd = received
                self._handlers[type(message)](message, fd)
        except ChannelClosed:
            self._readable.stop()
            self.is_open = False
            self._flush()  # to nobody: what is left is closed and forgotten
            self._when_closed()
        except (ValueError, KeyError):
            logger.exception("the primary sent what is no message for a worker")

    def _flush(self) -> None:
        while self._outbox:
            message, fd = self._outbox[0]
            try:
                sent = self._channel.send(message, fd)
            except ChannelClosed:
                sent = True  # nobody listens any more
            if not sent:
                if not self._writable.active:
                    self._writable.start(self._flush)
                return
            self._outbox.popleft()
            if fd is not None:
                posix.close(fd)
        self._writable.stop()


def own_listening(fd: int) -> _socket.socket:
    """The worker's hold on a listening socket; a process that the application forks (multiprocessing) has none, or it
    would keep the port when the worker and the cluster are gone.
    """
    listening = _socket.socket(fileno=fd)  # not gevent's class: it must not wait
    os.register_at_fork(after_in_child=listening.close)
    return listening


TURNS_AT_ONCE: Final = 4
"""Connections accepted in a turn of the loop, so that those which are open get theirs."""


class TurnAcceptor:
    """A listening socket that this worker accepts from when it is its turn; the primary has looked who waits there.

    Args:
        fd: The socket; it is this object's.
        index: The listener's.
        wire: Where the turns come from; it is told when they are used up, if the primary wants to hear it.
        serve: Called in the hub with each connection and its peer.
    """

    def __init__(self, fd: int, index: int, wire: Wire, serve: Callable[[int, Peer], None]) -> None:
        os.set_blocking(fd, False)
        self._listening = own_listening(fd)
        self._index = index
        self._wire = wire
        self._serve = serve
        self._loop = gevent.get_hub().loop
        self._turns = 0
        self._is_open = True

    def close(self) -> None:
        """Take no more, and close the socket: it would collect clients until the last of us is gone."""
        if self._is_open:
            self._is_open = False
            self._listening.close()

    def take(self, count: int) -> None:
        """Accept so many, one after another: each is served until it waits before the next one is taken."""
        was_at_it = self._turns > 0
        self._turns += count
        if not was_at_it:
            self._go_on()

    def _go_on(self) -> None:
        row = self._wire.row
        for _ in range(TURNS_AT_ONCE):
            if not self._turns or not self._is_open:
                return
            self._turns -= 1
            row.uses_turn()  # before the accept (law 2 of `turns`)
            if not self._turns and row.is_to_tell():  # now, so that the next are here when this one is served
                self._wire.tell_used()
            try:
                self._accept()
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._give_up()
        if self._turns:
            self._loop.run_callback(self._go_on)

    def take_rest(self) -> None:
        """In the hub: accept everybody who waits, for there is no primary any more that could give turns."""
        with suppress(OSError):
            while self._is_open:
                with suppress(ConnectionAbortedError):
                    self._accept()

    def _accept(self) -> None:
        """Raises OSError if nobody is there (another worker was faster), or if it cannot."""
        fd, address = self._listening._accept()  # type: ignore[attr-defined]
        self._wire.row.takes(self._index)
        self._serve(fd, (address[0], address[1]) if isinstance(address, tuple) and address else None)

    def _give_up(self) -> None:
        """No descriptor is left: whoever waits there is others' turn."""
        for _ in range(self._turns):
            self._wire.row.uses_turn()
        self._turns = 0
        self._wire.say(Exhausted())


class SharedAcceptor:
    """A listening socket that all workers accept from (policy `shared`): one connection a turn, whoever has time.

    Args:
        fd: The socket; it is this object's.
        serve: Called in the hub with each connection and its peer.
        wanted: Asked before each accept; while it says no, the others take them.
    """

    def __init__(self, fd: int, serve: Callable[[int, Peer], None], wanted: Callable[[], bool] = lambda: True) -> None:
        self._listening = own_listening(fd)
        self._serve = serve
        self._wanted = wanted
        self._loop = gevent.get_hub().loop
        self._watcher = self._loop.io(fd, 1)
        self._rested: Any = None
        self._is_open = True
        self._watch()

    def close(self) -> None:
        """Take no more, and close the socket: it would collect clients until the last of us is gone."""
        if self._is_open:
            self._is_open = False
            self._watcher.stop()
            self._listening.close()

    def _watch(self) -> None:
        if self._is_open:
            self._watcher.start(self._on_acceptable)

    def _on_acceptable(self) -> None:
        if not self._wanted():
            self._rest()
            return
        try:
            fd, address = self._listening._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._rest()
            return  # or another worker was faster, or the client gave up
        self._serve(fd, (address[0], address[1]) if isinstance(address, tuple) and address else None)

    def _rest(self) -> None:
        """Leave the clients to the other workers for a moment, or the loop would spin."""
        self._watcher.stop()
        self._rested = self._loop.timer(PAUSE_AFTER_EMFILE)  # a new one: libev's cannot be started twice
        self._rested.start(self._watch)


# -- what a client is on the wire --------------------------------------------------------------------------------


def proxied_as_text(proxied: Proxied | None) -> str:
    """What PROXY protocol said of a client, as the message carries it: "" nothing, "-" the proxy itself, HOST PORT."""
    if proxied is None:
        return ""
    return "-" if proxied.client is None else f"{proxied.client[0]} {proxied.client[1]}"


def proxied_from(text: str) -> Proxied | None:
    """The reverse of `proxied_as_text`."""
    if not text:
        return None
    host, _, port = text.partition(" ")
    return Proxied((host, int(port)) if port else None)
