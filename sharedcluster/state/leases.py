"""Leases: keys that hold our token for a limited time, renewed for as long as we want them.

A lease is *ours for certain* until `acquired + ttl` on our own monotonic clock, where acquired is taken before the
command was sent. Redis starts counting later, so the key lives at least as long. Once that moment has passed without a
renewal, the lease counts as lost and its holder is told, whether or not Redis can be reached to ask.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.scripting import script_command
from sharedcluster.state.wire import ReplyError

log = logging.getLogger("sharedcluster.state")


class Lease:
    """One key with our token.

    Args:
        key: The Redis key.
        token: What it holds while it is ours.
        ttl: Seconds it lives without renewal.
        taken_at: Monotonic time before the command that took it was sent.
        on_lost: Called once, in the keeper's thread, when it is no longer certain to be ours.
    """

    def __init__(
        self, key: str, token: str, ttl: float, taken_at: float, on_lost: Callable[[], object] | None = None
    ) -> None:
        self.key = key
        self.token = token
        self.ttl = ttl
        self.valid_until = taken_at + ttl
        self.lost = threading.Event()
        self._on_lost = on_lost

    @property
    def is_valid(self) -> bool:
        """True while it is certain to be ours."""
        return not self.lost.is_set() and time.monotonic() < self.valid_until

    @property
    def renew_at(self) -> float:
        """When a third of its time has passed."""
        return self.valid_until - self.ttl * 2 / 3

    def lose(self) -> None:
        """It is no longer certain to be ours."""
        if not self.lost.is_set():
            self.lost.set()
            if self._on_lost is not None:
                try:
                    self._on_lost()
                except Exception:
                    log.exception("the function that is told of a lost lease failed")


class LeaseKeeper:
    """Renews all leases of a worker, many in one round trip; its thread runs only while there are any."""

    def __init__(self, commit: GroupCommit) -> None:
        self._commit = commit
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_running = False

    def keep(self, lease: Lease) -> None:
        """Renew this lease until it is let go or lost."""
        with self._lock:
            self._leases[lease.token] = lease
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="sharedcluster-leases", daemon=True).start()
        self._wake.set()

    def let_go(self, lease: Lease) -> None:
        """Stop renewing it."""
        with self._lock:
            self._leases.pop(lease.token, None)

    def _run(self) -> None:
        idle_since = time.monotonic()
        while True:
            now = time.monotonic()
            leases = list(self._leases.values())
            due = [lease for lease in leases if lease.renew_at <= now]
            if due:
                self._renew(due)
            if leases:
                idle_since = now
            with self._lock:
                if not self._leases and now - idle_since > 5:
                    self._is_running = False
                    return
                pause = min((lease.renew_at for lease in self._leases.values()), default=now + 5) - time.monotonic()
            self._wake.wait(max(pause, 0.02))
            self._wake.clear()

    def _renew(self, due: list[Lease]) -> None:
        sent_at = time.monotonic()
        commands = [script_command("compare_expire", [x.key], [x.token, int(x.ttl * 1000)]) for x in due]
        try:
            replies = self._commit.many(commands, idempotent=True)
        except (StateUnavailableError, ReplyError):
            time.sleep(0.05)
            replies = [None] * len(due)
        for lease, reply in zip(due, replies, strict=True):
            if reply == 1:
                lease.valid_until = sent_at + lease.ttl
            elif reply == 0 or time.monotonic() >= lease.valid_until:
                self.let_go(lease)
                lease.lose()


def owner_token() -> str:
    """A token that names its process, for those who look into Redis, and cannot be guessed or repeated."""
    return f"{os.environ.get('SHAREDCLUSTER_WORKER_ID', os.getpid())}-{os.urandom(8).hex()}"
