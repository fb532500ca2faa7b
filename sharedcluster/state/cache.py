r"""A cache in two tiers: Redis, shared by all, and a near tier in each worker that is told of every change.

Laws
----
1. One computation per key in the whole cluster: whoever misses asks Redis for a *lease* on the key in the same round
   trip; whoever does not get it waits for the message that the value is there. In one worker, callers of one key join
   one flight before anybody asks Redis.
2. No stale set: a deletion takes the lease away, and a value may be stored only by the holder of its lease.
   (Leases as in "Scaling Memcache at Facebook", NSDI 2013.)
3. Tags are compared by equality of random versions, captured *before* the computation. An invalidation during the
   computation makes the value dead on arrival. No clock takes part.
4. The near tier obeys the laws of `near.Near`. Values come out decoded afresh, unless they cannot be changed.
5. Redis away: reads compute, writes and deletions raise, because a deletion that is lost is stale data.

A stored value is ``tag=version tag=version\netag ttl_ms stale_ms cost_ms\npayload``. How old it is follows from
Redis's own PTTL, so workers' clocks need not agree.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import quote

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.codec import Codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.leases import Lease, LeaseKeeper
from sharedcluster.state.near import Near
from sharedcluster.state.scripting import script_command
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.wire import Argument, Command

log = logging.getLogger("sharedcluster.state")

ALL = "*"  # the tag every value carries: `clear` invalidates it
_TAG_TTL_MS = 31 * 86_400_000
_MISSING = object()
_SHAREABLE = (str, int, bool, type(None), float, bytes)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A value as it was stored. `fresh_until` is on the monotonic clock; after it the value is stale but usable."""

    raw: bytes
    shared: Any  # the decoded value if it cannot be changed, _MISSING otherwise
    etag: str
    fresh_until: float
    cost: float  # seconds its computation took


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
        self,
        commit: GroupCommit,
        near: Near[CacheEntry],
        namespace: str,
        channel: str,
        codec: Codec,
        settings: StateSettings,
        counts: dict[str, int],
        keeper: LeaseKeeper,
    ) -> None:
        self.codec = codec
        self.near = near
        self._keeper = keeper
        self._commit = commit
        self._namespace = namespace
        self._tag_prefix = f"{namespace}:t:"
        self._channel = channel
        self._settings = settings
        self._counts = counts
        self._flights: dict[str, _Flight] = {}
        self._refreshing: set[str] = set()
        self._waiting: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()

    # -- plain use -------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Any:
        """The value, or None. Redis away counts as a miss."""
        entry = self.entry(key)
        return None if entry is None else self._value_of(entry)

    def has(self, key: str) -> bool:
        """True if there is a value, even None."""
        return self.entry(key) is not None

    def get_many(self, *keys: str) -> list[Any]:
        """The values in order, None for those that are missing; one round trip for all that are not near."""
        entries = self._entries(keys)
        return [None if entry is None else self._value_of(entry) for entry in entries]

    def get_dict(self, *keys: str) -> dict[str, Any]:
        """The values by key, None for those that are missing."""
        return dict(zip(keys, self.get_many(*keys), strict=True))

    def set(self, key: str, value: Any, timeout: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value for `timeout` seconds (None: the default, 0: for ever)."""
        return self._store({key: value}, timeout, tags, only_missing=False) == [key]

    def add(self, key: str, value: Any, timeout: float | None = None, *, tags: Iterable[str] = ()) -> bool:
        """Store a value if there is none; False if there is."""
        return self._store({key: value}, timeout, tags, only_missing=True) == [key]

    def set_many(
        self, mapping: Mapping[str, Any], timeout: float | None = None, *, tags: Iterable[str] = ()
    ) -> list[str]:
        """Store several values in one round trip; returns the keys that were stored."""
        return self._store(mapping, timeout, tags, only_missing=False)

    def delete(self, key: str) -> bool:
        """Delete a value everywhere; True if there was one. When it returns, no worker in touch serves it any more."""
        return self.delete_many(key) == [key]

    def delete_many(self, *keys: str) -> list[str]:
        """Delete several values in one round trip; returns the keys that were there."""
        if not keys:
            return []
        commands: list[Command] = []
        for key in keys:
            name = self.name_of(key)
            self._forget(name)
            commands += [("DEL", self._key(name)), ("DEL", self._lease(name))]
            commands.append(("PUBLISH", self._channel, f"c - {name}"))
        replies = self._commit.transaction(commands, idempotent=True)
        for key in keys:
            self._forget(self.name_of(key))
        return [key for index, key in enumerate(keys) if replies[3 * index]]

    def clear(self) -> bool:
        """Invalidate everything in this namespace's cache, in one round trip."""
        return self.invalidate_tag(ALL)

    def invalidate_tag(self, *tags: str) -> bool:
        """Invalidate every value that carries one of these tags, however many there are, in one round trip."""
        commands: list[Command] = []
        for tag in map(_quote_tag, tags):
            command: Command = ("SET", self._tag_prefix + tag, _new_version())
            commands.append(command if tag == ALL else (*command, "PX", _TAG_TTL_MS))
            commands.append(("PUBLISH", self._channel, f"t - {tag}"))
        self._commit.transaction(commands, idempotent=True)
        for tag in map(_quote_tag, tags):
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

        Raises:
            Whatever `compute` raises, in the callers that waited for that computation too.
        """
        job = _Job(self.name_of(key), compute, self._ttl(timeout), tuple(map(_quote_tag, tags)), stale, keep)
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
        return self._copy_of(flight.value)

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
            if isinstance(found, _Lease):
                return self._compute_and_store(job, found)
            if time.monotonic() >= give_up_at:
                return self._compute_only(job)

    @staticmethod
    def _compute_only(job: _Job) -> tuple[Any, bool]:
        value = job.compute()
        return value, job.keep(value)

    def _ask(self, job: _Job, ignore: str = "") -> CacheEntry | _Lease | None:
        """One round trip: a value, the lease, or None after having waited for the one who holds it."""
        token, event, asked_at = secrets.token_hex(8), threading.Event(), time.monotonic()
        with self._lock:
            self._waiting.setdefault(job.name, []).append(event)  # before asking, so that no message is missed
        try:
            begun = self.near.begin()
            reply = self._commit.script(
                "cache_get",
                [self._key(job.name), self._lease(job.name)],
                [token, self._lease_ms, self._tag_prefix, ignore, _new_version(), ALL, *job.tags],
                # A second try may find the lease of the first one; that costs a wait and breaks nothing.
                idempotent=True,
            )
            if reply[0] == 1:
                self._counts["cache_hits"] += 1
                return self._take(job.name, reply[1], reply[2], begun)
            if reply[0] == 2:
                self._counts["cache_misses"] += 1
                ttl = self._settings.cache_lease_timeout
                return _Lease(Lease(self._lease(job.name), token, ttl, asked_at), reply[1], begun)
            if not ignore:
                self._counts["cache_waits"] += 1
                # The message normally comes; the bound is for the case that the holder died or the message was missed.
                event.wait(min(max(reply[1], 1) / 1000 + 0.01, 1.0))
            return None
        finally:
            with self._lock:
                events = self._waiting[job.name]
                events.remove(event)
                if not events:
                    del self._waiting[job.name]

    def _compute_and_store(self, job: _Job, lease: _Lease) -> tuple[Any, bool]:
        self._keeper.keep(lease.lease)
        started_at = time.monotonic()
        is_stored = False
        try:
            value = job.compute()
            if job.keep(value):
                is_stored = True
                self._store_leased(job, lease, value, time.monotonic() - started_at)
            return value, is_stored
        finally:
            self._keeper.let_go(lease.lease)
            if not is_stored:
                # Nobody shall wait for a value that will not come.
                with suppress(StateUnavailableError):
                    self._commit.many(
                        [
                            script_command("compare_delete", [lease.lease.key], [lease.lease.token]),
                            ("PUBLISH", self._channel, f"c - {job.name}"),
                        ],
                        idempotent=True,
                    )

    def _store_leased(self, job: _Job, lease: _Lease, value: Any, cost: float) -> None:
        etag = _new_version()
        raw = self.codec.encode(value)
        ttl_ms, stale_ms = int(job.ttl * 1000), int(job.stale * 1000)
        args: list[Argument] = [
            lease.lease.token,
            lease.head,
            _body(etag, ttl_ms, stale_ms, cost, raw),
            ttl_ms and ttl_ms + stale_ms,
        ]
        args += [self._channel, f"c {etag} {job.name}", "0", self._tag_prefix]
        try:
            # Sent twice, the second finds the lease gone and is refused, though the first stored it: both are right.
            is_kept = self._commit.script(
                "cache_set", [self._key(job.name), self._lease(job.name)], args, idempotent=True
            )
        except StateUnavailableError:
            self._counts["cache_unavailable"] += 1
            return
        if is_kept:
            self._keep_near(
                job.name,
                self._make_entry(value, raw, etag, ttl_ms, cost),
                lease.begun,
                (ALL, *job.tags),
                ttl_ms + stale_ms,
            )
        else:
            self._counts["cache_stale_sets_refused"] += 1

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
        return self._value_of(entry)

    def _refresh(self, job: _Job, etag: str) -> None:
        with self._lock:
            if job.name in self._refreshing:
                return
            self._refreshing.add(job.name)
        threading.Thread(target=self._refresh_now, args=(job, etag), name="sharedcluster-refresh", daemon=True).start()

    def _refresh_now(self, job: _Job, etag: str) -> None:
        try:
            lease = self._ask(job, ignore=etag)
            if isinstance(lease, _Lease):
                self._counts["cache_early"] += 1
                self._compute_and_store(job, lease)
        except StateUnavailableError:
            pass
        except Exception:
            log.exception("computing %r anew failed; the stale value is served on", job.name)
            time.sleep(min(1.0, job.stale))  # a computation that fails is not tried on every request
        finally:
            self._refreshing.discard(job.name)

    # -- tiers -----------------------------------------------------------------------------------------------------

    def entry(self, key: str) -> CacheEntry | None:
        """The stored entry or None; from memory if that may be believed."""
        return self._entries((key,))[0]

    def _entries(self, keys: Iterable[str]) -> list[CacheEntry | None]:
        names = [self.name_of(key) for key in keys]
        found: dict[str, CacheEntry | None] = {}
        for name in names:
            near = self.near.get(name)
            found[name] = near.value if near is not None else None
        missing = [name for name, entry in found.items() if entry is None]
        self._counts["cache_near_hits"] += len(names) - len(missing)
        if missing:
            found |= self._fetch(missing)
        return [found[name] for name in names]

    def _fetch(self, names: list[str]) -> dict[str, CacheEntry | None]:
        begun = self.near.begin()
        args: list[Argument] = ["", 0, self._tag_prefix, ""]
        commands = [script_command("cache_get", [self._key(name), self._lease(name)], args) for name in names]
        try:
            replies = self._commit.many(commands, idempotent=True)
        except StateUnavailableError:
            self._counts["cache_unavailable"] += 1
            return {}.fromkeys(names)
        hits = sum(1 for reply in replies if reply[0] == 1)
        self._counts["cache_hits"] += hits
        self._counts["cache_misses"] += len(names) - hits
        return {
            name: self._take(name, reply[1], reply[2], begun) if reply[0] == 1 else None
            for name, reply in zip(names, replies, strict=True)
        }

    def _take(self, name: str, stored: bytes, pttl: int, begun: int) -> CacheEntry:
        """Read a stored value and keep it near."""
        head, facts, raw = stored.split(b"\n", 2)
        etag, _, stale_ms, cost = facts.decode().split(" ")
        fresh_for = (pttl - int(stale_ms)) / 1000 if pttl >= 0 else math.inf
        value = self.codec.decode(raw)
        shared = value if type(value) in _SHAREABLE else _MISSING
        entry = CacheEntry(raw, shared, etag, time.monotonic() + fresh_for, float(cost))
        tags = tuple(word.partition("=")[0] for word in head.decode().split())
        self._keep_near(name, entry, begun, tags, pttl)
        return entry

    def _make_entry(self, value: Any, raw: bytes, etag: str, ttl_ms: int, cost: float) -> CacheEntry:
        shared = value if type(value) in _SHAREABLE else _MISSING
        fresh_for = ttl_ms / 1000 if ttl_ms else math.inf
        return CacheEntry(raw, shared, etag, time.monotonic() + fresh_for, cost)

    def _keep_near(self, name: str, entry: CacheEntry, begun: int, tags: tuple[str, ...], ttl_ms: int) -> None:
        max_age = ttl_ms / 1000 if ttl_ms > 0 else 1e9
        size = len(entry.raw) + len(name) + 300
        self.near.fill(name, entry, begun, mark=entry.etag.encode(), size=size, max_age=max_age, tags=tags)

    def _store(
        self, mapping: Mapping[str, Any], timeout: float | None, tags: Iterable[str], *, only_missing: bool
    ) -> list[str]:
        ttl_ms = int(self._ttl(timeout) * 1000)
        tags = (ALL, *map(_quote_tag, tags))
        begun = self.near.begin()
        commands: list[Command] = []
        entries: dict[str, CacheEntry] = {}
        for key, value in mapping.items():
            name, etag, raw = self.name_of(key), _new_version(), self.codec.encode(value)
            entries[name] = self._make_entry(value, raw, etag, ttl_ms, 0.0)
            args: list[Argument] = [
                "",
                "",
                _body(etag, ttl_ms, 0, 0.0, raw),
                ttl_ms,
                self._channel,
                f"c {etag} {name}",
            ]
            args += ["1" if only_missing else "0", self._tag_prefix, _new_version(), *tags]
            commands.append(script_command("cache_set", [self._key(name), self._lease(name)], args))
        replies = self._commit.many(commands, idempotent=not only_missing)
        for (name, entry), reply in zip(entries.items(), replies, strict=True):
            if reply:
                self._keep_near(name, entry, begun, tags, ttl_ms)
        return [key for key, reply in zip(mapping, replies, strict=True) if reply]

    def _value_of(self, entry: CacheEntry) -> Any:
        return self.codec.decode(entry.raw) if entry.shared is _MISSING else entry.shared

    def _copy_of(self, value: Any) -> Any:
        """Callers that joined a flight get a value of their own, as they would from the cache."""
        return value if type(value) in _SHAREABLE else self.codec.decode(self.codec.encode(value))

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

    # -- names -----------------------------------------------------------------------------------------------------

    @property
    def _lease_ms(self) -> int:
        return int(self._settings.cache_lease_timeout * 1000)

    def _ttl(self, timeout: float | None) -> float:
        return self._settings.cache_timeout if timeout is None else max(timeout, 0.0)

    def name_of(self, key: str) -> str:
        """What a key is called in Redis and near: itself, or its hash if it is long."""
        if len(key) <= 200:
            return key
        return f"{key[:100]}#{blake2b(key.encode(), digest_size=16).hexdigest()}"

    def _key(self, name: str) -> str:
        return f"{self._namespace}:c:{name}"

    def _lease(self, name: str) -> str:
        return f"{self._namespace}:cl:{name}"


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of `get_or_compute`, its arguments checked."""

    name: str
    compute: Callable[[], Any]
    ttl: float
    tags: tuple[str, ...]
    stale: float
    keep: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class _Lease:
    """The right to compute one key. `head` are the versions of its tags from before the computation."""

    lease: Lease
    head: bytes
    begun: int


def _body(etag: str, ttl_ms: int, stale_ms: int, cost: float, raw: bytes) -> bytes:
    return b"%s %d %d %.6f\n%s" % (etag.encode(), ttl_ms, stale_ms, cost, raw)


def _new_version() -> str:
    return secrets.token_hex(6)


def _quote_tag(tag: str) -> str:
    return quote(tag, safe="*:/@!$&()+,;-_.~") if not tag.isalnum() else tag
