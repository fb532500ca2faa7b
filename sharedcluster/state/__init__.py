"""Shared state over Redis: sessions, caches, broadcast, primitives; knows neither Flask nor gevent.

`SharedState` is the one object: built in a worker, after the fork and after gevent's patch, never before. Everything
in it hangs on two connections, the data connection (`connection.GroupCommit`) and the ear (`subscriber.Subscriber`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sharedcluster.errors import Bug, RedisNeededError, StateUnavailableError
from sharedcluster.state.broadcast import Broadcast
from sharedcluster.state.cache import Cache
from sharedcluster.state.cache_store import CacheStore
from sharedcluster.state.checks import check_server
from sharedcluster.state.codec import make_codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.leases import LeaseKeeper
from sharedcluster.state.near import Near
from sharedcluster.state.presence import PresenceRoom
from sharedcluster.state.primitives import Counter, DictRecord, DictWatchers, Lock, LockRoom, RateLimit, SharedDict
from sharedcluster.state.runtime import THREADS, Runtime
from sharedcluster.state.schedule import Leader, Schedule
from sharedcluster.state.sessions import SessionStore
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.subscriber import Subscriber
from sharedcluster.state.wire import Address, ReplyError

__all__ = ["SharedState", "StateFacts", "StateSettings", "live_states", "process_id"]

log = logging.getLogger("sharedcluster.state")

# A system call per use would be a noticeable part of a warm read.
_PROCESS = [os.getpid()]
os.register_at_fork(after_in_child=lambda: _PROCESS.__setitem__(0, os.getpid()))


def process_id() -> int:
    """`os.getpid()`, remembered until the next fork."""
    return _PROCESS[0]


_LIVE: weakref.WeakSet[SharedState] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class StateFacts:
    """What a worker tells about its shared state.

    Attributes:
        url: Where Redis is, without a password.
        state: "ok", "down", or "none" before the first use.
        latency_ms: How long the last heartbeat took to Redis and back through the subscriber.
        gaps: How often the subscriber may have missed messages.
        counts: Everything else that only grows, by name.
    """

    url: str
    state: str
    latency_ms: float
    gaps: int
    counts: Mapping[str, int] = field(default_factory=dict)


class SharedState:
    """The shared state of one application in one worker.

    Args:
        url: redis://, rediss://, unix://, or redis+sentinel://.
        namespace: Prefix of all keys and channels; applications with different ones do not see each other.
        settings: Timeouts and limits.
        runtime: How callers wait.

    Raises:
        ConfigError: The URL or a setting cannot be understood.
    """

    def __init__(
        self, url: str, namespace: str, settings: StateSettings | None = None, runtime: Runtime = THREADS
    ) -> None:
        self.settings = settings = settings or StateSettings()
        self.namespace = namespace
        self._runtime = runtime
        self.counts: dict[str, int] = defaultdict(int)
        self.address = Address(url, settings)
        self.commit = GroupCommit(self.address, settings, runtime)
        self.subscriber = Subscriber(self.address, self.commit, namespace, settings, runtime)
        channel, codec = f"{namespace}:inv", make_codec(settings.codec)
        self._channel, self._codec = channel, codec
        self._keeper = LeaseKeeper(self.commit)
        self._locks = LockRoom(self.commit, self._keeper, namespace, channel)
        self._watchers = DictWatchers()
        self._dict_near: Near[DictRecord] = self._make_near(settings.near_max_age, ordered=True)
        self.leader = Leader(self._locks)
        self.presence = PresenceRoom(self.commit, namespace, codec)
        self.schedule = Schedule(self.commit, namespace)
        self._session_near = self._make_near(settings.session_near_max_age, ordered=True)
        self.sessions = SessionStore(self.commit, self._session_near, namespace, channel, codec, settings, self.counts)
        cache_near = self._make_near(settings.near_max_age, ordered=False)
        store = CacheStore(self.commit, cache_near, namespace, channel, codec, settings, self.counts)
        self.cache = Cache(store, settings, self.counts, self._keeper)
        self.broadcast = Broadcast(self.commit, self.subscriber, namespace, codec, settings, self.counts)
        self.subscriber.listen(channel, self._hear_invalidations)
        for near in (self._session_near, cache_near, self._dict_near):
            self.subscriber.on_gap.append(near.forget)
        self.subscriber.on_gap.append(self._watchers.hear_gap)
        self._pid = process_id()
        self._is_started = False
        self._start_lock = threading.Lock()

    def _make_near(self, max_age: float, *, ordered: bool) -> Near[Any]:
        settings = self.settings
        return Near(
            self.subscriber.is_trusted,
            entries=settings.near_entries,
            size=settings.near_bytes,
            max_age=max_age,
            ordered=ordered,
            runtime=self._runtime,
        )

    def start(self) -> None:
        """Begin to listen. Twice is as good as once.

        Raises:
            Bug: This object was made before a fork and used after it.
        """
        if self._pid != process_id():
            raise Bug(f"shared state of process {self._pid} used in process {process_id()}: make it after the fork")
        with self._start_lock:
            if not self._is_started:
                self._is_started = True
                _LIVE.add(self)
                self.subscriber.on_first_pulse += [self._load_scripts, self._report_check]
                self.subscriber.on_gap.append(self._load_scripts_soon)
                self.subscriber.start()

    def check(self) -> list[str]:
        """See `checks.check_server`: warnings, or RedisNeededError."""
        return check_server(self.address, self.namespace)

    def _load_scripts(self) -> None:
        """So that no request has to send a text; if it fails, the first that needs a script does it."""
        with suppress(StateUnavailableError, ReplyError):
            self.commit.load_scripts()

    def _load_scripts_soon(self) -> None:
        threading.Thread(target=self._load_scripts, name="sharedcluster-scripts", daemon=True).start()

    def _report_check(self) -> None:
        """Once, in the background: what is wrong is logged in words, while requests get their 503."""
        try:
            for warning in self.check():
                log.warning("%s", warning)
        except RedisNeededError as error:
            log.error("%s", error)  # noqa: TRY400 - the text says it all, a traceback would only hide it

    def drain(self) -> None:
        """The worker ends soon: streams are closed so that they resume elsewhere; sessions and cache go on working."""
        self.broadcast.drain()
        self.schedule.stop()
        threading.Thread(target=self.leader.resign, name="sharedcluster-resign", daemon=True).start()

    def close(self) -> None:
        """Let go of Redis."""
        _LIVE.discard(self)
        self.broadcast.close()
        self.presence.stop()
        self.schedule.stop()
        self.leader.resign()
        self.subscriber.close()
        self.commit.close()

    # -- primitives ------------------------------------------------------------------------------------------------

    def lock(
        self,
        name: str,
        *,
        timeout: float = 10.0,
        wait: float | None = 10.0,
        on_lost: Callable[[], object] | None = None,
    ) -> Lock:
        """A lock; see `primitives.Lock`."""
        return Lock(self._locks, name, timeout=timeout, wait=wait, on_lost=on_lost)

    def counter(self, name: str) -> Counter:
        """A counter; see `primitives.Counter`."""
        return Counter(self.commit, self.namespace, name)

    def dict(self, name: str) -> SharedDict:
        """A dict; see `primitives.SharedDict`."""
        return SharedDict(
            self.commit, self._dict_near, self._watchers, self.namespace, self._channel, self._codec, name
        )

    def rate_limit(self, name: str, limit: int, per: float) -> RateLimit:
        """A rate limit; see `primitives.RateLimit`."""
        return RateLimit(self.commit, self.namespace, name, limit, per)

    def wait_ready(self, timeout: float) -> bool:
        """True once the subscriber's delivery is proven, so that near caches work; False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.subscriber.is_trusted():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def facts(self) -> StateFacts:
        """For heartbeats and status."""
        state = "none" if not self._is_started else "down" if self.commit.breaker.is_open else "ok"
        counts = dict(self.counts)
        counts["redis_round_trips"] = self.commit.exchanges
        counts["redis_commands"] = self.commit.commands
        counts["messages_heard"] = self.subscriber.messages
        latency = round(self.subscriber.latency * 1000, 3)
        return StateFacts(self.address.public, state, latency, self.subscriber.gaps, counts)

    def _hear_invalidations(self, payloads: list[bytes]) -> None:
        """`kind mark name`: s session, c cached value, t tag, d dict, l lock; the mark is `-` for a deletion.

        Of sessions any number of marks and names follow one another: every worker hears of every write of its site.
        """
        for payload in payloads:
            kind, _, rest = payload.partition(b" ")
            try:
                if kind == b"s":
                    self._session_near.invalidate_many(_pairs(rest))
                    continue
                raw_mark, raw_name = rest.split(b" ", 1)
                mark, name = b"" if raw_mark == b"-" else raw_mark, raw_name.decode()
            except ValueError:
                log.warning("somebody else publishes on the channel of invalidations; what is none is lost")
                continue
            if kind == b"c":
                self.cache.hear(name, mark)
            elif kind == b"t":
                self.cache.hear_tag(name)
            elif kind == b"d":
                self._dict_near.invalidate(name, mark)
                self._watchers.hear(name)
            elif kind == b"l":
                self._locks.hear(name)


def _pairs(rest: bytes) -> list[tuple[str, bytes]]:
    """Names and marks out of `mark name mark name ...`, whose names have no blanks; ValueError if there is a rest."""
    marks, names = rest.split(b" ")[::2], rest.decode().split(" ")[1::2]
    if b"-" in marks:
        marks = [b"" if mark == b"-" else mark for mark in marks]
    return list(zip(names, marks, strict=True))


def live_states() -> list[SharedState]:
    """The started ones of this process: what a worker drains, closes and reports without knowing Flask."""
    return [state for state in _LIVE if state._pid == process_id()]
