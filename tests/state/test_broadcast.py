"""Broadcast: in order, once for everybody who comes back in time, and a reset for those who do not."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from sharedcluster.state import SharedState
from sharedcluster.state.broadcast import Message, Position, Subscription
from tests.state.conftest import MakeState
from tests.waiting import wait_until


def take(subscription: Subscription, count: int, deadline: float = 10.0) -> list[Message]:
    """The next `count` messages."""
    found: list[Message] = []
    end = time.monotonic() + deadline
    while len(found) < count and time.monotonic() < end:
        found += subscription.next_messages(0.2)
    return found


def read_events(stream: Any, count: int) -> list[dict[str, str]]:
    """Parse SSE chunks until so many events with data have come."""
    events: list[dict[str, str]] = []
    while len(events) < count:
        for block in next(stream).decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and line[0] != ":")
            if "data" in fields:
                events.append(fields)
    return events


def test_every_worker_hears_every_message_once_and_in_order(make_state: MakeState) -> None:
    """Three publishers at once, four workers: all see the same order, each message once."""
    workers = [make_state() for _ in range(4)]
    subscriptions = [worker.broadcast.subscribe("c") for worker in workers]

    def publish(worker: SharedState, name: int) -> None:
        for number in range(50):
            worker.broadcast.publish("c", f"{name}.{number}", 1000)

    threads = [threading.Thread(target=publish, args=(w, n)) for n, w in enumerate(workers[:3])]
    for thread in threads:
        thread.start()
    orders = [[message.raw for message in take(subscription, 150)] for subscription in subscriptions]
    for thread in threads:
        thread.join()
    assert len(orders[0]) == len(set(orders[0])) == 150
    assert all(order == orders[0] for order in orders)
    for n in range(3):
        own = [raw for raw in orders[0] if raw.startswith(b'"%d.' % n)]
        assert own == [b'"%d.%d"' % (n, i) for i in range(50)]


def test_a_client_that_comes_back_to_another_worker_gets_what_it_missed(make_state: MakeState) -> None:
    """EventSource reconnects with Last-Event-ID, to whichever worker: everything once, nothing twice."""
    first, second = make_state(), make_state()
    stream = first.broadcast.stream("c")
    assert next(stream).startswith(b"retry: ")
    for number in range(3):
        second.broadcast.publish("c", {"n": number}, history=100)
    events = read_events(stream, 3)
    stream.close()  # type: ignore[attr-defined]
    for number in range(3, 6):
        second.broadcast.publish("c", {"n": number}, history=100)
    again = second.broadcast.stream("c", events[-1]["id"])
    second.broadcast.publish("c", {"n": 6}, history=100)
    events += read_events(again, 4)
    assert [event["data"] for event in events] == [f'{{"n":{n}}}' for n in range(7)]
    again.close()  # type: ignore[attr-defined]


def test_a_client_that_is_cut_off_before_its_first_message_misses_nothing(make_state: MakeState) -> None:
    """The greeting carries an id, so that even a client that got no message yet resumes from the right place."""
    state = make_state()
    state.broadcast.publish("c", 0, history=10)
    stream = state.broadcast.stream("c")
    greeting = next(stream).decode()
    stream.close()  # type: ignore[attr-defined]
    identity = next(line[4:] for line in greeting.split("\n") if line.startswith("id: "))
    state.broadcast.publish("c", 1, history=10)
    assert [event["data"] for event in read_events(state.broadcast.stream("c", identity), 1)] == ["1"]


def test_who_comes_back_too_late_is_told(state: SharedState) -> None:
    """History holds ten messages: a client that missed twenty gets a reset, then what there is, in order."""
    hub = state.broadcast
    first = hub.publish("c", 0, history=10)
    for number in range(1, 21):
        hub.publish("c", number, history=10)
    found = take(hub.subscribe("c", first), 11)
    assert found[0].is_reset
    assert [message.raw for message in found[1:]] == [str(n).encode() for n in range(11, 21)]
    assert b"event: reset" in found[0].frame(hub.codec)


def test_a_repeated_publish_with_the_same_token_is_one_message(make_state: MakeState) -> None:
    """Who does not know whether a publish happened repeats it with the same token, on any worker."""
    first, second = make_state(), make_state()
    subscription = first.broadcast.subscribe("c")
    positions = {str(hub.publish("c", "x", 10, once="order 7")) for hub in (first.broadcast, second.broadcast)}
    second.broadcast.publish("c", "y", 10)
    assert [message.raw for message in take(subscription, 2)] == [b'"x"', b'"y"']
    assert len(positions) == 1
    with pytest.raises(ValueError, match="with history"):
        first.broadcast.publish("c", "x", once="order 7")


def test_a_lost_history_is_told(state: SharedState) -> None:
    """Redis lost the channel: offsets begin again in another epoch, and the client is told to start over."""
    hub = state.broadcast
    for number in range(5):
        last = hub.publish("c", number, history=10)
    subscription = hub.subscribe("c", last)
    assert take(subscription, 1, deadline=0.3) == []
    state.commit.call("DEL", f"{state.namespace}:bs:c", f"{state.namespace}:bm:c")
    hub.publish("c", "new life", history=10)
    found = take(subscription, 2)
    assert [message.is_reset for message in found] == [True, False]
    assert found[1].raw == b'"new life"'


def test_a_slow_client_loses_its_queue_and_no_message(make_state: MakeState) -> None:
    """The queue of a client that does not read is bounded; when it reads on, the rest comes from history."""
    state = make_state(stream_queue_limit=10)
    subscription = state.broadcast.subscribe("c")
    for number in range(100):
        state.broadcast.publish("c", number, history=1000)
    wait_until(lambda: state.subscriber.messages >= 100, "all have arrived")
    assert len(subscription._queue) <= 10
    assert state.counts["broadcast_overflows"] >= 1
    subscription.position = Position(state.broadcast.position_of("c").epoch, 0)  # type: ignore[union-attr]
    assert [int(message.raw) for message in take(subscription, 100)] == list(range(100))


def test_without_history_a_full_queue_drops_and_counts(make_state: MakeState) -> None:
    """At most once is what was asked for; that something was dropped is still counted."""
    state = make_state(stream_queue_limit=5)
    subscription = state.broadcast.subscribe("c")
    for number in range(20):
        state.broadcast.publish("c", number)
    wait_until(lambda: state.counts["broadcast_dropped"] == 15, "the rest is dropped")
    assert [int(message.raw) for message in take(subscription, 5)] == list(range(5))


def test_a_handler_cannot_stall_the_subscriber(make_state: MakeState) -> None:
    """A function on one channel that hangs or raises delays neither invalidations nor other channels."""
    state, other = make_state(), make_state()
    hang, heard = threading.Event(), []  # type: ignore[var-annotated]
    state.broadcast.on("slow")(lambda data: hang.wait(20))
    state.broadcast.on("fast")(heard.append)

    @state.broadcast.on("fast")
    def fail(data: Any) -> None:
        raise ZeroDivisionError

    for name in ("slow", "fast"):
        assert state.subscriber.wait_confirmed(f"{state.namespace}:b:{name}", 5)
    state.cache.set("k", 1)
    for number in range(3):
        other.broadcast.publish("slow", number)
        other.broadcast.publish("fast", number)
    other.cache.delete("k")
    wait_until(lambda: heard == [0, 1, 2], "the other channel")
    wait_until(lambda: state.cache.get("k") is None, "the invalidation")
    hang.set()


def test_one_redis_subscription_per_channel_and_worker(state: SharedState) -> None:
    """However many clients a worker has; the last one to leave ends it."""
    streams = [state.broadcast.stream("c") for _ in range(20)]
    channel = f"{state.namespace}:b:c"
    assert state.commit.call("PUBSUB", "NUMSUB", channel) == [channel.encode(), 1]
    assert state.broadcast.clients == 20
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: state.commit.call("PUBSUB", "NUMSUB", channel)[1] == 0, "unsubscribed")


def test_draining_ends_streams_politely(make_state: MakeState) -> None:
    """A worker that drains tells its clients when to come back and ends their streams; they lose nothing."""
    state, other = make_state(), make_state()
    stream = state.broadcast.stream("c")
    next(stream)
    state.broadcast.publish("c", 1, history=10)
    events = read_events(stream, 1)
    waiting: list[bytes] = []
    reader = threading.Thread(target=lambda: waiting.extend(stream))
    reader.start()
    state.drain()
    reader.join(5)
    assert not reader.is_alive()
    assert waiting[-1].startswith(b"retry: ")
    other.broadcast.publish("c", 2, history=10)
    assert [e["data"] for e in read_events(other.broadcast.stream("c", events[-1]["id"]), 1)] == ["2"]


def test_quiet_streams_are_pinged(make_state: MakeState) -> None:
    """A comment now and then finds clients that are gone."""
    state = make_state(stream_ping_interval=0.05)
    stream = state.broadcast.stream("c")
    next(stream)
    assert next(stream) == b": ping\n\n"


@pytest.mark.parametrize("text", ["", "x", "a.b", "a.-1", ".5", "a b.5", "a.1\n", "a." + "9" * 80, "ü.1"])
def test_a_last_event_id_of_somebody_else_is_ignored(text: str) -> None:
    """Clients may send anything."""
    assert Position.parse(text) is None or Position.parse(text) == Position("a", 1)


def test_lines_of_a_payload_stay_lines(state: SharedState) -> None:
    """A newline in the data cannot end an event or begin a field."""
    stream = state.broadcast.stream("c")
    next(stream)
    state.broadcast.publish("c", "one\ntwo\rid: 5\r\n\r\nevent: x")
    assert next(stream) == b"data: one\ndata: two\ndata: id: 5\ndata: \ndata: event: x\n\n"


def test_presence_is_seen_everywhere_and_ends(make_state: MakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of all workers; two tabs count once and leave with the last; a dead worker's members time out."""
    monkeypatch.setattr("sharedcluster.state.presence.TIMEOUT", 0.6)
    monkeypatch.setattr("sharedcluster.state.presence.REFRESH_INTERVAL", 0.1)
    first, second = make_state(), make_state()
    first.presence.join("c", "ann", {"age": 1})
    first.presence.join("c", "ann", {"age": 1})
    second.presence.join("c", "bob")
    assert first.presence.members("c") == second.presence.members("c") == {"ann": {"age": 1}, "bob": None}
    first.presence.leave("c", "ann")
    assert set(second.presence.members("c")) == {"ann", "bob"}
    first.presence.leave("c", "ann")
    assert set(second.presence.members("c")) == {"bob"}
    time.sleep(1.0)
    assert set(first.presence.members("c")) == {"bob"}  # refreshed
    second.presence.stop()  # dead: nobody vouches any more
    wait_until(lambda: first.presence.members("c") == {}, "timed out")
