"""Flask without state: hello, JSON, a view that waits and a view that computes."""

from __future__ import annotations

import time

from flask import Flask, Response

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    """The smallest view."""
    return "Hello, World!"


@app.get("/json")
def as_json() -> dict[str, object]:
    """A small document, as an API returns it."""
    return {"id": 7, "name": "sharedcluster", "tags": ["flask", "gevent", "redis"], "price": 12.5, "stock": None}


@app.get("/wait/<int:milliseconds>")
def wait(milliseconds: int) -> Response:
    """Wait as for a database: a cooperative server serves others meanwhile."""
    time.sleep(milliseconds / 1000)
    return Response("waited", mimetype="text/plain")


@app.get("/spin/<int:milliseconds>")
def spin(milliseconds: int) -> Response:
    """Compute in Python, holding the interpreter."""
    end = time.perf_counter() + milliseconds / 1000
    while time.perf_counter() < end:
        sum(range(200))
    return Response("computed", mimetype="text/plain")
