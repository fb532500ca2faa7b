"""One timer for all connections: a wheel of slots that a single loop timer turns.

A connection only writes down when it expires. Pushing that moment back, which every request does, is an attribute
write and costs nothing here: the wheel finds out when the slot the connection stands in comes round. Only a nearer
moment moves it (`sooner`).
"""

from __future__ import annotations

import time
from typing import Protocol

TICK = 0.25
"""Seconds between two turns: how late a timeout may fire."""
SLOTS = 512
"""The horizon is TICK * SLOTS = 128 s; who expires later is looked at again then."""
GONE = -1
"""The slot of what has left the wheel."""


class Expiring(Protocol):
    """What stands in the wheel."""

    expiry: float
    """Monotonic seconds; inf for never."""
    slot: int
    """The slot it stands in; the wheel's alone."""

    def expire(self, now: float) -> None:
        """`expiry` has passed."""


class Wheel:
    """Slots of connections by the tick at which to look at them. `now` is monotonic time, refreshed each tick."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self._slots: list[set[Expiring]] = [set() for _ in range(SLOTS)]
        self._tick = int(self.now / TICK)

    def add(self, item: Expiring) -> None:
        """Let `item` stand in the slot of its expiry."""
        ahead = min(max((item.expiry - self.now) / TICK, 0), SLOTS - 2)
        item.slot = (self._tick + int(ahead) + 1) % SLOTS
        self._slots[item.slot].add(item)

    def sooner(self, item: Expiring) -> None:
        """`item.expiry` may now lie before the slot it stands in."""
        self._slots[item.slot].discard(item)
        self.add(item)

    def remove(self, item: Expiring) -> None:
        """Forget `item`, also if it is just being looked at."""
        self._slots[item.slot].discard(item)
        item.slot = GONE

    def turn(self, now: float) -> None:
        """Expire what is due at `now`; called every TICK, and catching up when it was not."""
        self.now = now
        target = int(now / TICK)
        start, self._tick = max(self._tick, target - SLOTS), target
        for tick in range(start + 1, target + 1):
            index = tick % SLOTS
            due, self._slots[index] = self._slots[index], set()
            for item in due:
                if item.slot != index:
                    continue  # removed, or moved, by one that expired before it in this very loop
                self.add(item)
                if item.expiry <= now:
                    item.expire(now)
