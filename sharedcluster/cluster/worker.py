"""A worker: the one file that joins the wire, the HTTP engine and the shared state.

Importing this module patches the process for gevent, as its first statement, before socket, ssl, redis or flask can
be imported unpatched. So only a process that was forked to be a worker (or to check the application) imports it.

Laws:

1. What holds for connections and messages stands in `wire`: nothing is lost, and nothing is served twice.
2. `Server.serve` reads and runs the application until it waits, before the next connection is taken. So a view that
   blocks the process never sits on a second connection that was read and cannot be given to anybody else.
3. Signals of the terminal (INT, QUIT, HUP) are for the primary. TERM means: ask the primary for a replacement, and
   go on serving until it is there; a second one, or one during the drain: end now. Until the worker is ready TERM does
   what it does to any process: nothing is served that could be lost, and the primary sees what ended it.
4. When the primary is gone the worker drains and exits. If its loop stands still it cannot notice that; then a
   watchdog in C (`faulthandler`) writes the stacks and ends it, so that no orphan remains for ever.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

# ruff: noqa: E402 - nothing may be imported before the patch
import faulthandler
import os
import posix  # its close is not gevent's, which waits for a turn of the loop
import resource
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event

from sharedcluster import readiness
from sharedcluster.cluster.board import Row
from sharedcluster.cluster.forking import WorkerContext
from sharedcluster.cluster.loading import LoadedApp, load
from sharedcluster.cluster.messages import (
    Drain,
    Draining,
    Heartbeat,
    Listening,
    LoadFailed,
    NewConnection,
    Online,
    Peer,
    Rebalance,
    ReopenLogs,
    Stop,
    TakeTurns,
    WorkerStats,
    cut_to_fit,
)
from sharedcluster.cluster.wire import LAST_WORDS, SharedAcceptor, TurnAcceptor, Wire, WorkerFacts, proxied_from
from sharedcluster.config import Config
from sharedcluster.errors import UserError
from sharedcluster.hooks import HookCluster, Hooks, HookWorker
from sharedcluster.http.server import Server
from sharedcluster.http.settings import HttpSettings, ListenerFacts, ReleasedConnection
from sharedcluster.http.tls import make_context
from sharedcluster.log import access_logger, logger, set_up
from sharedcluster.log_files import lost_lines

if TYPE_CHECKING:
    from sharedcluster.state import SharedState

HEARTBEAT_INTERVAL: Final = 1.0
WATCHDOG_MARGIN: Final = 5.0
"""Seconds after the heartbeat timeout; more than the primary's TERM and KILL take."""
READY_POLL: Final = 0.05
EXIT_LOAD_FAILED: Final = 3
_PAGE: Final = resource.getpagesize()


def main(context: WorkerContext, loaded: LoadedApp | None = None) -> int:
    """Be a worker until told to leave; returns the exit code. `loaded` is the application, if a mold has it."""
    config = context.config
    set_up(f"w{context.slot}", level=config.log_level, style=config.log_format, files=config.log_files())
    os.environ["SHAREDCLUSTER_WORKER_ID"] = str(context.id)
    os.environ["SHAREDCLUSTER_SLOT"] = str(context.slot)
    set_environment(context.redis_url)
    return Worker(context).run(loaded)


def set_environment(redis_url: str) -> None:
    """What the application may read before it is loaded."""
    if redis_url:
        os.environ["SHAREDCLUSTER_REDIS_URL"] = redis_url


class Worker:
    """The process: its end of the wire and what it serves."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self.config = context.config
        self._wire = Wire(
            context.channel,
            context.row,
            {
                TakeTurns: self._on_turns,
                NewConnection: self._on_connection,
                Drain: self._on_drain,
                Stop: self._on_stop,
                Rebalance: self._on_rebalance,
                ReopenLogs: self._on_reopen_logs,
            },
            self._primary_gone,
        )
        loop = gevent.get_hub().loop
        self._first_turn = loop.timer(0.0)
        self._heartbeat = loop.timer(HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL)
        self._before_wait = loop.prepare()
        self._after_wait = loop.check()
        self._acceptors: dict[int, SharedAcceptor | TurnAcceptor] = {}
        self._hooks = Hooks(None)
        self._server: Server | None = None
        self._leave = Event()
        self._drain_timeout: float | None = None
        self._cut = False
        self._gives_back = False
        self._orphaned = False
        self._asked_to_leave = False
        self._rss = 0

    def run(self, loaded: LoadedApp | None = None) -> int:
        """Load the application, serve, drain."""
        self._handle_signals()
        self._wire.start()
        self._wire.say(Online(os.getpid()))
        try:
            self._hooks = Hooks.load(self.config.hooks)
            self._hooks.call("post_fork", *self._hook_facts())
            loaded = loaded or load(self.config.app)
            self._hooks.call("post_worker_init", self._hook_facts()[1])
            if loaded.extension is not None:
                loaded.extension.state  # noqa: B018 - made here, so that its handlers hear messages from now on
            self._server = self._make_server(loaded)
        except UserError as error:
            self._wire.say(LoadFailed(str(error), cut_to_fit(getattr(error, "traceback", ""))))
            self._wire.last_words()
            return EXIT_LOAD_FAILED
        if self.config.wait_ready and not self._hear_ready():
            return self._finish(self._server)
        self._first_turn.start(self._come_up, loaded.secret)
        self._before_wait.start(self._note_wait, self._server, self.context.row)
        self._after_wait.start(self.context.row.works)
        self._accept(self._server)
        self._leave.wait()
        return self._finish(self._server)

    def _hook_facts(self) -> tuple[HookCluster, HookWorker]:
        context = self.context
        worker = HookWorker(context.id, context.slot, context.generation, os.getpid())
        return HookCluster(self.config.name, os.getppid()), worker

    def _hear_ready(self) -> bool:
        """Wait until the application says that it is ready; False if the worker has to leave before."""
        while not self._leave.is_set():
            if readiness.wait(READY_POLL):
                return True
        return False

    def _make_server(self, loaded: LoadedApp) -> Server:
        context = self.context
        facts = WorkerFacts(context.slot, context.id, context.generation)
        server = Server(
            loaded.application, http_settings(self.config, context.slot), environ={"sharedcluster.worker": facts}
        )
        tls = None
        if self.config.certfile:
            tls = make_context(self.config.certfile, self.config.keyfile or None, ticket_key=context.ticket_key)
        for index, address in enumerate(context.addresses):
            server.add_listener(
                index, ListenerFacts(host=address.host, port=address.port, unix_path=address.path or None, tls=tls)
            )
        return server

    def _note_wait(self, server: Server, row: Row) -> None:
        """The loop is about to wait for events."""
        row.waits(server.in_flight, server.connections, server.requests)
        self._wire.tell_accepted()

    def _accept(self, server: Server) -> None:
        """Take connections off the listening sockets: in this worker's turn, or with policy `shared` at any time."""
        for index, fd in self.context.listener_fds.items():
            serve = partial(_serve_accepted, server, index)
            if self.config.policy == "shared":
                self._acceptors[index] = SharedAcceptor(fd, serve)
            else:
                self._acceptors[index] = TurnAcceptor(fd, index, self._wire, serve)

    def _finish(self, server: Server) -> int:
        """Drain: what is in flight is answered, up to the deadline."""
        start = time.monotonic()
        timeout = self.config.graceful_timeout if self._drain_timeout is None else self._drain_timeout
        for acceptor in self._acceptors.values():
            acceptor.close()
        if not self._cut:
            for shared in live_states():
                shared.drain()
            if self._gives_back:
                # Others go on serving: an idle connection moves to them instead of being closed.
                server.release_when_idle(self._wire.give_back)
                for released in server.release_idle():
                    self._wire.give_back(released)
            server.drain()
            server.wait_drained(timeout)
        if left := server.in_flight:
            logger.warning("%d requests were cut", left)
        server.close()
        for shared in live_states():
            shared.close()
        self._hooks.call("worker_exit", *self._hook_facts())
        if not self._orphaned:
            self._beat()
            # A connection that is on its way back is not to be lost because the primary is slow.
            self._wire.last_words(max(LAST_WORDS, timeout - (time.monotonic() - start)))
        return 0

    # -- the wire --------------------------------------------------------------------------------------------------

    def _on_turns(self, message: TakeTurns, _fd: int | None) -> None:
        acceptor = self._acceptors.get(message.listener)
        if isinstance(acceptor, TurnAcceptor):
            acceptor.take(message.count)

    def _on_connection(self, message: NewConnection, fd: int | None) -> None:
        if fd is None or self._server is None:  # out of descriptors: it stayed with the primary
            self._wire.refuse(message, fd)
            return
        self._wire.accept(message)
        proxied = proxied_from(message.proxied) if message.proxied else None
        self._server.serve(fd, message.listener, message.peer, proxied)

    def _on_drain(self, message: Drain, _fd: int | None) -> None:
        self._drain_timeout = message.timeout
        self._gives_back = message.give_back
        if self._server is None:
            os._exit(0)  # it was still loading: nothing is in flight
        self._leave.set()

    def _on_stop(self, _message: Stop, _fd: int | None) -> None:
        self._end_now()

    def _on_rebalance(self, message: Rebalance, _fd: int | None) -> None:
        """Give away the next connections that fall idle, up to the count; busy ones stay until then."""
        server = self._server
        if server is None or self._leave.is_set():
            return
        left = message.count

        def take(released: ReleasedConnection) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                server.release_when_idle(None)
            self._wire.give_back(released)

        for released in server.release_idle(left):
            take(released)
        if left > 0:
            server.release_when_idle(take)

    def _on_reopen_logs(self, _message: ReopenLogs, _fd: int | None) -> None:
        config = self.config
        set_up(f"w{self.context.slot}", level=config.log_level, style=config.log_format, files=config.log_files())

    def _primary_gone(self) -> None:
        logger.warning("the primary is gone: draining")
        self._orphaned = True
        self._gives_back = False
        if self._server is None:
            os._exit(0)
        for acceptor in self._acceptors.values():
            if isinstance(acceptor, TurnAcceptor):
                acceptor.take_rest()
        self._leave.set()

    def _come_up(self, secret: str) -> None:
        """The loop turns: only now the primary may count on this worker, and on a reload's old ones no more.

        An application that starts something on import that keeps the loop for itself never gets here.
        """
        gevent.signal_handler(signal.SIGTERM, self._on_term)
        self._tick()
        self._heartbeat.start(self._tick)
        self._wire.say(Listening(secret))

    def _tick(self) -> None:
        """Once a second."""
        if self.config.heartbeat_timeout:
            # The primary acts first, if it is there; this is for a worker without one.
            patience = self.config.heartbeat_timeout + WATCHDOG_MARGIN
            faulthandler.dump_traceback_later(patience, exit=True)
        if not self._orphaned:
            self._beat()

    def _beat(self) -> None:
        self._wire.say(Heartbeat(self._stats()))

    def _stats(self) -> WorkerStats:
        server = self._server
        assert server is not None
        counters: dict[str, int] = {}
        redis_state, redis_url, latency = "none", "", 0.0
        for shared in live_states():
            facts = shared.facts()
            redis_state = "down" if "down" in (facts.state, redis_state) else facts.state
            redis_url, latency = facts.url, facts.latency_ms
            counters["gaps"] = counters.get("gaps", 0) + facts.gaps
            for name, count in facts.counts.items():
                counters[name] = counters.get(name, 0) + count
        seen = server.stats()
        counters["responses_5xx"] = seen.by_class[4]
        if lost := lost_lines():
            counters["log_lines_lost"] = lost
        return WorkerStats(
            connections=server.connections,
            in_flight=server.in_flight,
            requests=server.requests,
            rss=self._resident_bytes(),
            cpu_seconds=time.process_time(),
            redis_state=redis_state,
            redis_latency_ms=latency,
            redis_url=redis_url,
            counters=counters,
            latency=list(seen.latency),
        )

    def _resident_bytes(self) -> int:
        try:
            fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # out of descriptors: the last figure is good enough, the heartbeat must go out
            return self._rss
        try:
            self._rss = int(os.read(fd, 128).split()[1]) * _PAGE
        finally:
            posix.close(fd)
        return self._rss

    # -- signals ---------------------------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        ignore_the_terminal()
        # In C, so that it works while the loop stands still; the greenlets follow if Python still runs.
        signal.signal(signal.SIGUSR2, _dump_greenlets)
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True, chain=True)

    def _on_term(self) -> None:
        if self._leave.is_set() or self._asked_to_leave:
            self._end_now()
            return
        self._asked_to_leave = True
        self._wire.say(Draining("it got TERM"))

    def _end_now(self) -> None:
        self._cut = True
        if self._server is not None:
            self._server.close()
        os._exit(0)


def _serve_accepted(server: Server, index: int, fd: int, peer: Peer) -> None:
    server.serve(fd, index, peer)


def live_states() -> list[SharedState]:
    """The shared states of the application; none, and no redis loaded for it, if it does not use the extension."""
    room = sys.modules.get("sharedcluster.state")
    return room.live_states() if room is not None else []


def ignore_the_terminal() -> None:
    """Leave to the primary what is sent to the whole process group."""
    # A handler that does nothing, not SIG_IGN: programs that the application starts must not inherit deafness.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1):
        signal.signal(number, lambda _number, _frame: None)


def _dump_greenlets(_number: int, _frame: Any) -> None:
    from gevent.util import format_run_info

    sys.stderr.write("\n".join(format_run_info()) + "\n")


def http_settings(config: Config, slot: int) -> HttpSettings:
    """The part of the configuration that concerns the HTTP engine."""
    return HttpSettings(
        limit_head=config.limit_head,
        limit_fields=config.limit_fields,
        limit_body=config.limit_body,
        limit_concurrency=config.limit_concurrency,
        keep_alive=config.keep_alive,
        head_timeout=config.head_timeout,
        body_timeout=config.body_timeout,
        write_timeout=config.write_timeout,
        request_timeout=config.request_timeout,
        forwarded_allow_ips=config.forwarded_allow_ips,
        forwarded_headers=config.forwarded_headers,
        proxy_protocol=config.proxy_protocol,
        access_log=access_logger.info if config.access_log else None,
        access_log_format=config.log_format,
        expose_worker=str(slot) if config.expose_worker else None,
    )
