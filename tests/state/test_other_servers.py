"""The extension under other servers than ours, and under Flask-Caching's own decorators."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path

import pytest
from flask import Flask

from sharedcluster import SharedCluster
from sharedcluster.errors import ConfigError
from tests.redis_process import free_port
from tests.waiting import wait_until

APP = """
import os
from flask import Flask, session
from sharedcluster import SharedCluster

app = Flask("other")
app.config["SECRET_KEY"] = "s"
shared = SharedCluster(app)
computed = []

@app.post("/counter")
def counter():
    session["n"] = session.get("n", 0) + 1
    return {"n": session["n"], "pid": os.getpid()}

@app.get("/cached")
@shared.cache.cached(60)
def cached():
    return {"by": os.getpid()}

@app.post("/say/<text>")
def say(text):
    shared.publish("chat", text, history=10)
    return ""

@app.get("/events")
def events():
    return shared.stream("chat")
"""

GUNICORN = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", "127.0.0.1:{port}", "--graceful-timeout", "1"]
COMMANDS = {
    "flask run": [sys.executable, "-m", "flask", "--app", "app", "run", "--port", "{port}"],
    "gunicorn gthread": [*GUNICORN, "-k", "gthread", "--threads", "8", "app:app"],
    "gunicorn gevent": [*GUNICORN, "-k", "gevent", "app:app"],
    "gunicorn preload": [*GUNICORN, "-k", "gthread", "--threads", "8", "--preload", "app:app"],
}


@pytest.fixture(params=sorted(COMMANDS))
def url(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, namespace: str) -> Iterator[str]:
    """The same application under another server."""
    if "gunicorn" in request.param and importlib.util.find_spec("gunicorn") is None:
        pytest.skip("gunicorn is not installed")
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    environ = os.environ | {"REDIS_URL": redis_url, "FLASK_SHAREDCLUSTER_NAMESPACE": namespace, "NO_COLOR": "1"}
    command = [part.format(port=port) for part in COMMANDS[request.param]]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=log, stderr=log)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until(lambda: post(base, "/say/hello", CookieJar()) == b"", "the server answers", deadline=30)
        yield base
    finally:
        process.terminate()
        process.wait(20)


def post(base: str, path: str, jar: CookieJar) -> bytes:
    """POST with a cookie jar."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    with opener.open(f"{base}{path}", data=b"", timeout=10) as response:
        return bytes(response.read())


def test_the_same_application_works_under_other_servers(url: str) -> None:
    """Threads, gevent, preloading: sessions count on, one cached value for all workers, events are replayed."""
    jar = CookieJar()
    answers = [json.loads(post(url, "/counter", jar)) for _ in range(20)]
    assert [answer["n"] for answer in answers] == list(range(1, 21))
    cached = set()
    for _ in range(10):
        with urllib.request.urlopen(f"{url}/cached", timeout=10) as response:
            cached.add(response.read())
    assert len(cached) == 1
    with urllib.request.urlopen(f"{url}/events", timeout=10) as stream:
        greeting = stream.readline() + stream.readline()
        identity = re.search(rb"id: (\S+)", greeting).group(1).decode()  # type: ignore[union-attr]
        post(url, "/say/one", jar)
        assert b"".join(stream.readline() for _ in range(4)).endswith(b"data: one\n\n")
    post(url, "/say/two", jar)
    request = urllib.request.Request(f"{url}/events", headers={"Last-Event-ID": identity})
    with urllib.request.urlopen(request, timeout=10) as stream:
        text = b"".join(stream.readline() for _ in range(8))
        assert text.index(b"data: one") < text.index(b"data: two")


def test_flask_caching_runs_on_the_shared_cache(redis_url: str, namespace: str) -> None:
    """CACHE_TYPE names our class: Flask-Caching's decorators work on it, in two applications at once."""
    flask_caching = pytest.importorskip("flask_caching")
    ran: list[str] = []
    clients, shares = [], []
    for _ in range(2):
        app = Flask("x")
        app.config.update(SECRET_KEY="s", SHAREDCLUSTER_REDIS_URL=redis_url, SHAREDCLUSTER_NAMESPACE=namespace)
        app.config.update(CACHE_TYPE="sharedcluster.flask_caching.ClusterCache", CACHE_KEY_PREFIX="p:")
        with pytest.raises(ConfigError, match="SharedCluster"):
            flask_caching.Cache(app)
        shares.append(SharedCluster(app))
        cache = flask_caching.Cache(app)

        @app.get("/page")
        @cache.cached(timeout=60)  # type: ignore[untyped-decorator]
        def page() -> str:
            ran.append("page")
            return "page"

        @cache.memoize(60)  # type: ignore[untyped-decorator]
        def double(x: int) -> int:
            ran.append("double")
            return 2 * x

        app.add_url_rule("/double", view_func=lambda double=double: str(double(4)))

        @app.post("/clear")
        def clear(cache: object = cache, double: object = double) -> str:
            cache.delete_memoized(double)  # type: ignore[attr-defined]
            cache.delete("view//page")  # type: ignore[attr-defined]
            return ""

        clients.append(app.test_client())
    for share in shares:
        assert share._states[0].state.wait_ready(10)
    for client in clients * 2:
        assert client.get("/page").data == b"page"
        assert client.get("/double").data == b"8"
    assert ran == ["page", "double"]
    clients[1].post("/clear")
    assert (clients[1].get("/page").data, clients[1].get("/double").data) == (b"page", b"8")
    assert ran == ["page", "double"] * 2
    for share in shares:
        share._states[0].state.close()
