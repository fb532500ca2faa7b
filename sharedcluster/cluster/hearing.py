"""What workers say, and what the primary makes of it: one function a message, chosen by a table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

from sharedcluster.cluster import events
from sharedcluster.cluster.hand_off import HandOff
from sharedcluster.cluster.ipc import ChannelClosed
from sharedcluster.cluster.messages import (
    Accepted,
    Connection,
    Draining,
    Exhausted,
    GivenBack,
    Heartbeat,
    Listening,
    LoadFailed,
    Message,
    Online,
    Returned,
)
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from sharedcluster.log import logger

ROUTINE: Final = frozenset((Accepted, Returned, Exhausted, GivenBack, Heartbeat))
"""Messages that come with the traffic: after them nothing has to be decided."""


class Crew(Protocol):
    """Those who are spoken for: the workforce, as far as a message can concern it."""

    workers: dict[int, WorkerHandle]
    counters: dict[str, int]
    hand_off: HandOff
    events: events.Emitter
    ever_listened: bool

    @property
    def is_leaving(self) -> bool:
        """Whether the cluster stops."""

    def retire(self, worker: WorkerHandle, reason: str) -> None:
        """Have a worker replaced."""


def hear(crew: Crew, worker: WorkerHandle, message: Message, fd: int | None) -> None:
    """Do what a message of a worker asks for."""
    handler = _HANDLERS.get(type(message))
    if handler is None:
        logger.error("worker %d sent a message that is not for the primary: %r", worker.id, message)
    else:
        handler(crew, worker, message, fd)


def _on_accepted(_crew: Crew, worker: WorkerHandle, message: Accepted, _fd: int | None) -> None:
    worker.acknowledged(message.seq)


def _on_returned(crew: Crew, worker: WorkerHandle, message: Returned, _fd: int | None) -> None:
    crew.counters["redispatched"] += 1
    crew.hand_off.take_back([worker.returned(message.seq)])
    crew.hand_off.rest(worker, time.monotonic())


def _on_exhausted(crew: Crew, worker: WorkerHandle, _message: Exhausted, _fd: int | None) -> None:
    crew.counters["redispatched"] += 1
    crew.hand_off.rest(worker, time.monotonic())


def _on_given_back(crew: Crew, worker: WorkerHandle, message: GivenBack, fd: int | None) -> None:
    if fd is None:
        logger.error("worker %d gave a connection back and its descriptor did not arrive", worker.id)
        return
    connection = Connection(fd, message.listener, message.peer, message.proxied)
    worker.given_back += 1
    if crew.is_leaving:
        _entrust(crew, connection)
        return
    crew.counters["migrated"] += 1
    crew.hand_off.give(connection)


def _entrust(crew: Crew, connection: Connection) -> None:
    """The stop overtook it on its way: a worker that drains answers the request that may be in it, and closes."""
    for worker in crew.workers.values():
        if worker.state is WorkerState.DRAINING and not worker.given_back and not worker.terminated_at:
            with suppress(ChannelClosed):
                if worker.hand_off(connection):
                    return
    os.close(connection.fd)


def _on_online(crew: Crew, worker: WorkerHandle, message: Online, _fd: int | None) -> None:
    worker.pid = message.pid
    if worker.state is WorkerState.FORKED:
        worker.state = WorkerState.ONLINE
    crew.events.emit(events.ONLINE, worker)


def _on_listening(crew: Crew, worker: WorkerHandle, message: Listening, _fd: int | None) -> None:
    worker.heartbeat_at = worker.listening_at = time.monotonic()
    worker.secret = message.secret
    if worker.state is WorkerState.DRAINING:
        return  # it was told to leave while it was loading
    worker.state = WorkerState.LISTENING
    crew.ever_listened = True
    crew.hand_off.enter(worker)
    _compare_secrets(crew, worker)
    crew.events.emit(events.LISTENING, worker)


def _compare_secrets(crew: Crew, newcomer: WorkerHandle) -> None:
    for other in crew.workers.values():
        if other.generation == newcomer.generation and other.secret and other.secret != newcomer.secret:
            logger.error(
                "Workers have different SECRET_KEY values (worker %d: %s, worker %d: %s).\n"
                "It is probably made anew at each import (os.urandom, secrets.token_hex). Sessions will be lost "
                "between workers.\nSet one value for all of them, in the environment or in the configuration.",
                other.id, other.secret, newcomer.id, newcomer.secret or "none",
            )  # fmt: skip
            return


def _on_load_failed(_crew: Crew, worker: WorkerHandle, message: LoadFailed, _fd: int | None) -> None:
    worker.load_failure = (message.what, message.traceback)


def _on_heartbeat(_crew: Crew, worker: WorkerHandle, message: Heartbeat, _fd: int | None) -> None:
    worker.heard(message.stats, time.monotonic())


def _on_draining(crew: Crew, worker: WorkerHandle, message: Draining, _fd: int | None) -> None:
    """It wants to leave (a TERM by hand): it goes on serving until its replacement is there, like any other."""
    if worker.state is WorkerState.LISTENING and not worker.retiring and not crew.is_leaving:
        crew.retire(worker, message.reason)


_HANDLERS: Final[dict[type[Message], Callable[[Crew, WorkerHandle, Any, int | None], None]]] = {
    Accepted: _on_accepted,
    Returned: _on_returned,
    Exhausted: _on_exhausted,
    GivenBack: _on_given_back,
    Online: _on_online,
    Listening: _on_listening,
    LoadFailed: _on_load_failed,
    Heartbeat: _on_heartbeat,
    Draining: _on_draining,
}
