"""`cluster.worker` in a worker: its two sockets, its servers, its way out.

Connections come by the wire (`cluster.wire` has its laws) and are served by the HTTP engine, as in a worker of
`sharedcluster run`. Handlers of messages run in a greenlet of their own, one message after the other, so a handler may
wait for Redis or sleep.

A worker lives until it is let go, by whichever way: `disconnect` from either side, TERM, or the end of the primary.
Then what is in flight is answered, up to the deadline; idle connections move to other workers; and it exits with 0.
"""

from __future__ import annotations

import _socket
import os
import posix  # its close is not gevent's, which waits for a turn of the loop
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import AsyncResult, Event

from sharedcluster.cluster.board import Board
from sharedcluster.cluster.ipc import MessageSocket
from sharedcluster.cluster.messages import (
    Bound,
    Drain,
    Draining,
    Listen,
    NewConnection,
    NotBound,
    Online,
    Stop,
    Unlisten,
)
from sharedcluster.cluster.wire import Wire, proxied_from
from sharedcluster.http.settings import ReleasedConnection
from sharedcluster.log import logger
from sharedcluster.program.channel import Channel, OnSent
from sharedcluster.program.emitter import Events
from sharedcluster.program.frames import serialization
from sharedcluster.program.loops import current_loop
from sharedcluster.program.role import BLOCKED_AT_START, WorkerRole

if TYPE_CHECKING:
    from sharedcluster.program.serving import Server

LAST_CALL: Final = 2.0
"""Seconds the script's own `finally` blocks may take at the very end."""


@dataclass(frozen=True, slots=True)
class ThisProcess:
    """What `cluster.worker.process` is in a worker."""

    pid: int


class ThisWorker(Events):
    """The worker this process is.

    Attributes:
        id: Counted from 1 by the primary, never used again.
        slot: A number below the number of workers; the worker that takes this one's place gets it again.
        process: `process.pid`.
        exited_after_disconnect: True once it was asked to go, or asked to.
    """

    EVENTS = ("message", "listening", "disconnect", "error")

    def __init__(self, role: WorkerRole) -> None:
        super().__init__()
        self.id = role.id
        self.slot = role.slot
        self.process = ThisProcess(os.getpid())
        self.exited_after_disconnect: bool | None = None
        self.graceful_timeout = role.graceful_timeout
        self._loop = current_loop()
        self._line = self._loop.line()
        self._early: deque[tuple[Any, Callable[[bool], None]]] = deque()
        self._requests: dict[int, tuple[Server, AsyncResult]] = {}
        self._indices: dict[tuple[object, ...], set[int]] = {}
        self._last_request = 0
        self._servers: dict[int, Server] = {}
        self._leaving = Event()
        self._over = Event()
        self._drain: tuple[float, bool] = (role.graceful_timeout, True)
        self._main: Any = gevent.getcurrent()
        self._row = Board(role.board_fd).row(role.row)
        # The C class, not Python's: that one is gevent's in here, and would wait in the loop.
        self._wire = Wire(
            MessageSocket(_socket.socket(fileno=role.wire_fd)),
            self._row,
            {
                NewConnection: self._on_connection,
                Bound: self._on_bound,
                NotBound: self._on_not_bound,
                Drain: self._on_drain,
                Stop: lambda _message, _fd: os._exit(0),
            },
            self._primary_gone,
        )
        self._channel = Channel(
            _socket.socket(fileno=role.messages_fd), self._loop, serialization(role.serialization),
            self._on_message, self._on_channel_closed,
        )  # fmt: skip
        self._channel.on_error = self._on_send_error

    # -- its life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Say that it is there; called by the entry, before the script runs."""
        hub_loop = gevent.get_hub().loop
        self._before_wait, self._after_wait = hub_loop.prepare(), hub_loop.check()
        self._before_wait.start(self._note_wait)
        self._after_wait.start(self._row.works)
        self._handle_signals()
        gevent.spawn(self._leave)
        self._wire.start()
        self._wire.say(Online(os.getpid()))

    def wait(self) -> None:
        """Stay, after the script's last line, until it has been let go."""
        self._main = None
        self._over.wait()

    def is_connected(self) -> bool:
        """Whether messages can be sent to the primary."""
        return self._channel.is_open

    def is_dead(self) -> bool:
        """Never, as long as anybody can ask."""
        return False

    @property
    def state(self) -> str:
        """online, listening, draining or disconnected."""
        if not self.is_connected():
            return "disconnected"
        return "draining" if self._leaving.is_set() else "listening" if self._servers else "online"

    def _note_wait(self) -> None:
        in_flight = connections = requests = 0
        for server in self._servers.values():
            in_flight += server.http.in_flight
            connections += server.http.connections
            requests += server.http.requests
        self._row.waits(in_flight, connections, requests)
        self._wire.tell_accepted()

    def _handle_signals(self) -> None:
        # The terminal's signals are for the primary. A handler that does nothing, not SIG_IGN: programs that the
        # script starts must not inherit deafness.
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)
        gevent.signal_handler(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_AT_START)

    def _on_term(self) -> None:
        if self._leaving.is_set():
            os._exit(0)
        self.disconnect()

    # -- messages --------------------------------------------------------------------------------------------------

    def send(self, message: Any, callback: OnSent | None = None) -> bool:
        """Send a message to the primary: its `worker.on("message")` and `cluster.on("message")`.

        Args:
            message: Any JSON value, or what the serialization of `setup_primary` takes.
            callback: Called with None when the primary's handlers have been called with it, else with the error.

        Returns:
            False when too much is waiting already (it is still sent: hold on until a callback came), or when the
            primary is gone.

        Raises:
            TypeError, ValueError: The message cannot be written; nothing was sent.
            BufferError: 64 MiB are waiting; nothing was sent.
        """
        return self._channel.send(message, callback)

    def _on_message(self, message: Any, taken: Callable[[bool], None]) -> None:
        # What arrives before anybody listens waits: the script may not have come that far yet.
        if self.has_observer("message"):
            self._line(lambda: self._deliver(message, taken))
        else:
            self._early.append((message, taken))

    def _deliver(self, message: Any, taken: Callable[[bool], None]) -> None:
        if self.has_observer("message"):
            self.emit("message", message)
            taken(True)
        else:  # `once` has had its message: the others wait for the next observer
            self._early.append((message, taken))

    def _observed(self, event: str) -> None:
        while event == "message" and self._early:
            self._on_message(*self._early.popleft())

    def _on_channel_closed(self) -> None:
        self._line(lambda: self.emit("disconnect"))

    def _on_send_error(self, error: Exception) -> None:
        if self.has_observer("error"):
            self.emit("error", error)
        else:
            logger.warning("a message to the primary was not delivered: %s", error)

    # -- servers ---------------------------------------------------------------------------------------------------

    def listen(self, server: Server) -> None:
        """Ask the primary for a listener and wait for the answer.

        Raises:
            OSError: The primary could not listen there.
        """
        if self._leaving.is_set():
            self._over.wait()  # it was let go before it came so far: there is nothing more to do for the script
            raise SystemExit(0)
        self._last_request += 1
        answer = AsyncResult()
        self._requests[self._last_request] = server, answer
        server.index = self._free_index(server.asked)
        host, port, path, fd = server.asked
        self._wire.say(Listen(self._last_request, server.index, host, port, path, fd, server.backlog))
        try:
            answer.get()
        except OSError:
            self._indices[server.asked].discard(server.index)
            raise

    def _free_index(self, asked: tuple[str, int, str, int | None]) -> int:
        taken = self._indices.setdefault(asked, set())
        index = max(taken, default=-1) + 1
        taken.add(index)
        return index

    def _on_bound(self, message: Bound, fd: int | None) -> None:
        server, answer = self._requests.pop(message.request)
        try:
            server.opened(message, fd)
        except Exception as error:
            self._wire.say(Unlisten(message.listener))
            answer.set_exception(error)
            return
        self._servers[message.listener] = server
        self._line(lambda: self.emit("listening", server))
        answer.set(None)

    def _on_not_bound(self, message: NotBound, _fd: int | None) -> None:
        _server, answer = self._requests.pop(message.request)
        answer.set_exception(OSError(message.code, message.what))

    def _on_connection(self, message: NewConnection, fd: int | None) -> None:
        server = self._servers.get(message.listener)
        if fd is None or server is None or not server.takes_more:
            self._wire.refuse(message, fd)
            return
        self._wire.accept(message)
        proxied = proxied_from(message.proxied) if message.proxied else None
        server.http.serve(fd, message.listener, message.peer, proxied)

    def unlisten(self, server: Server) -> None:
        """The server takes no more connections here."""
        if self._servers.get(server.listener) is server:
            self._wire.say(Unlisten(server.listener))
            self._indices[server.asked].discard(server.index)

    def forget(self, server: Server) -> None:
        """The server has no connection left."""
        if self._servers.get(server.listener) is server:
            del self._servers[server.listener]

    # -- its way out -----------------------------------------------------------------------------------------------

    def disconnect(self) -> None:
        """Go: the primary hands over no more connections; what is in flight is answered; then exit with code 0."""
        if not self._leaving.is_set():
            self.exited_after_disconnect = True
            self._wire.say(Draining("it asked to"))
            self._leaving.set()

    kill = destroy = disconnect

    def _on_drain(self, message: Drain, _fd: int | None) -> None:
        self._drain = message.timeout, message.give_back
        self.exited_after_disconnect = True
        self._leaving.set()

    def _primary_gone(self) -> None:
        if not self._leaving.is_set():
            logger.warning("the primary is gone: draining")
        self._leaving.set()

    def _leave(self) -> None:
        """Drain, in a greenlet of its own: the script may be anywhere."""
        self._leaving.wait()
        timeout, gives_back = self._drain
        gevent.spawn_later(timeout + LAST_CALL, os._exit, 0)  # whatever the script's handlers do
        end = time.monotonic() + timeout
        for shared in _live_states():
            shared.drain()
        servers = list(self._servers.values())
        for server in servers:
            server.drain(self._give_back if gives_back and self._wire.is_open else None)
        for server in servers:
            server.http.wait_drained(max(0.0, end - time.monotonic()))
            if left := server.http.in_flight:
                logger.warning("%d requests were cut", left)
            server.http.close()
            server.closed()
        for shared in _live_states():
            shared.close()
        self._wire.last_words()
        while not self._channel.is_idle and time.monotonic() < end:
            gevent.sleep(0.01)
        self._channel.close()
        self._line(self._exit)  # behind the handlers of what came last, and of `disconnect`

    def _give_back(self, released: ReleasedConnection) -> None:
        if self._wire.is_open:
            self._wire.give_back(released)
        else:
            posix.close(released.fd)

    def _exit(self) -> None:
        gevent.spawn_later(LAST_CALL, os._exit, 0)
        self._over.set()
        if self._main is not None:  # the script is not at its end: let its `finally` blocks run
            gevent.get_hub().loop.run_callback(self._main.throw, SystemExit(0))


def _live_states() -> list[Any]:
    """The shared states of this process, if the script uses any."""
    state = sys.modules.get("sharedcluster.state")
    return state.live_states() if state is not None else []
