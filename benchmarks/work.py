"""The work that is measured as CPU per request: what is asked, of which application, by which client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.peers import Family


@dataclass(frozen=True, slots=True)
class Work:
    """One row of the table.

    Attributes:
        name: As the table has it.
        login: Each client posts there once first; then our own client, with its cookies, makes the load, else wrk.
        peers: Who is compared, besides us.
        expects, expects_bytes: How the body of a right answer begins, and how long it is at least.
        idle: Connections that are open beside the active ones and ask nothing.
    """

    name: str
    family: Family
    path: str
    peers: tuple[str, ...]
    expects: str = "Hello, World!"
    expects_bytes: int = 0
    method: str = "GET"
    body_bytes: int = 0
    connections: int = 64
    new_connection: bool = False
    login: str = ""
    idle: int = 0


_PYTHON: Final = ("gunicorn gevent", "gunicorn gthread", "granian", "uwsgi", "bjoern", "waitress", "gevent.pywsgi")
_FAST: Final = ("gunicorn gevent", "granian", "bjoern", "node cluster")
_STATE: Final = ("gunicorn gevent", "granian", "node cluster")

WORKS: Final[dict[str, Work]] = {
    work.name: work
    for work in (
        Work("plain WSGI", "plain", "/", (*_PYTHON, "node cluster", "pm2")),
        Work(
            "plain WSGI, a new connection per request",
            "plain",
            "/",
            ("sharedcluster, shared", "gunicorn gevent", "granian", "uwsgi", "bjoern", "node cluster"),
            new_connection=True,
        ),
        Work("Flask hello", "flask", "/", (*_PYTHON, "node cluster", "pm2")),
        Work(
            "Flask hello, a new connection per request",
            "flask",
            "/",
            ("sharedcluster, shared", *_PYTHON, "node cluster"),
            new_connection=True,
        ),
        Work("JSON", "flask", "/json", _FAST, "{"),
        Work("Flask, session read", "state", "/read", (*_STATE, "pm2"), "ada 0", login="/login"),
        Work("Flask, session write", "state", "/write", (*_STATE, "pm2"), "", method="POST", login="/login"),
        Work("a cached page, hot", "state", "/cached", _STATE, "<ul>", 3900),
        Work("a memoized value in a view, hot", "state", "/memoized", _STATE, "<ul>", 3900),
        Work("upload of 1 MB", "plain", "/upload", _FAST, "1048576", method="POST", body_bytes=1 << 20, connections=8),
        Work("download of 1 MB", "plain", "/download", _FAST, "", 1 << 20, connections=8),
        Work("streaming, 100 chunks", "plain", "/stream", _FAST, "xxx", 102_400, connections=16),
        Work("Flask hello beside 1,000 idle connections", "flask", "/", _FAST, idle=1000),
        Work("Flask hello beside 10,000 idle connections", "flask", "/", _FAST, idle=10_000),
    )
}
