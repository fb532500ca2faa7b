"""What happens once per cluster: the leader, and jobs that run every so many seconds on one worker.

Ticks are counted by Redis's clock, so that all workers agree on which one it is. Whoever sets the tick's key runs the
job: at most once per tick, on any worker; a tick is left out if Redis is away or its worker dies.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from contextlib import suppress

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.leases import owner_token
from sharedcluster.state.primitives import Lock, LockLostError, LockRoom
from sharedcluster.state.wire import ReplyError

log = logging.getLogger("sharedcluster.state")

LEADER_TIMEOUT = 5.0


class Leader:
    """One worker in the cluster; another one within `LEADER_TIMEOUT` seconds if it dies."""

    def __init__(self, room: LockRoom, name: str = "@leader") -> None:
        self._lock = Lock(room, name, timeout=LEADER_TIMEOUT, wait=0)
        self._is_campaigning = False
        self._stop = threading.Event()
        self._start_lock = threading.Lock()

    @property
    def is_leader(self) -> bool:
        """True while this worker is certain to be the only one. Asking makes it a candidate."""
        with self._start_lock:
            if not self._is_campaigning:
                self._is_campaigning = True
                self._campaign()
                threading.Thread(target=self._run, name="sharedcluster-leader", daemon=True).start()
        return self._lock.is_held

    def _run(self) -> None:
        while not self._stop.wait(random.uniform(0.5, 1.0)):
            self._campaign()

    def _campaign(self) -> None:
        with suppress(StateUnavailableError, ReplyError):
            if not self._lock.is_held:
                self._lock.acquire()

    def resign(self) -> None:
        """Let another worker lead."""
        self._stop.set()
        with suppress(LockLostError, StateUnavailableError):
            self._lock.release()


class Schedule:
    """The periodic jobs of one worker."""

    def __init__(self, commit: GroupCommit, namespace: str) -> None:
        self._commit = commit
        self._prefix = f"{namespace}:j:"
        self._stop = threading.Event()

    def every(self, seconds: float, name: str, job: Callable[[], object]) -> None:
        """Run a job on one worker per tick of so many seconds."""
        if seconds <= 0:
            raise ValueError("a job runs every so many seconds, more than 0")
        arguments = (seconds, name, job)
        threading.Thread(target=self._run, args=arguments, name=f"sharedcluster-every-{name}", daemon=True).start()

    def _run(self, seconds: float, name: str, job: Callable[[], object]) -> None:
        while not self._stop.is_set():
            try:
                pause = self._until_next_tick(seconds)
                if self._stop.wait(pause + random.uniform(0, min(0.02, seconds / 10))):
                    return
                if self._claim(seconds, name):
                    job()
            except (StateUnavailableError, ReplyError) as error:
                log.warning("job %s: a tick was left out, %s", name, error)
                self._stop.wait(min(1.0, seconds))
            except Exception:
                log.exception("job %s failed", name)

    def _now(self) -> float:
        whole, micro = self._commit.call("TIME", idempotent=True)
        return int(whole) + int(micro) / 1e6

    def _until_next_tick(self, seconds: float) -> float:
        now = self._now()
        return (now // seconds + 1) * seconds - now

    def _claim(self, seconds: float, name: str) -> bool:
        tick = round(self._now() / seconds)
        key = f"{self._prefix}{name}:{tick}"
        ttl_ms = max(int(2000 * seconds), 10_000)
        return self._commit.call("SET", key, owner_token(), "NX", "PX", ttl_ms) is not None

    def stop(self) -> None:
        """Claim no further ticks; a job that runs is not interrupted."""
        self._stop.set()
