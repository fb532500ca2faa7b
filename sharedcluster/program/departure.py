"""The end of all workers in order: nobody who was promised an answer is sent away.

refuse newcomers -> empty the backlogs and queues -> close the listeners -> let the workers go -> the last exit
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from sharedcluster.log import logger
from sharedcluster.program.servers import Servers
from sharedcluster.program.settings import Settings
from sharedcluster.program.workers import Worker

HANDSHAKE_GRACE: Final = 0.25
"""Seconds between refusing newcomers and closing the listeners: the time a handshake that has begun may take."""


class Leaving(Protocol):
    """What a departure needs of its cluster."""

    workers: dict[int, Worker]

    @property
    def settings(self) -> Settings:
        """For the deadline."""

    @property
    def servers(self) -> Servers:
        """The listeners."""

    def hold(self, more: int) -> None:
        """Stay alive for it."""

    def departed(self, departure: Departure) -> None:
        """It is over."""


class Departure:
    """One call of `disconnect`: whom it concerns, and how far it is."""

    def __init__(self, cluster: Leaving, callback: Callable[[], object] | None) -> None:
        self.callback = callback
        self.is_told = False
        self._cluster = cluster
        self._workers = dict(cluster.workers)
        self._waiting = set(self._workers)
        now = time.monotonic()
        self._closing_at = now + HANDSHAKE_GRACE
        self._late_at = now + cluster.settings.graceful_timeout
        cluster.hold(1)

    def advance(self, now: float) -> None:
        """Once the backlogs and queues are empty: close the listeners and let the workers go."""
        if self.is_told or (self._waiting and now < self._closing_at):
            return
        servers = self._cluster.servers
        waiting = servers.accept_all(now)
        handing = any(worker.handle.unacknowledged for worker in self._workers.values())
        if (waiting or handing) and self._waiting and now < self._late_at:
            servers.dispatch()
            return
        self.is_told = True
        if cut := servers.close_those_of(self._workers.keys()):
            logger.warning("%d connections were cut that no worker took in time", cut)
        for worker in self._workers.values():
            worker.start_drain(give_back=False)
        self._end_if_over()

    def lost(self, worker: Worker) -> None:
        """A worker has exited."""
        self._waiting.discard(worker.id)
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self.is_told and not self._waiting:
            self._cluster.hold(-1)
            self._cluster.departed(self)
