"""A child: answers what it is told, and does what it is asked."""

import os
import sys

from sharedcluster import child_process

parent = child_process.parent
if parent is None:
    print("no parent", flush=True)
    sys.exit(4)


@parent.on("message")
def answer(message: object) -> None:
    """Say it back, or end."""
    assert parent is not None
    if message == "arguments":
        parent.send([sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), "SHAREDCLUSTER_CHANNEL" in os.environ])
    elif message == "leave":
        parent.disconnect()
    elif message == "write":
        print("to out", flush=True)
        print("to err", file=sys.stderr, flush=True)
    elif isinstance(message, dict) and "exit" in message:
        sys.exit(message["exit"])
    else:
        parent.send(message)


parent.on("disconnect", lambda: os.write(1, b"alone\n"))  # one write: the parent has the same stdout
