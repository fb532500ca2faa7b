"""What has to be done so that the workers are as they should be: one pure function.

Boot, crash restart, scale, recycling, rolling reload and stop are the same question asked again after every event:
given what is desired and what there is, which actions bring the one to the other? `reconcile` answers it without a
clock, a fork or a socket, so a table of cases is its test.

Laws:

1. Replacement first: a worker that is outdated (an older generation) or retiring (recycled, drained by hand) leaves
   only when the target generation has `workers` workers that listen.
2. A new generation that does not come up is abandoned as a whole; the old one has never stopped serving. A newcomer
   that somebody else killed (an operator's TERM, the kernel's KILL) says nothing of the new code and is replaced,
   unless it keeps happening.
3. A worker that crashes is replaced after a delay that grows with every crash in a row (x 1.5 up to 15 s) and is
   forgotten after 30 s of service. Workers that never come up, or keep dying with none left to serve, end the
   cluster: an orchestrator sees an exit code, not a loop.
4. The way out of a worker is a ladder: drain with a deadline, TERM, KILL.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState

MIN_UPTIME: Final = 1.0
"""Seconds of listening below which an exit counts as unstable."""
FIRST_DELAY: Final = 0.1
DELAY_FACTOR: Final = 1.5
MAX_DELAY: Final = 15.0
FORGIVEN_AFTER: Final = 30.0
"""Seconds of listening after which the crashes of a slot are forgotten."""
BOOT_BUDGET: Final = 5
"""Unstable exits in a row of one slot, while no worker has ever listened, that end the cluster."""
CRASH_BUDGET: Final = 16
"""Unstable exits in a row of one slot, while no worker listens, that end the cluster."""
NEWCOMER_BUDGET: Final = 3
"""Newcomers killed from outside, in one reload, that end it."""
LEAVE_GRACE: Final = 0.5
"""Seconds from the drain deadline, at which a worker cuts what is left, says so and runs its last hooks, to TERM, at
which it would end without a word."""
TERM_GRACE: Final = 2.0
"""Seconds between TERM and KILL."""

_ALIVE: Final = (WorkerState.FORKED, WorkerState.ONLINE, WorkerState.LISTENING)


@dataclass(frozen=True, slots=True)
class Desired:
    """How it should be. Durations are in seconds."""

    workers: int
    generation: int
    serving_generation: int
    """The generation that serves until the target one (`generation`) is ready; equal to it outside a reload."""
    graceful_timeout: float
    heartbeat_timeout: float
    boot_timeout: float
    stopping: bool = False
    """The cluster leaves: nobody is replaced."""
    now_or_never: bool = False
    """Stop now: TERM at once, then KILL."""


@dataclass(frozen=True, slots=True)
class Crashes:
    """The record of one slot."""

    unstable: int = 0
    respawn_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a worker for the slot."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Take it out of rotation and tell it to finish by `deadline` (monotonic)."""

    worker: WorkerHandle
    deadline: float
    reason: str


@dataclass(frozen=True, slots=True)
class Dump:
    """It stands still: have it write its stacks to the log before it is ended."""

    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class Terminate:
    """Send TERM: a worker that drains ends at once on it."""

    worker: WorkerHandle
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Send KILL."""

    worker: WorkerHandle
    reason: str


@dataclass(frozen=True, slots=True)
class Promote:
    """The target generation is complete: it is the one that serves."""


@dataclass(frozen=True, slots=True)
class AbandonReload:
    """The target generation does not come up: stay with the one that serves."""

    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Workers keep dying and none serves."""

    reason: str


Action = Spawn | DrainWorker | Dump | Terminate | Kill | Promote | AbandonReload | GiveUp


def after_exit(record: Crashes, worker: WorkerHandle, now: float) -> Crashes:
    """The record of a slot after its worker ended without having been asked to."""
    served = 0.0 if worker.listening_at is None else now - worker.listening_at
    if served >= FORGIVEN_AFTER:
        record = Crashes()
    if served >= MIN_UPTIME and record.unstable == 0:
        return Crashes(0, now)  # the first crash after a stable life: replaced at once
    unstable = record.unstable + 1
    delay = min(FIRST_DELAY * DELAY_FACTOR ** (unstable - 1), MAX_DELAY)
    return Crashes(unstable, now + delay)


def speaks_against_new_code(end: int, killed_before: int) -> bool:
    """Whether a process of the new generation that ended before it was ready ends the reload.

    Args:
        end: Its exit code, or the number of the signal that ended it as a negative number.
        killed_before: How many of this reload were killed from outside before it.
    """
    return -end not in (signal.SIGTERM, signal.SIGKILL) or killed_before + 1 >= NEWCOMER_BUDGET


def reconcile(
    desired: Desired,
    workers: Sequence[WorkerHandle],
    crashes: dict[int, Crashes],
    now: float,
    *,
    ever_listened: bool,
) -> list[Action]:
    """Everything that has to be done now, in order.

    Args:
        desired: What should be.
        workers: Every worker that has not been reaped.
        crashes: The records of the slots that have one.
        now: The monotonic clock.
        ever_listened: Whether any worker has ever reached `listening`.
    """
    if desired.now_or_never:
        return _end_all(workers, now)
    actions = _ladder(workers, now)
    if desired.stopping:
        deadline = now + desired.graceful_timeout
        return actions + [DrainWorker(w, deadline, "stop") for w in workers if w.state in _ALIVE]
    if reason := _hopeless(desired, workers, crashes, ever_listened):
        return [GiveUp(reason)]
    actions += _unresponsive(desired, workers, now)
    if desired.generation != desired.serving_generation and (failed := _failed_newcomer(desired, workers)):
        return [*actions, AbandonReload(failed)]
    return actions + _replacements(desired, workers, crashes, now)


def _replacements(
    desired: Desired, workers: Sequence[WorkerHandle], crashes: dict[int, Crashes], now: float
) -> list[Action]:
    """Spawn what is missing of the target generation; let leave what is outdated, retiring or too many."""
    actions: list[Action] = []
    current = [w for w in workers if w.state in _ALIVE and w.generation == desired.generation and not w.retiring]
    taken = {w.slot for w in current}
    missing = desired.workers - len(current)
    slot = 0
    while missing > 0:
        if slot not in taken:
            missing -= 1
            if crashes.get(slot, _CLEAN).respawn_at <= now:
                actions.append(Spawn(slot, desired.generation))
        slot += 1
    by_slot = sorted(current, key=lambda w: w.slot)
    kept, surplus = by_slot[: desired.workers], by_slot[desired.workers :]
    ready = sum(w.state is WorkerState.LISTENING for w in kept)
    deadline = now + desired.graceful_timeout
    if ready >= desired.workers:
        if desired.generation != desired.serving_generation:
            actions.append(Promote())
        leaving = [w for w in workers if w.state in _ALIVE and w not in current]
        actions += [DrainWorker(w, deadline, w.retiring or "reload") for w in leaving]
        actions += [DrainWorker(w, deadline, "scale") for w in surplus]
    return actions


_CLEAN: Final = Crashes()


def _ladder(workers: Sequence[WorkerHandle], now: float) -> list[Action]:
    actions: list[Action] = []
    for worker in workers:
        if worker.state is WorkerState.DEAD or worker.killed:
            continue
        if worker.terminated_at is not None:
            if now - worker.terminated_at >= TERM_GRACE:
                actions.append(Kill(worker, "it did not end on TERM"))
        elif worker.deadline is not None and now >= worker.deadline + LEAVE_GRACE:
            actions.append(Terminate(worker, "its drain passed the deadline"))
    return actions


def _end_all(workers: Sequence[WorkerHandle], now: float) -> list[Action]:
    actions: list[Action] = []
    for worker in workers:
        if worker.state is WorkerState.DEAD or worker.killed:
            continue
        if worker.state is not WorkerState.DRAINING:
            # Out of rotation first: nothing may be handed to a worker that is about to die.
            actions.append(DrainWorker(worker, now, "stop now"))
        if worker.terminated_at is None:
            actions.append(Terminate(worker, "stop now"))
        elif now - worker.terminated_at >= TERM_GRACE:
            actions.append(Kill(worker, "stop now"))
    return actions


def _unresponsive(desired: Desired, workers: Sequence[WorkerHandle], now: float) -> list[Action]:
    """Workers whose loop stands still, and workers that take too long to come up."""
    actions: list[Action] = []
    for worker in workers:
        if worker.terminated_at is not None or worker.killed:
            continue
        silent = now - worker.heartbeat_at
        if worker.state is WorkerState.LISTENING and silent >= desired.heartbeat_timeout > 0:
            actions.append(Dump(worker))
            actions.append(Terminate(worker, f"its loop has stood still for {silent:.0f} s"))
        elif worker.state in (WorkerState.FORKED, WorkerState.ONLINE):
            booting = now - worker.forked_at
            if booting >= desired.boot_timeout:
                actions.append(Dump(worker))
                actions.append(Terminate(worker, f"it was not ready within {desired.boot_timeout:.0f} s"))
    return actions


def _failed_newcomer(desired: Desired, workers: Sequence[WorkerHandle]) -> WorkerHandle | None:
    """A worker of the target generation that did not load the application, or had to be ended."""
    for worker in workers:
        is_new = worker.generation == desired.generation and worker.listening_at is None
        if is_new and (worker.load_failure or worker.terminated_at is not None):
            return worker
    return None


def _hopeless(
    desired: Desired, workers: Sequence[WorkerHandle], crashes: dict[int, Crashes], ever_listened: bool
) -> str:
    if any(w.state is WorkerState.LISTENING for w in workers):
        return ""
    worst = max((record.unstable for record in crashes.values()), default=0)
    if not ever_listened and worst >= BOOT_BUDGET:
        return f"No worker ever came up: {worst} attempts failed."
    if worst >= CRASH_BUDGET:
        return f"The workers kept dying: {worst} times in a row within {MIN_UPTIME:.0f} s of service."
    return ""


def forgiven(record: Crashes, worker: WorkerHandle, now: float) -> Crashes:
    """The record of a slot whose worker has listened for long enough."""
    if record.unstable and worker.listening_at is not None and now - worker.listening_at >= FORGIVEN_AFTER:
        return replace(record, unstable=0)
    return record
