"""A listening socket: binding it, accepting from it, closing it without loss."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sharedcluster.cluster.listener import Listener, bind, bind_error
from sharedcluster.config import BindAddress, Config
from sharedcluster.errors import BindError
from sharedcluster.starting import _adopt
from sharedcluster.upgrading import Inheritance, Predecessor

ANY = BindAddress("127.0.0.1", 0)


@pytest.fixture
def listener() -> Iterator[Listener]:
    """On a free port, with room for 100."""
    bound = bind(ANY, backlog=128)
    made = Listener(0, BindAddress(*bound.getsockname()), bound, limit=100)
    yield made
    made.close()
    made.cut_pending()


def clients(listener: Listener, count: int) -> list[socket.socket]:
    """So many connected clients."""
    return [socket.create_connection((listener.address.host, listener.address.port)) for _ in range(count)]


def accept_all(listener: Listener) -> int:
    """Everything the kernel has; how many that was."""
    return sum(iter(lambda: listener.accept(0.0), 0))


def test_it_accepts_in_batches_up_to_its_bound(listener: Listener) -> None:
    """Batches that grow while they are filled; at the bound nothing more is taken, the rest stays in the kernel."""
    ends = clients(listener, 120)
    assert [listener.accept(0.0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 37, 0]
    assert listener.is_full
    assert [c.peer for c in listener.pending] == [end.getsockname() for end in ends[:100]]
    assert listener.cut_pending() == 100
    assert accept_all(listener) == 20
    assert listener.accepted == 120
    for end in ends:
        end.close()


def test_what_comes_back_goes_to_the_head_in_order(listener: Listener) -> None:
    """Connections that a worker did not take are the first to be handed off again."""
    ends = clients(listener, 4)
    accept_all(listener)
    taken = [listener.pending.popleft(), listener.pending.popleft()]
    listener.give_back(taken)
    assert [c.peer for c in listener.pending] == [end.getsockname() for end in ends]
    for end in ends:
        end.close()


def test_running_out_of_descriptors_pauses_it(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE ends the batch and sets a pause; a client that gave up meanwhile is skipped."""
    errors = iter([OSError(errno.ECONNABORTED, ""), OSError(errno.EMFILE, "")])

    class Failing:
        def _accept(self) -> None:
            raise next(errors)

        def close(self) -> None: ...

    listener.socket.close()
    monkeypatch.setattr(listener, "socket", Failing())
    assert listener.accept(10.0) == 0
    assert listener.paused_until > 10.0


def test_newcomers_are_dropped_and_the_others_kept(listener: Listener) -> None:
    """After `refuse_newcomers` those that were connected are accepted; a new one gets no answer until the close."""
    early = clients(listener, 3)
    listener.refuse_newcomers()
    late = socket.socket()
    late.settimeout(0.3)
    with pytest.raises(TimeoutError):
        late.connect((listener.address.host, listener.address.port))
    assert accept_all(listener) == 3
    for end in [*early, late]:
        end.close()


@pytest.mark.parametrize("lender", ["nobody", "systemd", "a primary before this one"])
def test_a_socket_of_others_goes_on_listening(lender: str) -> None:
    """Closing ends what is ours alone, whoever has it open yet; what another program has too goes on for that one."""
    bound = bind(ANY, backlog=8)
    where, theirs = bound.getsockname(), bound.dup()
    if lender == "a primary before this one":
        inherited = Inheritance("x", ((bound.detach(), BindAddress(*where)),), -1)
        (listener,) = _adopt(inherited, Config(app="app"))
    else:
        fd = bound.fileno() if lender == "systemd" else None
        listener = Listener(0, BindAddress(where[0], where[1], fd=fd), bound, limit=8)
    listener.close()
    with theirs:
        if lender == "nobody":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(where, timeout=5)
        else:
            socket.create_connection(where, timeout=5).close()


def test_an_upgrade_lends_the_listeners(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start of the new program on: a stop of the old one in the middle of it must not end the socket."""
    primary: Any = SimpleNamespace(
        hand_off=SimpleNamespace(listeners=(listener,)),
        name="x",
        events=SimpleNamespace(on=lambda *_: None),
        watch=lambda *_: None,
    )
    upgrade = Predecessor(primary, redis_url="", lifeline_fd=-1)
    monkeypatch.setattr(upgrade, "_start", lambda _inheritance: os.getpid())
    upgrade.begin()
    assert upgrade._channel is not None
    upgrade._channel.close()
    assert listener.is_lent


def test_a_stale_socket_file_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    """Nobody listens: bound anew. Somebody does: an error. The file goes with the listener that made it."""
    address = BindAddress(path=str(tmp_path / "x.sock"))
    first = Listener(0, address, bind(address, backlog=1), limit=1)
    with pytest.raises(BindError, match="a file of that name"):
        bind(address, backlog=1)
    first.socket.close()
    second = Listener(0, address, bind(address, backlog=1), limit=1)
    first.close()
    assert os.path.exists(address.path)
    second.close()
    assert not os.path.exists(address.path)


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    """An ordinary file in the way is an error, not removed."""
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(BindError):
        bind(BindAddress(path=str(path)), backlog=1)
    assert path.read_text() == "data"


@pytest.mark.parametrize(
    ("address", "number", "texts"),
    [
        (BindAddress("127.0.0.1", 80), errno.EACCES, ("permission denied for port 80", "CAP_NET_BIND_SERVICE")),
        (BindAddress("127.0.0.1", 8000), errno.EADDRINUSE, ("the port is in use", "--port")),
        (BindAddress(path="/root/x.sock"), errno.EACCES, ("permission denied", "not writable")),
        (BindAddress(fd=7), errno.ENOTSOCK, ("descriptor 7 is not an open socket",)),
        (BindAddress("192.0.2.1", 80), errno.EADDRNOTAVAIL, ("192.0.2.1:80", "Cannot assign")),
    ],
)
def test_errors_say_what_to_do(address: BindAddress, number: int, texts: tuple[str, ...]) -> None:
    """The address, the reason, the way out; exit code 4."""
    error = bind_error(address, OSError(number, os.strerror(number)))
    assert error.exit_code == 4
    assert all(text in str(error) for text in texts)


def test_a_descriptor_that_does_not_listen() -> None:
    """A socket that was never told to listen is refused."""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        with pytest.raises(BindError, match="not one that listens"):
            bind(BindAddress(fd=os.dup(end.fileno())), backlog=1)
