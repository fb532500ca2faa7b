"""An application that can be counted on: every request that begins leaves a line, and some do harm on purpose."""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import subprocess
import time
import uuid
from collections.abc import Iterator

from flask import Flask, Response, request
from gevent import monkey

app = Flask(__name__)
sleep_in_c = monkey.get_original("time", "sleep")
LEDGER = os.environ.get("LEDGER", "")
BALLAST = bytearray(os.urandom(1 << 16) * int(os.environ.get("BALLAST_PAGES", "0")))
LOADED_IN = os.getpid()
kept: list[bytearray] = []
opened: list[int] = []


def worker_facts() -> dict[str, int]:
    """Who answers; under another server, only which process."""
    worker = request.environ.get("sharedcluster.worker")
    if worker is None:
        return {"pid": os.getpid()}
    return {"slot": worker.slot, "id": worker.id, "generation": worker.generation, "pid": os.getpid()}


@app.before_request
def note() -> None:
    """A line per request that begins: what was done twice, or done and not answered, shows."""
    if LEDGER and "n" in request.args:
        fd = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{request.args['n']}\n".encode())
        os.close(fd)


@app.get("/")
def who() -> dict[str, int]:
    """Who answers."""
    return worker_facts()


@app.get("/slow/<float:seconds>")
def slow(seconds: float) -> dict[str, int]:
    """A view that waits; the loop turns meanwhile."""
    time.sleep(seconds)
    return worker_facts()


@app.get("/block/<float:seconds>")
def block(seconds: float) -> dict[str, int]:
    """A view that stands in C code; the loop stands still."""
    sleep_in_c(seconds)
    return worker_facts()


@app.post("/upload")
def upload() -> dict[str, object]:
    """What arrived: its length and digest."""
    digest, length = hashlib.sha256(), 0
    while piece := request.stream.read(65536):
        digest.update(piece)
        length += len(piece)
    return {"length": length, "sha256": digest.hexdigest(), **worker_facts()}


@app.get("/big/<int:kilobytes>")
def big(kilobytes: int) -> Response:
    """So much, for a client that reads slowly."""
    return Response(b"x" * 1024 * kilobytes, mimetype="application/octet-stream")


@app.get("/events/<int:count>")
def events(count: int) -> Response:
    """A stream of events, one every 20 ms."""

    def lines() -> Iterator[str]:
        for number in range(count):
            yield f"id: {number}\ndata: {os.getpid()}\n\n"
            time.sleep(0.02)

    return Response(lines(), mimetype="text/event-stream")


@app.get("/grow/<int:megabytes>")
def grow(megabytes: int) -> dict[str, int]:
    """A leak."""
    kept.append(bytearray(os.urandom(1024)) * 1024 * megabytes)
    return worker_facts()


@app.get("/random")
def draw() -> dict[str, str]:
    """What must differ between workers that share an origin."""
    return {
        "pid": str(os.getpid()),
        "random": str(random.random()),
        "secrets": secrets.token_hex(8),
        "uuid4": str(uuid.uuid4()),
        "uuid1": str(uuid.uuid1()),
    }


@app.get("/orphan")
def orphan() -> dict[str, int]:
    """A process that outlives its parent."""
    script = "sleep 20 >/dev/null 2>&1 & echo $!"
    return {"orphan": int(subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout)}


@app.get("/loaded")
def loaded() -> dict[str, object]:
    """In which process the application was imported."""
    return {"loaded_in": LOADED_IN, **worker_facts()}
