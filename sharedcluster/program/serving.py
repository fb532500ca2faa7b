"""`cluster.serve` in a worker: an application on a listener of the primary's, and what `cluster` is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import gevent

from sharedcluster.cluster.messages import Bound, Peer
from sharedcluster.cluster.wire import SharedAcceptor, WorkerFacts
from sharedcluster.http.server import Server as HttpServer
from sharedcluster.http.settings import HttpSettings, ListenerFacts, ReleasedConnection
from sharedcluster.http.tls import make_context
from sharedcluster.program.emitter import Events
from sharedcluster.program.policies import SCHED_NONE, SCHED_RR
from sharedcluster.program.this_worker import ThisWorker


class Server(Events):
    """An application on an address, as `cluster.serve` returns it; the listener is the primary's.

    Attributes:
        host, port, path: Where it really listens: the port that 0 became.
    """

    EVENTS = ("close",)

    def __init__(
        self,
        worker: ThisWorker,
        application: Any,
        asked: tuple[str, int, str, int | None],
        backlog: int,
        max_connections: int | None,
        settings: HttpSettings,
        tls: tuple[str, str],
    ) -> None:
        super().__init__()
        facts = WorkerFacts(worker.slot, worker.id, 1)
        self.http = HttpServer(application, settings, environ={"sharedcluster.worker": facts})
        self.asked = asked
        self.backlog = backlog
        self.max_connections = max_connections
        self.index = 0
        self.listener = -1
        self.host, self.port, self.path, _ = asked
        self._tls = tls
        self._worker = worker
        self._is_closed = False
        self._acceptor: SharedAcceptor | None = None

    def __repr__(self) -> str:
        return f"<server on {self.address}>"

    @property
    def address(self) -> str:
        """`host:port`, or the path of the unix socket."""
        return self.path or (f"[{self.host}]" if ":" in self.host else self.host) + f":{self.port}"

    @property
    def takes_more(self) -> bool:
        """Whether it takes one more connection."""
        limit = self.max_connections
        return not self._is_closed and (limit is None or self.http.connections < limit)

    def close(self, callback: Callable[[], object] | None = None) -> None:
        """Take no more connections and let those there are end; then `close` is emitted and `callback` called."""
        if self._is_closed:
            return
        if callback is not None:
            self.once("close", callback)
        self._worker.unlisten(self)
        self.drain(None)
        gevent.spawn(self._wait_closed)

    def _wait_closed(self) -> None:
        self.http.wait_drained(self._worker.graceful_timeout)
        self.http.close()
        self.closed()

    # -- called by the worker --------------------------------------------------------------------------------------

    def opened(self, bound: Bound, fd: int | None) -> None:
        """The primary listens. Called in the hub, before the first connection can come."""
        self.listener = bound.listener
        self.host, self.port, self.path = bound.host, bound.port, bound.path
        certfile, keyfile = self._tls
        tls = make_context(certfile, keyfile or None, ticket_key=bytes.fromhex(bound.ticket_key)) if certfile else None
        facts = ListenerFacts(host=bound.host, port=bound.port, unix_path=bound.path or None, tls=tls)
        self.http.add_listener(bound.listener, facts)
        if fd is not None:
            self._acceptor = SharedAcceptor(fd, self._serve_accepted, lambda: self.takes_more)

    def _serve_accepted(self, fd: int, peer: Peer) -> None:
        self.http.serve(fd, self.listener, peer)

    def drain(self, give_back: Callable[[ReleasedConnection], None] | None) -> None:
        """Take nothing new; idle connections go to `give_back`, or are closed."""
        self._is_closed = True
        if self._acceptor is not None:
            self._acceptor.close()
        if give_back is not None:
            self.http.release_when_idle(give_back)
            for released in self.http.release_idle():
                give_back(released)
        self.http.drain()

    def closed(self) -> None:
        """Its last connection has ended."""
        self._worker.forget(self)
        self.emit("close")


def _spare(application: Any) -> None:
    """Let a Flask application take the shortcuts that it has under `sharedcluster run`."""
    flask = sys.modules.get("flask")  # who has such an application has imported it; nobody else needs to have Flask
    if flask is not None and isinstance(application, flask.Flask):
        from sharedcluster.flask_shortcuts import take_shortcuts

        take_shortcuts(application)


class WorkerCluster:
    """What `from sharedcluster import cluster` is in a worker."""

    SCHED_RR = SCHED_RR
    SCHED_NONE = SCHED_NONE
    is_primary = False
    is_worker = True

    def __init__(self, worker: ThisWorker) -> None:
        self.worker = worker
        # As in the primary: what happens to the one worker there is.
        self.on, self.once, self.off = worker.on, worker.once, worker.off

    def serve(
        self,
        application: Any,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        path: str = "",
        fd: int | None = None,
        backlog: int = 2048,
        max_connections: int | None = None,
        certfile: str = "",
        keyfile: str = "",
        **http: Any,
    ) -> Server:
        """Serve a WSGI application on an address that all workers share, and go on with the script.

        Args:
            application: Any WSGI callable.
            host: An address or name of this machine; "" is all IPv4 addresses, "::" all there are.
            port: 0 takes a free one: the same in every worker that asks for it as often.
            path: A unix socket instead; relative to this worker's folder.
            fd: A listening socket that the primary has open, by its number.
            backlog: Connections the kernel holds, and the bound of the primary's queue; the first worker's counts.
            max_connections: More than these are left to other workers, or wait in the primary.
            certfile: TLS, a PEM file; a session begun with one worker resumes with any other.
            keyfile: Its key, if it is not in the same file.
            **http: Limits and times of the HTTP engine, see `HttpSettings`: keep_alive, limit_body, ...

        Raises:
            OSError: The primary could not listen there (EADDRINUSE, EACCES as PermissionError, ...).
            ConfigError: The TLS files are of no use.
            TypeError: There is no such limit.
        """
        if certfile:
            make_context(certfile, keyfile or None)  # what is wrong with them is said here
        _spare(application)
        asked = ("", 0, os.path.abspath(path), None) if path else ("", 0, "", fd) if fd is not None else None
        server = Server(
            self.worker, application, asked or (host or "0.0.0.0", port, "", None), backlog, max_connections,
            HttpSettings(**http), (certfile, keyfile),
        )  # fmt: skip
        self.worker.listen(server)
        return server
