"""Messages to everybody: ordered channels with a bounded history, resumed on any worker.

Laws
----
1. Every message of a channel with history has an *offset*, one more than the one before, given by Redis in the script
   that stores and publishes it. The *epoch* names one life of the channel: when Redis lost it, offsets start again
   under another epoch.
2. Each subscription knows its own position (epoch, offset). It delivers `position + 1`, skips what it has seen, and
   reads what is missing from history. So a gap of the subscriber connection, a full queue and a reconnect on another
   worker are one case: catching up.
3. A queue is bounded. A subscription that does not keep up loses its queue, not its messages: it reads on from history
   when it is ready. What history no longer holds is told as a reset, never skipped in silence.
4. One Redis subscription per channel and worker, whatever the number of clients.
5. The subscriber thread only appends to queues.

Guarantee: ordered per channel; every message once for subscriptions that come back while history still holds it;
without history at most once. A publish that timed out may have happened: repeat it with the same `once` token.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state.codec import Codec
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.subscriber import Subscriber

log = logging.getLogger("sharedcluster.state")

Listener = Callable[[Any], object]

# The record of a channel's epoch and offset outlives its history, so that who comes back late is told of a reset.
META_MARGIN = 24

_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, default=str).encode


@dataclass(frozen=True, slots=True)
class Position:
    """Where a subscription stands: everything up to `offset` of `epoch` has been delivered."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """Read what `str` made (a client's Last-Event-ID); None for anything else."""
        epoch, _, offset = text.strip().rpartition(".")
        if not text.isascii() or not epoch.isalnum() or not offset.isdigit() or len(text) > 64:
            return None
        return cls(epoch, int(offset))


@dataclass(slots=True)
class Message:
    """One message as it travels. `offset` is 0 on channels without history."""

    offset: int
    epoch: str
    raw: bytes
    is_reset: bool = False
    _frame: bytes = field(default=b"", repr=False)

    def frame(self, codec: Codec) -> bytes:
        """The message as an SSE event; made once per worker, however many clients it goes to."""
        if not self._frame:
            self._frame = _sse_frame(self, codec)
        return self._frame


def _sse_frame(message: Message, codec: Codec) -> bytes:
    """HTML Living Standard, 9.2.5: fields of one line each, `data` once per line of the payload."""
    identity = f"id: {message.epoch}.{message.offset}\n" if message.epoch else ""
    if message.is_reset:
        return f"{identity}event: reset\ndata: history does not reach back to where you were\n\n".encode()
    value = codec.decode(message.raw)
    text = value if isinstance(value, str) else _to_json(value)
    data = "".join(f"data: {line}\n" for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return f"{identity}{data}\n".encode()


class Subscription:
    """One listener's view of one channel: iterate over it for messages in order, `None` after each quiet interval."""

    def __init__(self, hub: Broadcast, channel: str, position: Position | None) -> None:
        self.channel = channel
        self.position = position
        self.dropped = 0  # messages without history that a full queue could not keep
        self._hub = hub
        self._queue: deque[Message] = deque()
        self._wake = threading.Event()
        self._is_behind = position is not None
        self._is_closed = False

    def offer(self, message: Message) -> None:
        """Called in the subscriber's thread: never blocks."""
        if len(self._queue) >= self._hub.queue_limit:
            if message.offset == 0:
                self.dropped += 1
                self._hub.count("broadcast_dropped")
                return
            self._queue.clear()
            self._is_behind = True
            self._hub.count("broadcast_overflows")
        self._queue.append(message)
        self._wake.set()

    def note_gap(self) -> None:
        """Messages may have been missed: read history before the next delivery."""
        self._is_behind = True
        self._wake.set()

    def close(self) -> None:
        """End the iteration."""
        if not self._is_closed:
            self._is_closed = True
            self._wake.set()
            self._hub.remove(self)

    @property
    def is_closed(self) -> bool:
        """True once nothing more will be delivered."""
        return self._is_closed

    def next_messages(self, timeout: float) -> list[Message]:
        """What is to be delivered next, in order; empty after `timeout` seconds without anything.

        Raises:
            StateUnavailableError: History is needed and Redis does not answer; ask again later, nothing is lost.
        """
        give_up_at = time.monotonic() + timeout
        while True:
            self._wake.clear()  # before looking, so that what comes after is not overlooked
            if due := self._collect():
                return due
            remaining = give_up_at - time.monotonic()
            if remaining <= 0 or self._is_closed or self._hub.is_draining:
                return []
            self._wake.wait(remaining)

    def _collect(self) -> list[Message]:
        """What can be delivered now."""
        due = self._catch_up() if self._is_behind else []
        while (message := self._pop()) is not None:
            if not self._follows(message):
                continue
            if self._is_missing_before(message):
                # Put back before asking, so that nothing is lost if Redis does not answer now.
                self._queue.appendleft(message)
                if due:
                    self._is_behind = True
                    return due
                due = self._catch_up()
                if self._follows(message) and self._is_missing_before(message):
                    # History does not have it either: say so, and go on from here.
                    due.append(Message(message.offset - 1, message.epoch, b"", is_reset=True))
                    self.position = Position(message.epoch, message.offset - 1)
                continue
            due.append(message)
            if message.offset:
                self.position = Position(message.epoch, message.offset)
        return due

    def _pop(self) -> Message | None:
        try:
            return self._queue.popleft()
        except IndexError:  # empty, or just emptied by an overflow
            return None

    def _follows(self, message: Message) -> bool:
        """False for what was delivered already, from history."""
        at = self.position
        return message.offset == 0 or at is None or message.epoch != at.epoch or message.offset > at.offset

    def _is_missing_before(self, message: Message) -> bool:
        at = self.position
        if message.offset == 0 or at is None:
            return False
        return message.epoch != at.epoch or message.offset != at.offset + 1

    def _catch_up(self) -> list[Message]:
        self._is_behind = False  # before asking: a gap that is told meanwhile means asking again
        if self.position is None:  # there was no history so far, and nothing to go back to
            return []
        try:
            messages, self.position = self._hub.history_after(self.channel, self.position)
        except BaseException:
            self._is_behind = True
            raise
        return messages


class Broadcast:
    """Publishing and listening; see the top of this file."""

    def __init__(
        self,
        commit: GroupCommit,
        subscriber: Subscriber,
        namespace: str,
        codec: Codec,
        settings: StateSettings,
        counts: dict[str, int],
    ) -> None:
        self.codec = codec
        self.queue_limit = settings.stream_queue_limit
        self._commit = commit
        self._subscriber = subscriber
        self._namespace = namespace
        self._settings = settings
        self._counts = counts
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._handlers: dict[str, list[Listener]] = {}
        self._lock = threading.Lock()
        self._is_draining = False
        subscriber.on_gap.append(self._hear_gap)

    # -- publishing ------------------------------------------------------------------------------------------------

    def publish(self, channel: str, data: Any, history: int = 0, *, once: str = "") -> Position | None:
        """Send a message to every subscription of a channel on every worker; one round trip.

        Args:
            channel: Any name.
            data: Anything the codec can store; clients of `stream` get text as it is and all else as JSON.
            history: How many messages Redis keeps for those who come back; 0 keeps none.
            once: A token that names this message; a second call with it, within the time history is kept, sends
                nothing and returns the first one's position. It needs a history.

        Returns:
            The message's position, or None without history.

        Raises:
            StateUnavailableError: It is not known whether the message was sent.
        """
        raw = self.codec.encode(data)
        self._counts["broadcast_published"] += 1
        if once and history <= 0:
            raise ValueError("a message can be published once only on a channel with history")
        if history <= 0:
            self._commit.call("PUBLISH", self._channel(channel), b"0 - " + raw)
            return None
        history_ms = int(self._settings.history_timeout * 1000)
        offset, epoch = self._commit.script(
            "publish",
            [self._stream(channel), self._meta(channel), f"{self._namespace}:bo:{channel}:{once}"],
            [
                raw,
                history,
                secrets.token_hex(4),
                history_ms,
                history_ms * META_MARGIN,
                self._channel(channel),
                int(bool(once)),
            ],
            idempotent=bool(once),
        )
        return Position(epoch.decode(), offset)

    # -- listening -------------------------------------------------------------------------------------------------

    def on(self, channel: str) -> Callable[[Listener], Listener]:
        """Call the decorated function with each message's data, in this worker, in order.

        Functions of one channel run one after another in a thread of their own; a slow one delays that channel only.
        """

        def register(listener: Listener) -> Listener:
            with self._lock:
                listeners = self._handlers.setdefault(channel, [])
                listeners.append(listener)
                is_first = len(listeners) == 1
            if is_first:
                subscription = self.subscribe(channel, from_now=True)
                name = f"sharedcluster-on-{channel}"
                threading.Thread(target=self._run_handlers, args=(subscription,), name=name, daemon=True).start()
            return listener

        return register

    def _run_handlers(self, subscription: Subscription) -> None:
        while not subscription.is_closed:
            try:
                messages = subscription.next_messages(self._settings.stream_ping_interval)
            except StateUnavailableError:
                time.sleep(0.2)
                continue
            for message in messages:
                if not message.is_reset:
                    self._call_handlers(subscription.channel, message)

    def _call_handlers(self, channel: str, message: Message) -> None:
        for listener in list(self._handlers.get(channel, ())):
            try:
                listener(self.codec.decode(message.raw))
            except Exception:
                log.exception("a function on channel %r failed", channel)

    def subscribe(self, channel: str, position: Position | None = None, *, from_now: bool = False) -> Subscription:
        """Begin to listen.

        Args:
            channel: Its name.
            position: Continue after this; None begins with what is published from now on.
            from_now: Do not wait for Redis to confirm the channel; what is published before that may be missed.
        """
        subscription = Subscription(self, channel, position)
        with self._lock:
            group = self._subscriptions.setdefault(channel, [])
            group.append(subscription)
            if len(group) == 1:
                self._subscriber.listen(
                    self._channel(channel),
                    lambda payloads: self._hear(channel, payloads),
                    # A message between asking for the channel and getting it would else be noticed with the next one.
                    lambda: self._note_gap(channel),
                )
        if not from_now and not self._subscriber.wait_confirmed(
            self._channel(channel), 2 * self._settings.socket_timeout
        ):
            log.info("channel %r is not confirmed yet; it will be as soon as Redis answers", channel)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Stop listening; see `Subscription.close`."""
        with self._lock:
            group = self._subscriptions.get(subscription.channel, [])
            if subscription in group:
                group.remove(subscription)
            if not group and self._subscriptions.pop(subscription.channel, None) is not None:
                self._subscriber.unlisten(self._channel(subscription.channel))

    def position_of(self, channel: str) -> Position | None:
        """Where the channel stands now; None if it has no history."""
        offset, epoch = self._commit.call("HMGET", self._meta(channel), "o", "e", idempotent=True)
        return Position(epoch.decode(), int(offset)) if epoch else None

    def history_after(self, channel: str, position: Position) -> tuple[list[Message], Position]:
        """What history holds after a position, with a reset before it if it does not reach back that far."""
        start = f"{position.offset + 1}-0"
        offset, epoch = self._commit.call("HMGET", self._meta(channel), "o", "e", idempotent=True)
        if not epoch:
            # Redis lost the channel, and nothing has been published since: the position leads nowhere.
            return [], position
        is_same = epoch.decode() == position.epoch
        if is_same and int(offset) <= position.offset:
            return [], position
        rows = self._commit.call("XRANGE", self._stream(channel), start if is_same else "-", "+", idempotent=True)
        messages = [Message(int(row[0].partition(b"-")[0]), epoch.decode(), row[1][1]) for row in rows]
        first = messages[0].offset if messages else int(offset) + 1
        self._counts["broadcast_replayed"] += len(messages)
        if not is_same or first > position.offset + 1:
            self._counts["broadcast_resets"] += 1
            messages.insert(0, Message(first - 1, epoch.decode(), b"", is_reset=True))
        return messages, Position(epoch.decode(), messages[-1].offset)

    # -- streams for browsers --------------------------------------------------------------------------------------

    def stream(self, channel: str, last_event_id: str = "") -> Iterator[bytes]:
        """Server-sent events of a channel, for as long as the client stays.

        Args:
            channel: Its name.
            last_event_id: What the client sent as Last-Event-ID; it gets everything after that, from history.
        """
        subscription = self.subscribe(channel, Position.parse(last_event_id) if last_event_id else None)
        if subscription.position is None:
            with suppress(StateUnavailableError):  # it then learns its position from the first message
                subscription.position = self.position_of(channel)
        return SseStream(self, subscription)

    def drain(self) -> None:
        """End all streams politely: clients are told when to come back, spread over time, and resume elsewhere."""
        self._is_draining = True
        for group in list(self._subscriptions.values()):
            for subscription in list(group):
                subscription._wake.set()

    @property
    def is_draining(self) -> bool:
        """True once streams are to end."""
        return self._is_draining

    def close(self) -> None:
        """End all subscriptions."""
        for group in list(self._subscriptions.values()):
            for subscription in list(group):
                subscription.close()

    def count(self, name: str) -> None:
        """Add one to a counter."""
        self._counts[name] += 1

    @property
    def clients(self) -> int:
        """Subscriptions of this worker."""
        return sum(map(len, self._subscriptions.values()))

    def retry_ms(self) -> int:
        """When a client shall come back: spread, so that a thousand do not come at once."""
        return int(self._settings.stream_retry * 1000 * random.uniform(0.5, 1.5))

    @property
    def ping_interval(self) -> float:
        """Seconds between two signs of life."""
        return self._settings.stream_ping_interval

    # -- messages --------------------------------------------------------------------------------------------------

    def _hear(self, channel: str, payloads: list[bytes]) -> None:
        for payload in payloads:
            try:
                offset, epoch, raw = payload.split(b" ", 2)
                message = Message(int(offset), "" if epoch == b"-" else epoch.decode(), raw)
            except ValueError:
                log.warning(
                    "channel %r: somebody else publishes there; what is not a message of ours is lost", channel
                )
                continue
            for subscription in list(self._subscriptions.get(channel, ())):
                subscription.offer(message)

    def _hear_gap(self) -> None:
        for channel in list(self._subscriptions):
            self._note_gap(channel)

    def _note_gap(self, channel: str) -> None:
        for subscription in list(self._subscriptions.get(channel, ())):
            subscription.note_gap()

    def _channel(self, channel: str) -> str:
        return f"{self._namespace}:b:{channel}"

    def _stream(self, channel: str) -> str:
        return f"{self._namespace}:bs:{channel}"

    def _meta(self, channel: str) -> str:
        return f"{self._namespace}:bm:{channel}"


class SseStream(Iterator[bytes]):
    """The body of an SSE response. The server calls `close` when the client is gone."""

    def __init__(self, hub: Broadcast, subscription: Subscription) -> None:
        self._hub = hub
        self._subscription = subscription
        self._is_started = False
        self._is_ended = False

    def __iter__(self) -> SseStream:
        return self

    def __next__(self) -> bytes:
        if self._is_ended:
            self.close()
            raise StopIteration
        if not self._is_started:
            self._is_started = True
            return self._greeting()
        return self._next_chunk()

    def _greeting(self) -> bytes:
        """Headers leave at once with it; the id is where a client stands that gets no message before it is cut off."""
        at = self._subscription.position
        identity = f"id: {at}\n" if at is not None else ""
        return f"retry: {self._hub.retry_ms()}\n{identity}\n".encode()

    def _next_chunk(self) -> bytes:
        try:
            messages = [] if self._hub.is_draining else self._subscription.next_messages(self._hub.ping_interval)
        except StateUnavailableError:
            time.sleep(0.2)
            messages = []
        chunk = b"".join([message.frame(self._hub.codec) for message in messages])
        if self._hub.is_draining:
            self._is_ended = True
            return chunk + b"retry: %d\n\n" % self._hub.retry_ms()
        if self._subscription.is_closed:
            self._is_ended = True
        return chunk or b": ping\n\n"

    def close(self) -> None:
        """The client or the server ends it."""
        self._is_ended = True
        self._subscription.close()
