"""A link to Redis in a process of its own, told over stdin how to misbehave: forward, cut, "black hole"."""

from __future__ import annotations

import os
import selectors
import socket
import sys
from contextlib import suppress


def main() -> None:
    """`python -m tests.slow.consistency_link REDIS_PORT`; prints its own port."""
    target = ("127.0.0.1", int(sys.argv[1]))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    other: dict[socket.socket, socket.socket] = {}
    mode = "forward"

    def drop(one: socket.socket) -> None:
        for each in (one, other.pop(one, one)):
            other.pop(each, None)
            with suppress(KeyError, ValueError):
                selector.unregister(each)
            each.close()

    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                commands = os.read(0, 1000).decode().split("\n")
                if commands == [""]:
                    return
                for command in filter(None, commands):
                    if command == "cut":
                        for each in list(other):
                            drop(each)
                    else:
                        mode = command
            elif key.fileobj is listener:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(target, timeout=5)
                except OSError:
                    client.close()
                    continue
                for one, two in ((client, server), (server, client)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    other[one] = two
                    selector.register(one, selectors.EVENT_READ)
            else:
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source not in other:
                    continue
                try:
                    data = source.recv(262_144)
                    if not data:
                        drop(source)
                    elif mode == "forward":
                        other[source].sendall(data)
                except OSError:
                    drop(source)


if __name__ == "__main__":
    main()
