"""A TCP link to Redis that can be hurt in the ways links are hurt."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress


class Link:
    """Forwards to Redis. `mode` may be changed at any time.

    "forward"; "cut replies": commands arrive, then the connection breaks instead of the reply; "black hole":
    everything is swallowed, in both directions, while TCP stays up; "refuse": connections are closed as they come.
    """

    def __init__(self, url: str) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2].partition("/")[0]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.mode = "forward"

    def __enter__(self) -> Link:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections that are up now."""
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:  # nobody is there any more
            client.close()
            return
        with client, server:
            self._sockets += [client, server]
            other = {client: server, server: client}
            try:
                while True:
                    for source in select.select([client, server], [], [])[0]:
                        data = source.recv(65536)
                        if not data or (source is server and self.mode == "cut replies"):
                            return
                        if self.mode != "black hole":
                            other[source].sendall(data)
            except (OSError, ValueError):
                return
