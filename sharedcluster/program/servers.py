"""What workers asked to listen on, in the primary: bound once for all of them, kept, and handed off from.

Laws:

1. One address and index is one listener, whichever worker asks first; the others get the same (Node's rule: the n-th
   server on port 0 has the same port in every worker, the next one another).
2. A listener closes when the last worker that holds it closes its server, or with the cluster. A worker's death closes
   nothing: what waits in the queue is served by whoever comes next.
3. Each listener has a hand-off of its own, because not every worker serves every address.
"""

from __future__ import annotations

import errno
import itertools
import os
import selectors
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from sharedcluster.cluster.hand_off import HandOff
from sharedcluster.cluster.listener import Listener, bind
from sharedcluster.cluster.messages import Connection, Listen
from sharedcluster.cluster.scheduling import LeastConnections, Policy, RoundRobin, Sticky
from sharedcluster.cluster.worker_handle import WorkerHandle
from sharedcluster.config import BindAddress
from sharedcluster.errors import BindError

POLICIES: Final[dict[str, type[Policy]]] = {
    "round-robin": RoundRobin,
    "least-connections": LeastConnections,
    "sticky": Sticky,
    "shared": RoundRobin,  # only for what comes back: the workers accept for themselves
}

_SO_DETACH_FILTER: Final = 27
_Key = tuple[str, int, str, int | None, int]


@dataclass(slots=True)
class Served:
    """A listener, who holds it, and the hand-off between them."""

    key: _Key
    listener: Listener
    hand_off: HandOff
    is_shared: bool
    holders: set[int] = field(default_factory=set)


class Servers:
    """All of them; `selector` is the primary's."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._by_key: dict[_Key, Served] = {}
        self._by_index: dict[int, Served] = {}
        self._indices = itertools.count()

    def listen(self, worker: WorkerHandle, request: Listen, policy: str) -> Served:
        """Give the worker a share in a listener, which is bound if this is the first who asks.

        Raises:
            OSError: It cannot be bound; the text says what to do.
        """
        key = (request.host, request.port, request.path, request.fd, request.index)
        served = self._by_key.get(key) or self._bind(key, request, policy)
        served.holders.add(worker.id)
        return served

    def _bind(self, key: _Key, request: Listen, policy: str) -> Served:
        asked = BindAddress(host=request.host, port=request.port, path=request.path, fd=request.fd)
        try:
            bound = bind(asked, backlog=request.backlog)
        except BindError as error:
            code = getattr(error.__cause__, "errno", None)
            raise OSError(code if code and code > 0 else errno.EINVAL, " ".join(str(error).splitlines())) from error
        index = next(self._indices) & 0xFFFF
        listener = Listener(index, _really(asked, bound), bound, limit=request.backlog)
        is_shared = policy == "shared"
        hand_off = HandOff([listener], POLICIES[policy](), self._selector, accepts=not is_shared)
        self._by_key[key] = self._by_index[index] = served = Served(key, listener, hand_off, is_shared)
        return served

    def unlisten(self, worker: WorkerHandle, index: int) -> None:
        """The worker closed its server; the last one that does closes the listener."""
        served = self._by_index.get(index)
        if served is None or worker.id not in served.holders:
            return
        served.hand_off.leave(worker)
        served.holders.discard(worker.id)
        if not served.holders:
            self._close(served)

    def leave(self, worker: WorkerHandle) -> None:
        """The worker gets no more connections."""
        for served in self._by_index.values():
            served.hand_off.leave(worker)

    def forget(self, worker: WorkerHandle, orphans: list[Connection]) -> None:
        """The worker is dead; what it never acknowledged goes to the others, or to whoever takes its place."""
        self.leave(worker)
        self.take_back(orphans)
        for served in self._by_index.values():
            served.holders.discard(worker.id)

    def take_back(self, connections: list[Connection]) -> None:
        """Connections that a worker did not take."""
        for connection in connections:
            served = self._by_index.get(connection.listener)
            if served is None:
                os.close(connection.fd)  # its listener is closed: there is nobody who could serve it
            else:
                served.hand_off.take_back([connection])

    def give(self, connection: Connection) -> None:
        """An idle connection that a leaving worker gave away."""
        served = self._by_index.get(connection.listener)
        if served is None or not served.listener.is_open:
            os.close(connection.fd)  # it was idle, so its client loses nothing
        else:
            served.listener.pending.append(connection)

    def rest(self, worker: WorkerHandle, index: int, now: float) -> None:
        """The worker refused a connection of this listener: leave it alone for a moment."""
        if served := self._by_index.get(index):
            served.hand_off.rest(worker, now)

    def dispatch(self) -> None:
        """Hand off what is pending, as far as there are workers with credit."""
        for served in self._by_index.values():
            if served.listener.pending:
                served.hand_off.dispatch()

    def watch(self, now: float) -> bool:
        """Watch the listeners that have room; True if one of them has to be looked at again soon."""
        is_restless = False
        for served in self._by_index.values():
            served.hand_off.watch(now)
            is_restless = is_restless or served.hand_off.is_waiting
        return is_restless

    # -- closing without loss --------------------------------------------------------------------------------------

    def refuse_newcomers(self) -> None:
        """First half, see `Listener.refuse_newcomers`."""
        for served in self._by_index.values():
            served.hand_off.refuse_newcomers()

    def accept_all(self, now: float) -> bool:
        """Empty the backlogs; True while there is something left to hand off."""
        left = [served.hand_off.accept_all(now) for served in self._by_index.values() if not served.is_shared]
        return any(left)

    def close(self) -> int:
        """Close them all; returns how many pending connections were cut by it."""
        return sum(self._close(served) for served in list(self._by_index.values()))

    def close_those_of(self, leaving: Collection[int]) -> int:
        """Close those that only these workers hold; one that a newcomer holds too takes newcomers again."""
        cut = 0
        for served in list(self._by_index.values()):
            if served.holders <= set(leaving):
                cut += self._close(served)
            else:
                with suppress(OSError):
                    served.listener.socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        return cut

    def _close(self, served: Served) -> int:
        del self._by_key[served.key], self._by_index[served.listener.index]
        return served.hand_off.close()


def _really(asked: BindAddress, bound: socket.socket) -> BindAddress:
    """The address that was bound: the port that 0 became, what an inherited descriptor is bound to."""
    name = bound.getsockname()
    if isinstance(name, tuple):
        return BindAddress(host=name[0], port=name[1], fd=asked.fd)
    return asked if asked.path else replace(asked, path=os.fsdecode(name))
