"""The worker's one ear: a connection that listens, and the proof that it hears everything.

Laws
----
1. One connection per worker, whatever the number of channels. It is opened here, never silently reopened by a library:
   redis-py's PubSub reconnects and subscribes again by itself, and what was published meanwhile is gone without a
   trace. Here every new connection, and every second confirmation of a channel on one connection, is a *gap*.
2. After a gap `on_gap` runs once the new connection is confirmed: near caches forget, streams catch up from history.
3. Proof of delivery: each worker publishes a stamp of its own monotonic clock on a channel of its own, through the
   data connection, once per `heartbeat_interval`. When stamp t comes back here, everything published before t has been
   delivered here too. A health check by PING would prove less: a demoted server still answers PING.
4. Without proof for `trust_timeout` seconds the near caches are bypassed and this connection is replaced, also if the
   socket still looks alive (half-open link, stopped server, subscriber on a server that was demoted).
5. Handlers run in this thread and must neither block nor raise; what takes time belongs into a queue. They are given
   what came together on their channel, in its order; messages of several channels are handed over in the order in
   which they came. A handler that raises has missed something, which is a gap.
"""

from __future__ import annotations

import itertools
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter

import hiredis
import redis

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.runtime import THREADS, Runtime
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.wire import Address, ReplyError, Wire, pack

log = logging.getLogger("sharedcluster.state")

Handler = Callable[[list[bytes]], None]

_kind_and_channel = itemgetter(0, 1)
_payload = itemgetter(2)


class _GapError(Exception):
    """The connection can no longer be relied on."""


class Subscriber:
    """Listens on channels and tells gaps. `listen` before or after `start`; both are safe from any thread."""

    def __init__(
        self,
        address: Address,
        commit: GroupCommit,
        namespace: str,
        settings: StateSettings,
        runtime: Runtime = THREADS,
    ) -> None:
        self.on_gap: list[Callable[[], None]] = []
        self.on_first_pulse: list[Callable[[], None]] = []  # run once, in the pulse's thread
        self.gaps = 0
        self.messages = 0
        self.beats = 0  # commands the pulse has sent
        self.proven_at = float("-inf")
        self.latency = 0.0  # seconds a heartbeat took to come back
        self._address = address
        self._commit = commit
        self._settings = settings
        self._runtime = runtime
        self._trust_timeout = settings.trust_timeout
        self._heartbeat_channel = f"{namespace}:hb:{secrets.token_hex(8)}"
        self._handlers: dict[bytes, Handler] = {}
        self._confirmed: dict[bytes, threading.Event] = {}
        self._on_confirmed: dict[bytes, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self._connected_at = 0.0
        self._awake_since = 0.0
        self._connections = 0
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.listen(self._heartbeat_channel, self._hear_heartbeat)

    # -- what others use -------------------------------------------------------------------------------------------

    def is_trusted(self) -> bool:
        """True while delivery is proven (law 3)."""
        return time.monotonic() - self.proven_at < self._trust_timeout

    def listen(self, channel: str, handler: Handler, on_confirmed: Callable[[], None] | None = None) -> None:
        """Call `handler` with the payloads of the messages on this channel; one handler per channel.

        `on_confirmed` is called whenever Redis confirms the channel: from then on nothing is missed, but something may
        have been before.
        """
        name = channel.encode()
        with self._lock:
            self._handlers[name] = handler
            if on_confirmed is not None:
                self._on_confirmed[name] = on_confirmed
            self._confirmed[name] = threading.Event()
            self._send("SUBSCRIBE", channel)

    def unlisten(self, channel: str) -> None:
        """Stop listening on this channel."""
        name = channel.encode()
        with self._lock:
            self._confirmed.pop(name, None)
            self._on_confirmed.pop(name, None)
            if self._handlers.pop(name, None) is not None:
                self._send("UNSUBSCRIBE", channel)

    def wait_confirmed(self, channel: str, timeout: float) -> bool:
        """True once Redis has confirmed the channel on the present connection, False after `timeout` seconds."""
        event = self._confirmed.get(channel.encode())
        return event is not None and event.wait(timeout)

    def start(self) -> None:
        """Start listening; returns at once."""
        for target in (self._listen, self._pulse):
            thread = threading.Thread(target=target, name=f"sharedcluster-{target.__name__[1:]}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop listening and wait for the threads to end."""
        self._stop.set()
        if (wire := self._wire) is not None:
            wire.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2)

    # -- the pulse -------------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        """Publish heartbeats; also what keeps probing Redis while no request does."""
        # Many workers start at the same moment; they need not all knock at the same moment.
        self._stop.wait(random.uniform(0, 0.05))
        for hook in self.on_first_pulse:
            hook()
        while not self._stop.is_set():
            # After a gap the near caches are of no use until the first proof, so it is asked for more often.
            pause = self._settings.heartbeat_interval if self.is_trusted() else 0.1
            with suppress(StateUnavailableError, ReplyError):
                self.beats += 1
                if self._wire is not None:
                    self._commit.call("PUBLISH", self._heartbeat_channel, repr(time.monotonic()), idempotent=True)
                else:
                    self._commit.call("PING", idempotent=True)
            self._stop.wait(pause * random.uniform(0.8, 1.0))

    def _hear_heartbeat(self, payloads: list[bytes]) -> None:
        sent_at = float(payloads[-1])
        self.latency = time.monotonic() - sent_at
        self.proven_at = max(self.proven_at, sent_at)

    # -- the ear ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        pause = 0.05
        while not self._stop.is_set():
            started_at = time.monotonic()
            try:
                self._listen_once()
            except (OSError, redis.RedisError, hiredis.HiredisError, _GapError, ReplyError, AttributeError) as error:
                # AttributeError: the socket was closed under a reader by `close`.
                if not self._stop.is_set():
                    log.warning("the subscriber lost Redis (%s), connecting again", error)
            finally:
                self._lose_wire()
            pause = 0.05 if time.monotonic() - started_at > 5 else min(pause * 2, 1.0)
            self._stop.wait(pause * random.uniform(0.5, 1.0))

    def _lose_wire(self) -> None:
        self.proven_at = float("-inf")
        with self._lock:
            wire, self._wire = self._wire, None
            for event in self._confirmed.values():
                event.clear()
        if wire is not None:
            wire.close()

    def _listen_once(self) -> None:
        wire = Wire(self._address, self._runtime)
        wire.settimeout(0.25)
        self._connected_at = time.monotonic()
        with self._lock:
            self._wire = wire
            awaited = set(self._handlers)
            wire.send(pack(("SUBSCRIBE", *sorted(awaited))))
        confirmed: set[bytes] = set()
        looked_at = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            if now - looked_at > 1.0:
                # This process stood still (C code, a stopped machine), so nothing can have come back: it is not the
                # connection's fault. What has arrived meanwhile is read first.
                self._awake_since = now
            looked_at = now
            try:
                reply = wire.read()
            except TimeoutError:
                self._check_proof()
                continue
            # What came together is handled together; a loop of Python's own would cost as much as the rest.
            replies = [reply, *iter(wire.read_waiting, Wire)]
            if ReplyError in map(type, replies):
                raise next(each for each in replies if type(each) is ReplyError)
            for (kind, channel), group in itertools.groupby(replies, _kind_and_channel):
                if kind == b"message":
                    self._hear(channel, [*map(_payload, group)])
                    continue
                for _ in group:
                    self._note_answer(kind, channel, confirmed)
                if awaited and awaited <= confirmed | (awaited - self._handlers.keys()):
                    awaited = set()
                    self._note_connection()
            self._check_proof()

    def _note_connection(self) -> None:
        """All channels are confirmed: from here on nothing is missed. What was missed before is a gap."""
        self._connections += 1
        if self._connections > 1:
            self._tell_gap()

    def _tell_gap(self) -> None:
        self.gaps += 1
        for hook in self.on_gap:
            hook()

    def _check_proof(self) -> None:
        last = max(self.proven_at, self._connected_at, self._awake_since)
        if time.monotonic() - last > self._settings.trust_timeout:
            raise _GapError("no heartbeat came back")

    def _hear(self, channel: bytes, payloads: list[bytes]) -> None:
        """Hand over messages of one channel that came behind one another."""
        self.messages += len(payloads)
        handler = self._handlers.get(channel)
        if handler is not None:
            try:
                handler(payloads)
            except Exception:
                log.exception("[BUG] a handler of channel %r failed", channel)
                self._tell_gap()

    def _note_answer(self, kind: bytes, channel: bytes, confirmed: set[bytes]) -> None:
        """Redis has confirmed that it listens for us on a channel, or no longer does."""
        if kind == b"subscribe":
            if channel in confirmed:
                self._tell_gap()
            confirmed.add(channel)
            if (hook := self._on_confirmed.get(channel)) is not None:
                hook()
            if (event := self._confirmed.get(channel)) is not None:
                event.set()
        elif kind == b"unsubscribe":
            confirmed.discard(channel)

    def _send(self, command: str, channel: str) -> None:
        """Send if connected; if not, the next connection subscribes to everything. Called with the lock held."""
        if self._wire is not None:
            with suppress(OSError):
                self._wire.send(pack((command, channel)))
