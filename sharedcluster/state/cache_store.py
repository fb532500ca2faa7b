r"""Cached values where they are kept: in Redis, shared by all, and in a near tier in each worker.

Laws
----
1. No stale set: a deletion takes the lease away, and a value that was computed under one may be stored only by the
   holder of its lease. (Leases as in "Scaling Memcache at Facebook", NSDI 2013.)
2. Tags are compared by equality of random versions, captured *before* the computation. An invalidation during the
   computation makes the value dead on arrival. No clock takes part.
3. The near tier obeys the laws of `near.Near`. Values come out decoded afresh, unless they cannot be changed.

A stored value is ``tag=version tag=version\netag ttl_ms stale_ms cost_ms\npayload``. How old it is follows from
Redis's own PTTL, so workers' clocks need not agree.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import quote

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.codec import Codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.leases import Lease
from sharedcluster.state.near import Near
from sharedcluster.state.scripting import script_command
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.wire import Argument, Command

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


@dataclass(frozen=True, slots=True)
class CacheLease:
    """The right to compute one key. `head` are the versions of its tags from before the computation."""

    lease: Lease
    head: bytes
    begun: int


class CacheStore:
    """Values by name, told of every change. See the top of this file.

    A key is what an application says; its name (`name_of`) is what it is called in Redis and near. Redis away: where
    nothing else is said, StateUnavailableError.
    """

    def __init__(
        self,
        commit: GroupCommit,
        near: Near[CacheEntry],
        namespace: str,
        channel: str,
        codec: Codec,
        settings: StateSettings,
        counts: dict[str, int],
    ) -> None:
        self.codec = codec
        self.near = near
        self._commit = commit
        self._namespace = namespace
        self._tag_prefix = f"{namespace}:t:"
        self._channel = channel
        self._lease_timeout = settings.cache_lease_timeout
        self._counts = counts

    # -- reading ---------------------------------------------------------------------------------------------------

    def entries(self, keys: Iterable[str]) -> list[CacheEntry | None]:
        """What is stored under these keys, from memory where that may be believed; one round trip for the rest.

        None for what is missing, and, counted, for what Redis does not tell because it is away.
        """
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

    def value_of(self, entry: CacheEntry) -> Any:
        """Its value, for one caller."""
        return self.codec.decode(entry.raw) if entry.shared is _MISSING else entry.shared

    def copy_of(self, value: Any) -> Any:
        """A value for a further caller, as it would come out of the cache."""
        return value if type(value) in _SHAREABLE else self.codec.decode(self.codec.encode(value))

    # -- writing ---------------------------------------------------------------------------------------------------

    def store(self, mapping: Mapping[str, Any], ttl: float, tags: Iterable[str], *, only_missing: bool) -> list[str]:
        """Store values for `ttl` seconds (0: for ever) in one round trip; returns the keys that were stored."""
        ttl_ms = int(ttl * 1000)
        tags = (ALL, *map(quote_tag, tags))
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

    def delete(self, keys: Iterable[str]) -> list[str]:
        """Delete values and take their leases away, in one round trip; returns the keys that were there."""
        names = {key: self.name_of(key) for key in keys}
        commands: list[Command] = []
        for name in names.values():
            commands += [("DEL", self._key(name)), ("DEL", self._lease(name))]
            commands.append(("PUBLISH", self._channel, f"c - {name}"))
        replies = self._commit.transaction(commands, idempotent=True)
        return [key for index, key in enumerate(names) if replies[3 * index]]

    def invalidate_tags(self, tags: Iterable[str]) -> None:
        """Give these (quoted) tags new versions, in one round trip."""
        commands: list[Command] = []
        for tag in tags:
            command: Command = ("SET", self._tag_prefix + tag, _new_version())
            commands.append(command if tag == ALL else (*command, "PX", _TAG_TTL_MS))
            commands.append(("PUBLISH", self._channel, f"t - {tag}"))
        self._commit.transaction(commands, idempotent=True)

    # -- leases ----------------------------------------------------------------------------------------------------

    def ask(self, name: str, tags: tuple[str, ...], ignore: str = "") -> CacheEntry | CacheLease | float:
        """One round trip: the value, or the lease to compute it, or for how many seconds somebody else has that.

        Args:
            name: The value's name.
            tags: The (quoted) tags it will carry, whose versions the lease captures.
            ignore: An etag that counts as missing: its value is to be computed anew.
        """
        token, asked_at = secrets.token_hex(8), time.monotonic()
        begun = self.near.begin()
        reply = self._commit.script(
            "cache_get",
            [self._key(name), self._lease(name)],
            [token, int(self._lease_timeout * 1000), self._tag_prefix, ignore, _new_version(), ALL, *tags],
            # A second try may find the lease of the first one; that costs a wait and breaks nothing.
            idempotent=True,
        )
        if reply[0] == 1:
            self._counts["cache_hits"] += 1
            return self._take(name, reply[1], reply[2], begun)
        if reply[0] == 2:
            self._counts["cache_misses"] += 1
            return CacheLease(Lease(self._lease(name), token, self._lease_timeout, asked_at), reply[1], begun)
        return float(max(reply[1], 1)) / 1000

    def store_leased(
        self, name: str, lease: CacheLease, value: Any, ttl: float, stale: float, cost: float, tags: tuple[str, ...]
    ) -> None:
        """Store what was computed under a lease, unless it was taken away; for `ttl` and further `stale` seconds.

        Redis away: counted only, for the value was computed all the same.
        """
        etag = _new_version()
        raw = self.codec.encode(value)
        ttl_ms, stale_ms = int(ttl * 1000), int(stale * 1000)
        args: list[Argument] = [
            lease.lease.token,
            lease.head,
            _body(etag, ttl_ms, stale_ms, cost, raw),
            ttl_ms and ttl_ms + stale_ms,
        ]
        args += [self._channel, f"c {etag} {name}", "0", self._tag_prefix]
        try:
            # Sent twice, the second finds the lease gone and is refused, though the first stored it: both are right.
            is_kept = self._commit.script("cache_set", [self._key(name), self._lease(name)], args, idempotent=True)
        except StateUnavailableError:
            self._counts["cache_unavailable"] += 1
            return
        if is_kept:
            entry = self._make_entry(value, raw, etag, ttl_ms, cost)
            self._keep_near(name, entry, lease.begun, (ALL, *tags), ttl_ms + stale_ms)
        else:
            self._counts["cache_stale_sets_refused"] += 1

    def give_back(self, name: str, lease: CacheLease) -> None:
        """No value will come: let those who wait for it know, if Redis can be reached."""
        with suppress(StateUnavailableError):
            self._commit.many(
                [
                    script_command("compare_delete", [lease.lease.key], [lease.lease.token]),
                    ("PUBLISH", self._channel, f"c - {name}"),
                ],
                idempotent=True,
            )

    # -- near ------------------------------------------------------------------------------------------------------

    def _make_entry(self, value: Any, raw: bytes, etag: str, ttl_ms: int, cost: float) -> CacheEntry:
        shared = value if type(value) in _SHAREABLE else _MISSING
        fresh_for = ttl_ms / 1000 if ttl_ms else math.inf
        return CacheEntry(raw, shared, etag, time.monotonic() + fresh_for, cost)

    def _keep_near(self, name: str, entry: CacheEntry, begun: int, tags: tuple[str, ...], ttl_ms: int) -> None:
        max_age = ttl_ms / 1000 if ttl_ms > 0 else 1e9
        size = len(entry.raw) + len(name) + 300
        self.near.fill(name, entry, begun, mark=entry.etag.encode(), size=size, max_age=max_age, tags=tags)

    # -- names -----------------------------------------------------------------------------------------------------

    def name_of(self, key: str) -> str:
        """What a key is called in Redis and near: itself, or its hash if it is long."""
        if len(key) <= 200:
            return key
        return f"{key[:100]}#{blake2b(key.encode(), digest_size=16).hexdigest()}"

    def _key(self, name: str) -> str:
        return f"{self._namespace}:c:{name}"

    def _lease(self, name: str) -> str:
        return f"{self._namespace}:cl:{name}"


def _body(etag: str, ttl_ms: int, stale_ms: int, cost: float, raw: bytes) -> bytes:
    return b"%s %d %d %.6f\n%s" % (etag.encode(), ttl_ms, stale_ms, cost, raw)


def _new_version() -> str:
    return secrets.token_hex(6)


def quote_tag(tag: str) -> str:
    """A tag as it is written: without what separates tags."""
    return quote(tag, safe="*:/@!$&()+,;-_.~") if not tag.isalnum() else tag
