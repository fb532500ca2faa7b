"""Connections that workers accept themselves, each when it is its turn: the primary looks at the backlog and decides.

Theory of operation. The workers have the listening socket open, but only the primary watches it. It asks the kernel
how many connections wait there and gives as many turns, by the policy, in one message per worker (`TakeTurns`); a
worker that gets one accepts. So a connection is in the kernel until the process that serves it takes it: no descriptor
travels, none is closed twice, and a worker that stands still, is stopped or dies holds nobody.

Waking the primary is what costs, so under load it is not woken for each newcomer. While some worker has no turn left
the bell rings for every one. Once all have some, a newcomer would be served no sooner for being noticed: the bell is
muted, and the first worker that comes to its last turn says so. What has gathered by then is given out at once, so the
more there is to do, the larger the groups.

Laws:

1. A turn is a permission, not a connection. There may be more turns than connections, never fewer for long: a turn
   that finds nothing is used up like any other.
2. The backlog is read *before* the board says which turns are used, and a worker marks a turn as used *before* it
   accepts. So a connection that is taken between the two looks makes us give one turn too many, never one too few.
3. A turn counts as long as its worker answers. Those of one that dies, leaves, stands still or has used none of its
   own for a moment are not counted, and the connections they were meant for are another worker's turn.
4. While somebody waits in the backlog, or the bell is muted, the primary looks again within one tick, whatever was
   lost on the way.
"""

from __future__ import annotations

import select
import selectors
import time
from collections.abc import Callable, Iterable, Mapping

from sharedcluster.cluster.ipc import ChannelClosed
from sharedcluster.cluster.listener import Listener
from sharedcluster.cluster.messages import TakeTurns
from sharedcluster.cluster.scheduling import Policy
from sharedcluster.cluster.worker_handle import WorkerHandle


class Turns:
    """The turns at some listeners.

    Args:
        listeners: Those whose connections workers accept in turns.
        policy: Whose turn it is.
        workers: Those in rotation.
        selector: The primary's loop.
        leave: Called with a worker that is gone.
    """

    def __init__(
        self,
        listeners: Iterable[Listener],
        policy: Policy,
        workers: Mapping[int, WorkerHandle],
        selector: selectors.BaseSelector,
        leave: Callable[[WorkerHandle], None],
    ) -> None:
        self.listeners = tuple(listeners)
        self._policy = policy
        self._workers = workers
        self._selector = selector
        self._leave = leave
        self._has_rung = True
        self._is_muted = True
        # A loop that watched the sockets themselves would be told again and again of those whom a worker is about to
        # accept. This one tells of each newcomer once (EPOLLET), and the loop watches it.
        self._bell = select.epoll()
        for listener in self.listeners:
            self._bell.register(listener.socket, select.EPOLLIN | select.EPOLLET)

    def _on_bell(self, _mask: int) -> None:
        if not self._bell.closed:  # by another event of this turn (a take-over)
            self._bell.poll(0)
            self._has_rung = True

    @property
    def are_awaited(self) -> bool:
        """Whether somebody waited in a backlog when we last looked, or may come unnoticed."""
        return self._is_muted or any(listener.waiting for listener in self.listeners)

    def look(self) -> None:
        """Note which turns are used; policies ask how many a worker has."""
        now = time.monotonic_ns()
        for worker in self._workers.values():
            worker.look_at_turns(now)

    def give(self) -> None:
        """Give turns to accept what waits and is nobody's turn yet."""
        has_rung, self._has_rung = self._has_rung, False
        for listener in self.listeners:
            if has_rung or self._is_muted or listener.waiting:
                self._give(listener)
        if self._all_are_busy():
            for worker in self._workers.values():
                worker.ask_about_turns()
            # One that had come to its last turn before it could see the question will not answer it.
            self.look()
            if not self._all_are_busy():
                for listener in self.listeners:
                    self._give(listener)
        self._mute(self._all_are_busy())

    def _all_are_busy(self) -> bool:
        """Whether nobody would be served sooner if we knew of newcomers."""
        return all(worker.turns for worker in self._workers.values())

    def _give(self, listener: Listener) -> None:
        if not listener.is_open:
            return
        waiting = listener.look()
        now = time.monotonic_ns()
        unclaimed = waiting - self._claimed(listener.index, now)
        if not waiting:
            return
        if unclaimed <= 0 and self._is_muted:
            # All were busy, and those who wait are their turn. One that is through with its own need not stand by.
            unclaimed = min(waiting, sum(not worker.turns for worker in self._workers.values()))
        # A crowd is shared out in pieces: to pick for each of them was half of the primary's work under load.
        piece = max(1, unclaimed // max(1, len(self._workers)))
        calls: dict[WorkerHandle, int] = {}
        while unclaimed > 0 and (worker := self._policy.pick(None)) is not None:
            if worker.answers(now):
                given = worker.give_turns(listener.index, min(piece, unclaimed), now)
            elif worker.turns:
                break  # nobody answers, and each has a turn for when it does
            else:
                given = worker.give_turns(listener.index, 1, now)
            calls[worker] = calls.get(worker, 0) + given
            unclaimed -= given
        for worker, count in calls.items():
            self._call(worker, listener, count)
        if unclaimed > 0:
            self._make_room(listener)

    @staticmethod
    def _make_room(listener: Listener) -> None:
        """Take into our queue what is more than half of the kernel's, or that one overflows while ours is empty."""
        while listener.look() > listener.limit // 2 and not listener.is_full:
            if not listener.accept(time.monotonic()):
                return

    def _claimed(self, index: int, now: int) -> int:
        """Turns at this listener that are given, not used, and will be."""
        claimed = 0
        for worker in self._workers.values():
            worker.look_at_turns(now)
            if worker.turns and worker.answers(now):
                claimed += worker.turns.count(index)
        return claimed

    def _call(self, worker: WorkerHandle, listener: Listener, count: int) -> None:
        try:
            if not worker.channel.send(TakeTurns(listener.index, count)):
                worker.revoke_turns(count)
        except ChannelClosed:
            self._leave(worker)

    def _mute(self, is_muted: bool) -> None:
        if is_muted != self._is_muted:
            self._is_muted = is_muted
            if is_muted:
                self._selector.unregister(self._bell)
            else:
                self._selector.register(self._bell, selectors.EVENT_READ, self._on_bell)

    def forget(self, worker: WorkerHandle) -> None:
        """It takes no more turns; those it was given are others'."""
        worker.void_turns()
        self._has_rung = True

    def close(self) -> None:
        """Give no more turns. The sockets may be open in workers, so the bell would go on ringing for them."""
        if not self._is_muted:
            self._selector.unregister(self._bell)
        self._bell.close()

    def close_in_child(self) -> None:
        """In a forked process."""
        self._bell.close()
