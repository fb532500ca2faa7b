"""The primary process: one thread, one selector loop; it binds, forks, hands off connections and supervises.

Laws:

1. Standard library only. It never imports gevent, redis, flask, httptools or the application, and never starts a
   thread, so a fork is always clean and a reload always loads new code.
2. It never reads a byte of a request. A connection is passed on as a descriptor; its owner is always visible:
   kernel backlog -> `Listener.pending` -> `WorkerHandle.unacknowledged` -> the worker.
3. Everything happens in the loop, between two calls of `select`: signals come through a pipe, children through
   SIGCHLD, operators through the control socket. After each turn `reconcile` says what has to be done.
4. It knows how to do things (fork, signal, hand off); `supervision` decides which.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Protocol

import sharedcluster
from sharedcluster.cluster import events, supervision
from sharedcluster.cluster.forking import WorkerContext, WorkerMain, fork_worker
from sharedcluster.cluster.hand_off import HandOff
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.listener import Listener
from sharedcluster.cluster.messages import (
    Accepted,
    Connection,
    Drain,
    Draining,
    GivenBack,
    Heartbeat,
    Listening,
    LoadFailed,
    Message,
    Online,
    ReopenLogs,
    Returned,
)
from sharedcluster.cluster.scheduling import RoundRobin
from sharedcluster.cluster.signals import INTENTS, SignalPipe
from sharedcluster.cluster.status import ClusterFacts, describe
from sharedcluster.cluster.supervision import Crashes, Desired
from sharedcluster.cluster.worker_handle import ExitReason, WorkerHandle, WorkerState
from sharedcluster.config import Config
from sharedcluster.control.server import ControlServer
from sharedcluster.errors import UserError
from sharedcluster.log import logger, set_up

IDLE_TICK: Final = 1.0
BUSY_TICK: Final = 0.05
HANDSHAKE_GRACE: Final = 0.25
"""Seconds between refusing newcomers and closing the listeners: the time a handshake that has begun may take."""
MESSAGES_PER_TURN: Final = 256


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
        worker_main: The worker's entry, called in the forked child; returns the exit code.
        redis_url: What workers connect to, "" for none; `redis_shown` is the same without a password.
        keeper: What keeps a private Redis, if there is one: its process is a child of ours, but no worker.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[Listener],
        worker_main: WorkerMain,
        *,
        name: str,
        redis_url: str = "",
        redis_shown: str = "",
        keeper: Keeper | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.workers: dict[int, WorkerHandle] = {}
        self.events = events.Emitter(self._observer_failed)
        self.exit_code = 0
        self.counters = dict.fromkeys(
            ("restarts", "reloads", "redispatched", "migrated", "gaps", "requests", "killed", "cut"), 0
        )
        self._worker_main = worker_main
        self._redis_url = redis_url
        self._redis_shown = redis_shown
        self._keeper = keeper
        self._started_at = time.time()
        self._started = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._signals = SignalPipe()
        self.hand_off = HandOff(listeners, RoundRobin(), self._selector)
        self._control: ControlServer | None = None
        # Supervision
        self._desired = Desired(
            workers=config.workers,
            generation=1,
            serving_generation=1,
            graceful_timeout=config.graceful_timeout,
            heartbeat_timeout=config.heartbeat_timeout,
            boot_timeout=config.boot_timeout,
        )
        self._crashes: dict[int, Crashes] = {}
        self._restarts: dict[int, int] = {}
        self._last_id = 0
        self._ever_listened = False
        self._was_ready = False
        self._reload_again = False
        self._reload_observers: list[Callable[[str], None]] = []
        # Stopping
        self._closing_at: float | None = None
        self._stop_deadline: float | None = None

    def answer(self, control: Callable[[selectors.BaseSelector], ControlServer]) -> None:
        """Take commands of operators; the control server runs in the primary's own loop."""
        self._control = control(self._selector)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until it is told to stop or has to give up; returns the exit code of the command."""
        self._signals.install()
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        if self._control:
            self._control.start()
        try:
            while True:
                now = time.monotonic()
                self._act(now)
                if self._is_over():
                    logger.info(
                        "stopped: %d requests served, %d connections cut",
                        self.counters["requests"],
                        self.counters["cut"],
                    )
                    return self.exit_code
                self.hand_off.watch(now)
                for key, mask in self._selector.select(self._tick()):
                    key.data(mask)
                self.hand_off.dispatch()
        finally:
            self._close()

    def _tick(self) -> float:
        """How long the loop may sleep when nothing happens."""
        restless = (
            self._closing_at is not None
            or len(self.workers) != self._desired.workers
            or any(w.state is not WorkerState.LISTENING or w.terminated_at for w in self.workers.values())
            or self.hand_off.is_paused
        )
        return BUSY_TICK if restless else IDLE_TICK

    def _is_over(self) -> bool:
        return not self.workers and (self._desired.stopping or self._desired.now_or_never or self.exit_code != 0)

    def _close(self) -> None:
        self.counters["cut"] += self.hand_off.close()
        if self._control:
            self._control.close()
        self._signals.restore()
        self._selector.close()
        self._signals.close()

    # -- messages of workers ---------------------------------------------------------------------------------------

    def _reader(self, worker: WorkerHandle) -> Callable[[int], None]:
        def on_readable(_mask: int) -> None:
            self._read_channel(worker)

        return on_readable

    def _read_channel(self, worker: WorkerHandle) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                received = worker.channel.receive()
            except ChannelClosed:
                self._channel_closed(worker)
                return
            except ValueError as error:
                logger.error("worker %d sent what is no message: %s", worker.id, error)
                continue
            if received is None:
                return
            message, fd = received
            handler = self._HANDLERS.get(type(message))
            if handler is None:
                logger.error("worker %d sent a message that is not for the primary: %r", worker.id, message)
            else:
                handler(self, worker, message, fd)

    def _channel_closed(self, worker: WorkerHandle) -> None:
        self.hand_off.leave(worker)
        with suppress(KeyError):
            self._selector.unregister(worker.channel)
            self.events.emit(events.DISCONNECT, worker)

    def _on_accepted(self, worker: WorkerHandle, message: Accepted, _fd: int | None) -> None:
        worker.acknowledged(message.seq)

    def _on_returned(self, worker: WorkerHandle, message: Returned, _fd: int | None) -> None:
        self.counters["redispatched"] += 1
        self.hand_off.take_back([worker.returned(message.seq)])
        self.hand_off.rest(worker, time.monotonic())

    def _on_given_back(self, worker: WorkerHandle, message: GivenBack, fd: int | None) -> None:
        if fd is None:
            logger.error("worker %d gave a connection back and its descriptor did not arrive", worker.id)
            return
        if self._desired.stopping:
            os.close(fd)  # there is nobody left to take it; it was idle, so its client loses nothing
            return
        worker.given_back += 1
        self.counters["migrated"] += 1
        self.hand_off.give(Connection(fd, message.listener, message.peer, message.proxied))

    def _on_online(self, worker: WorkerHandle, _message: Online, _fd: int | None) -> None:
        worker.state = WorkerState.ONLINE
        self.events.emit(events.ONLINE, worker)

    def _on_listening(self, worker: WorkerHandle, message: Listening, _fd: int | None) -> None:
        now = time.monotonic()
        worker.heartbeat_at = worker.listening_at = now
        worker.secret = message.secret
        if worker.state is WorkerState.DRAINING:
            return  # it was told to leave while it was loading
        worker.state = WorkerState.LISTENING
        self._ever_listened = True
        self.hand_off.enter(worker)
        self._compare_secrets(worker)
        self.events.emit(events.LISTENING, worker)

    def _on_load_failed(self, worker: WorkerHandle, message: LoadFailed, _fd: int | None) -> None:
        worker.load_failure = (message.what, message.traceback)

    def _on_heartbeat(self, worker: WorkerHandle, message: Heartbeat, _fd: int | None) -> None:
        worker.heard(message.stats, time.monotonic())

    def _on_draining(self, worker: WorkerHandle, message: Draining, _fd: int | None) -> None:
        """It leaves of its own accord, so it is drained like one that was told to."""
        logger.info("worker %d (slot %d) leaves: %s", worker.id, worker.slot, message.reason)
        worker.asked_to_leave = True
        worker.retiring = message.reason
        self._start_drain(worker, time.monotonic() + self.config.graceful_timeout)

    _HANDLERS: Final[dict[type[Message], Callable[[Any, WorkerHandle, Any, int | None], None]]] = {
        Accepted: _on_accepted,
        Returned: _on_returned,
        GivenBack: _on_given_back,
        Online: _on_online,
        Listening: _on_listening,
        LoadFailed: _on_load_failed,
        Heartbeat: _on_heartbeat,
        Draining: _on_draining,
    }

    def _compare_secrets(self, newcomer: WorkerHandle) -> None:
        for other in self.workers.values():
            if other.generation == newcomer.generation and other.secret and other.secret != newcomer.secret:
                logger.error(
                    "Workers have different SECRET_KEY values (worker %d: %s, worker %d: %s).\n"
                    "It is probably made anew at each import (os.urandom, secrets.token_hex). Sessions will be lost "
                    "between workers.\nSet one value for all of them, in the environment or in the configuration.",
                    other.id, other.secret, newcomer.id, newcomer.secret or "none",
                )  # fmt: skip
                return

    # -- acting on decisions ---------------------------------------------------------------------------------------

    def _act(self, now: float) -> None:
        self._advance_stop(now)
        for worker in self.workers.values():
            if worker.slot in self._crashes:
                self._crashes[worker.slot] = supervision.forgiven(self._crashes[worker.slot], worker, now)
        actions = supervision.reconcile(
            self._desired, list(self.workers.values()), self._crashes, now, ever_listened=self._ever_listened
        )
        for action in actions:
            self._ACTIONS[type(action)](self, action)
        ready = [w for w in self.workers.values() if w.state is WorkerState.LISTENING]
        if not self._was_ready and len(ready) >= self._desired.workers:
            self._was_ready = True
            self.events.emit(events.READY, now - self._started, len(ready))

    def _spawn(self, action: supervision.Spawn) -> None:
        ours, theirs = MessageSocket.pair()
        self._last_id += 1
        context = WorkerContext(
            id=self._last_id,
            slot=action.slot,
            generation=action.generation,
            channel=theirs,
            config=self.config,
            addresses=tuple(each.address for each in self.hand_off.listeners),
            redis_url=self._redis_url,
            primary_pid=os.getpid(),
        )
        pid = fork_worker(context, self._worker_main, self._close_in_child, ours)
        worker = WorkerHandle(
            context.id, action.slot, action.generation, pid, ours, time.monotonic(),
            restarts=self._restarts.get(action.slot, 0),
        )  # fmt: skip
        self.workers[worker.id] = worker
        self._selector.register(ours, selectors.EVENT_READ, self._reader(worker))
        self.events.emit(events.FORK, worker)

    def _close_in_child(self) -> None:
        """In a forked worker: drop every descriptor of the primary's, or it would keep connections and ports open."""
        self._signals.restore()
        self._signals.close()
        for worker in self.workers.values():
            worker.channel.close()
            for connection in worker.unacknowledged.values():
                os.close(connection.fd)
        self.hand_off.close_in_child()
        if self._control:
            self._control.close_in_child()
        self._selector.close()

    def _drain(self, action: supervision.DrainWorker) -> None:
        worker = action.worker
        worker.asked_to_leave = True
        self._start_drain(worker, action.deadline)
        give_back = not (self._desired.stopping or self._desired.now_or_never)
        worker.tell(Drain(max(0.0, action.deadline - time.monotonic()), give_back))
        logger.debug("worker %d drains: %s", worker.id, action.reason)

    def _start_drain(self, worker: WorkerHandle, deadline: float) -> None:
        self.hand_off.leave(worker)
        worker.state = WorkerState.DRAINING
        worker.deadline = deadline
        self.events.emit(events.DRAIN, worker)

    def _dump(self, action: supervision.Dump) -> None:
        action.worker.hung = True
        with suppress(ProcessLookupError):
            os.kill(action.worker.pid, signal.SIGUSR2)

    def _terminate(self, action: supervision.Terminate) -> None:
        worker = action.worker
        worker.terminated_at = time.monotonic()
        self.hand_off.leave(worker)
        if not worker.asked_to_leave or worker.stats.in_flight:
            logger.warning(
                "worker %d (slot %d, pid %d) gets TERM: %s", worker.id, worker.slot, worker.pid, action.reason
            )
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGTERM)

    def _kill(self, action: supervision.Kill) -> None:
        worker = action.worker
        worker.killed = True
        self.counters["killed"] += 1
        logger.warning("worker %d (slot %d, pid %d) gets KILL: %s", worker.id, worker.slot, worker.pid, action.reason)
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)

    def _promote(self, _action: supervision.Promote) -> None:
        self._desired = replace(self._desired, serving_generation=self._desired.generation)
        self.counters["reloads"] += 1
        self.events.emit(events.RELOAD, self._desired.generation)
        if self._reload_again:
            # Those who asked during a reload meant the code they had just written: the next one answers.
            self._reload_again = False
            self._begin_reload()
        else:
            self._reload_ended("")

    def _abandon_reload(self, action: supervision.AbandonReload) -> None:
        what, trace = action.worker.load_failure or ("a new worker ended before it was ready", "")
        count = self._desired.workers
        logger.error("reload stopped: %s; the %d old workers keep serving\n%s", what, count, trace)
        failed, self._desired = self._desired.generation, replace(
            self._desired, generation=self._desired.serving_generation
        )  # fmt: skip
        self._reload_again = False
        self._reload_ended(f"{what}\n{trace}".rstrip())
        for worker in self.workers.values():
            if worker.generation == failed and worker.state is not WorkerState.DRAINING:
                self._drain(supervision.DrainWorker(worker, time.monotonic(), "its generation was abandoned"))

    def _give_up(self, action: supervision.GiveUp) -> None:
        failures = [w.load_failure for w in self.workers.values() if w.load_failure]
        logger.error("%s", action.reason)
        if failures:
            logger.error("%s\n%s", *failures[-1])
        self.exit_code = 3
        self.on_stop_now()

    _ACTIONS: Final[dict[type[supervision.Action], Callable[[Any, Any], None]]] = {
        supervision.Spawn: _spawn,
        supervision.DrainWorker: _drain,
        supervision.Dump: _dump,
        supervision.Terminate: _terminate,
        supervision.Kill: _kill,
        supervision.Promote: _promote,
        supervision.AbandonReload: _abandon_reload,
        supervision.GiveUp: _give_up,
    }

    # -- the end of a worker ---------------------------------------------------------------------------------------

    def on_reap(self) -> None:
        """Collect every child that ended; one that is no worker (an orphan given to PID 1) is only collected."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            worker = next((w for w in self.workers.values() if w.pid == pid), None)
            if worker is not None:
                self._bury(worker, status)
            elif self._keeper is not None and pid == self._keeper.keeper_pid and not self._desired.stopping:
                self._revive(self._keeper)

    def _revive(self, keeper: Keeper) -> None:
        try:
            keeper.revive()
        except UserError as error:
            logger.error("%s", error)

    def _bury(self, worker: WorkerHandle, status: int) -> None:
        # What it said before it died counts: an `Accepted` in the socket means that bytes may have been read, so
        # that connection must not be given to anybody else; a given-back one must not be lost.
        self._read_channel(worker)
        self._channel_closed(worker)
        worker.channel.close()
        worker.state = WorkerState.DEAD
        del self.workers[worker.id]
        orphans = worker.take_back()
        self.counters["redispatched"] += len(orphans)
        self.hand_off.take_back(orphans)
        self.counters["requests"] += worker.stats.requests
        for name, count in worker.stats.counters.items():
            self.counters[name] = self.counters.get(name, 0) + count
        reason = ExitReason(
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            asked=worker.asked_to_leave,
        )
        if reason.code in self.config.stop_exit_codes and not worker.asked_to_leave:
            self._leave_empty(worker, reason.code)
        elif not (worker.asked_to_leave or self._desired.now_or_never):
            now = time.monotonic()
            self._crashes[worker.slot] = supervision.after_exit(self._crashes.get(worker.slot, Crashes()), worker, now)
            self._restarts[worker.slot] = self._restarts.get(worker.slot, 0) + 1
            self.counters["restarts"] += 1
            self._stopped_early(worker)
        self.events.emit(events.EXIT, worker, reason)

    def _leave_empty(self, worker: WorkerHandle, code: int | None) -> None:
        """It ended as it may (`stop_exit_codes`): one worker fewer, and without any the cluster has done its work."""
        left = self._desired.workers - 1
        logger.info("worker %d (slot %d) has done its work (code %s): %d left", worker.id, worker.slot, code, left)
        if left:
            self._desired = replace(self._desired, workers=left)
        else:
            self.on_stop_now()

    def _stopped_early(self, worker: WorkerHandle) -> None:
        """A newcomer of a reload that died before it was ready ends the reload (it is not in `workers` any more)."""
        is_newcomer = worker.generation == self._desired.generation != self._desired.serving_generation
        if is_newcomer and worker.listening_at is None:
            self._abandon_reload(supervision.AbandonReload(worker))

    # -- signals and commands --------------------------------------------------------------------------------------

    def _on_signals(self, _mask: int) -> None:
        for number in self._signals.read():
            getattr(self, f"on_{INTENTS[number][0]}")()

    def on_drain(self) -> None:
        """Stop: first empty the queues, then let the workers finish."""
        if self._closing_at is not None:
            return
        now = time.monotonic()
        self._closing_at = now + HANDSHAKE_GRACE
        self._stop_deadline = now + self.config.graceful_timeout
        self.hand_off.refuse_newcomers()
        in_flight = sum(w.stats.in_flight for w in self.workers.values())
        logger.info(
            "draining: %d workers, %d requests in flight, up to %g s (Ctrl+C again to stop now)",
            len(self.workers), in_flight, self.config.graceful_timeout,
        )  # fmt: skip

    def on_interrupt(self) -> None:
        """Ctrl+C: the first drains, the second stops now."""
        if self._closing_at is None:
            self.on_drain()
        else:
            self.on_stop_now()

    def on_stop_now(self) -> None:
        """Stop: what is in flight is cut."""
        self._closing_at = self._closing_at or time.monotonic()
        self.counters["cut"] += self.hand_off.close()
        self._desired = replace(self._desired, stopping=True, now_or_never=True)

    def _advance_stop(self, now: float) -> None:
        """Second half of `on_drain`: when the backlog and the queues are empty, close and drain the workers."""
        if self._closing_at is None or self._desired.stopping or now < self._closing_at:
            return
        late = self._stop_deadline is not None and now >= self._stop_deadline
        waiting = self.hand_off.accept_all(now)
        handing = any(w.unacknowledged for w in self.workers.values())
        if (waiting or handing) and self._ever_listened and not late:
            self.hand_off.dispatch()
            return
        self.counters["cut"] += self.hand_off.close()
        left = max(0.0, (self._stop_deadline or now) - now)
        self._desired = replace(self._desired, stopping=True, graceful_timeout=left)

    def on_reload(self, when_over: Callable[[str], None] | None = None) -> None:
        """A new generation; a second call during the first is done after it.

        Args:
            when_over: Called with "" when the new generation serves, or with the reason why it does not.
        """
        if self.is_stopping:
            return
        if when_over is not None:
            self._reload_observers.append(when_over)
        if self._desired.generation != self._desired.serving_generation:
            self._reload_again = True
        else:
            self._begin_reload()

    def _reload_ended(self, failure: str) -> None:
        observers, self._reload_observers = self._reload_observers, []
        for observer in observers:
            observer(failure)

    def _begin_reload(self) -> None:
        self._crashes.clear()
        self._desired = replace(self._desired, generation=max(self._desired.generation, self._newest()) + 1)
        logger.info("reloading %d workers: generation %d", self._desired.workers, self._desired.generation)

    def _newest(self) -> int:
        return max((w.generation for w in self.workers.values()), default=0)

    def on_scale_up(self) -> None:
        """One worker more."""
        self.scale(self._desired.workers + 1)

    def on_scale_down(self) -> None:
        """One worker fewer, but not none."""
        self.scale(max(1, self._desired.workers - 1))

    def scale(self, workers: int) -> None:
        """Change the number of workers."""
        if workers != self._desired.workers:
            logger.info("scaling from %d to %d workers", self._desired.workers, workers)
            self._desired = replace(self._desired, workers=workers)

    def on_reopen_logs(self) -> None:
        """Workers and primary open their log files anew."""
        try:
            set_up("primary", level=self.config.log_level, style=self.config.log_format, files=self.config.log_files())
        except UserError as error:
            logger.error("%s", error)
        for worker in self.workers.values():
            worker.tell(ReopenLogs())

    @property
    def is_stopping(self) -> bool:
        """Whether it is on its way out."""
        return self._closing_at is not None

    @property
    def desired_workers(self) -> int:
        """How many workers there should be."""
        return self._desired.workers

    def status(self) -> dict[str, Any]:
        """What `sharedcluster status --json` prints."""
        state = "online"
        if self.is_stopping:
            state = "draining"
        elif self._desired.generation != self._desired.serving_generation:
            state = "reloading"
        facts = ClusterFacts(
            name=self.name,
            pid=os.getpid(),
            version=sharedcluster.__version__,
            state=state,
            generation=self._desired.serving_generation,
            policy=self.config.policy,
            started_at=self._started_at,
            redis_url=self._redis_shown,
            counters=self.counters,
        )
        return describe(facts, self.hand_off.listeners, list(self.workers.values()), time.monotonic())

    def _observer_failed(self, event: str, error: BaseException) -> None:
        logger.error("an observer of %r failed", event, exc_info=error)
