"""A worker as the primary sees it: its state, what was handed to it, and how it is asked to leave.

None of the worker's own logic is here (that is `worker`). The handle owns the connections that the worker was passed
and has not acknowledged: as long as `Accepted` has not come, the primary's copy of the descriptor is open and nobody
has read a byte, so the connection can go to another worker if this one dies, refuses or runs out of descriptors. It
also knows which turns to accept the worker was given and has not used; those hold nothing.

    forked -> online -> listening -> draining -> dead
"""

from __future__ import annotations

import os
import signal
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sharedcluster.cluster.board import STANDS_STILL, Row
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import Connection, Message, NewConnection, WorkerStats
from sharedcluster.errors import Bug

CREDIT: Final = 4
"""Un-acknowledged connections a worker may hold. A worker that stands still keeps no more than these waiting; one
that works always finds the next ones in its socket. (1 is Node's figure; more saves waking the primary for each.)"""


TURNS: Final = 16
"""Unused turns a worker may have. They hold nothing, so more would do no harm, but who has some is given no others
when a neighbour is free; fewer would wake the primary more often."""


class WorkerState(StrEnum):
    """Named after the events."""

    FORKED = "forked"
    ONLINE = "online"
    LISTENING = "listening"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class ExitReason:
    """How a worker's process ended: an exit code or a signal, whether it had been asked to go, and whether the
    kernel killed somebody of this control group for want of memory at that time.
    """

    code: int | None
    signal: int | None
    asked: bool
    out_of_memory: bool = False

    @property
    def how(self) -> str:
        """In words: `was killed by SIGKILL`, `ended with code 7`."""
        return f"was killed by {signal.Signals(self.signal).name}" if self.signal else f"ended with code {self.code}"


class WorkerHandle:
    """One worker process, from the primary's side.

    `pid` is 0 until a mold has said which process it forked for it. `id` is never used again; `slot` is, by the
    worker that takes this one's place. `restarts` counts how often the slot was filled again after a crash.
    """

    def __init__(
        self,
        id: int,
        slot: int,
        generation: int,
        pid: int,
        channel: MessageSocket,
        row: Row,
        now: float,
        restarts: int = 0,
    ) -> None:
        # The process
        self.id = id
        self.slot = slot
        self.generation = generation
        self.pid = pid
        self.channel = channel
        self.row = row
        self.restarts = restarts
        self.state = WorkerState.FORKED
        self.forked_at = now
        self.listening_at: float | None = None
        # What it says of itself
        self.stats = WorkerStats()
        self.cpu_percent = 0.0
        self.heartbeat_at = now
        self.secret = ""
        self.load_failure: tuple[str, str] | None = None
        # Its way out
        self.retiring = ""
        self.asked_to_leave = False
        self.deadline: float | None = None
        self.terminated_at: float | None = None
        self.killed = False
        self.is_disconnected = False
        self.exit_status: int | None = None
        # Connections
        self.unacknowledged: dict[int, Connection] = {}
        self.turns: deque[int] = deque()
        self.given_back = 0
        self._passed = 0
        self._seq = 0
        self._turns_used = 0
        self._is_sated = False
        self._progress_at = 0

    def __repr__(self) -> str:
        return f"<worker {self.id} slot={self.slot} gen={self.generation} pid={self.pid} {self.state}>"

    # -- connections -----------------------------------------------------------------------------------------------

    @property
    def owes(self) -> int:
        """How many connections it was handed, or told to accept, and has not taken as far as is known."""
        return len(self.unacknowledged) + len(self.turns)

    @property
    def load(self) -> tuple[int, int]:
        """Requests in flight and open connections: as its row says, and what it was given since the row said so.

        A turn is used long before its row tells what came of it: clients of the same moment tell the difference.
        """
        untold = len(self.unacknowledged) + max(0, self._turns_used + len(self.turns) - self.row.turns_told)
        return self.row.in_flight + untold, self.row.connections + untold

    @property
    def has_credit(self) -> bool:
        """Whether one more connection may be handed to it, or is its turn."""
        return self.state is WorkerState.LISTENING and len(self.unacknowledged) < CREDIT and not self._is_sated

    def is_free(self, now: int) -> bool:
        """Whether it owes nothing and its loop is not standing still (`now` is `time.monotonic_ns()`)."""
        return (
            not self.unacknowledged
            and not self.turns
            and self.state is WorkerState.LISTENING
            and not self.row.stands_still(now)
        )

    def answers(self, now: int) -> bool:
        """Whether its loop turns and it takes the turns it is given; false of one that is stopped by a signal, too."""
        if self.row.stands_still(now):
            return False
        return not self.turns or now - self._progress_at <= STANDS_STILL

    @property
    def handed_off(self) -> int:
        """Connections it was passed, has accepted itself, or is to accept."""
        return self._passed + self.row.all_taken + len(self.turns)

    def give_turns(self, listener: int, count: int, now: int) -> int:
        """It is to accept so many more connections of this listener, or as many as it may; the caller says so to it
        (`TakeTurns`). Returns how many it is; at least one of one that `has_credit`.
        """
        if not self.turns:
            self._progress_at = now
        count = min(count, TURNS - len(self.turns))
        self.turns.extend((listener,) * count)
        self._is_sated = len(self.turns) >= TURNS
        return count

    def revoke_turns(self, count: int) -> None:
        """It could not be told of the last ones."""
        for _ in range(count):
            self.turns.pop()
        self._is_sated = False

    def look_at_turns(self, now: int) -> None:
        """Note which turns the board says are used; they are used in the order in which they were given."""
        used = self.row.turns_used
        if used > self._turns_used:
            self._progress_at = now
            for _ in range(min(used - self._turns_used, len(self.turns))):
                self.turns.popleft()
            self._turns_used = used
            if len(self.turns) <= TURNS // 2:  # else each turn it uses would be followed by a message of its own
                self._is_sated = False

    def ask_about_turns(self) -> None:
        """Have it say when it has used them all."""
        self.row.ask(self._turns_used + len(self.turns))

    def void_turns(self) -> None:
        """Nobody waits for it any more; should it use them yet, they are not counted again."""
        self._turns_used += len(self.turns)
        self.turns.clear()
        self._is_sated = False

    def hand_off(self, connection: Connection) -> bool:
        """Send a connection to the worker and keep it as un-acknowledged.

        Returns:
            False if it could not be sent; the connection is still the caller's.

        Raises:
            ChannelClosed: The worker is gone; the connection is still the caller's.
        """
        seq = self._seq + 1
        message = NewConnection(seq, connection.listener, connection.peer, connection.proxied)
        if not self.channel.send(message, connection.fd):
            return False
        self._seq = seq
        self.unacknowledged[seq] = connection
        self._passed += 1
        return True

    def acknowledged(self, seq: int) -> None:
        """The worker owns everything up to `seq`: close the primary's copies."""
        if seq > self._seq:
            raise Bug(f"worker {self.id} acknowledged connection {seq} of {self._seq}")
        while self.unacknowledged and (first := next(iter(self.unacknowledged))) <= seq:
            os.close(self.unacknowledged.pop(first).fd)

    def returned(self, seq: int) -> Connection:
        """The worker refused it: it is the caller's again."""
        connection = self.unacknowledged.pop(seq, None)
        if connection is None:
            raise Bug(f"worker {self.id} returned connection {seq}, which it was not given")
        return connection

    def take_back(self) -> list[Connection]:
        """Everything it never took, oldest first. Only for a dead worker: a stalled one may still accept.

        The board has the last word: the worker may have written there and died before it could tell.
        """
        if self.state is not WorkerState.DEAD:
            raise Bug(f"{self!r} is alive and may still take what it was handed")
        self.acknowledged(self.row.accepted)
        connections = list(self.unacknowledged.values())
        self.unacknowledged.clear()
        return connections

    # -- messages --------------------------------------------------------------------------------------------------

    def tell(self, message: Message, fd: int | None = None) -> bool:
        """Send a message; False if it cannot be sent (the worker is gone, or its socket is full)."""
        try:
            return self.channel.send(message, fd)
        except ChannelClosed:
            return False  # the exit is reaped in a moment

    def heard(self, stats: WorkerStats, now: float) -> None:
        """Take in a heartbeat."""
        passed = now - self.heartbeat_at
        if passed > 0.5 and stats.cpu_seconds >= self.stats.cpu_seconds:
            self.cpu_percent = 100 * (stats.cpu_seconds - self.stats.cpu_seconds) / passed
        self.stats = stats
        self.heartbeat_at = now
