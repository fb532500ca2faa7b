"""Whose turn it is to accept: real listening sockets and clients, workers without processes."""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedcluster.cluster.hand_off import HandOff
from sharedcluster.cluster.ipc import MessageSocket
from sharedcluster.cluster.listener import Listener, bind
from sharedcluster.cluster.messages import TakeTurns
from sharedcluster.cluster.scheduling import LeastConnections, RoundRobin
from sharedcluster.cluster.worker_handle import TURNS, WorkerHandle, WorkerState
from sharedcluster.config import BindAddress
from tests.unit.cluster import fake_workers
from tests.waiting import wait_until

BACKLOG = 100


class Worker:
    """A worker's side of the turns: it has read its messages, and accepts when the test says so."""

    def __init__(self, handle: WorkerHandle, channel: MessageSocket, listening: list[socket.socket]) -> None:
        self.handle = handle
        self.channel = channel
        self.listening = listening
        self.waiting: deque[int] = deque()
        self.groups: list[int] = []

    def read(self) -> int:
        """Take in what it was told; returns how many turns it has."""
        while (received := self.channel.receive()) is not None:
            message = received[0]
            assert isinstance(message, TakeTurns)
            self.groups.append(message.count)
            self.waiting.extend([message.listener] * message.count)
        return len(self.waiting)

    def use(self) -> bool:
        """Use one turn as a worker does; True if there was a connection."""
        listener = self.waiting.popleft()
        self.handle.row.uses_turn()
        try:
            self.listening[listener].accept()[0].close()
        except BlockingIOError:
            return False
        self.handle.row.takes(listener)
        return True


class Room:
    """A primary's hand-off over listening sockets, and everybody who connects to them."""

    def __init__(self, stack: ExitStack, policy: RoundRobin, listeners: int = 1) -> None:
        self.stack = stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        sockets = [bind(BindAddress("127.0.0.1", 0), backlog=BACKLOG) for _ in range(listeners)]
        self.listeners = [
            Listener(index, BindAddress(*each.getsockname()), each, limit=BACKLOG)
            for index, each in enumerate(sockets)
        ]
        self.hand_off = HandOff(self.listeners, policy, self.selector, in_turns=True)
        stack.callback(self.hand_off.close)
        self.workers: list[Worker] = []

    def enter(self) -> Worker:
        """One more worker."""
        ours, theirs = MessageSocket.pair()
        self.stack.callback(ours.close)
        self.stack.callback(theirs.close)
        handle = fake_workers.worker(len(self.workers) + 1)
        handle.channel = ours
        handle.row.waits(0, 0, 0)
        self.workers.append(Worker(handle, theirs, [each.socket for each in self.listeners]))
        self.hand_off.enter(handle)
        return self.workers[-1]

    def connect(self, count: int = 1, listener: int = 0) -> None:
        """So many clients more; they wait in the kernel when this returns."""
        for _ in range(count):
            client = socket.create_connection(self.listeners[listener].socket.getsockname()[:2], timeout=5)
            self.stack.callback(client.close)

    def turn(self) -> None:
        """A turn of the primary's loop."""
        for key, mask in self.selector.select(0):
            key.data(mask)
        self.hand_off.dispatch()

    def rings(self) -> bool:
        """Whether the primary would be woken by what it watches."""
        return bool(self.selector.select(0))

    def is_restless(self) -> bool:
        """Whether the primary wants to look again within a tick."""
        return self.hand_off.is_waiting


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed at the end."""
    with ExitStack() as opened:
        yield opened


def test_each_connection_is_one_workers_turn(stack: ExitStack) -> None:
    """Clients one by one go round; the primary is told of each once, and of nobody who is somebody's turn already."""
    room = Room(stack, RoundRobin())
    workers = [room.enter() for _ in range(3)]
    room.turn()
    for number in range(7):
        room.connect()
        assert room.rings()
        room.turn()
        assert not room.rings()
        room.turn()
        assert [each.read() for each in workers] == [int(index == number % 3) for index in range(3)]
        assert workers[number % 3].use()


def test_a_crowd_is_given_out_in_groups(stack: ExitStack) -> None:
    """Ten who wait are five turns each, in one message each; nobody waits for more."""
    room = Room(stack, RoundRobin())
    first, second = room.enter(), room.enter()
    room.connect(10)
    room.turn()
    assert (first.read(), second.read()) == (5, 5)
    assert (first.groups, second.groups) == ([5], [5])
    assert all(each.use() for each in (first, second) for _ in range(5))


def test_a_worker_has_only_so_many_turns(stack: ExitStack) -> None:
    """What is beyond waits in the kernel; it is given out in groups again, not one for each turn that is used."""
    room = Room(stack, RoundRobin())
    worker = room.enter()
    room.connect(TURNS + 8)
    room.turn()
    assert worker.read() == TURNS
    for _ in range(TURNS // 2 - 1):
        assert worker.use()
        room.turn()
    assert worker.read() == TURNS - (TURNS // 2 - 1)
    worker.use()
    room.turn()
    worker.read()
    assert worker.groups[1:] == [TURNS // 2]


def test_the_bell_is_muted_while_nobody_is_free(stack: ExitStack) -> None:
    """All have a turn: newcomers wake nobody. The first that comes to its last turn says so, and it rings again."""
    room = Room(stack, RoundRobin())
    first, second = room.enter(), room.enter()
    room.connect(2)
    room.turn()
    assert (first.read(), second.read()) == (1, 1)
    room.connect(3)
    assert not room.rings()
    assert not first.handle.row.is_to_tell()
    assert first.use()
    assert first.handle.row.is_to_tell()
    assert not first.handle.row.is_to_tell()  # once
    room.turn()
    assert first.read() + second.read() == 4  # the one that is second's turn, and the three
    for each in (first, second):
        while each.read():
            each.use()
    room.turn()
    room.connect()
    assert room.rings()


def wait_until_silent(worker: Worker) -> None:
    """Wait until it counts as one that does not answer."""
    wait_until(lambda: not worker.handle.answers(time.monotonic_ns()), "it does not answer", interval=0.005)


class Quick:
    """The primary's end of a channel to workers that use what they are told before the primary's next instruction."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.channel = worker.handle.channel

    def send(self, message: TakeTurns) -> bool:
        """As `MessageSocket.send`."""
        assert self.channel.send(message)
        while self.worker.read():
            self.worker.use()
            assert not self.worker.handle.row.is_to_tell()
        return True


def test_a_worker_may_be_through_before_it_is_asked(stack: ExitStack) -> None:
    """All have a turn, and one has used it before it could see that the primary wants to hear it: the bell rings."""
    room = Room(stack, RoundRobin())
    quick, slow = room.enter(), room.enter()
    quick.handle.channel = Quick(quick)  # type: ignore[assignment]
    room.turn()
    room.connect(2)
    room.turn()
    assert slow.read() == 1
    room.connect()
    assert room.rings()


def test_the_primary_looks_again_while_it_could_miss_somebody(stack: ExitStack) -> None:
    """Muted, or with somebody waiting, it asks to be called within a tick; with nobody there it may sleep."""
    room = Room(stack, RoundRobin())
    worker = room.enter()
    room.turn()
    assert not room.is_restless()
    room.connect()
    room.turn()
    assert room.is_restless()
    worker.read()
    worker.use()
    room.turn()
    assert not room.is_restless()


def test_a_muted_bell_is_no_reason_to_sleep(stack: ExitStack) -> None:
    """Nobody waits, but the only worker has a turn left: if what it says got lost, nothing else would wake us."""
    room = Room(stack, RoundRobin())
    worker = room.enter()
    room.connect()
    room.turn()
    assert worker.read() == 1
    room.listeners[0].socket.accept()[0].close()  # somebody was faster
    room.turn()
    assert not room.rings()
    assert room.is_restless()


def test_who_waits_for_a_stopped_worker_is_anothers_turn(stack: ExitStack) -> None:
    """A worker that seems to wait for events and does not take its turn (SIGSTOP) keeps nobody."""
    room = Room(stack, RoundRobin())
    stopped, other = room.enter(), room.enter()
    room.connect()
    room.turn()
    assert stopped.read() == 1
    wait_until_silent(stopped)
    room.turn()
    assert other.read() == 1
    assert other.use()
    assert not stopped.use()  # when it goes on, it finds that somebody has been faster
    room.turn()
    room.connect()
    room.turn()
    assert stopped.read() == 1, "it counts again"


def test_who_waits_for_a_worker_that_stands_still_is_anothers_turn(stack: ExitStack) -> None:
    """The board says that its loop has worked for long without a pause."""
    room = Room(stack, RoundRobin())
    busy, other = room.enter(), room.enter()
    room.connect(2)
    room.turn()
    assert (busy.read(), other.read()) == (1, 1)
    busy.handle.row.works()
    wait_until_silent(busy)
    assert other.use()
    room.turn()
    assert other.read() == 1
    assert other.use()


def test_nobody_answers(stack: ExitStack) -> None:
    """All stand still: each has one turn for when it goes on, however often the primary looks."""
    room = Room(stack, RoundRobin())
    workers = [room.enter() for _ in range(2)]
    for each in workers:
        each.handle.row.works()
    for each in workers:
        wait_until_silent(each)
    room.connect(9)
    for _ in range(5):
        room.turn()
    assert [each.read() for each in workers] == [1, 1]


def test_the_turns_of_who_leaves_are_others(stack: ExitStack) -> None:
    """It drains or dies with turns in hand; they are given again, and what it still uses of them does no harm."""
    room = Room(stack, RoundRobin())
    leaving, other = room.enter(), room.enter()
    room.connect(6)
    room.turn()
    assert (leaving.read(), other.read()) == (3, 3)
    room.hand_off.leave(leaving.handle)
    assert leaving.use()
    room.turn()
    assert other.read() == 5
    assert all(other.use() for _ in range(5))
    room.hand_off.enter(leaving.handle)
    room.connect(2)
    room.turn()
    assert (leaving.read(), other.read()) == (3, 1)  # two old ones and a new one
    leaving.use()
    leaving.use()
    room.turn()
    assert len(leaving.handle.turns) == 1, "the old ones it has used are not taken for the new one"


def test_one_that_is_gone_is_noticed_when_it_is_told(stack: ExitStack) -> None:
    """Its end of the channel is closed: it leaves the rotation, and its turn is another's."""
    room = Room(stack, RoundRobin())
    gone, other = room.enter(), room.enter()
    gone.channel.close()
    room.connect(2)
    room.turn()
    room.turn()
    assert other.read() == 2
    assert not gone.handle.turns


def test_one_that_has_nothing_to_do_does_not_stand_by(stack: ExitStack) -> None:
    """Both have turns, one is through with them: it gets one of the other's, who finds nothing for it."""
    room = Room(stack, RoundRobin())
    slow, quick = room.enter(), room.enter()
    room.connect(6)
    room.turn()
    assert (slow.read(), quick.read()) == (3, 3)
    for _ in range(3):
        quick.use()
    assert quick.handle.row.is_to_tell()
    room.turn()
    assert quick.read() == 1
    assert quick.use()
    assert [slow.use() for _ in range(3)] == [True, True, False]


def test_least_connections(stack: ExitStack) -> None:
    """It is the turn of the worker with the least work in flight, turns included."""
    room = Room(stack, LeastConnections())
    busy, idle = room.enter(), room.enter()
    busy.handle.row.waits(3, 3, 3)
    room.connect(5)
    room.turn()
    assert (busy.read(), idle.read()) == (1, 4)


def test_least_connections_knows_what_a_row_does_not_tell_yet(stack: ExitStack) -> None:
    """A turn that is used counts until the worker's row says what came of it, and then no more."""
    room = Room(stack, LeastConnections())
    first, second = room.enter(), room.enter()
    for each in (first, second):
        each.handle.row.waits(0, 0, 0)
    room.connect()
    room.turn()
    taker, other = (first, second) if first.handle.turns else (second, first)
    assert taker.read() == 1
    assert taker.use()
    room.connect()
    room.turn()
    assert (taker.handle.load, other.handle.load) == ((1, 1), (1, 1))
    taker.handle.row.waits(in_flight=1, connections=1, requests=1)
    assert taker.handle.load == (1, 1)
    taker.handle.row.waits(in_flight=0, connections=0, requests=1)
    assert other.read() == 1
    assert other.use()
    room.connect()
    room.turn()
    assert (taker.read(), other.read()) == (1, 0)


def test_a_take_over_in_the_turn_in_which_it_rings(stack: ExitStack) -> None:
    """Another event of the same turn closes everything; what has rung by then is the next primary's to answer."""
    room = Room(stack, RoundRobin())
    room.enter()
    room.turn()
    room.connect()
    ringing = room.selector.select(0)
    room.hand_off.stop_accepting()
    for key, mask in ringing:
        key.data(mask)
    room.hand_off.dispatch()
    assert not room.is_restless()


def test_several_listeners(stack: ExitStack) -> None:
    """Each has turns of its own; those of one are no claim on another's connections."""
    room = Room(stack, RoundRobin(), listeners=2)
    worker = room.enter()
    room.connect(2, listener=0)
    room.turn()
    room.connect(3, listener=1)
    assert worker.read() == 2
    worker.use()
    worker.use()
    room.turn()
    assert worker.read() == 3
    assert all(worker.use() for _ in range(3))
    assert [worker.handle.row.taken(index) for index in (0, 1)] == [2, 3]
    room.turn()
    assert worker.handle.handed_off == 5


def test_more_listeners_than_a_row_has_cells_for(stack: ExitStack) -> None:
    """Those beyond are passed on by hand, and none is without an owner."""
    room = Room(stack, RoundRobin(), listeners=9)
    assert set(room.hand_off.worker_fds) < set(range(9))
    worker = room.enter()
    room.hand_off.watch(time.monotonic())
    room.connect(1, listener=8)
    room.turn()
    assert len(worker.handle.unacknowledged) == 1
    for connection in worker.handle.unacknowledged.values():
        socket.socket(fileno=connection.fd).close()


def test_a_crowd_without_workers(stack: ExitStack) -> None:
    """Half the backlog is full and nobody takes anybody: the primary makes room in the kernel with its own queue."""
    room = Room(stack, RoundRobin())
    room.connect(BACKLOG // 2 + 10)
    for _ in range(3):
        room.turn()
    assert len(room.listeners[0].pending) > 0
    assert len(room.listeners[0].pending) + room.listeners[0].look() == BACKLOG // 2 + 10


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["connect", "look", "read", "mark", "accept", "leave", "enter"]), max_size=60))
def test_nobody_is_overlooked(steps: list[str]) -> None:
    """In every order of arriving, looking, marking a turn and accepting: after a look everybody who waits is
    somebody's turn, or all workers have turns; and in the end everybody is accepted.
    """
    with ExitStack() as stack:
        room = Room(stack, RoundRobin())
        room.enter()
        room.enter()
        marked = 0
        for step in steps:
            worker = room.workers[0]
            room.workers.reverse()
            if step == "connect":
                room.connect()
            elif step == "look":
                room.turn()
                handles = [each.handle for each in room.workers if each.handle.state is WorkerState.LISTENING]
                waiting, given = room.listeners[0].look(), [len(handle.turns) for handle in handles]
                assert sum(given) + marked >= waiting or min(given) > 0
            elif step == "read":
                worker.read()
            elif step == "mark" and worker.waiting:
                worker.waiting.popleft()
                worker.handle.row.uses_turn()
                marked += 1
            elif step == "accept" and marked:
                marked -= 1
                try:
                    room.listeners[0].socket.accept()[0].close()
                except BlockingIOError:
                    continue
            elif step == "leave":
                room.hand_off.leave(worker.handle)
                room.hand_off.enter(worker.handle)
        for _ in range(200):
            room.turn()
            for each in room.workers:
                while each.read():
                    each.use()
        assert room.listeners[0].look() == 0
