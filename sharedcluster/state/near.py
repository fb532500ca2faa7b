"""A near cache: what this worker remembers of Redis, and the rules by which it may believe it.

Laws
----
1. A near entry is used only while delivery is proven: the last heartbeat that came back through Redis and the
   subscriber's connection was sent less than `trust_timeout` ago. Redis runs commands one after another and delivers
   to one connection in order, so a heartbeat that was sent at time t and came back proves that every invalidation
   published before t has been delivered.
2. A fill is accepted only if nothing that concerns it arrived since *before* its value was asked for. A reader that
   fetched the old value, was overtaken by the invalidation and then stored what it had would otherwise keep a stale
   entry with nobody left to drop it.
3. An own write may be stored under the mark (version or etag) it was written with, if the last invalidation of its
   name carries that mark: messages of one name arrive in the order of the writes, so then nobody wrote after us. Where
   marks are versions that grow with every write of a name (`ordered`), a message about an older version says nothing
   against a newer entry, however late it comes. Without that a client that writes quickly would drop its own copy with
   the echo of the write before.
4. After a gap (the subscriber was away) everything is forgotten, and fills that began before it are refused.

What is remembered for law 2 is bounded: when the table of recent invalidations is full, it is emptied and its highest
tick becomes a floor under which every fill is refused.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from sharedcluster.state.runtime import THREADS, Runtime

V = TypeVar("V")

RECENT_LIMIT = 20_000


class NearEntry(Generic[V]):
    """One remembered value. `mark` is its version or etag; `expires_at` is on the monotonic clock."""

    __slots__ = ("expires_at", "mark", "size", "tags", "value")

    def __init__(self, value: V, mark: bytes, expires_at: float, size: int, tags: tuple[str, ...]) -> None:
        self.value = value
        self.mark = mark
        self.expires_at = expires_at
        self.size = size
        self.tags = tags


class Near(Generic[V]):
    """Names to values, bounded in entries and bytes, least recently used first out.

    Args:
        trusted: Tells whether delivery of invalidations is proven at this moment (law 1).
        entries: Most names kept.
        size: Most bytes kept, as the callers of `fill` count them.
        max_age: Seconds after which an entry is asked for again in any case.
        ordered: Marks are versions that grow with every write of a name.
        runtime: Makes its lock.
    """

    def __init__(
        self,
        trusted: Callable[[], bool],
        *,
        entries: int,
        size: int,
        max_age: float,
        ordered: bool = False,
        runtime: Runtime = THREADS,
    ) -> None:
        self._is_ordered = ordered
        self._trusted = trusted
        self._entry_limit = entries
        self._size_limit = size
        self._max_age = max_age
        self._entries: OrderedDict[str, NearEntry[V]] = OrderedDict()
        self._tagged: dict[str, set[str]] = {}
        self._recent: dict[str, tuple[int, bytes]] = {}
        self._tick = 1
        self._floor = 0
        self._size = 0
        self._lock = runtime.make_lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._size

    def begin(self) -> int:
        """Call before asking Redis; the result belongs into `fill`. 0 means that nothing may be kept now."""
        return self._tick if self._trusted() else 0

    def get(self, name: str) -> NearEntry[V] | None:
        """The entry of that name if it may be believed now."""
        entry = self._entries.get(name)
        if entry is None or not self._trusted() or time.monotonic() >= entry.expires_at:
            return None
        return entry

    def peek(self, name: str) -> NearEntry[V] | None:
        """The entry of that name whether or not it may be believed: for those who are told that it may be old."""
        return self._entries.get(name)

    def fill(
        self,
        name: str,
        value: V,
        begun: int,
        *,
        mark: bytes = b"",
        size: int = 0,
        max_age: float = 1e9,
        tags: tuple[str, ...] = (),
    ) -> NearEntry[V] | None:
        """Remember what Redis said, unless it may have been overtaken (laws 2 and 3).

        Args:
            name: The entry's name.
            value: Must not be changed by anybody afterwards.
            begun: What `begin` returned before Redis was asked.
            mark: The value's version or etag; messages that carry it do not drop the entry.
            size: Its bytes.
            max_age: Seconds it may live; the near cache's own limit applies too.
            tags: Dropped with any of these.
        """
        expires_at = time.monotonic() + min(max_age, self._max_age)
        with self._lock:
            entries = self._entries
            # What was there is older than what Redis just said or has just been told, whether or not that is kept:
            # who wrote must not read the old value afterwards.
            if name in entries:
                self._remove(name)
            if not begun or begun <= self._floor:
                return None
            last = self._recent.get(name)
            if (
                last is not None
                and last[0] >= begun
                and (last[1] != mark or not mark)
                and self._supersedes(last[1], mark)
            ):
                return None
            if tags and any(self._recent.get(f"t {tag}", (0, b""))[0] >= begun for tag in tags):
                return None
            entry = entries[name] = NearEntry(value, mark, expires_at, size, tags)
            self._size += size
            for tag in tags:
                self._tagged.setdefault(tag, set()).add(name)
            if self._size > self._size_limit or len(entries) > self._entry_limit:
                self._shrink()
            return entry

    def _shrink(self) -> None:
        while self._size > self._size_limit or len(self._entries) > self._entry_limit:
            self._remove(next(iter(self._entries)))

    def _supersedes(self, told: bytes, mark: bytes) -> bool:
        """Whether a message with the mark `told` makes what carries another `mark`, or none, out of date."""
        # Decimal numbers without leading zeros, which compare like this without being read.
        is_older = self._is_ordered and mark and told and (len(told), told) < (len(mark), mark)
        return not is_older

    def note_use(self, name: str) -> None:
        """The entry was used: it goes last when room is needed."""
        try:
            self._entries.move_to_end(name)
        except KeyError:  # another thread dropped it
            return

    def invalidate(self, name: str, mark: bytes = b"") -> None:
        """Somebody wrote this name; `mark` is what they wrote it with, empty for a deletion."""
        self.invalidate_many([(name, mark)])

    def invalidate_many(self, told: Sequence[tuple[str, bytes]]) -> None:
        """As `invalidate`, for names and marks that were heard of together, in their order."""
        with self._lock:
            if len(self._recent) + len(told) > RECENT_LIMIT:
                self._make_room()
            entries, recent, tick = self._entries, self._recent, self._tick
            for name, mark in told:
                recent[name] = (tick, mark)
                tick += 1
                entry = entries.get(name)
                # An own write comes back with the mark it is kept under.
                if entry is not None and (mark != entry.mark or not mark) and self._supersedes(mark, entry.mark):
                    self._remove(name)
            self._tick = tick

    def invalidate_tag(self, tag: str) -> None:
        """Everything with this tag is out of date."""
        self.invalidate(f"t {tag}")
        with self._lock:
            for name in list(self._tagged.get(tag, ())):
                self._remove(name)

    def forget(self) -> None:
        """A gap: messages may have been missed (law 4)."""
        with self._lock:
            self._floor = self._tick
            self._tick += 1
            self._recent.clear()
            self._entries.clear()
            self._tagged.clear()
            self._size = 0

    def drop(self, name: str) -> None:
        """Forget one entry without anything having been written."""
        with self._lock:
            self._remove(name)

    def _make_room(self) -> None:
        """What is remembered of invalidations is bounded: no fill that began before now is accepted."""
        self._recent.clear()
        self._floor = self._tick
        self._tick += 1

    def _remove(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        self._size -= entry.size
        for tag in entry.tags:
            names = self._tagged.get(tag)
            if names is not None:
                names.discard(name)
                if not names:
                    del self._tagged[tag]
