"""The servers that are compared, each in its usual best set-up; benchmarks/README.md says why each is fair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from benchmarks import ROOT
from benchmarks.install import NODE, NODE_PATH, PYTHON

Family = Literal["plain", "flask", "state"]
"""Which application is served: a plain callable, Flask (Express), Flask (Express) with session and cache."""

OUR_APPS: Final[dict[Family, str]] = {
    "plain": "benchmarks.apps.plain:app",
    "flask": "benchmarks.apps.flask_app:app",
    "state": "benchmarks.apps.shared_state:app",
}
PEER_APPS: Final[dict[Family, str]] = {**OUR_APPS, "state": "benchmarks.apps.flask_extensions:app"}
NODE_APPS: Final[dict[Family, str]] = {"plain": "plain.js", "flask": "express.js", "state": "express_state.js"}
APPS_FOLDER: Final = ROOT / "benchmarks" / "apps"
BIN: Final = PYTHON.parent


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how big a server is to be started; those of one `site` share their state."""

    family: Family
    port: int
    workers: int
    redis_url: str
    preload: bool = False
    site: str = "bench"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server: its command line, and what it can do.

    Attributes:
        needs: The entry of `install.left_out` without which it cannot run.
        scales: Whether it has more than one worker process.
        warm_up: Seconds of load before it is measured: Node compiles what it has seen often.
        reload: How it is told to replace its workers: a signal's name, a command, or "" if it cannot.
    """

    name: str
    command: Callable[[Place], list[str]]
    needs: str = ""
    scales: bool = True
    preloads: bool = False
    warm_up: float = 1.0
    reload: str | tuple[str, ...] = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _sharedcluster(place: Place, *options: str) -> list[str]:
    redis = place.redis_url if place.family == "state" else "none"
    return [
        str(PYTHON), "-m", "sharedcluster", "run", OUR_APPS[place.family], "--bind", f"127.0.0.1:{place.port}",
        "--workers", str(place.workers), "--redis", redis, "--log-level", "warning",
        *(["--preload"] if place.preload else []), *options,
    ]  # fmt: skip


def _shared_listeners(place: Place) -> list[str]:
    return _sharedcluster(place, "--policy", "shared")


def _gunicorn(kind: str, *options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return [
            str(PYTHON), "-m", "gunicorn", PEER_APPS[place.family], "--worker-class", kind,
            "--workers", str(place.workers), "--bind", f"127.0.0.1:{place.port}", "--backlog", "2048",
            "--keep-alive", "75", "--worker-connections", "12000", "--log-level", "error", *options,
            *(["--preload"] if place.preload else []),
        ]  # fmt: skip

    return command


def _granian(place: Place) -> list[str]:
    # One thread runs Python for what only computes: more threads only pass the interpreter's lock around. What
    # waits for Redis gets a few.
    return _granian_with(place, {"plain": 1, "flask": 4, "state": 8}[place.family])


def _granian_for_waiting(place: Place) -> list[str]:
    return _granian_with(place, 64)


def _granian_with(place: Place, threads: int) -> list[str]:
    return [
        str(BIN / "granian"), "--interface", "wsgi", PEER_APPS[place.family], "--host", "127.0.0.1",
        "--port", str(place.port), "--workers", str(place.workers), "--blocking-threads", str(threads),
        "--backlog", "2048", "--backpressure", "12000", "--no-ws", "--http", "1", "--log-level", "error",
    ]  # fmt: skip


def _uwsgi(place: Place) -> list[str]:
    # The http router keeps clients' connections alive, as nginx would in front of it; its CPU counts.
    threads = ["--threads", "8"] if place.family == "state" else []
    return [
        str(BIN / "uwsgi"), "--http", f"127.0.0.1:{place.port}", "--http-keepalive", "--master", "--need-app",
        "--processes", str(place.workers), "--module", PEER_APPS[place.family], "--disable-logging", "--listen",
        "1024", "--die-on-term", "--single-interpreter", "--pythonpath", str(ROOT), *threads,
    ]  # fmt: skip


def _bjoern(place: Place) -> list[str]:
    script = str(APPS_FOLDER / "run_bjoern.py")
    return [str(PYTHON), script, PEER_APPS[place.family], str(place.port), str(place.workers)]


def _pywsgi(place: Place) -> list[str]:
    script = str(APPS_FOLDER / "run_pywsgi.py")
    return [str(PYTHON), script, PEER_APPS[place.family], str(place.port), str(place.workers)]


def _waitress(place: Place) -> list[str]:
    return [
        str(BIN / "waitress-serve"), "--listen", f"127.0.0.1:{place.port}", "--threads", "8", "--backlog", "2048",
        "--connection-limit", "12000", "--channel-timeout", "75", PEER_APPS[place.family],
    ]  # fmt: skip


def _node(place: Place) -> list[str]:
    app = APPS_FOLDER / "node" / NODE_APPS[place.family]
    return ["node", str(APPS_FOLDER / "node" / "serve.js"), str(app)]


def _pm2(place: Place) -> list[str]:
    app = APPS_FOLDER / "node" / NODE_APPS[place.family]
    return [str(NODE / "node_modules" / ".bin" / "pm2-runtime"), "start", str(app), "-i", str(place.workers), "--raw"]


_NODE_ENV: Final = {"NODE_ENV": "production", "NODE_PATH": str(NODE / "node_modules"), "PATH": NODE_PATH}

PEERS: Final[dict[str, Peer]] = {
    peer.name: peer
    for peer in (
        Peer("sharedcluster", _sharedcluster, preloads=True, reload="HUP"),
        Peer("sharedcluster, shared", _shared_listeners, preloads=True, reload="HUP"),
        Peer("gunicorn gevent", _gunicorn("gevent"), "gunicorn", preloads=True, reload="HUP"),
        Peer("gunicorn gthread", _gunicorn("gthread", "--threads", "8"), "gunicorn", preloads=True, reload="HUP"),
        Peer("gunicorn gthread, 64 threads", _gunicorn("gthread", "--threads", "64"), "gunicorn"),
        Peer("granian", _granian, "granian", reload="HUP"),
        Peer("granian, 64 threads", _granian_for_waiting, "granian"),
        Peer("uwsgi", _uwsgi, "uwsgi", reload="HUP"),
        Peer("bjoern", _bjoern, "bjoern"),
        Peer("waitress", _waitress, "waitress", scales=False),
        Peer("gevent.pywsgi", _pywsgi),
        Peer("node cluster", _node, "node", warm_up=3.0, environment=_NODE_ENV),
        Peer("pm2", _pm2, "pm2", warm_up=3.0, environment=_NODE_ENV, reload=("pm2", "reload", "all")),
    )
}
OURS: Final = "sharedcluster"
