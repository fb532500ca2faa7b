"""Messages both ways, and a shutdown that lets the workers say goodbye.

Each worker tells the primary about every request; the primary counts for all of them and tells the workers the sum. On
TERM or Ctrl+C the primary sends "shutdown"; a worker answers with what it has done, and leaves when its last request
is answered.
"""

import os
import signal
from types import FrameType
from typing import Any

from flask import Flask

from sharedcluster import cluster

app = Flask(__name__)
known = {"sum": 0, "mine": 0}


@app.get("/")
def hello() -> str:
    """Count, and say what is known here."""
    known["mine"] += 1
    cluster.worker.send({"kind": "request"})
    return f"worker {cluster.worker.id}: {known['mine']} here, {known['sum']} in all workers\n"


def lead() -> None:
    """The primary."""
    counted = 0

    def on_message(worker: cluster.Worker, message: dict[str, Any]) -> None:
        nonlocal counted
        if message["kind"] == "request":
            counted += 1
            for other in cluster.workers.values():
                other.send({"kind": "sum", "value": counted})
        elif message["kind"] == "goodbye":
            print(f"worker {worker.id} served {message['requests']} requests and says goodbye", flush=True)

    def on_stop(_number: int, _frame: FrameType | None) -> None:
        print("shutting down", flush=True)
        for worker in cluster.workers.values():
            worker.send({"kind": "shutdown"})
            force = cluster.call_later(10, worker.kill, "SIGKILL")
            worker.on("exit", lambda code, name, force=force: force.cancel())

    cluster.on("message", on_message)
    cluster.on("listening", lambda worker, address: print(f"worker {worker.id} is ready", flush=True))
    cluster.on("exit", lambda worker, code, name: print(f"worker {worker.id} exited with {name or code}", flush=True))
    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGINT, on_stop)
    for _ in range(int(os.environ.get("WORKERS", os.cpu_count() or 1))):
        cluster.fork()


def work() -> None:
    """A worker."""
    worker = cluster.worker

    def on_message(message: dict[str, Any]) -> None:
        if message["kind"] == "sum":
            known["sum"] = message["value"]
        elif message["kind"] == "shutdown":
            worker.send({"kind": "goodbye", "requests": known["mine"]})
            worker.disconnect()  # answers what is in flight, then exits

    worker.on("message", on_message)
    cluster.serve(app, port=int(os.environ.get("PORT", "8000")))


if cluster.is_primary:
    lead()
else:
    work()
