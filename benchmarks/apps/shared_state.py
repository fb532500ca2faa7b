"""Session, cache and broadcast with sharedcluster's own extension."""

from __future__ import annotations

import os

from flask import Flask, Response, session

from benchmarks.apps import page
from sharedcluster import SharedCluster

app = Flask(__name__)
# Clusters that are measured side by side must not hear of each other's writes, unless that is what is measured.
app.config.update(SECRET_KEY="benchmark", SHAREDCLUSTER_NAMESPACE=os.environ["BENCH_SITE"])
shared = SharedCluster(app)


@app.post("/login")
def login() -> str:
    """Give the client a session with something in it."""
    session.update(page.fresh_session())
    return "ok"


@app.get("/read")
def read() -> str:
    """Read two keys of the session."""
    return f"{session['user']} {session['count']}"


@app.post("/write")
def write() -> str:
    """Change one key of the session."""
    session["count"] = session.get("count", 0) + 1
    return str(session["count"])


@app.get("/cached")
@shared.cache.cached(timeout=300)
def cached() -> str:
    """A page that is dear to make."""
    return page.render()


@shared.cache.memoize(timeout=300)
def catalogue(page_number: int) -> str:
    """A part of a page that is dear to make."""
    return page.render()


@app.get("/memoized")
def memoized() -> str:
    """A view that puts a cached part into its page."""
    return catalogue(1)


@app.get("/events")
def events() -> Response:
    """Server-sent events of one channel."""
    return shared.stream("bench")


@app.post("/publish/<text>")
def publish(text: str) -> str:
    """Send an event to every subscriber of every worker."""
    shared.publish("bench", text)
    return "ok"
