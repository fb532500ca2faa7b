"""Hold connections open: `python -m benchmarks.load.holder PORT COUNT PATH`.

Each asks once, so that it is a kept-alive connection and not one that never spoke; then it says READY, waits for a
line, and reports how many the server has kept.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Final

BATCH: Final = 200
"""Connections that are opened before the first of their answers is awaited: fewer than any server's backlog."""


def main() -> None:
    """Open, ask, hold, count."""
    port, count, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    held: list[socket.socket] = []
    while len(held) < count:
        batch = [
            socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(min(BATCH, count - len(held)))
        ]
        for connection in batch:
            connection.sendall(request)
        for connection in batch:
            connection.recv(65536)
            connection.setblocking(False)
        held += batch
    print("READY", flush=True)
    sys.stdin.readline()
    print(json.dumps({"open": sum(_is_open(each) for each in held)}), flush=True)


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
