"""A Flask application without shared state: who answers, slow views, and views that stop the worker's loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from flask import Flask, Response, request
from gevent import monkey

app = Flask(__name__)
sleep_in_c = monkey.get_original("time", "sleep")


@app.get("/")
def who() -> dict[str, object]:
    """Who answers."""
    worker = request.environ["sharedcluster.worker"]
    return {"slot": worker.slot, "id": worker.id, "generation": worker.generation, "pid": os.getpid()}


@app.get("/slow/<float:seconds>")
def slow(seconds: float) -> str:
    """A view that waits, as for a database; the loop turns meanwhile."""
    time.sleep(seconds)
    return "slow"


@app.get("/block/<float:seconds>")
def block(seconds: float) -> str:
    """A view that stands in C code; the loop stands still."""
    sleep_in_c(seconds)
    return "blocked"


@app.get("/fork")
def fork() -> dict[str, int]:
    """A view that leaves a process behind, as multiprocessing does."""
    pid = os.fork()
    if pid == 0:
        os.close(1)
        os.close(2)
        sleep_in_c(60)
        os._exit(0)
    return {"pid": pid}


@app.get("/exit/<int:code>")
def leave(code: int) -> str:
    """A view that ends its process."""
    os._exit(code)


@app.post("/echo")
def echo() -> Response:
    """The body comes back."""
    return Response(request.get_data(), mimetype="application/octet-stream")


@app.get("/stream/<int:count>")
def stream(count: int) -> Response:
    """So many lines, one every 50 ms."""

    def lines() -> Iterator[str]:
        for number in range(count):
            yield f"{number}\n"
            time.sleep(0.05)

    return Response(lines(), mimetype="text/plain")


@app.get("/environment")
def environment() -> dict[str, str]:
    """What the cluster told the worker."""
    return {name: value for name, value in os.environ.items() if name.startswith("SHAREDCLUSTER_")}
