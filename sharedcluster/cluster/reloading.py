"""Reloads: the one that is on its way, the one asked for meanwhile, and who waits to hear how they end.

A reload is nothing but a target generation that differs from the serving one; `supervision` says which workers that
takes, and when it is complete. Here stands what happens at its beginning and at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sharedcluster.cluster import events, supervision
from sharedcluster.cluster.molds import Nursery
from sharedcluster.cluster.slots import Slots
from sharedcluster.cluster.worker_handle import ExitReason, WorkerHandle, WorkerState
from sharedcluster.log import logger


class Crew(Protocol):
    """The workforce, as far as a reload concerns it."""

    desired: supervision.Desired
    workers: dict[int, WorkerHandle]
    counters: dict[str, int]
    slots: Slots
    nursery: Nursery
    events: events.Emitter

    @property
    def is_reloading(self) -> bool:
        """Whether a new generation is coming up."""

    def drain(self, action: supervision.DrainWorker) -> None:
        """Take a worker out of rotation and tell it to finish."""


class Reloads:
    """All reloads of a cluster, one after the other. Generations are counted up, also those that were abandoned."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._last_generation = crew.desired.generation
        self._newcomers_killed = 0
        self._again = False
        self._observers: list[Callable[[str], None]] = []

    def ask(self, when_over: Callable[[str], None] | None = None) -> None:
        """Start a new generation; asked for during a reload, another one follows it.

        Args:
            when_over: Called with "" when the new generation serves, or with the reason why it does not.
        """
        crew = self._crew
        if when_over is not None:
            self._observers.append(when_over)
        if crew.is_reloading:
            self._again = True
            return
        crew.slots.crashes.clear()
        self._newcomers_killed = 0
        self._last_generation += 1
        crew.desired = replace(crew.desired, generation=self._last_generation)
        logger.info("reloading %d workers: generation %d", crew.desired.workers, crew.desired.generation)

    def promote(self) -> None:
        """The new generation is complete, and serves."""
        crew = self._crew
        crew.desired = replace(crew.desired, serving_generation=crew.desired.generation)
        crew.counters["reloads"] += 1
        crew.nursery.retire(crew.desired.generation)
        crew.events.emit(events.RELOAD, crew.desired.generation)
        # Those who asked during a reload meant the code they had just written: the next one answers.
        self._over("")

    def abandon(self, what: str, trace: str) -> None:
        """Stay with the generation that serves; those that were to replace it go."""
        crew = self._crew
        logger.error("reload stopped: %s; the old workers keep serving\n%s", what, trace)
        failed = crew.desired.generation
        crew.desired = replace(crew.desired, generation=crew.desired.serving_generation)
        crew.slots.crashes.clear()
        crew.nursery.retire(crew.desired.serving_generation)
        for worker in crew.workers.values():
            if worker.generation == failed and worker.state is not WorkerState.DRAINING:
                crew.drain(supervision.DrainWorker(worker, time.monotonic(), "its generation was abandoned"))
        self._over(f"{what}\n{trace}".rstrip())

    def newcomer_ended(self, worker: WorkerHandle, reason: ExitReason) -> None:
        """A worker of the new generation ended before it was ready, and nobody here had asked it to."""
        end = -reason.signal if reason.signal else reason.code or 0
        killed_before, self._newcomers_killed = self._newcomers_killed, self._newcomers_killed + 1
        if supervision.speaks_against_new_code(end, killed_before):
            what = f"a new worker {reason.how} before it was ready"
            self.abandon(*(worker.load_failure or (what, "")))

    def _over(self, failure: str) -> None:
        if self._again:
            self._again = False
            self.ask()
            return
        observers, self._observers = self._observers, []
        for observer in observers:
            observer(failure)
