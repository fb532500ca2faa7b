"""A cache that computes each value once: what `shared.cache` is made of.

Laws
----
1. One computation per key in the whole cluster: whoever misses asks Redis for a *lease* on the key in the same round
   trip; whoever does not get it waits for the message that the value is there. In one worker, callers of one key join
   one flight before anybody asks Redis.
2. Who comes after a deletion never joins a computation from before it.
3. Redis away: reads compute, writes and deletions raise, because a deletion that is lost is stale data.

Where values are kept, and what makes them out of date, is the affair of `cache_store`.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.cache_store import ALL, CacheEntry, CacheLease, CacheStore, quote_tag
from sharedcluster.state.leases import LeaseKeeper
from sharedcluster.state.settings import StateSettings

log = logging.getLogger("sharedcluster.state")

_MISSING = object()


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of `get_or_compute`, its arguments checked."""

    name: str
    compute: Callable[[], Any]
    ttl: float
    tags: tuple[str, ...]
    stale: float
    keep: Callable[[Any], bool]
    carry: Callable[[Callable[[], Any]], Callable[[], Any]]


class _Flight:
    """One computation that several callers of this worker wait for."""

    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = _MISSING
        self.error: BaseException | None = None


class Cache:
    """See the top of this file; `sharedcluster.flask` adds the decorators that need a request."""

    def __init__(
        self, store: CacheStore, settings: StateSettings, counts: dict[str, int], keeper: LeaseKeeper
    ) -> None:
        self.near = store.near
        self._store = store
        self._keeper = keeper
        self._settings = settings
        self._counts = counts
        self._flights: dict[str, _Flight] = {}
        self._refreshing: set[str] = set()
        self._waiting: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()

    def name_of(self, key: str) -> str:
        """What a key is called in Redis and near."""
        return self._store.name_of(key)

    # -- plain use -------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Any:
        """The value, or None. Redis away counts as a miss."""
        entry = self.entry(key)
        return None if entry is None else self._store.value_of(entry)

    def entry(self, key: str) -> CacheEntry | None:
        """The stored entry or None; from memory if that may be believed."""
        return self._store.entries((key,))[0]

    def has(self, key: str) -> bool:
        """True if there is a value, even None."""
        return self.entry(key) is not None

    def get_many(self, *keys: str) -> list[Any]:
        """The values in order, None for those that are missing; one round trip for all that are not near."""
        entries = self._store.entries(keys)
        return [None if entry is None else self._store.value_of(entry) for entry in entries]

    def get_dict(self, *keys: str) -> dict[str, Any]:
        """The values by key, None for those that are missing."""
        return dict(zip(keys, self.get_many(*keys), strict=True))

    def set(self, key: str, value: Any, timeout: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value for `timeout` seconds (None: the default, 0: for ever)."""
        return self._store.store({key: value}, self._ttl(timeout), tags, only_missing=False) == [key]

    def add(self, key: str, value: Any, timeout: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value if there is none; False if there is."""
        return self._store.store({key: value}, self._ttl(timeout), tags, only_missing=True) == [key]

    def set_many(
        self, mapping: Mapping[str, Any], timeout: float | None = None, *, tags: Iterable[str] = ()
    ) -> list[str]:
        """Store several values in one round trip; returns the keys that were stored."""
        return self._store.store(mapping, self._ttl(timeout), tags, only_missing=False)

    def delete(self, key: str) -> bool:
        """Delete a value everywhere; True if there was one. When it returns, no worker in touch serves it any more."""
        return self.delete_many(key) == [key]

    def delete_many(self, *keys: str) -> list[str]:
        """Delete several values in one round trip; returns the keys that were there."""
        if not keys:
            return []
        for key in keys:
            self._forget(self.name_of(key))
        found = self._store.delete(keys)
        for key in keys:
            self._forget(self.name_of(key))
        return found

    def clear(self) -> bool:
        """Invalidate everything in this namespace's cache, in one round trip."""
        return self.invalidate_tag(ALL)

    def invalidate_tag(self, *tags: str) -> bool:
        """Invalidate every value that carries one of these tags, however many there are, in one round trip."""
        quoted = [*map(quote_tag, tags)]
        self._store.invalidate_tags(quoted)
        for tag in quoted:
            self.hear_tag(tag)
        self._counts["cache_tag_invalidations"] += len(tags)
        return True

    # -- computing -------------------------------------------------------------------------------------------------

    def get_or_compute(
        self,
        key: str,
        compute: Callable[[], Any],
        timeout: float | None = None,
        *,
        tags: Iterable[str] = (),
        stale: float = 0.0,
        keep: Callable[[Any], bool] = lambda value: True,
        carry: Callable[[Callable[[], Any]], Callable[[], Any]] = lambda compute: compute,
    ) -> Any:
        """The value, computed at most once in the cluster if it is missing.

        Args:
            key: The value's key.
            compute: Makes the value.
            timeout: Seconds it is fresh (None: the default, 0: for ever).
            tags: See `invalidate_tag`.
            stale: Seconds after `timeout` during which it is still served while one worker computes it anew, and
                during which a computation that fails changes nothing.
            keep: Tells whether a computed value is to be stored.
            carry: Makes of `compute` what does the same in another thread; called in the caller's, and only if the
                value is to be computed in the background.

        Raises:
            Whatever `compute` raises, in the callers that waited for that computation too.
        """
        job = _Job(self.name_of(key), compute, self._ttl(timeout), tuple(map(quote_tag, tags)), stale, keep, carry)
        near = self.near.get(job.name)
        if near is not None:
            self._counts["cache_near_hits"] += 1
            return self._use(near.value, job)
        with self._lock:
            flight = self._flights.get(job.name)
            is_first = flight is None
            if flight is None:
                flight = self._flights[job.name] = _Flight()
        if is_first:
            return self._fly(flight, job)
        self._counts["cache_joined"] += 1
        if not flight.done.wait(self._settings.cache_wait_timeout) or flight.value is _MISSING:
            if flight.error is not None and isinstance(flight.error, Exception):
                raise flight.error
            return compute()
        return self._store.copy_of(flight.value)

    def _fly(self, flight: _Flight, job: _Job) -> Any:
        try:
            value, is_for_all = self._look_up_or_compute(job)
            if is_for_all:
                flight.value = value
            return value
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                if self._flights.get(job.name) is flight:
                    del self._flights[job.name]
            flight.done.set()

    def _look_up_or_compute(self, job: _Job) -> tuple[Any, bool]:
        """The value, and whether those who wait may have it too: what is not kept is not handed around either."""
        give_up_at = time.monotonic() + self._settings.cache_wait_timeout
        while True:
            try:
                found = self._ask(job)
            except StateUnavailableError:
                self._counts["cache_unavailable"] += 1
                return self._compute_only(job)
            if isinstance(found, CacheEntry):
                return self._use(found, job), True
            if isinstance(found, CacheLease):
                return self._compute_and_store(job, found)
            if time.monotonic() >= give_up_at:
                return self._compute_only(job)

    @staticmethod
    def _compute_only(job: _Job) -> tuple[Any, bool]:
        value = job.compute()
        return value, job.keep(value)

    def _ask(self, job: _Job, ignore: str = "") -> CacheEntry | CacheLease | None:
        """A value, the lease, or None after having waited for the one who holds it."""
        event = threading.Event()
        with self._lock:
            self._waiting.setdefault(job.name, []).append(event)  # before asking, so that no message is missed
        try:
            found = self._store.ask(job.name, job.tags, ignore)
            if not isinstance(found, float):
                return found
            if not ignore:
                self._counts["cache_waits"] += 1
                # The message normally comes; the bound is for the case that the holder died or the message was missed.
                event.wait(min(found + 0.01, 1.0))
            return None
        finally:
            with self._lock:
                events = self._waiting[job.name]
                events.remove(event)
                if not events:
                    del self._waiting[job.name]

    def _compute_and_store(self, job: _Job, lease: CacheLease) -> tuple[Any, bool]:
        self._keeper.keep(lease.lease)
        started_at = time.monotonic()
        is_stored = False
        try:
            value = job.compute()
            if job.keep(value):
                is_stored = True
                cost = time.monotonic() - started_at
                self._store.store_leased(job.name, lease, value, job.ttl, job.stale, cost, job.tags)
            return value, is_stored
        finally:
            self._keeper.let_go(lease.lease)
            if not is_stored:
                self._store.give_back(job.name, lease)

    # -- freshness -------------------------------------------------------------------------------------------------

    def _use(self, entry: CacheEntry, job: _Job) -> Any:
        """The entry's value; if it is stale or about to be, one caller in the cluster computes it anew meanwhile."""
        remaining = entry.fresh_until - time.monotonic()
        # XFetch (Vattani et al., VLDB 2015): the dearer the computation and the nearer the end, the likelier.
        early = entry.cost * self._settings.cache_early * -math.log(1.0 - random.random())
        if remaining <= early and job.ttl:
            if remaining <= 0:
                self._counts["cache_stale"] += 1
            self._refresh(job, entry.etag)
        return self._store.value_of(entry)

    def _refresh(self, job: _Job, etag: str) -> None:
        with self._lock:
            if job.name in self._refreshing:
                return
            self._refreshing.add(job.name)
        try:
            job = replace(job, compute=job.carry(job.compute))
        except BaseException:
            self._refreshing.discard(job.name)
            raise
        threading.Thread(target=self._refresh_now, args=(job, etag), name="sharedcluster-refresh", daemon=True).start()

    def _refresh_now(self, job: _Job, etag: str) -> None:
        try:
            lease = self._ask(job, ignore=etag)
            if isinstance(lease, CacheLease):
                self._counts["cache_early"] += 1
                self._compute_and_store(job, lease)
        except StateUnavailableError:
            pass
        except Exception:
            log.exception("computing %r anew failed; the stale value is served on", job.name)
            time.sleep(min(1.0, job.stale))  # a computation that fails is not tried on every request
        finally:
            self._refreshing.discard(job.name)

    # -- messages --------------------------------------------------------------------------------------------------

    def hear(self, name: str, etag: bytes) -> None:
        """Somebody stored (etag) or deleted (empty) this name."""
        self.near.invalidate(name, etag)
        if not etag:
            self._flights.pop(name, None)  # who comes after a deletion must not join a computation from before it
        for event in list(self._waiting.get(name, ())):
            event.set()

    def hear_tag(self, tag: str) -> None:
        """Somebody invalidated this tag."""
        self.near.invalidate_tag(tag)
        self._flights.clear()  # flights do not know their tags; a second computation is the smaller harm

    def _forget(self, name: str) -> None:
        self.near.invalidate(name)
        self._flights.pop(name, None)

    def _ttl(self, timeout: float | None) -> float:
        return self._settings.cache_timeout if timeout is None else max(timeout, 0.0)
