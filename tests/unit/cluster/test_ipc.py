"""The message socket: boundaries, descriptors, and their loss."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import Accepted, NewConnection, Online

Pair = tuple[MessageSocket, MessageSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends."""
    ends = MessageSocket.pair()
    yield ends
    for end in ends:
        end.close()


def test_messages_keep_their_boundaries_and_order(pair: Pair) -> None:
    """Three sent at once are three received, in order; then there is nothing."""
    near, far = pair
    for seq in range(3):
        assert near.send(Accepted(seq))
    assert [far.receive() for _ in range(3)] == [(Accepted(n), None) for n in range(3)]
    assert far.receive() is None


def test_a_descriptor_travels_with_its_message(pair: Pair) -> None:
    """The receiver's descriptor is another one, on the same file, and not inherited by programs it starts."""
    near, far = pair
    read, write = os.pipe()
    assert near.send(NewConnection(1, 0, None), write)
    received = far.receive()
    assert received is not None
    message, fd = received
    assert message == NewConnection(1, 0, None)
    assert fd is not None
    assert not os.get_inheritable(fd)
    os.write(fd, b"x")
    assert os.read(read, 1) == b"x"
    for each in (read, write, fd):
        os.close(each)


def test_a_lost_descriptor_is_seen(pair: Pair) -> None:
    """At the limit of descriptors the message arrives without its descriptor, and the next one is whole again."""
    near, far = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    near.send(NewConnection(7, 0, None), near.fileno())
    fillers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
        try:
            while True:
                fillers.append(os.dup(near.fileno()))
        except OSError:
            pass
        assert far.receive() == (NewConnection(7, 0, None), None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    near.send(Accepted(8))
    assert far.receive() == (Accepted(8), None)


def test_the_end_of_the_other_side(pair: Pair) -> None:
    """What was sent before the end is read first; then it is the end, for reading and for writing."""
    near, far = pair
    near.send(Online(1))
    near.close()
    assert far.receive() == (Online(1), None)
    with pytest.raises(ChannelClosed):
        far.receive()
    with pytest.raises(ChannelClosed):
        far.send(Accepted(1))


def test_a_full_socket_says_so(pair: Pair) -> None:
    """A receiver that does not read makes send return False, not raise or block; after a read there is room again."""
    near, far = pair
    count = 0
    while near.send(Accepted(count)):
        count += 1
    assert count > 100
    assert far.receive() == (Accepted(0), None)
    while far.receive() is not None:
        pass
    assert near.send(Accepted(1))


def test_garbage_is_refused_and_its_descriptor_closed(pair: Pair) -> None:
    """A datagram that is no message raises ValueError and leaks nothing."""
    near, far = pair
    near.socket.send(b"\x04not json")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="not a message"):
        far.receive()
    assert len(os.listdir("/proc/self/fd")) == before
