"""The workers of a cluster: started, listened to, sent away and reaped, as `supervision` decides.

It knows how (fork, signal, tell, reap); which and when comes from the pure functions of `supervision` and `recycling`.
What a worker says is handled in `hearing`, a reload in `reloading`.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from sharedcluster import cgroup
from sharedcluster.cluster import events, recycling, supervision
from sharedcluster.cluster.board import Board
from sharedcluster.cluster.forking import WorkerContext
from sharedcluster.cluster.hand_off import HandOff
from sharedcluster.cluster.hearing import ROUTINE, hear
from sharedcluster.cluster.ipc import ChannelClosed, MessageSocket
from sharedcluster.cluster.messages import Accepted, Drain, Message, Rebalance, ReopenLogs
from sharedcluster.cluster.molds import Nursery
from sharedcluster.cluster.reloading import Reloads
from sharedcluster.cluster.slots import Slots
from sharedcluster.cluster.supervision import Desired
from sharedcluster.cluster.worker_handle import ExitReason, WorkerHandle, WorkerState
from sharedcluster.config import Config
from sharedcluster.log import logger

MESSAGES_PER_TURN: Final = 256
REBALANCE_INTERVAL: Final = 5.0
SPAWN_RETRY: Final = 1.0
PAUSE: Final = 2.0
"""Seconds between two turns of the primary's loop that mean it was paused; it never sleeps longer than one."""
_STRAY_MEMORY: Final = 5.0
"""Seconds for which a reaped stranger is remembered: longer than a mold takes to tell whom it forked, shorter than
the kernel takes to use a process id again."""


class Workforce:
    """Every worker that has not been reaped, by its id, and what is known of slots and generations.

    Args:
        config: The settings.
        hand_off: Where workers enter and leave the rotation.
        selector: The primary's; it watches the workers' channels.
        emitter: Told of fork, online, listening, drain, disconnect, exit, ready and reload.
        make_context: What a worker gets, by id, slot, generation, its end of the channel and its row.
    """

    def __init__(
        self,
        config: Config,
        hand_off: HandOff,
        selector: selectors.BaseSelector,
        emitter: events.Emitter,
        make_context: Callable[[int, int, int, MessageSocket, Any], WorkerContext],
    ) -> None:
        self.workers: dict[int, WorkerHandle] = {}
        self.board = Board()
        self.nursery: Nursery
        self.counters = dict.fromkeys(
            ("restarts", "reloads", "recycled", "redispatched", "migrated", "gaps", "requests", "killed"), 0
        )
        self.desired = Desired(
            workers=config.workers,
            generation=1,
            serving_generation=1,
            graceful_timeout=config.graceful_timeout,
            heartbeat_timeout=config.heartbeat_timeout,
            boot_timeout=config.boot_timeout,
        )
        self.gave_up = ""
        self.has_changed = True
        """Something has happened that may need a decision; connections that come and go do not."""
        self._config = config
        self.hand_off = hand_off
        self._selector = selector
        self.events = emitter
        self._make_context = make_context
        self._limits = recycling.Limits(
            config.max_requests, config.max_requests_jitter, config.max_memory, config.max_lifetime
        )
        # Slots and ids
        self.slots = Slots()
        self._last_id = 0
        self.ever_listened = False
        self._was_ready = False
        self._held_back: set[int] = set()
        self._strays: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self._oom_kills = cgroup.oom_kills()
        self._rebalance_at = 0.0
        self._acted_at = 0.0
        self.reloads = Reloads(self)

    # -- deciding and acting ---------------------------------------------------------------------------------------

    def act(self, now: float) -> None:
        """Do what has to be done now."""
        self.has_changed = False
        workers = list(self.workers.values())
        self._forgive_a_pause(workers, now)
        self._read_on()
        self.nursery.look(now)
        self.slots.forgive(workers, now)
        if not self.is_leaving:
            self._recycle(workers, now)
            self._rebalance(workers, now)
        actions = supervision.reconcile(
            self.desired, workers, self.slots.crashes, now, ever_listened=self.ever_listened
        )
        for action in actions:
            self._ACTIONS[type(action)](self, action)
        self._look_if_ready(now)

    def _forgive_a_pause(self, workers: list[WorkerHandle], now: float) -> None:
        """If we stood still ourselves (a frozen container), silence in that time says nothing of the workers."""
        paused = now - self._acted_at
        if self._acted_at and paused > PAUSE:
            for worker in workers:
                worker.heartbeat_at = min(now, worker.heartbeat_at + paused)
        self._acted_at = now

    @property
    def is_leaving(self) -> bool:
        """Whether the cluster stops."""
        return self.desired.stopping or self.desired.now_or_never

    @property
    def is_reloading(self) -> bool:
        """Whether a new generation is coming up."""
        return self.desired.generation != self.desired.serving_generation

    @property
    def is_restless(self) -> bool:
        """Whether something is on its way, so that the loop must not sleep long."""
        return len(self.workers) != self.desired.workers or any(
            w.state is not WorkerState.LISTENING or w.terminated_at for w in self.workers.values()
        )

    def _look_if_ready(self, now: float) -> None:
        ready = sum(w.state is WorkerState.LISTENING for w in self.workers.values())
        if not self._was_ready and ready >= self.desired.workers:
            self._was_ready = True
            self.events.emit(events.READY, ready)

    def _recycle(self, workers: list[WorkerHandle], now: float) -> None:
        if not self.is_reloading and (found := recycling.due(workers, self._limits, now)):
            self.retire(*found)

    def retire(self, worker: WorkerHandle, reason: str) -> None:
        """Have a worker replaced: the replacement first, then it drains."""
        logger.info("recycling worker %d (slot %d, pid %d): %s", worker.id, worker.slot, worker.pid, reason)
        worker.retiring = reason
        self.counters["recycled"] += 1

    def _rebalance(self, workers: list[WorkerHandle], now: float) -> None:
        if now >= self._rebalance_at:
            self._rebalance_at = now + REBALANCE_INTERVAL
            # A sticky client would only be handed to the same worker again.
            if not self.is_reloading and self._config.policy != "sticky":
                for worker, count in recycling.surplus(workers):
                    worker.tell(Rebalance(count))

    def _spawn(self, action: supervision.Spawn) -> None:
        try:
            self._start(action)
        except OSError as error:
            # Out of descriptors, processes or memory. What serves goes on serving, and this is tried again.
            logger.error("cannot start a worker: %s; trying again in %g s", error.strerror, SPAWN_RETRY)
            self.slots.delay(action.slot, time.monotonic() + SPAWN_RETRY)

    def _start(self, action: supervision.Spawn) -> None:
        ours, theirs = MessageSocket.pair()
        row = self.board.take()
        context = self._make_context(self._last_id + 1, action.slot, action.generation, theirs, row)
        pid = None
        try:
            pid = self.nursery.spawn(context, ours)
        finally:
            if pid is None:  # it failed, or the mold is still loading; the same is wanted again in the next turn
                ours.close()
                theirs.close()
                self.board.give_back(row)
        if pid is None:
            return
        self._last_id += 1
        worker = WorkerHandle(
            context.id, action.slot, action.generation, pid, ours, row, time.monotonic(),
            restarts=self.slots.restarts(action.slot),
        )  # fmt: skip
        self.workers[worker.id] = worker
        self._selector.register(ours, selectors.EVENT_READ, lambda _mask: self._on_readable(worker))
        self.events.emit(events.FORK, worker)

    def forked(self, id: int, pid: int) -> None:
        """A mold has forked worker `id`; it may have died, and been reaped as a stranger, before we heard of it."""
        worker = self.workers.get(id)
        if worker is not None:
            worker.pid = pid
            self._bury_if_ended(worker)

    def drain(self, action: supervision.DrainWorker) -> None:
        """Take a worker out of rotation and tell it to finish."""
        worker = action.worker
        worker.asked_to_leave = True
        self._start_drain(worker, action.deadline)
        worker.tell(Drain(max(0.0, action.deadline - time.monotonic()), give_back=not self.is_leaving))
        logger.debug("worker %d drains: %s", worker.id, action.reason)

    def _start_drain(self, worker: WorkerHandle, deadline: float) -> None:
        self.hand_off.leave(worker)
        worker.state = WorkerState.DRAINING
        worker.deadline = deadline
        self.events.emit(events.DRAIN, worker)

    def _dump(self, action: supervision.Dump) -> None:
        _signal(action.worker, signal.SIGUSR2)

    def _terminate(self, action: supervision.Terminate) -> None:
        worker = action.worker
        worker.terminated_at = time.monotonic()
        self.hand_off.leave(worker)
        if not worker.asked_to_leave or worker.stats.in_flight:
            self._warn(worker, "TERM", action.reason)
        if not worker.pid:  # the mold that was asked for it has not answered
            self.nursery.discard(worker.generation)
        _signal(worker, signal.SIGTERM)

    def _kill(self, action: supervision.Kill) -> None:
        action.worker.killed = True
        self.counters["killed"] += 1
        self._warn(action.worker, "KILL", action.reason)
        _signal(action.worker, signal.SIGKILL)

    def _warn(self, worker: WorkerHandle, what: str, why: str) -> None:
        logger.warning("worker %d (slot %d, pid %d) gets %s: %s", worker.id, worker.slot, worker.pid, what, why)

    def _give_up(self, action: supervision.GiveUp) -> None:
        failures = [w.load_failure for w in self.workers.values() if w.load_failure]
        logger.error("%s", action.reason)
        if failures:
            logger.error("%s\n%s", *failures[-1])
        self.gave_up = action.reason

    def _promote(self, _action: supervision.Promote) -> None:
        self.reloads.promote()

    def _abandon(self, action: supervision.AbandonReload) -> None:
        late = f"a new worker was not ready within {self.desired.boot_timeout:g} s (--boot-timeout)"
        self.reloads.abandon(*(action.worker.load_failure or (late, "")))

    def mold_failed(self, generation: int, what: str, trace: str) -> None:
        """The mold of a generation did not load the application."""
        if self.is_reloading and generation == self.desired.generation:
            self.reloads.abandon(what, trace)
        else:
            logger.error("%s\n%s", what, trace)
            self.gave_up = what if not self.ever_listened else ""

    _ACTIONS: Final[dict[type[supervision.Action], Callable[[Any, Any], None]]] = {
        supervision.Spawn: _spawn,
        supervision.DrainWorker: drain,
        supervision.Dump: _dump,
        supervision.Terminate: _terminate,
        supervision.Kill: _kill,
        supervision.Promote: _promote,
        supervision.AbandonReload: _abandon,
        supervision.GiveUp: _give_up,
    }

    # -- what workers say ------------------------------------------------------------------------------------------

    def tell_all(self, message: Message) -> None:
        """Send every worker the same message."""
        for worker in self.workers.values():
            worker.tell(message)

    def reset_counters(self) -> None:
        """Set what the primary counts to zero; what workers count of themselves goes on."""
        self.counters.update(dict.fromkeys(self.counters, 0))
        self.slots.forget_restarts()
        for worker in self.workers.values():
            worker.restarts = 0

    def reopen_logs(self) -> None:
        """Have the workers open their log files anew."""
        self.tell_all(ReopenLogs())

    def _on_readable(self, worker: WorkerHandle) -> None:
        # In the same turn, before this event's, the worker may have been reaped and its channel closed.
        if worker.id in self.workers:
            self._read(worker)
            self._bury_if_ended(worker)

    def _bury_if_ended(self, worker: WorkerHandle) -> None:
        """A mold's worker may end before its process is known: then it was reaped as a stranger, or never forked."""
        if worker.id not in self.workers:
            return
        if worker.pid in self._strays:
            self._ended(worker, self._strays.pop(worker.pid)[1])
        elif not worker.pid and worker.is_disconnected:
            self._ended(worker, signal.SIGKILL)  # how it ended, nobody knows

    def _read(self, worker: WorkerHandle, most: int = MESSAGES_PER_TURN) -> None:
        for _ in range(most):
            if worker.state is WorkerState.DRAINING and not self.hand_off.has_room:
                self._hold_back(worker)
                return
            try:
                received = worker.channel.receive()
            except ChannelClosed:
                self._disconnected(worker)
                return
            except ValueError as error:
                logger.error("worker %d sent what is no message: %s", worker.id, error)
                continue
            if received is None:
                return
            message, fd = received
            if type(message) not in ROUTINE:
                self.has_changed = True
            hear(self, worker, message, fd)
            if type(message) is Accepted and most == MESSAGES_PER_TURN:
                return  # nearly always the last: to look for more costs more than to be called again

    def _hold_back(self, worker: WorkerHandle) -> None:
        """It gives back faster than others take: what it sends waits in its channel, where it costs no descriptor."""
        if worker.id not in self._held_back:
            self._held_back.add(worker.id)
            self._selector.unregister(worker.channel)

    def _read_on(self) -> None:
        """Hear those again that were held back."""
        for id in tuple(self._held_back):
            if not self.hand_off.has_room:
                return
            self._held_back.discard(id)
            worker = self.workers[id]
            self._selector.register(worker.channel, selectors.EVENT_READ, lambda _mask, w=worker: self._on_readable(w))
            if worker.exit_status is None:
                self._on_readable(worker)
            else:
                self._ended(worker, worker.exit_status)

    def _disconnected(self, worker: WorkerHandle) -> None:
        worker.is_disconnected = True
        self.hand_off.leave(worker)
        with suppress(KeyError):
            self._selector.unregister(worker.channel)
            self.events.emit(events.DISCONNECT, worker)

    # -- the end of a worker ---------------------------------------------------------------------------------------

    def reaped(self, pid: int, status: int) -> None:
        """A child ended. One that is nobody's may be a worker its mold has not told us of yet, or an orphan."""
        worker = next((w for w in self.workers.values() if w.pid == pid), None)
        if worker is not None:
            self._ended(worker, status)
        elif not self.nursery.reaped(pid, status):
            now = time.monotonic()
            self._strays[pid] = (now, status)
            while next(iter(self._strays.values()))[0] < now - _STRAY_MEMORY:
                self._strays.popitem(last=False)

    def _ended(self, worker: WorkerHandle, status: int) -> None:
        # What it said before it died counts: an `Accepted` in the socket means that bytes may have been read, so
        # that connection must not be given to anybody else; a given-back one must not be lost.
        worker.exit_status = status
        if worker.id not in self._held_back:
            self._read(worker, sys.maxsize)
        if worker.id not in self._held_back:
            self._bury(worker, status)

    def _bury(self, worker: WorkerHandle, status: int) -> None:
        self._disconnected(worker)
        worker.channel.close()
        worker.state = WorkerState.DEAD
        del self.workers[worker.id]
        self.hand_off.forget(worker)
        self.board.give_back(worker.row)
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
            out_of_memory=self._was_out_of_memory(status),
        )
        self.events.emit(events.EXIT, worker, reason)
        if reason.code in self._config.stop_exit_codes and not worker.asked_to_leave:
            self._leave_empty(worker)
        elif not (worker.asked_to_leave or self.is_leaving):
            self._crashed(worker, reason)

    def _leave_empty(self, worker: WorkerHandle) -> None:
        """It ended as it may (`stop_exit_codes`): one worker fewer, and without any the cluster has done its work."""
        left = self.desired.workers - 1
        logger.info("worker %d (slot %d) has done its work: %d left", worker.id, worker.slot, left)
        self.desired = replace(self.desired, workers=left) if left else replace(self.desired, stopping=True)

    def _crashed(self, worker: WorkerHandle, reason: ExitReason) -> None:
        self.slots.crashed(worker, time.monotonic())
        self.counters["restarts"] += 1
        if self.is_reloading and worker.generation == self.desired.generation and worker.listening_at is None:
            self.reloads.newcomer_ended(worker, reason)

    def _was_out_of_memory(self, status: int) -> bool:
        """Whether the kernel says that it killed somebody here for want of memory since we last looked."""
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            return False
        before, self._oom_kills = self._oom_kills, cgroup.oom_kills()
        return self._oom_kills > before

    def close_in_child(self) -> None:
        """In a forked process: drop the primary's ends of the channels and its copies of connections."""
        for worker in self.workers.values():
            worker.channel.close()
            for connection in worker.unacknowledged.values():
                os.close(connection.fd)
        self.nursery.close_in_child()


def _signal(worker: WorkerHandle, number: signal.Signals) -> None:
    if worker.pid:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, number)
