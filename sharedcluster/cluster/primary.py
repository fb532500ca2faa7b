"""The primary process: one thread, one selector loop; it binds, forks, hands off connections and supervises.

Laws:

1. Standard library only. It never imports gevent, redis, flask, httptools or the application, and never starts a
   thread, so a fork is always clean and a reload always loads new code.
2. It never reads a byte of a request. A connection is passed on as a descriptor; its owner is always visible:
   kernel backlog -> the worker whose turn it is, or
   kernel backlog -> `Listener.pending` -> `WorkerHandle.unacknowledged` -> the worker.
3. Everything happens in the loop, between two calls of `select`: signals come through a pipe, children through
   SIGCHLD, operators through the control socket. After each turn `supervision` says what has to be done.

This file is the loop, the signals and the way to stop; the workers are in `workforce`, the connections in `hand_off`.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from sharedcluster.cluster import events
from sharedcluster.cluster.board import Row
from sharedcluster.cluster.forking import MoldContext, MoldMain, WorkerContext, WorkerMain
from sharedcluster.cluster.hand_off import HandOff
from sharedcluster.cluster.ipc import MessageSocket
from sharedcluster.cluster.listener import Listener
from sharedcluster.cluster.molds import Direct, Molds
from sharedcluster.cluster.notify import Notifier
from sharedcluster.cluster.own_policy import make_policy
from sharedcluster.cluster.scheduling import BLIND
from sharedcluster.cluster.signals import INTENTS, SignalPipe
from sharedcluster.cluster.status import ClusterFacts, describe
from sharedcluster.cluster.workforce import Workforce
from sharedcluster.config import Config
from sharedcluster.control.server import ControlServer
from sharedcluster.errors import UserError
from sharedcluster.log import logger, set_up
from sharedcluster.version import VERSION

IDLE_TICK: Final = 1.0
BUSY_TICK: Final = 0.05
HANDSHAKE_GRACE: Final = 0.25
"""Seconds between refusing newcomers and closing the listeners: the time a handshake that has begun may take."""

TICKET_KEY_BYTES: Final = 80
"""What OpenSSL takes: a name of 16 bytes, an HMAC key and an AES key of 32 each."""


class Keeper(Protocol):
    """The primary's hold on the process that keeps a private Redis."""

    keeper_pid: int

    def revive(self) -> None:
        """Start it again after it was killed."""


class Primary:
    """A cluster, from the bound listeners to the last reaped worker.

    Args:
        config: The settings.
        listeners: Bound already: what cannot be bound must fail before anything is forked.
        worker_main: A worker's entry, called in the forked child; returns the exit code.
        mold_main: A mold's entry, likewise; used with `--preload`.
        name: The cluster's name.
        redis_url: What workers connect to, "" for none; `redis_shown` is the same without a password.
        keeper: What keeps a private Redis, if there is one: its process is a child of ours, but no worker.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[Listener],
        worker_main: WorkerMain,
        mold_main: MoldMain,
        *,
        name: str,
        redis_url: str = "",
        redis_shown: str = "",
        keeper: Keeper | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.events = events.Emitter(self._observer_failed)
        self.exit_code = 0
        self.notifier = Notifier()
        self._redis_url = redis_url
        self._redis_shown = redis_shown
        self._keeper = keeper
        self._started_at = time.time()
        self._selector = selectors.DefaultSelector()
        self._signals = SignalPipe()
        self._control: ControlServer | None = None
        self._ticket_key = os.urandom(TICKET_KEY_BYTES)
        self._closing_at: float | None = None
        self._stop_deadline: float | None = None
        self._act_at = 0.0
        self._handed_over = False
        self._cut = 0
        self.hand_off = HandOff(
            listeners,
            make_policy(config.policy),
            self._selector,
            accepts=config.policy != "shared",
            in_turns=config.policy in BLIND,
        )
        self.workforce = Workforce(config, self.hand_off, self._selector, self.events, self._worker_context)
        self.workforce.nursery = self._make_nursery(worker_main, mold_main)

    def _make_nursery(self, worker_main: WorkerMain, mold_main: MoldMain) -> Direct | Molds:
        if not self.config.preload:
            return Direct(worker_main, self._close_in_child)
        return Molds(
            mold_main,
            self._mold_context,
            self._selector,
            self._close_in_child,
            on_forked=self.workforce.forked,
            on_failed=self.workforce.mold_failed,
            boot_timeout=self.config.boot_timeout,
        )

    def answer(self, control: Callable[[selectors.BaseSelector], ControlServer]) -> None:
        """Take commands of operators; the control server runs in the primary's own loop."""
        self._control = control(self._selector)
        self._control.start()

    def stop_answering(self) -> None:
        """Close the control socket; does nothing if it is closed."""
        if self._control:
            self._control.close()
            self._control = None

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Have the loop call `callback` whenever `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def unwatch(self, fd: int) -> None:
        """Stop watching."""
        self._selector.unregister(fd)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until it is told to stop or has to give up; returns the exit code of the command."""
        self._signals.install()
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        try:
            while True:
                now = time.monotonic()
                self.hand_off.watch(now)
                if now < self._act_at and not self.workforce.has_changed:
                    # Most turns only hand connections out; then nothing has to be decided.
                    left = self._act_at - now
                    self._turn(min(left, BUSY_TICK) if self.hand_off.is_waiting else left)
                    continue
                self._advance_stop(now)
                self.workforce.act(now)
                if self.workforce.gave_up and not self.exit_code:
                    self.exit_code = 3
                    self.on_stop_now()
                    continue
                if self.workforce.is_leaving and not self.workforce.workers:
                    return self.exit_code
                self.notifier.beat(now)
                self._act_at = now + self._tick()
                self._turn(self._tick())
        finally:
            self._close()

    def _turn(self, timeout: float) -> None:
        for key, mask in self._selector.select(timeout):
            key.data(mask)
        self.hand_off.dispatch()

    def _tick(self) -> float:
        """How long nothing needs to be decided, if nothing happens."""
        restless = self.is_stopping or self.workforce.is_restless or self.hand_off.is_waiting
        longest = min(IDLE_TICK, self.notifier.interval or IDLE_TICK)
        return BUSY_TICK if restless else longest

    def _close(self) -> None:
        self._cut += self.hand_off.close(keep_files=self._handed_over)
        self.workforce.nursery.close()
        self.stop_answering()
        self._signals.restore()
        self._selector.close()
        self._signals.close()
        requests = self.workforce.counters["requests"]
        logger.info("stopped: %d requests served, %d connections cut", requests, self._cut)

    # -- what forked processes get ---------------------------------------------------------------------------------

    def _worker_context(self, id: int, slot: int, generation: int, channel: MessageSocket, row: Row) -> WorkerContext:
        return WorkerContext(
            id=id,
            slot=slot,
            generation=generation,
            channel=channel,
            config=self.config,
            addresses=tuple(each.address for each in self.hand_off.listeners),
            redis_url=self._redis_url,
            row=row,
            ticket_key=self._ticket_key,
            listener_fds=self.hand_off.worker_fds,
        )

    def _mold_context(self, generation: int, channel: MessageSocket) -> MoldContext:
        return MoldContext(
            generation=generation,
            channel=channel,
            config=self.config,
            addresses=tuple(each.address for each in self.hand_off.listeners),
            redis_url=self._redis_url,
            board=self.workforce.board,
            ticket_key=self._ticket_key,
            listener_fds=self.hand_off.worker_fds,
        )

    def _close_in_child(self) -> None:
        """In a forked process: drop every descriptor of ours, or it would keep connections and ports open."""
        self._signals.restore()
        self._signals.close()
        self.workforce.close_in_child()
        self.hand_off.close_in_child()
        if self._control:
            self._control.close_in_child()
        self._selector.close()

    # -- signals ---------------------------------------------------------------------------------------------------

    def _on_signals(self, _mask: int) -> None:
        self.workforce.has_changed = True
        for number in self._signals.read():
            getattr(self, f"on_{INTENTS[number][0]}")()

    def on_reap(self) -> None:
        """Collect every child that ended; one that is nobody's (an orphan given to PID 1) is only collected."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._keeper is not None and pid == self._keeper.keeper_pid:
                self._revive(self._keeper)
            else:
                self.workforce.reaped(pid, status)
                self.events.emit(events.REAPED, pid, status)

    def _revive(self, keeper: Keeper) -> None:
        if self.workforce.is_leaving:
            return
        try:
            keeper.revive()
        except UserError as error:
            logger.error("%s", error)

    def on_reload(self, when_over: Callable[[str], None] | None = None) -> None:
        """A new generation; a second call during the first is done after it."""
        if not self.is_stopping:
            self.notifier.reloading()
            self.workforce.reloads.ask(lambda failure: self._reload_is_over(failure, when_over))

    def _reload_is_over(self, failure: str, when_over: Callable[[str], None] | None) -> None:
        if failure:
            self.notifier.ready(self.desired_workers)  # systemd waits for this after RELOADING, however it went
        if when_over is not None:
            when_over(failure)

    def on_scale_up(self) -> None:
        """One worker more."""
        self.scale(self.desired_workers + 1)

    def on_scale_down(self) -> None:
        """One worker fewer, but not none."""
        self.scale(max(1, self.desired_workers - 1))

    def scale(self, workers: int) -> None:
        """Change the number of workers."""
        if workers != self.desired_workers:
            logger.info("scaling from %d to %d workers", self.desired_workers, workers)
            self.workforce.desired = replace(self.workforce.desired, workers=workers)

    def on_reopen_logs(self) -> None:
        """Workers and primary open their log files anew."""
        try:
            set_up("primary", level=self.config.log_level, style=self.config.log_format, files=self.config.log_files())
        except UserError as error:
            logger.error("%s", error)
        self.workforce.reopen_logs()

    def on_upgrade(self) -> None:
        """Replace this very program; done by whoever knows how it was started."""
        if not self.is_stopping:
            self.events.emit(events.UPGRADE)

    # -- stopping --------------------------------------------------------------------------------------------------

    def on_drain(self) -> None:
        """Stop: first empty the queues, then let the workers finish."""
        if self.is_stopping:
            return
        now = time.monotonic()
        self._closing_at = now + HANDSHAKE_GRACE
        self._stop_deadline = now + self.config.graceful_timeout
        self.hand_off.refuse_newcomers()
        self._say_draining()

    def hand_over(self) -> None:
        """Another primary serves on the same sockets: leave the listeners to it and drain."""
        if self.is_stopping:
            return
        self._handed_over = True
        now = time.monotonic()
        self._closing_at = now
        self._stop_deadline = now + self.config.graceful_timeout
        self.stop_answering()
        self.hand_off.stop_accepting()
        self._say_draining()

    def _say_draining(self) -> None:
        self.notifier.stopping()
        workers = self.workforce.workers.values()
        in_flight = sum(w.row.in_flight for w in workers)
        logger.info(
            "draining: %d workers, %d requests in flight, up to %g s (Ctrl+C again to stop now)",
            len(workers), in_flight, self.config.graceful_timeout,
        )  # fmt: skip

    def on_interrupt(self) -> None:
        """Ctrl+C: the first drains, the second stops now."""
        if self.is_stopping:
            self.on_stop_now()
        else:
            self.on_drain()

    def on_stop_now(self) -> None:
        """Stop: what is in flight is cut."""
        self._closing_at = self._closing_at or time.monotonic()
        self._cut += self.hand_off.close(keep_files=self._handed_over)
        self.workforce.desired = replace(self.workforce.desired, stopping=True, now_or_never=True)

    def _advance_stop(self, now: float) -> None:
        """Second half of `on_drain`: when the backlog and the queues are empty, close and drain the workers."""
        desired = self.workforce.desired
        if self._closing_at is None or desired.stopping or now < self._closing_at:
            return
        deadline = self._stop_deadline or now
        handing = any(w.unacknowledged for w in self.workforce.workers.values())
        if (self.hand_off.accept_all(now) or handing) and now < deadline and self.workforce.workers:
            self.hand_off.dispatch()
            return
        self._cut += self.hand_off.close(keep_files=self._handed_over)
        left = max(0.0, deadline - now)
        self.workforce.desired = replace(desired, stopping=True, graceful_timeout=left)

    # -- what others ask -------------------------------------------------------------------------------------------

    @property
    def was_handed_over(self) -> bool:
        """Whether another primary serves in this one's place."""
        return self._handed_over

    @property
    def is_stopping(self) -> bool:
        """Whether it is on its way out."""
        return self._closing_at is not None

    @property
    def desired_workers(self) -> int:
        """How many workers there should be."""
        return self.workforce.desired.workers

    def status(self) -> dict[str, Any]:
        """What `sharedcluster status --json` prints."""
        state = "online"
        if self.is_stopping:
            state = "draining"
        elif self.workforce.is_reloading:
            state = "reloading"
        facts = ClusterFacts(
            name=self.name,
            pid=os.getpid(),
            version=VERSION,
            state=state,
            generation=self.workforce.desired.serving_generation,
            policy=self.config.policy,
            started_at=self._started_at,
            redis_url=self._redis_shown,
            counters={**self.workforce.counters, "cut": self._cut},
        )
        workers = list(self.workforce.workers.values())
        return describe(facts, self.hand_off.listeners, workers, time.monotonic())

    def _observer_failed(self, event: str, error: BaseException) -> None:
        logger.error("an observer of %r failed", event, exc_info=error)
