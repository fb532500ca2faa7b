"""What is known of the slots that workers fill: crashes in a row, restarts, and when each may be filled again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sharedcluster.cluster.supervision import Crashes, after_exit, forgiven
from sharedcluster.cluster.worker_handle import WorkerHandle


class Slots:
    """The records, by slot; the rules are in `supervision`."""

    def __init__(self) -> None:
        self.crashes: dict[int, Crashes] = {}
        self._restarts: dict[int, int] = {}

    def crashed(self, worker: WorkerHandle, now: float) -> None:
        """Its worker ended without having been asked to."""
        self.crashes[worker.slot] = after_exit(self.crashes.get(worker.slot, Crashes()), worker, now)
        self._restarts[worker.slot] = self.restarts(worker.slot) + 1

    def forgive(self, workers: Iterable[WorkerHandle], now: float) -> None:
        """Clear the records of those that have served for long enough."""
        for worker in workers:
            if worker.slot in self.crashes:
                self.crashes[worker.slot] = forgiven(self.crashes[worker.slot], worker, now)

    def delay(self, slot: int, until: float) -> None:
        """Do not fill it before then."""
        self.crashes[slot] = replace(self.crashes.get(slot, Crashes()), respawn_at=until)

    def restarts(self, slot: int) -> int:
        """How often it was filled again after a crash."""
        return self._restarts.get(slot, 0)

    def forget_restarts(self) -> None:
        """Count from zero."""
        self._restarts.clear()
