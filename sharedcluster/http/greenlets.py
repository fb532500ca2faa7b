"""Greenlets that are used again: a request costs two switches, not the making of a greenlet.

A greenlet that has served its request parks itself. Its context variables are dropped between two requests, so each
request starts in an empty context, as it would in a greenlet of its own. What an application keeps in
`threading.local` (gevent's local) outlives a request, as it does in any pool of threads.
"""

from __future__ import annotations

import logging
from typing import Protocol

from greenlet import getcurrent, greenlet

log = logging.getLogger("sharedcluster.http")

PARKED = 256
"""Greenlets kept for later; a burst beyond it makes more, and they end when they are done."""


class Job(Protocol):
    """What a greenlet runs."""

    def run(self) -> bool:
        """Do the work, raising nothing. False if something was thrown into the greenlet meanwhile.

        Who it waited for may still hold its `switch` then, so such a greenlet must not serve another request.
        """


class GreenletPool:
    """Runs jobs from the hub. `hub` is the greenlet of the loop, to which every job returns when it waits or ends."""

    def __init__(self, hub: greenlet, job_type: type[Job]) -> None:
        self._hub = hub
        self._job_type = job_type
        self.parked: list[greenlet] = []
        """Whoever has a job pops one of these, or makes one, and switches to it with the job; in the hub only."""

    def make(self) -> greenlet:
        """A greenlet that runs the job it is switched to with, until that ends or first waits."""
        return greenlet(self._serve, self._hub)

    def _serve(self, job: Job) -> None:
        me = getcurrent()
        park = greenlet.switch
        parked = self.parked
        hub = self._hub
        job_type = self._job_type
        while job.run():
            del job  # a parked greenlet keeps nothing of its last request alive
            me.gr_context = None
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
