"""Which worker gets the next connection. A policy picks; it never queues and never sends."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from sharedcluster.cluster.messages import Peer
from sharedcluster.cluster.worker_handle import WorkerHandle


class Policy(Protocol):
    """Three methods; a policy of your own needs no more."""

    def add(self, worker: WorkerHandle) -> None:
        """The worker is listening and takes connections from now on."""

    def remove(self, worker: WorkerHandle) -> None:
        """The worker drains or is dead. Called once for each `add`."""

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """The worker for a client, one with `has_credit`; None leaves the connection in the pending queue."""


class RoundRobin:
    """Each in turn, without those that are at their credit; one with nothing outstanding goes before one with some.

    A worker whose loop stands still does not acknowledge, so it is passed over: the credit is the load protection.
    """

    def __init__(self) -> None:
        self._ring: deque[WorkerHandle] = deque()

    def add(self, worker: WorkerHandle) -> None:
        """Join at the end of the round."""
        self._ring.append(worker)

    def remove(self, worker: WorkerHandle) -> None:
        """Leave the round."""
        self._ring.remove(worker)

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """The next in the round; `peer` does not matter."""
        second: WorkerHandle | None = None
        for worker in self._ring:
            if not worker.unacknowledged:
                self._to_the_end(worker)
                return worker
            if second is None and worker.has_credit:
                second = worker
        if second is not None:
            self._to_the_end(second)
        return second

    def _to_the_end(self, worker: WorkerHandle) -> None:
        if self._ring[0] is worker:  # the usual case: no search
            self._ring.rotate(-1)
        else:
            self._ring.remove(worker)
            self._ring.append(worker)
