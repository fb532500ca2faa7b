"""Session, cache and broadcast as Flask teams have them today: Flask-Session, Flask-Caching, Flask-SSE over Redis."""

from __future__ import annotations

import os

import redis
from flask import Flask, Response, session
from flask_caching import Cache
from flask_session import Session
from flask_sse import sse

from benchmarks.apps import page

URL = os.environ["BENCH_REDIS_URL"]

app = Flask(__name__)
app.config.update(
    SECRET_KEY="benchmark",
    SESSION_TYPE="redis",
    SESSION_REDIS=redis.Redis.from_url(URL),
    CACHE_TYPE="RedisCache",
    CACHE_REDIS_URL=URL,
    CACHE_DEFAULT_TIMEOUT=300,
    REDIS_URL=URL,
)
Session(app)
cache = Cache(app)
app.register_blueprint(sse, url_prefix="/events")


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
@cache.cached(timeout=300)  # type: ignore[untyped-decorator, unused-ignore]
def cached() -> str:
    """A page that is dear to make."""
    return page.render()


@cache.memoize(timeout=300)  # type: ignore[untyped-decorator, unused-ignore]
def catalogue(page_number: int) -> str:
    """A part of a page that is dear to make."""
    return page.render()


@app.get("/memoized")
def memoized() -> str:
    """A view that puts a cached part into its page."""
    return str(catalogue(1))


@app.post("/publish/<text>")
def publish(text: str) -> Response:
    """Send an event to every subscriber of every worker."""
    sse.publish(text)
    return Response("ok")
