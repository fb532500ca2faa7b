"""Lock, counter, rate limit, shared dict. All of them fail closed: without Redis they raise, nothing is assumed."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from sharedcluster.errors import SharedClusterError, StateUnavailableError
from sharedcluster.state.codec import Codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.leases import Lease, LeaseKeeper, owner_token
from sharedcluster.state.near import Near
from sharedcluster.state.wire import Argument

log = logging.getLogger("sharedcluster.state")


class LockTimeoutError(SharedClusterError):
    """Somebody else held the lock for as long as we were willing to wait."""


class LockLostError(SharedClusterError):
    """The lock was not ours for the whole time: Redis could not be reached to renew it, or lost it."""


class RateLimitedError(SharedClusterError):
    """More than the limit allows; `retry_after` seconds later there is room again."""

    def __init__(self, what: str, retry_after: float) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class LockRoom:
    """What the locks of one worker share: the way to Redis, the keeper, and those who sleep until one is released."""

    def __init__(self, commit: GroupCommit, keeper: LeaseKeeper, namespace: str, channel: str) -> None:
        self.commit = commit
        self.keeper = keeper
        self.prefix = f"{namespace}:l:"
        self.channel = channel
        self._sleepers: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()

    def sleep(self, name: str, event: threading.Event, timeout: float) -> None:
        """Wait until a release of this lock is heard."""
        event.wait(timeout)
        event.clear()

    def enter(self, name: str) -> threading.Event:
        """Begin to listen for releases of a lock."""
        event = threading.Event()
        with self._lock:
            self._sleepers.setdefault(name, []).append(event)
        return event

    def leave(self, name: str, event: threading.Event) -> None:
        """Stop listening."""
        with self._lock:
            sleepers = self._sleepers[name]
            sleepers.remove(event)
            if not sleepers:
                del self._sleepers[name]

    def hear(self, name: str) -> None:
        """A lock was released; called in the subscriber's thread."""
        for event in list(self._sleepers.get(name, ())):
            event.set()


class Lock:
    """At most one holder at a time in the whole cluster, told apart for ever by a growing `fence`.

        with shared.lock("stock", timeout=10) as lock:
            store.write(row, fence=lock.fence)

    The lock is renewed while it is held; a holder that dies loses it after `timeout` seconds. Redis replicates
    asynchronously, so after a failover two may believe to hold it until the first is told; what must not happen twice
    has to check the fence.

    Args:
        room: The worker's.
        name: The lock's name.
        timeout: Seconds after which a dead holder's lock is free.
        wait: Seconds `with` and `acquire` wait for it; None waits without end.
        on_lost: Called when it is no longer certain to be ours.
    """

    def __init__(
        self,
        room: LockRoom,
        name: str,
        *,
        timeout: float = 10.0,
        wait: float | None = 10.0,
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        if timeout <= 0:
            raise ValueError("a lock needs a timeout above 0: it is what frees it when its holder dies")
        self.name = name
        self.timeout = timeout
        self.fence = 0
        self._room = room
        self._wait = wait
        self._on_lost = on_lost
        self._lease: Lease | None = None

    @property
    def is_held(self) -> bool:
        """True while the lock is certain to be ours."""
        return self._lease is not None and self._lease.is_valid

    @property
    def lost(self) -> bool:
        """True if we had it and it is no longer certain to be ours."""
        return self._lease is not None and not self._lease.is_valid

    def check(self) -> None:
        """Raise LockLostError unless the lock is certain to be ours."""
        if not self.is_held:
            raise LockLostError(f'the lock "{self.name}" is not ours any more')

    def acquire(self, *, wait: float | None = -1.0) -> bool:
        """Take the lock; False if somebody else kept it for `wait` seconds (default: the lock's own).

        Raises:
            StateUnavailableError: Redis does not answer.
        """
        wait = self._wait if wait == -1.0 else wait
        give_up_at = None if wait is None else time.monotonic() + wait
        token = owner_token()
        event = self._room.enter(self.name)
        try:
            while True:
                remaining = None if give_up_at is None else give_up_at - time.monotonic()
                will_wait = remaining is None or remaining > 0
                holder_ms = self._try(token, will_wait)
                if holder_ms is None:
                    return True
                if not will_wait:
                    return False
                # Woken by the release; the bound is for a holder that died and for messages that were missed.
                pause = min(holder_ms / 1000, 1.0) + random.uniform(0, 0.02)
                self._room.sleep(self.name, event, pause if remaining is None else min(pause, remaining))
        finally:
            self._room.leave(self.name, event)

    def _try(self, token: str, will_wait: bool) -> int | None:
        """None if it is ours now, else for how many milliseconds the present holder has it."""
        key = self._room.prefix + self.name
        taken_at = time.monotonic()
        args: list[Argument] = [token, int(self.timeout * 1000), int(will_wait)]
        keys = [key, f"{key}:fence", f"{key}:waiters"]
        is_ours, number = self._room.commit.script("lock_acquire", keys, args, idempotent=True)
        if not is_ours:
            return max(int(number), 1)
        self.fence = int(number)
        self._lease = Lease(key, token, self.timeout, taken_at, self._on_lost)
        self._room.keeper.keep(self._lease)
        return None

    def release(self) -> None:
        """Give it back.

        Raises:
            LockLostError: It was lost before.
        """
        lease, self._lease = self._lease, None
        if lease is None:
            raise LockLostError(f'the lock "{self.name}" is not held')
        self._room.keeper.let_go(lease)
        was_valid = lease.is_valid
        args: list[Argument] = [lease.token, self._room.channel, f"l - {self.name}"]
        try:
            was_ours = self._room.commit.script("lock_release", [lease.key, f"{lease.key}:waiters"], args)
        except StateUnavailableError:
            # It ends by itself after `timeout`; whoever held it did so rightly until now.
            was_ours = was_valid
        if not was_ours or not was_valid:
            raise LockLostError(f'the lock "{self.name}" was lost while it was held')

    def __enter__(self) -> Self:
        if not self.acquire():
            raise LockTimeoutError(f'the lock "{self.name}" was not free within {self._wait} s')
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.release()
        except LockLostError:
            if kind is None:
                raise


class Counter:
    """A number all workers add to."""

    def __init__(self, commit: GroupCommit, namespace: str, name: str) -> None:
        self._commit = commit
        self._key = f"{namespace}:n:{name}"
        self._once_key = f"{namespace}:n1:{name}:"

    @property
    def value(self) -> int:
        """Its present value; 0 if nobody has added yet."""
        return int(self._commit.call("GET", self._key, idempotent=True) or 0)

    def add(self, amount: int = 1, *, once: str = "", remember: float = 86_400.0) -> int:
        """Add and return the new value.

        Args:
            amount: May be negative.
            once: A token that names this event; a second call with it within `remember` seconds adds nothing. With it
                a call that timed out may simply be repeated; without it such a call may or may not have counted.
            remember: Seconds for which the token is kept.
        """
        if not once:
            return int(self._commit.call("INCRBY", self._key, amount))
        args: list[Argument] = [amount, int(remember * 1000)]
        return int(self._commit.script("counter_add", [self._key, self._once_key + once], args, idempotent=True))

    def reset(self, value: int = 0) -> None:
        """Set it."""
        self._commit.call("SET", self._key, value, idempotent=True)


@dataclass(frozen=True, slots=True)
class RateResult:
    """What a limit said. Times are seconds; `retry_after` is infinite for a cost that is above the limit itself."""

    allowed: bool
    remaining: int
    retry_after: float
    reset_after: float

    def __bool__(self) -> bool:
        return self.allowed


class RateLimit:
    """At most `limit` events per `per` seconds, for all workers together, evenly refilled (GCRA, by Redis's clock)."""

    def __init__(self, commit: GroupCommit, namespace: str, name: str, limit: int, per: float) -> None:
        if limit < 1 or per <= 0:
            raise ValueError("a rate limit is at least 1 event per a time above 0")
        self._commit = commit
        self._key = f"{namespace}:r:{name}"
        self._name = name
        self._interval = per * 1_000_000 / limit
        self._tolerance = per * 1_000_000

    def hit(self, cost: int = 1) -> RateResult:
        """Count an event, if there is room for it."""
        return self._ask(cost, take=True)

    def test(self, cost: int = 1) -> RateResult:
        """Tell whether there is room, without counting."""
        return self._ask(cost, take=False)

    def require(self, cost: int = 1) -> None:
        """Count an event or raise RateLimitedError, which the Flask extension answers with 429 and Retry-After."""
        if not (result := self.hit(cost)):
            raise RateLimitedError(f'the limit "{self._name}" is reached', result.retry_after)

    def reset(self) -> None:
        """Forget all events."""
        self._commit.call("DEL", self._key, idempotent=True)

    def _ask(self, cost: int, *, take: bool) -> RateResult:
        args: list[Argument] = [f"{self._interval:.3f}", f"{self._tolerance:.3f}", cost, int(take)]
        allowed, remaining, retry, reset = self._commit.script("rate_limit", [self._key], args)
        retry_after = retry / 1e6 if retry >= 0 else float("inf")
        return RateResult(bool(allowed), max(remaining, 0), retry_after, reset / 1e6)


@dataclass(frozen=True, slots=True)
class DictRecord:
    """What Redis holds of a shared dict."""

    version: int
    fields: Mapping[str, bytes]


_MISSING = object()


class DictWatchers:
    """Functions to be called when a shared dict has changed, in a thread of their own."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[[], object]]] = {}
        self._changed: set[str] = set()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._is_running = False

    def watch(self, name: str, callback: Callable[[], object]) -> None:
        """Call `callback` after each change of the dict of that name; several quick changes may be told as one."""
        with self._lock:
            self._callbacks.setdefault(name, []).append(callback)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="sharedcluster-watch", daemon=True).start()

    def hear(self, name: str) -> None:
        """A dict was written; called in the subscriber's thread."""
        if name in self._callbacks:
            self._changed.add(name)
            self._wake.set()

    def hear_gap(self) -> None:
        """Any dict may have been written."""
        for name in list(self._callbacks):
            self.hear(name)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._changed:
                for callback in list(self._callbacks.get(self._changed.pop(), ())):
                    try:
                        callback()
                    except Exception:
                        log.exception("a function that watches a shared dict failed")


class SharedDict:
    """A dict all workers see. Reads come from memory while invalidations are proven to arrive.

    It is read as a whole, so it is meant for up to a few thousand entries; keep more in the cache or a database.
    Single operations are atomic, and `update` sets all or nothing. For "read, decide, write" use `compare_and_set`.
    """

    def __init__(
        self,
        commit: GroupCommit,
        near: Near[DictRecord],
        watchers: DictWatchers,
        namespace: str,
        channel: str,
        codec: Codec,
        name: str,
    ) -> None:
        self._watchers = watchers
        self.name = name
        self._commit = commit
        self._near = near
        self._key = f"{namespace}:d:{name}"
        self._channel = channel
        self._codec = codec

    def _record(self) -> DictRecord:
        entry = self._near.get(self.name)
        return entry.value if entry is not None else self._load()

    def _load(self) -> DictRecord:
        begun = self._near.begin()
        pairs = iter(self._commit.call("HGETALL", self._key, idempotent=True))
        fields = {name.decode(): value for name, value in zip(pairs, pairs, strict=True)}
        version = int(fields.pop("@v", b"0"))
        record = DictRecord(version, {name[1:]: value for name, value in fields.items()})
        size = sum(len(name) + len(value) + 100 for name, value in fields.items())
        self._near.fill(self.name, record, begun, mark=b"%d" % version, size=size)
        return record

    def _write(self, *operations: tuple[str, str, Argument, Argument]) -> bool:
        args: list[Argument] = [self._channel, self.name, 0, len(operations)]
        for kind, key, expected, value in operations:
            args += (kind, "." + key, expected, value)
        is_conditional = any(kind in ("new", "cas") for kind, *_ in operations)
        # A conditional write that is sent twice would find its own effect and say no.
        reply = self._commit.script("dict_write", [self._key], args, idempotent=not is_conditional)
        # Nobody in this worker may read what was there before, however late the message is.
        self._near.invalidate(self.name)
        return bool(reply[0])

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default`."""
        raw = self._record().fields.get(key)
        return default if raw is None else self._codec.decode(raw)

    def __getitem__(self, key: str) -> Any:
        raw = self._record().fields.get(key)
        if raw is None:
            raise KeyError(key)
        return self._codec.decode(raw)

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(("set", key, "", self._codec.encode(value)))

    def __delitem__(self, key: str) -> None:
        """Remove a key; one that is not there is no error, because somebody else may just have removed it."""
        self._write(("del", key, "", ""))

    def __contains__(self, key: object) -> bool:
        return key in self._record().fields

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._record().fields))

    def __len__(self) -> int:
        return len(self._record().fields)

    def keys(self) -> list[str]:
        """All keys."""
        return list(self._record().fields)

    def items(self) -> list[tuple[str, Any]]:
        """All keys and values, as they were together at one moment."""
        return [(key, self._codec.decode(raw)) for key, raw in self._record().fields.items()]

    def copy(self) -> dict[str, Any]:
        """A plain dict of everything."""
        return dict(self.items())

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several keys at once."""
        if values:
            self._write(*(("set", key, "", self._codec.encode(value)) for key, value in values.items()))

    def setdefault(self, key: str, value: Any) -> Any:
        """Set a key if it is missing; returns what is there afterwards."""
        while True:
            if self._write(("new", key, "", self._codec.encode(value))):
                return value
            found = self.fresh(key, _MISSING)
            if found is not _MISSING:
                return found

    def compare_and_set(self, key: str, expected: Any, value: Any) -> bool:
        """Set a key if it holds `expected` at that moment; False, and nothing changes, if it does not."""
        return self._write(("cas", key, self._codec.encode(expected), self._codec.encode(value)))

    def fresh(self, key: str, default: Any = None) -> Any:
        """As `get`, from Redis in any case."""
        raw = self._load().fields.get(key)
        return default if raw is None else self._codec.decode(raw)

    def watch(self, callback: Callable[[SharedDict], object]) -> Callable[[SharedDict], object]:
        """Call `callback` with this dict after it has changed, in this worker; several changes may be told as one."""
        self._watchers.watch(self.name, lambda: callback(self))
        return callback

    def clear(self) -> None:
        """Remove everything."""
        keys = list(self._load().fields)
        if keys:
            self._write(*(("del", key, "", "") for key in keys))
