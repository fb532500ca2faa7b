"""When a worker has served long enough: pure rules on what the primary knows of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState


@dataclass(frozen=True, slots=True)
class Limits:
    """0 switches a limit off. `requests` gets up to `jitter` on top, drawn anew for each worker.

    `memory` is the resident set as the kernel counts it for the process, shared pages included, in bytes; it and the
    count of requests are sampled with each heartbeat, once a second. `lifetime` is in seconds.
    """

    requests: int = 0
    jitter: int = 0
    memory: int = 0
    lifetime: float = 0.0

    def reason(self, worker: WorkerHandle, now: float) -> str:
        """Why this worker should be recycled, "" if it should not."""
        if self.requests and worker.stats.requests >= self.requests + jitter_of(worker, self.jitter):
            return f"it served {worker.stats.requests} requests"
        if self.memory and worker.stats.rss >= self.memory:
            return f"it holds {worker.stats.rss / 1048576:.0f} MB"
        if self.lifetime and now - worker.forked_at >= self.lifetime:
            return f"it has lived {now - worker.forked_at:.0f} s"
        return ""


def jitter_of(worker: WorkerHandle, most: int) -> int:
    """A number from 0 to `most` that stays the same for a worker, so that workers do not all go at once."""
    return random.Random(worker.id * 7919 + worker.pid).randint(0, most) if most else 0


def due(workers: Sequence[WorkerHandle], limits: Limits, now: float) -> tuple[WorkerHandle, str] | None:
    """The one worker to recycle now, and why; None while another one is on its way out or coming up.

    Never two at once: capacity stays what it is, and a limit that all reach together does not empty the cluster.
    """
    if any(w.retiring or w.state is not WorkerState.LISTENING for w in workers):
        return None
    for worker in sorted(workers, key=lambda w: w.forked_at):
        if reason := limits.reason(worker, now):
            return worker, reason
    return None


def surplus(workers: Sequence[WorkerHandle]) -> list[tuple[WorkerHandle, int]]:
    """Workers with far more than their share of the open connections, and how many idle ones each should give back.

    Far more: half as many again as the mean, and at least four above it. Long-lived clients that came when there
    were fewer workers would otherwise stay where they are for ever.
    """
    serving = [w for w in workers if w.state is WorkerState.LISTENING and not w.retiring]
    if len(serving) < 2:
        return []
    mean = sum(w.row.connections for w in serving) / len(serving)
    return [(w, int(w.row.connections - mean)) for w in serving if w.row.connections >= max(1.5 * mean, mean + 4)]
