"""Which worker gets the next connection. A policy picks; it never queues and never sends.

Common to all: a worker is asked only while it `has_credit`, and one whose loop stands still is passed over as long as
another one can take the connection. What nobody can take stays in the listener's pending queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final, Protocol

from sharedcluster.cluster.messages import Peer
from sharedcluster.cluster.worker_handle import WorkerHandle


class Policy(Protocol):
    """Three methods; a policy of your own (`--policy MODULE:CLASS`, see `own_policy`) needs no more.

    Policies that ask for the client's address have their connections accepted by the primary, which then passes them
    on; with the others (`BLIND`) it is the worker's turn to accept (`turns`).
    """

    def add(self, worker: WorkerHandle) -> None:
        """The worker is listening and takes connections from now on."""

    def remove(self, worker: WorkerHandle) -> None:
        """The worker drains or is dead. Called once for each `add`."""

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """The worker for a client, one with `has_credit`; None leaves the connection in the pending queue."""


class RoundRobin:
    """Each in turn; one that owes an acknowledgement only if all others do so too."""

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
        now = time.monotonic_ns()
        for worker in self._ring:
            if worker.is_free(now):  # the usual case: the first of the ring
                self._to_the_end(worker)
                return worker
        return self._least(now, lambda worker: worker.owes)

    def _least(self, now: int, load: Callable[[WorkerHandle], Any]) -> WorkerHandle | None:
        """The one with the least load, in turn, of those that answer; only if none does, of all.

        If all that answer are at their credit, nobody: their acknowledgements are a moment away.
        """
        answering = [w for w in self._ring if w.answers(now)] or self._ring
        best = min((w for w in answering if w.has_credit), key=load, default=None)
        if best is not None:
            self._to_the_end(best)
        return best

    def _to_the_end(self, worker: WorkerHandle) -> None:
        if self._ring[0] is worker:  # no search
            self._ring.rotate(-1)
        else:
            self._ring.remove(worker)
            self._ring.append(worker)


class LeastConnections(RoundRobin):
    """The one with the least work in flight, what it is about to begin included.

    Where that is equal, the one with the fewest open connections; where that is equal too, each in turn.
    """

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """The least busy; `peer` does not matter."""
        return self._least(time.monotonic_ns(), lambda worker: worker.load)


class Sticky:
    """The same worker for the same client address, as long as that worker's slot is filled.

    Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998) over slots:
    when a slot comes or goes, only the clients of that slot move. A client without an address (a unix socket) is
    taken in turn. A busy worker's clients wait for it: going elsewhere is what stickiness forbids.
    """

    def __init__(self) -> None:
        self._by_slot: dict[int, list[WorkerHandle]] = {}
        self._turn = RoundRobin()

    def add(self, worker: WorkerHandle) -> None:
        """Take over its slot; during a reload the newest worker of a slot has it."""
        self._by_slot.setdefault(worker.slot, []).append(worker)
        self._turn.add(worker)

    def remove(self, worker: WorkerHandle) -> None:
        """Leave the slot, to the one that had it before if the newer one fails."""
        holders = self._by_slot[worker.slot]
        holders.remove(worker)
        if not holders:
            del self._by_slot[worker.slot]
        self._turn.remove(worker)

    def pick(self, peer: Peer) -> WorkerHandle | None:
        """The client's own worker, if it can take one more."""
        if peer is None:
            return self._turn.pick(peer)
        if not self._by_slot:
            return None
        address = peer[0].encode()
        slot = max(self._by_slot, key=lambda slot: blake2b(address, digest_size=8, key=b"%d" % slot).digest())
        worker = self._by_slot[slot][-1]
        return worker if worker.has_credit else None


BLIND: Final = frozenset(("round-robin", "least-connections"))
"""The policies that pick without looking at the client."""
POLICIES: Final[dict[str, type[RoundRobin] | type[Sticky]]] = {
    "round-robin": RoundRobin,
    "least-connections": LeastConnections,
    "sticky": Sticky,
    # Workers accept for themselves; the primary hands off only what comes back, and what is left at the stop.
    "shared": RoundRobin,
}
