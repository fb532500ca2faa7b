"""The hot paths, each as a thing that can be done once more: `python -m benchmarks.micro.paths NAME TIMES`.

They are driven through what the rest of the program calls, so that a rewrite behind it is measured and not broken.
Nothing here waits for another process: the count of instructions must be the same each time.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Final

Step = Callable[[], object]
REQUEST: Final = (
    b"GET /a/path?with=query HTTP/1.1\r\nHost: example.test\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
    b"Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8\r\nAccept-Language: en\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\nCookie: theme=dark\r\n\r\n"
)


def turn() -> Step:
    """A client connects, the primary looks and says whose turn it is, and that worker accepts."""
    import selectors

    from sharedcluster.cluster.board import Board
    from sharedcluster.cluster.hand_off import HandOff
    from sharedcluster.cluster.ipc import MessageSocket
    from sharedcluster.cluster.listener import Listener, bind
    from sharedcluster.cluster.scheduling import RoundRobin
    from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
    from sharedcluster.config import BindAddress

    bound = bind(BindAddress("127.0.0.1", 0), backlog=64)
    address = bound.getsockname()
    selector = selectors.DefaultSelector()
    room = HandOff([Listener(0, BindAddress(*address), bound, limit=64)], RoundRobin(), selector, in_turns=True)
    board, ends = Board(), {}
    for id in (1, 2):
        ours, theirs = MessageSocket.pair()
        handle = WorkerHandle(id, id, 1, 100_000 + id, ours, board.take(), 0.0)
        handle.state = WorkerState.LISTENING
        handle.row.waits(0, 0, 0)
        room.enter(handle)
        ends[id] = (handle, theirs)
    room.dispatch()

    def step() -> None:
        client = socket.create_connection(address)
        for key, mask in selector.select(1):
            key.data(mask)
        room.dispatch()
        handle, end = next((handle, end) for handle, end in ends.values() if handle.turns)
        assert end.receive() is not None
        handle.row.uses_turn()
        fd = bound._accept()[0]  # type: ignore[attr-defined]
        handle.row.takes(0)
        os.close(fd)
        client.close()
        room.dispatch()

    return step


def hand_off() -> Step:
    """A connection is scheduled, sent to its worker, taken, acknowledged on the board, and let go by the primary."""
    from sharedcluster.cluster.board import Board
    from sharedcluster.cluster.ipc import MessageSocket
    from sharedcluster.cluster.messages import Connection, NewConnection
    from sharedcluster.cluster.scheduling import RoundRobin
    from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState

    board, policy, ends = Board(), RoundRobin(), {}
    for id in (1, 2):
        ours, theirs = MessageSocket.pair()
        handle = WorkerHandle(id, id, 1, 100_000 + id, ours, board.take(), 0.0)
        handle.state = WorkerState.LISTENING
        handle.row.waits(0, 0, 0)
        policy.add(handle)
        ends[id] = theirs
    null = os.open("/dev/null", os.O_RDONLY)
    peer = ("127.0.0.1", 40000)

    def step() -> None:
        handle = policy.pick(peer)
        assert handle is not None
        assert handle.hand_off(Connection(os.dup(null), 0, peer))
        received = ends[handle.id].receive()
        assert received is not None
        message, fd = received
        assert isinstance(message, NewConnection)
        assert fd is not None
        os.close(fd)
        handle.row.accepts(message.seq)
        handle.acknowledged(handle.row.accepted)

    return step


def request() -> Step:
    """One keep-alive request with a browser's head through the HTTP engine, on a socket pair."""
    serve, wait = _engine()
    ours, theirs = socket.socketpair()
    serve(theirs.detach())
    ours.setblocking(False)

    def step() -> None:
        ours.send(REQUEST)
        wait(ours)

    return step


def connection() -> Step:
    """The same request on a connection of its own, which is closed after it."""
    serve, wait = _engine()

    def step() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.send(REQUEST[:-2] + b"Connection: close\r\n\r\n")
        serve(theirs.detach())
        wait(ours)
        ours.close()

    return step


def _engine() -> tuple[Callable[[int], None], Callable[[socket.socket], None]]:
    import gevent

    from benchmarks.apps.plain import app
    from sharedcluster.http.server import Server
    from sharedcluster.http.settings import HttpSettings, ListenerFacts

    server = Server(app, HttpSettings())
    server.add_listener(0, ListenerFacts("127.0.0.1", 8000))

    hub = gevent.get_hub()

    def serve(fd: int) -> None:  # as in a worker: in the hub
        hub.loop.run_callback(server.serve, fd, 0, ("127.0.0.1", 40000))

    def wait(client: socket.socket) -> None:
        watcher = hub.loop.io(client.fileno(), 1)
        hub.wait(watcher)
        watcher.close()
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer

    return serve, wait


def cookie() -> Step:
    """Sign a session cookie with a new version and verify it, as a write and the next request do."""
    from sharedcluster.state.cookie import Cookie, CookieSigner

    signer = CookieSigner(["a secret"])
    version = 1_700_000_000_000_000

    def step() -> None:
        nonlocal version
        version += 1
        assert signer.verify(signer.sign(Cookie("s" * 43, version, 1_700_000_000_000)))

    return step


def near_hit() -> Step:
    """Find a value in the near cache."""
    from sharedcluster.state.near import Near

    near: Near[str] = Near(lambda: True, entries=1000, size=1 << 20, max_age=1e9)
    near.fill("name", "value", near.begin(), mark=b"1", size=100)

    def step() -> None:
        assert near.get("name") is not None

    return step


PATHS: Final[Mapping[str, Callable[[], Step]]] = {
    "turn to accept a connection": turn,
    "hand-off of a connection": hand_off,
    "request, kept alive": request,
    "request on a connection of its own": connection,
    "session cookie, signed and verified": cookie,
    "near cache hit": near_hit,
}


def main() -> None:
    """Do one path so many times."""
    gc.disable()  # a collection comes when it comes, and walks all that was ever imported
    step = PATHS[sys.argv[1]]()
    for _ in range(int(sys.argv[2])):
        step()
    sys.stdout.flush()
    os._exit(0)  # what an interpreter does to end is not part of the path


if __name__ == "__main__":
    main()
