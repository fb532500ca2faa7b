"""One worker as the primary's script sees it: its events, messages and way out. `WorkerHandle` has its connections."""

from __future__ import annotations

import os
import signal as signals
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sharedcluster.cluster.messages import Drain, Stop
from sharedcluster.cluster.supervision import LEAVE_GRACE, TERM_GRACE
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from sharedcluster.log import logger
from sharedcluster.program.channel import Channel, OnSent
from sharedcluster.program.emitter import Events
from sharedcluster.program.loops import Loop, Timer

RETRY: Final = 0.1


@dataclass(frozen=True, slots=True)
class ListeningAddress:
    """What a `listening` event says: host and port, or the path of a unix socket (`address_type` -1)."""

    address: str
    port: int
    address_type: int
    fd: int | None = None


class Owner(Protocol):
    """What a worker needs of its cluster."""

    def leaves(self, worker: Worker) -> None:
        """No more connections for this one."""


class Worker(Events):
    """A worker, in the primary. `cluster.fork()` returns it, `cluster.workers` holds it while its process lives.

    Attributes:
        id: Counted from 1, never used again.
        slot: The lowest number that was free; the worker that takes its place gets it again.
        process: The `subprocess.Popen`, for its `pid`.
        exited_after_disconnect: None while it lives and nobody asked it to go; then True if it was asked to
            (`disconnect`, `kill()`, or by itself), False if it ended by accident.
    """

    EVENTS = ("fork", "online", "listening", "message", "disconnect", "exit", "error", "stdout", "stderr")

    def __init__(
        self, handle: WorkerHandle, process: subprocess.Popen[bytes], loop: Loop, owner: Owner, graceful_timeout: float
    ) -> None:
        super().__init__()
        self.id = handle.id
        self.slot = handle.slot
        self.process = process
        self.exited_after_disconnect: bool | None = None
        self._handle = handle
        self._loop = loop
        self._owner = owner
        self._graceful_timeout = graceful_timeout
        self._channel: Channel | None = None
        self._ladder: list[Timer] = []
        self._is_told = False

    def __repr__(self) -> str:
        return f"<worker {self.id} pid={self.process.pid} {self.state}>"

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """forked, online, listening, draining, disconnected or dead."""
        state = self._handle.state
        if state is not WorkerState.DEAD and not self.is_connected():
            return "disconnected"
        return str(state)

    def is_connected(self) -> bool:
        """Whether messages can still come from it."""
        return self._channel is not None and self._channel.is_open

    def is_dead(self) -> bool:
        """Whether its process has ended."""
        return self._handle.state is WorkerState.DEAD

    # -- messages --------------------------------------------------------------------------------------------------

    def send(self, message: Any, callback: OnSent | None = None) -> bool:
        """Send a message to the worker's `cluster.worker.on("message")`.

        Args:
            message: Any JSON value, or what the serialization of `setup_primary` takes.
            callback: Called with None when the worker's handlers have been called with it, else with the error.

        Returns:
            False when too much is waiting already (it is still sent: hold on until a callback came), or when the
            worker is disconnected.

        Raises:
            TypeError, ValueError: The message cannot be written; nothing was sent.
            BufferError: 64 MiB are waiting; nothing was sent.
        """
        if self._channel is None:
            raise RuntimeError("The worker was not started.")
        return self._channel.send(message, callback)

    # -- its way out -----------------------------------------------------------------------------------------------

    def disconnect(self) -> Worker:
        """Let it go: no new connections, what is in flight is answered, idle connections move to other workers.

        It exits with code 0 then. Half a second after `graceful_timeout` it gets TERM, and KILL 2 seconds later.
        """
        self.start_drain(give_back=True)
        return self

    def kill(self, signal: str | int = "SIGTERM") -> None:
        """End it: TERM, INT and HUP let it go, as `disconnect` does; QUIT cuts what is in flight; others are sent.

        Node's page says that `kill` disconnects first and its code has not done so since v16; here the page is right.
        """
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal)
        if number in (signals.SIGTERM, signals.SIGINT, signals.SIGHUP):
            self.disconnect()
        elif number is signals.SIGQUIT:
            self.stop_now()
        else:
            self.signal(number)

    destroy = kill

    def start_drain(self, *, give_back: bool) -> None:
        """Tell it to go, once."""
        if self.is_dead() or self._is_told:
            return
        self._is_told = True
        self.leaving()
        self._tell_drain(give_back)

    def leaving(self) -> None:
        """It goes, told or of its own accord: out of rotation, and up the ladder if it takes too long."""
        if self.exited_after_disconnect is not None:
            return
        self.exited_after_disconnect = True
        self._handle.asked_to_leave = True
        self._handle.state = WorkerState.DRAINING
        self._handle.deadline = time.monotonic() + self._graceful_timeout
        self._owner.leaves(self)
        steps: list[tuple[float, Callable[[], None]]] = [
            (self._graceful_timeout + LEAVE_GRACE, self._terminate),
            (self._graceful_timeout + LEAVE_GRACE + TERM_GRACE, self._kill),
        ]
        self._ladder = [self._loop.call_later(seconds, step) for seconds, step in steps]

    def stop_now(self) -> None:
        """Cut what is in flight."""
        self.exited_after_disconnect = True
        self._handle.tell(Stop())
        self._ladder.append(self._loop.call_later(TERM_GRACE, self._kill))

    def _tell_drain(self, give_back: bool) -> None:
        deadline = self._handle.deadline or 0.0
        left = max(0.0, deadline - time.monotonic())
        if not self.is_dead() and not self._handle.tell(Drain(left, give_back)) and left:
            # Its socket is full because it stands still; the ladder ends it if that lasts.
            self._ladder.append(self._loop.call_later(RETRY, self._tell_drain, give_back))

    def _terminate(self) -> None:
        logger.warning("worker %d (pid %d) gets TERM: it did not leave in time", self.id, self.process.pid)
        self.signal(signals.SIGTERM)

    def _kill(self) -> None:
        logger.warning("worker %d (pid %d) gets KILL", self.id, self.process.pid)
        self.signal(signals.SIGKILL)

    def signal(self, number: signals.Signals) -> None:
        """Send a signal to its process, if it still has one."""
        if not self.is_dead():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    # -- called by the cluster -------------------------------------------------------------------------------------

    def attach(self, channel: Channel) -> None:
        """Its message channel."""
        self._channel = channel
        channel.on_error = self._on_error

    def _on_error(self, error: Exception) -> None:
        if self.has_observer("error"):
            self.emit("error", error)
        else:
            logger.warning("a message to worker %d was not delivered: %s", self.id, error)

    @property
    def handle(self) -> WorkerHandle:
        """Its connections and its end of the message socket."""
        return self._handle

    @property
    def channel(self) -> Channel:
        """Its message channel."""
        assert self._channel is not None
        return self._channel

    def ended(self) -> None:
        """Its process was reaped."""
        self._handle.state = WorkerState.DEAD
        for timer in self._ladder:
            timer.cancel()
        if self.exited_after_disconnect is None:
            self.exited_after_disconnect = False
