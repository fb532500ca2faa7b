"""A worker's end of the message socket, on gevent's loop; shared by the worker of `run` and the worker of a program.

Laws:

1. `Accepted` leaves before the first byte of a connection is read, and not later than that: the primary re-dispatches
   what is not acknowledged, so nothing is lost and nothing is served twice. `accept` is the only way to say it.
2. One new connection per turn of the loop. The application's greenlet for it runs before the next one is taken, so a
   view that blocks the process never sits on a second connection that was read and cannot be given to anybody else.
3. Messages leave in the order in which they were said; a descriptor that is given away is closed when it has left.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import gevent

from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import Accepted, GivenBack, Message, NewConnection, Returned
from sharedcluster.config import BindAddress
from sharedcluster.http.settings import ListenerFacts, Proxied, ReleasedConnection
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
    """Reads what the primary says and hands it to `handlers`, sends what the worker says.

    Args:
        channel: The worker's end.
        handlers: What to call for each type of message.
        when_closed: Called once, when the primary is gone.
    """

    def __init__(
        self, channel: MessageSocket, handlers: Mapping[type[Message], Handler], when_closed: Callable[[], None]
    ) -> None:
        self._channel = channel
        self._handlers = handlers
        self._when_closed = when_closed
        loop = gevent.get_hub().loop
        self._readable = loop.io(channel.fileno(), 1)
        self._writable = loop.io(channel.fileno(), 2)
        self._outbox: deque[tuple[Message, int | None, Callable[[], None] | None]] = deque()
        self.is_open = True

    def start(self) -> None:
        """Listen to the primary from now on."""
        self._readable.start(self._on_readable)

    def say(self, message: Message, fd: int | None = None, then: Callable[[], None] | None = None) -> None:
        """Send a message, in order; `then` is called once it has left. `fd` stays the caller's."""
        self._outbox.append((message, fd, then))
        if len(self._outbox) == 1:
            self._flush()

    def accept(self, message: NewConnection, serve: Callable[[], None]) -> None:
        """Take a connection over: acknowledge it, then `serve` it (law 1)."""
        self.say(Accepted(message.seq), then=serve)

    def refuse(self, message: NewConnection, fd: int | None) -> None:
        """Leave a connection with the primary, which has kept its copy of the descriptor."""
        if fd is not None:
            os.close(fd)
        self.say(Returned(message.seq))

    def give_back(self, released: ReleasedConnection) -> None:
        """Hand an idle connection to the primary. Called in the hub or in a request's greenlet."""
        message = GivenBack(released.listener, released.peer, proxied_as_text(released.proxied))
        fd = released.fd
        self.say(message, fd, then=lambda: os.close(fd))

    def last_words(self) -> None:
        """Wait, in a greenlet, for what was said to leave, but not for long."""
        end = time.monotonic() + LAST_WORDS
        while self._outbox and time.monotonic() < end:
            gevent.sleep(0.01)

    def _on_readable(self) -> None:
        """One connection at the most, then back to the loop (law 2); other messages are read to the end."""
        try:
            while (received := self._channel.receive()) is not None:
                message, fd = received
                self._handlers[type(message)](message, fd)
                if isinstance(message, NewConnection):
                    return
        except ChannelClosed:
            self._readable.stop()
            self.is_open = False
            self._flush()  # to nobody; but what was to happen when it had left happens
            self._when_closed()
        except (ValueError, KeyError):
            logger.exception("the primary sent what is no message for a worker")

    def _flush(self) -> None:
        while self._outbox:
            message, fd, then = self._outbox[0]
            try:
                sent = self._channel.send(message, fd)
            except ChannelClosed:
                # Nobody waits for the answer any more, but a connection that came with its question is ours.
                sent = True
            if not sent:
                if not self._writable.active:
                    self._writable.start(self._flush)
                return
            self._outbox.popleft()
            if then is not None:
                then()
        self._writable.stop()


# -- what connections and listeners are on the wire --------------------------------------------------------------


def listener_facts(address: BindAddress) -> ListenerFacts:
    """What a listener's address is to the WSGI environ."""
    return ListenerFacts(host=address.host, port=address.port, unix_path=address.path or None)


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
