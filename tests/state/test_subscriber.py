"""The ear: every gap is noticed, nothing near is believed without proof, everything repairs itself."""

from __future__ import annotations

import os
import signal
import time

import pytest

from sharedcluster.errors import Bug, StateUnavailableError
from sharedcluster.state import SharedState
from sharedcluster.state.wire import Command
from tests.redis_process import RedisProcess
from tests.state.browser import Browser
from tests.state.conftest import MakeState
from tests.state.link import Link
from tests.waiting import wait_until


def test_a_killed_subscriber_misses_nothing_in_the_end(own_redis: RedisProcess, make_state: MakeState) -> None:
    """Redis kills the subscriber and publishes in one MULTI: near copies are dropped and history is replayed.

    redis-py's own PubSub loses the message here without a trace.
    """
    state, writer = make_state(own_redis.url), make_state(own_redis.url)
    browser = Browser()
    browser.set(writer, n=1)
    browser.get(state, "n")
    state.cache.set("k", "old")
    subscription = state.broadcast.subscribe("news")
    subscription.position = state.broadcast.position_of("news")
    writer.broadcast.publish("news", 0, history=10)
    assert [m.offset for m in subscription.next_messages(5)] == [1]
    for turn in range(1, 4):
        gaps = state.subscriber.gaps
        encoded = writer.sessions.codec.encode(f"new{turn}")
        writer.cache.set("source", f"new{turn}")
        stored = writer.commit.call("GET", f"{state.namespace}:c:source")
        # The write and its message happen in the same instant in which the subscribers die.
        writer.commit.transaction(
            [
                ("CLIENT", "KILL", "TYPE", "pubsub"),
                ("SET", f"{state.namespace}:c:k", stored),
                ("PUBLISH", f"{state.namespace}:inv", "c other k"),
            ]
        )
        assert encoded in stored
        writer.broadcast.publish("news", turn, history=10)
        wait_until(lambda g=gaps: state.subscriber.gaps > g, "the gap is noticed")  # type: ignore[misc]
        wait_until(lambda t=turn: state.cache.get("k") == f"new{t}", "no stale copy")  # type: ignore[misc]
        offsets: list[int] = []
        wait_until(lambda o=offsets: o.extend(m.offset for m in subscription.next_messages(0.2)) or o, "replay")  # type: ignore[misc]
        assert offsets == [turn + 1]
        assert state.wait_ready(10)


@pytest.mark.parametrize("how", ["black hole", "stopped"])
def test_without_proof_near_copies_are_not_used(own_redis: RedisProcess, make_state: MakeState, how: str) -> None:
    """TCP stays up but nothing comes through (or the server stands still): within 2.5 s memory is no longer trusted.

    redis-py's health check sends pings here and never looks for the answers.
    """
    with Link(own_redis.url) as link:
        state = make_state(link.url)
        state.cache.set("k", 1)
        assert state.cache.near.get("k") is not None
        began = time.monotonic()
        if how == "stopped":
            own_redis.signal(signal.SIGSTOP)
        else:
            link.mode = "black hole"
        wait_until(lambda: state.cache.near.get("k") is None, "no longer trusted", interval=0.005)
        # 2.5 s by the state's own clock; the rest is what a busy machine may take to look.
        assert time.monotonic() - began < 4.0
        link.mode = "forward"
        own_redis.signal(signal.SIGCONT)
        assert state.wait_ready(15)
        if how == "black hole":  # what was swallowed is lost; a server that stood still delivers when it goes on
            assert state.subscriber.gaps >= 1


def test_it_comes_back_by_itself(own_redis: RedisProcess, make_state: MakeState) -> None:
    """Redis is killed and started again: subscriptions, near caches and data work on, with one warning per loss."""
    state, other = make_state(own_redis.url), make_state(own_redis.url)
    heard: list[object] = []
    state.broadcast.on("chat")(heard.append)
    assert state.subscriber.wait_confirmed(f"{state.namespace}:b:chat", 5)
    other.broadcast.publish("chat", "before")
    wait_until(lambda: heard == ["before"], "the first message")
    own_redis.kill()
    wait_until(lambda: not state.subscriber.is_trusted(), "the loss")
    own_redis.start()
    assert state.wait_ready(15)
    assert other.wait_ready(15)
    assert state.subscriber.wait_confirmed(f"{state.namespace}:b:chat", 5)
    other.broadcast.publish("chat", "after")
    wait_until(lambda: heard == ["before", "after"], "the second message")
    assert state.facts().state == "ok"


def test_a_cut_link_is_a_gap_even_if_nothing_else_is_wrong(own_redis: RedisProcess, make_state: MakeState) -> None:
    """Every new connection counts as a gap, whoever closed the old one."""
    with Link(own_redis.url) as link:
        state = make_state(link.url)
        for turn in range(1, 4):
            link.cut()
            wait_until(lambda t=turn: state.subscriber.gaps >= t, "the gap")  # type: ignore[misc]
            assert state.wait_ready(10)


def test_a_state_from_before_a_fork_is_refused_after_it(state: SharedState) -> None:
    """Two processes on one connection would read each other's replies: it is a bug, and looks like one."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            state.start()
        except Bug as bug:
            os.write(writer, str(bug).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    assert os.read(reader, 1000).startswith(b"[BUG] shared state of process")
    os.close(reader)
    assert state.commit.call("PING") == b"PONG"


def test_facts_tell_what_is_the_case(own_redis: RedisProcess, make_state: MakeState) -> None:
    """State, latency, gaps and counters for heartbeats; never a password."""
    state = make_state(own_redis.url)
    state.cache.get("nothing")
    facts = state.facts()
    assert facts.state == "ok"
    assert 0 < facts.latency_ms < 1000
    assert facts.counts["cache_misses"] == 1
    own_redis.kill()
    wait_until(lambda: state.facts().state == "down", "down")
    with pytest.raises(StateUnavailableError):
        state.counter("x").add()


def test_what_comes_together_is_handed_over_in_its_order(make_state: MakeState, own_redis: RedisProcess) -> None:
    """Messages of several channels in one packet: each handler gets those that stand together, none is lost."""
    state = make_state(own_redis.url)
    heard: list[tuple[str, list[bytes]]] = []
    for channel in ("one", "two"):
        state.subscriber.listen(channel, lambda payloads, name=channel: heard.append((name, payloads)))  # type: ignore[misc]
        assert state.subscriber.wait_confirmed(channel, 5)
    order = ["one", "one", "two", "one", "two", "two"]
    state.commit.transaction([("PUBLISH", channel, str(number)) for number, channel in enumerate(order)])
    wait_until(lambda: sum(len(payloads) for _, payloads in heard) == len(order), "all messages")
    assert [(name, payload) for name, payloads in heard for payload in payloads] == [
        (channel, b"%d" % number) for number, channel in enumerate(order)
    ]


def test_a_handler_that_fails_has_missed_something(make_state: MakeState, own_redis: RedisProcess) -> None:
    """Nobody knows what it heard of a group: near copies are dropped as after any gap, and listening goes on."""
    state = make_state(own_redis.url)

    def fail(payloads: list[bytes]) -> None:
        raise ZeroDivisionError("on purpose")

    state.subscriber.listen("bad", fail)
    assert state.subscriber.wait_confirmed("bad", 5)
    state.cache.set("k", "near")
    gaps = state.subscriber.gaps
    state.commit.call("PUBLISH", "bad", "x")
    wait_until(lambda: state.subscriber.gaps > gaps, "the gap is told")
    assert state.cache.near.peek("k") is None
    assert state.cache.get("k") == "near"


def test_what_others_publish_on_our_channels_harms_nobody(
    make_state: MakeState, own_redis: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no message of ours is reported and lost; those that came with it are heard, and nothing is a gap."""
    state, writer = make_state(own_redis.url), make_state(own_redis.url)
    browser = Browser()
    browser.set(writer, n=1)
    assert browser.get(state, "n") == 1
    name = next(iter(state._session_near._entries))
    subscription = state.broadcast.subscribe("news")
    gaps = state.subscriber.gaps
    invalidations, news = f"{state.namespace}:inv", f"{state.namespace}:b:news"
    bad: list[str | bytes] = ["", "x", "s 1", b"s 1 \xff", "unknown 1 k"]
    commands: list[Command] = [("PUBLISH", invalidations, payload) for payload in bad]
    commands += [("PUBLISH", invalidations, f"s - {name}"), ("PUBLISH", news, "not ours"), ("PUBLISH", news, "1 - 7")]
    state.commit.transaction(commands)
    wait_until(lambda: state._session_near.peek(name) is None, "the copy is dropped")
    assert [message.raw for message in subscription.next_messages(5)] == [b"7"]
    assert state.subscriber.gaps == gaps
    assert "somebody else publishes" in caplog.text
