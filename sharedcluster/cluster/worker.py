"""A worker: the one file that joins the wire, the HTTP engine and the shared state.

Importing this module patches the process for gevent, as its first statement, before socket, ssl, redis or flask can
be imported unpatched. So only a process that was forked to be a worker (or to check the application) imports it.

Laws:

1. What holds for connections and messages is in `wire`: acknowledged before the first read, one per turn of the loop.
2. Signals of the terminal (INT, QUIT, HUP) are for the primary. TERM means: drain; while draining: end now.
3. When the primary is gone the worker drains and exits. If its loop stands still it cannot notice that; then a
   watchdog in C (`faulthandler`) writes the stacks and ends it, so that no orphan remains for ever.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

# ruff: noqa: E402 - nothing may be imported before the patch
import faulthandler
import os
import resource
import signal
import sys
import time
from typing import Any, Final

import gevent
from gevent.event import Event

from sharedcluster import state
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
    ReopenLogs,
    Stop,
    WorkerStats,
    cut_to_fit,
)
from sharedcluster.cluster.wire import Wire, WorkerFacts, listener_facts, proxied_from
from sharedcluster.config import Config
from sharedcluster.errors import AppLoadError
from sharedcluster.http.server import Server
from sharedcluster.http.settings import HttpSettings
from sharedcluster.log import access_logger, logger, set_up

HEARTBEAT_INTERVAL: Final = 1.0
WATCHDOG_MARGIN: Final = 5.0
"""Seconds after the heartbeat timeout; more than the primary's TERM and KILL take."""
EXIT_LOAD_FAILED: Final = 3
_PAGE: Final = resource.getpagesize()


def main(context: WorkerContext) -> int:
    """Be a worker until told to leave; returns the exit code."""
    set_up(f"w{context.slot}", level=context.config.log_level, style=context.config.log_format)
    os.environ["SHAREDCLUSTER_WORKER_ID"] = str(context.id)
    os.environ["SHAREDCLUSTER_SLOT"] = str(context.slot)
    if context.redis_url:
        os.environ["SHAREDCLUSTER_REDIS_URL"] = context.redis_url
    return Worker(context).run()


class Worker:
    """The process: its end of the wire and what it serves."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self.config = context.config
        self._wire = Wire(
            context.channel,
            {
                NewConnection: self._on_connection,
                Drain: self._on_drain,
                Stop: self._on_stop,
                ReopenLogs: self._on_reopen_logs,
            },
            self._primary_gone,
        )
        self._heartbeat = gevent.get_hub().loop.timer(0.0, HEARTBEAT_INTERVAL)
        self._server: Server | None = None
        self._leave = Event()
        self._drain_timeout: float | None = None
        self._cut = False
        self._gives_back = False
        self._orphaned = False
        self._rss = 0

    def run(self) -> int:
        """Load the application, serve, drain."""
        self._handle_signals()
        self._wire.start()
        self._wire.say(Online(os.getpid()))
        try:
            loaded = load(self.config.app)
        except AppLoadError as error:
            self._wire.say(LoadFailed(str(error), cut_to_fit(error.traceback)))
            self._wire.last_words()
            return EXIT_LOAD_FAILED
        self._server = self._make_server(loaded)
        self._wire.say(Listening(loaded.secret))
        self._heartbeat.start(self._tick)
        self._leave.wait()
        return self._finish(self._server)

    def _make_server(self, loaded: LoadedApp) -> Server:
        context = self.context
        facts = WorkerFacts(context.slot, context.id, context.generation)
        server = Server(
            loaded.application, http_settings(self.config, context.slot), environ={"sharedcluster.worker": facts}
        )
        for index, address in enumerate(context.addresses):
            server.add_listener(index, listener_facts(address))
        return server

    def _finish(self, server: Server) -> int:
        """Drain: what is in flight is answered, up to the deadline."""
        timeout = self.config.graceful_timeout if self._drain_timeout is None else self._drain_timeout
        if not self._cut:
            for shared in state.live_states():
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
        for shared in state.live_states():
            shared.close()
        if not self._orphaned:
            self._beat()
            self._wire.last_words()
        return 0

    # -- the wire --------------------------------------------------------------------------------------------------

    def _on_connection(self, message: NewConnection, fd: int | None) -> None:
        if fd is None or self._server is None:  # out of descriptors: it stayed with the primary
            self._wire.refuse(message, fd)
            return
        server = self._server
        proxied = proxied_from(message.proxied)
        self._wire.accept(message, lambda: server.serve(fd, message.listener, message.peer, proxied))

    def _on_drain(self, message: Drain, _fd: int | None) -> None:
        self._drain_timeout = message.timeout
        self._gives_back = message.give_back
        if self._server is None:
            os._exit(0)  # it was still loading: nothing is in flight
        self._leave.set()

    def _on_stop(self, _message: Stop, _fd: int | None) -> None:
        self._end_now()

    def _on_reopen_logs(self, _message: ReopenLogs, _fd: int | None) -> None:
        set_up(f"w{self.context.slot}", level=self.config.log_level, style=self.config.log_format)

    def _primary_gone(self) -> None:
        logger.warning("the primary is gone: draining")
        self._orphaned = True
        self._gives_back = False
        if self._server is None:
            os._exit(0)
        self._leave.set()

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
        for shared in state.live_states():
            facts = shared.facts()
            redis_state = "down" if "down" in (facts.state, redis_state) else facts.state
            redis_url, latency = facts.url, facts.latency_ms
            counters["gaps"] = counters.get("gaps", 0) + facts.gaps
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
        )

    def _resident_bytes(self) -> int:
        try:
            fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # out of descriptors: the last figure is good enough, the heartbeat must go out
            return self._rss
        try:
            self._rss = int(os.read(fd, 128).split()[1]) * _PAGE
        finally:
            os.close(fd)
        return self._rss

    # -- signals ---------------------------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        # A handler that does nothing, not SIG_IGN: programs that the application starts must not inherit deafness.
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1):
            signal.signal(number, lambda _number, _frame: None)
        # In C, so that it works while the loop stands still; the greenlets follow if Python still runs.
        signal.signal(signal.SIGUSR2, _dump_greenlets)
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True, chain=True)
        gevent.signal_handler(signal.SIGTERM, self._on_term)

    def _on_term(self) -> None:
        if self._leave.is_set() or self._server is None:
            self._end_now()
            return
        self._wire.say(Draining("it got TERM"))
        self._leave.set()

    def _end_now(self) -> None:
        self._cut = True
        if self._server is not None:
            self._server.close()
        os._exit(0)


def _dump_greenlets(_number: int, _frame: Any) -> None:
    from gevent.util import format_run_info

    sys.stderr.write("\n".join(format_run_info()) + "\n")


def http_settings(config: Config, slot: int) -> HttpSettings:
    """The part of the configuration that concerns the HTTP engine."""
    return HttpSettings(
        limit_head=config.limit_head,
        limit_body=config.limit_body,
        limit_concurrency=config.limit_concurrency,
        keep_alive=config.keep_alive,
        request_timeout=config.request_timeout,
        forwarded_allow_ips=config.forwarded_allow_ips,
        access_log=access_logger.info if config.access_log else None,
        access_log_format=config.log_format,
        expose_worker=str(slot) if config.expose_worker else None,
    )
