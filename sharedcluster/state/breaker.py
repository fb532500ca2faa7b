"""Whether Redis counts as down, so that a request need not find out by waiting."""

from __future__ import annotations

import threading
import time


class CircuitBreaker:
    """Fails in microseconds while Redis is down, instead of a timeout per request.

    Args:
        limit: Failures in a row that open it.
        interval: Seconds between two probes while it is open.
    """

    def __init__(self, limit: int, interval: float) -> None:
        self._limit = limit
        self._interval = interval
        self._failures = 0
        self._probe_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """True while Redis counts as down."""
        return self._failures >= self._limit

    def allows(self) -> bool:
        """True if a command may be tried: always while closed, once per interval while open."""
        if self._failures < self._limit:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._probe_at:
                return False
            self._probe_at = now + self._interval
            return True

    def note_success(self) -> None:
        """Redis answered."""
        self._failures = 0

    def note_failure(self) -> None:
        """Redis did not answer."""
        with self._lock:
            self._failures += 1
            self._probe_at = time.monotonic() + self._interval
