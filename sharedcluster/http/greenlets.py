"""Greenlets that are used again: a request costs two switches, not the making of a greenlet.

A greenlet that has served its request parks itself. Its context variables are dropped between two requests, so each
request starts in an empty context, as it would in a greenlet of its own. What an application keeps in
`threading.local` (gevent's local) outlives a request, as it does in any pool of threads.

Requests that arrive in one pass of the loop are all read before the first is served, and then served one behind the
other, in one greenlet as long as none waits. In between runs the application, which is large, and whatever ran before
it has left the CPU's caches: reading twenty heads in a row costs much less than reading one, twenty times. Together
with the two switches that it saves, this was 9 % of a Flask hello at 32 connections, and nothing at one.

And the answers of one pass leave together, behind the last of them: whoever is sent something wakes up, often on this
very CPU and at once, and each time leaves it cold. Laws:
- An answer is held back only while others are being made in the same pass: one that is alone leaves at once.
- For a millisecond (`HOLD`), or until the job that is running then ends or waits. Behind a job that takes longer than
  that by itself the next thousand answers are not held: a view that computes may keep others' answers, but seldom.
- Only what leaves without waiting, and with nothing to do behind it, is held: see `Exchange`.
"""

from __future__ import annotations

import logging
from collections import deque
from time import monotonic_ns
from typing import Any, Final, Protocol

from greenlet import getcurrent, greenlet

log = logging.getLogger("sharedcluster.http")

PARKED = 256
"""Greenlets kept for later; a burst beyond it makes more, and they end when they are done."""


HOLD: Final = 1_000_000
"""Nanoseconds after which what is held back leaves, if there is still something to do."""
WARY: Final = 1000
"""Answers that are not held back after a job that took as long."""


class Job(Protocol):
    """What a greenlet runs."""

    def leave(self) -> None:
        """Send what was held back and be done; waits for nobody, raises nothing. In the hub, or in a greenlet."""

    def run(self, worker: greenlet) -> bool:
        """Do the work in `worker`, raising nothing. False if something was thrown into it meanwhile.

        Who it waited for may still hold its `switch` then, so such a greenlet must not serve another request.
        """


class GreenletPool:
    """Runs jobs from the hub: the greenlet of the loop, to which every job returns when it waits or ends."""

    def __init__(self, hub: Any, job_type: type[Job]) -> None:
        self._hub = hub
        self._job_type = job_type
        self.parked: list[greenlet] = []
        """Whoever has a job to run at once pops one of these, or makes one, and switches to it; in the hub only."""
        self.ready: deque[Job] = deque()
        """Jobs that run when the loop has read what has come. Who puts the first one here schedules `run_ready`."""
        self._held: deque[Job] = deque()
        self._held_since = self._looked_at = 0
        self._wary = 0

    def holds_back(self) -> bool:
        """Whether the job that asks, which is done but for leaving, is to give itself to `hold`."""
        if not (self.ready or self._held):
            return False
        if self._wary:
            self._wary -= 1
            return False
        return True

    def hold(self, job: Job) -> None:
        """Let a job `leave` with the others of this pass."""
        if not self._held:
            self._held_since = self._looked_at = monotonic_ns()
        self._held.append(job)

    def _let_go(self, *, goes_on: bool = False) -> None:
        """Let all leave that are held back; if the pass goes on, only when it is time."""
        now = monotonic_ns()
        if now - self._looked_at > HOLD:
            self._wary = WARY
        self._looked_at = now
        if goes_on and now - self._held_since <= HOLD:
            return
        held = self._held
        try:
            while held:
                held.popleft().leave()
        finally:
            if held:  # a bug has come through one
                self._hub.loop.run_callback(self.run_ready)

    def run_ready(self) -> None:
        """From the loop: run what is ready, each until it ends or first waits."""
        ready = self.ready
        parked = self.parked
        try:
            while ready:
                worker = parked.pop() if parked else self.make()
                worker.switch(ready.popleft())
        finally:
            if ready:  # a bug has come through a job: the others must not wait for the next one
                self._hub.loop.run_callback(self.run_ready)
            if self._held:  # the last job waits
                self._let_go()

    def make(self) -> greenlet:
        """A greenlet that runs the job it is switched to with, and then what is ready, until one of them waits."""
        return greenlet(self._serve, self._hub)

    def _serve(self, job: Job) -> None:
        me = getcurrent()
        park = greenlet.switch
        parked = self.parked
        ready = self.ready
        held = self._held
        hub = self._hub
        job_type = self._job_type
        while job.run(me):
            me.gr_context = None
            if ready:
                if held:
                    self._let_go(goes_on=True)
                job = ready.popleft()
                continue
            if held:
                self._let_go()
            del job  # a parked greenlet keeps nothing of its last request alive
            if len(parked) >= PARKED:
                return
            parked.append(me)
            try:
                job = park(hub)
                while type(job) is not job_type:  # a stray wake-up, for a wait that is over
                    job = park(hub)
            except BaseException as error:
                log.warning(
                    "%r was thrown into a greenlet whose request is over; is a gevent.Timeout not closed?", error
                )
                parked.remove(me)
                return
