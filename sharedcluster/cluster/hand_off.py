"""From the listeners to the workers: whose turn it is to accept, or accept, pick, pass on; and take back.

A connection is in exactly one place: the kernel's backlog, a listener's `pending`, or a handle's `unacknowledged`.
Where the policy need not know the client (`turns`) it goes from the backlog to the worker that serves it. Passed on as
descriptors are the others, those of unix sockets, and what comes back: its worker died, refused, or drains and gives
it away. That goes into `pending` again: to the head if it has been waiting, to the tail if it is an idle one that has
nothing to say yet.
"""

from __future__ import annotations

import resource
import selectors
import time
from collections.abc import Callable, Sequence
from typing import Final

from sharedcluster.cluster.board import COUNTED
from sharedcluster.cluster.ipc import ChannelClosed
from sharedcluster.cluster.listener import Listener
from sharedcluster.cluster.messages import Connection
from sharedcluster.cluster.scheduling import Policy
from sharedcluster.cluster.turns import Turns
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from sharedcluster.log import logger

WARN_INTERVAL: Final = 10.0
REST: Final = 0.25
"""Seconds a worker that refused a connection gets none."""


LOOK_AHEAD: Final = 64
"""Pending connections that may be passed over because their own worker (policy `sticky`) has no credit."""


class HandOff:
    """The listeners, the workers in rotation, and the policy between them.

    With `accepts` False the workers take new connections off the listening sockets themselves (policy `shared`); only
    what comes back, and what is left in the backlog at a stop, goes through here. With `in_turns` they do so when this
    object says so, where the kernel tells how many wait; the policy is then asked without a client.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        policy: Policy,
        selector: selectors.BaseSelector,
        *,
        accepts: bool = True,
        in_turns: bool = False,
    ) -> None:
        self.listeners = tuple(listeners)
        self._accepts = accepts
        self._policy = policy
        self._selector = selector
        self._in_rotation: dict[int, WorkerHandle] = {}
        self._resting: list[tuple[float, WorkerHandle]] = []
        self._watched: set[int] = set()
        self._acceptors = {listener.index: _acceptor(listener) for listener in self.listeners}
        looked_at = [each for each in self.listeners[:COUNTED] if in_turns and each.can_look()]
        self._turns = Turns(looked_at, policy, self._in_rotation, selector, self.leave) if looked_at else None
        self._in_turns = {each.index for each in looked_at}

    # -- rotation --------------------------------------------------------------------------------------------------

    def enter(self, worker: WorkerHandle) -> None:
        """It takes connections from now on; one that rested does so no longer."""
        self.leave(worker)
        self._in_rotation[worker.id] = worker
        self._policy.add(worker)

    def leave(self, worker: WorkerHandle) -> None:
        """It gets none any more, also not after its rest; a worker that is not in rotation is left as it is."""
        self._resting = [(until, other) for until, other in self._resting if other is not worker]
        if worker.id in self._in_rotation:
            del self._in_rotation[worker.id]
            self._policy.remove(worker)
            if self._turns is not None:
                self._turns.forget(worker)

    def rest(self, worker: WorkerHandle, now: float) -> None:
        """It refused a connection (it is out of descriptors): leave it alone for a moment, or the two would spin."""
        if worker.id in self._in_rotation:
            self.leave(worker)
            self._resting.append((now + REST, worker))

    def _wake(self, now: float) -> None:
        for until, worker in tuple(self._resting):
            if until <= now:
                self._resting.remove((until, worker))
                if worker.state is WorkerState.LISTENING and worker.terminated_at is None:
                    self.enter(worker)

    # -- connections -----------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Hand off what is pending, and give turns, as far as there are workers with credit."""
        for listener in self.listeners:
            pending = listener.pending
            if pending and self._turns is not None:
                self._turns.look()
            skipped: list[Connection] = []
            while pending and len(skipped) < LOOK_AHEAD:
                worker = self._policy.pick(pending[0].peer)
                if worker is None:
                    if not any(w.has_credit for w in self._in_rotation.values()):
                        break
                    skipped.append(pending.popleft())  # this one waits for its own worker, the next may have another
                    continue
                try:
                    if not worker.hand_off(pending[0]):
                        break
                except ChannelClosed:
                    # It died a moment ago and has not been reaped; nothing was sent, so nothing is owed.
                    self.leave(worker)
                    continue
                pending.popleft()
            if len(skipped) < LOOK_AHEAD:
                pending.extendleft(reversed(skipped))
            else:  # the clients of one busy worker must not stand in front of everybody else's for ever
                pending.extend(skipped)
        if self._turns is not None:
            self._turns.give()

    def take_back(self, connections: list[Connection]) -> None:
        """What a dead or refusing worker never acknowledged goes to the head of its queue."""
        for listener in self.listeners:
            listener.give_back([c for c in connections if c.listener == listener.index])

    def give(self, connection: Connection) -> None:
        """An idle connection that its worker gave away joins the queue like a new one."""
        self.listeners[connection.listener].pending.append(connection)

    @property
    def has_room(self) -> bool:
        """Whether connections that are given back may join, or their descriptors would be more than this process may
        have: a quarter of those is for what is pending, the rest for what nobody can refuse.
        """
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        return sum(len(listener.pending) for listener in self.listeners) < most

    # -- the listeners ---------------------------------------------------------------------------------------------

    def watch(self, now: float) -> None:
        """Watch those that have room; a full or exhausted one leaves its clients in the kernel's backlog."""
        self._wake(now)
        for listener in self.listeners:
            if listener.paused_until and listener.paused_until <= now:
                listener.paused_until = 0.0
            accepts = self._accepts and listener.index not in self._in_turns
            wanted = accepts and listener.is_open and not listener.is_full and not listener.paused_until
            if wanted and listener.index not in self._watched:
                self._selector.register(listener.socket, selectors.EVENT_READ, self._acceptors[listener.index])
                self._watched.add(listener.index)
            elif not wanted:
                self._unwatch(listener)

    def _unwatch(self, listener: Listener) -> None:
        if listener.index in self._watched:
            self._selector.unregister(listener.socket)
            self._watched.discard(listener.index)

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for what no event announces: descriptors, or a loop that turns again."""
        if self._resting or (self._turns is not None and self._turns.are_awaited):
            return True
        return any(each.paused_until or each.pending for each in self.listeners)

    def refuse_newcomers(self) -> None:
        """First half of closing without loss, see `Listener.refuse_newcomers`."""
        for listener in self.listeners:
            listener.refuse_newcomers()

    def accept_all(self, now: float) -> bool:
        """Empty the kernel's backlogs; True while there was something in one, or something is pending."""
        taken = sum(listener.accept(now) for listener in self.listeners if listener.is_open)
        return bool(taken) or any(listener.pending for listener in self.listeners)

    def stop_accepting(self) -> None:
        """Another primary accepts on the same sockets from now on; what is pending here is still handed off."""
        self._end_turns()
        for listener in self.listeners:
            self._unwatch(listener)
            listener.close(keep_file=True)

    def _end_turns(self) -> None:
        if self._turns is not None:
            self._turns.close()
            self._turns = None

    def forget(self, worker: WorkerHandle) -> None:
        """It is dead, and its row of the board goes to another one: keep what it has counted."""
        for listener in self.listeners:
            listener.accepted += self._taken(worker, listener)

    @staticmethod
    def _taken(worker: WorkerHandle, listener: Listener) -> int:
        return worker.row.taken(listener.index) if listener.index < COUNTED else 0

    @property
    def worker_fds(self) -> dict[int, int]:
        """The listening sockets of which workers accept themselves, by the listener's index."""
        return {each.index: each.socket.fileno() for each in self.listeners if self._is_workers(each)}

    def _is_workers(self, listener: Listener) -> bool:
        return not self._accepts or listener.index in self._in_turns

    def close(self, *, keep_files: bool = False) -> int:
        """Close the listeners; returns how many pending connections were cut by it."""
        cut = 0
        self._end_turns()
        for listener in self.listeners:
            self._unwatch(listener)
            listener.close(keep_file=keep_files)
            cut += listener.cut_pending()
        return cut

    def close_in_child(self) -> None:
        """In a forked worker: close every descriptor."""
        if self._turns is not None:
            self._turns.close_in_child()
        for listener in self.listeners:
            listener.close_in_child(keep_socket=self._is_workers(listener))


def _acceptor(listener: Listener) -> Callable[[int], None]:
    warn_at = 0.0

    def on_readable(_mask: int) -> None:
        nonlocal warn_at
        if listener.socket.fileno() < 0:  # closed by another event of this turn (a take-over)
            return
        now = time.monotonic()
        listener.accept(now)
        if listener.paused_until and now >= warn_at:
            warn_at = now + WARN_INTERVAL
            logger.warning("out of file descriptors: new connections wait in the kernel (see ulimit -n)")

    return on_readable
