"""Group commit: one connection for all callers, and nobody gets another one's reply."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gevent.monkey import is_module_patched

from sharedcluster.errors import Bug, StateUnavailableError
from sharedcluster.flask import find_runtime
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.wire import Address, Command, ReplyError, Wire
from tests.redis_process import RedisProcess
from tests.state.link import Link
from tests.waiting import wait_until


@pytest.fixture
def commit(redis_url: str) -> Iterator[GroupCommit]:
    """A connection of its own to the shared server."""
    settings = StateSettings()
    group = GroupCommit(Address(redis_url, settings), settings, find_runtime())
    yield group
    group.close()


def run_all(*functions: Callable[[], object]) -> None:
    """Run functions at the same time and wait for all."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_concurrent_callers_get_their_own_replies(commit: GroupCommit, namespace: str) -> None:
    """100 callers with different keys each read back what they wrote, over one connection and in fewer trips."""
    wrong: list[object] = []
    barrier = threading.Barrier(100)

    def write_and_read(number: int) -> None:
        barrier.wait(10)
        for turn in range(5):
            key, value = f"{namespace}:{number}", f"{number}.{turn}".encode()
            commit.call("SET", key, value)
            if (found := commit.call("GET", key)) != value:
                wrong.append((value, found))

    run_all(*(lambda n=number: write_and_read(n) for number in range(100)))
    assert wrong == []
    assert commit.commands == 1000
    assert commit.exchanges < commit.commands
    assert commit.reconnects == 1


def test_a_lone_command_is_one_round_trip_at_once(commit: GroupCommit) -> None:
    """A command that finds the connection free is sent by itself and by its own caller."""
    before = commit.exchanges
    assert commit.call("PING") == b"PONG"
    assert (commit.exchanges - before, commit.commands) == (1, 1)


@pytest.mark.skipif(not is_module_patched("socket"), reason="threads take no turns")
def test_a_crowd_asks_together_and_a_lone_caller_waits_for_nobody(commit: GroupCommit) -> None:
    """Who is about to ask in the same turn of the loop goes along, once it is known that there are many."""
    import gevent

    def ask_together(callers: int) -> int:
        before = commit.exchanges
        asking = [gevent.spawn(commit.call, "ECHO", f"{number}") for number in range(callers)]
        gevent.joinall(asking, timeout=10, raise_error=True)
        assert [each.value for each in asking] == [f"{number}".encode() for number in range(callers)]
        return commit.exchanges - before

    commit.call("PING")
    assert ask_together(10) == 2  # the first alone
    assert [ask_together(10) for _ in range(5)] == [1] * 5
    assert ask_together(1) == 1
    turns: list[None] = []
    commit._runtime.yield_turn = lambda: turns.append(None)  # type: ignore[method-assign]
    assert ask_together(1) == 1
    assert turns == []  # nobody came along with the last one


def test_a_caller_that_is_killed_while_others_queue_up_passes_the_lead_on(
    commit: GroupCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has sent nothing yet: the next one in the queue leads, over the same connection."""

    class Killed(BaseException):
        """As a greenlet's or a thread's end."""

    answers: list[object] = []
    other = threading.Thread(target=lambda: answers.append(commit.call("ECHO", "other")), daemon=True)

    def yield_turn() -> None:
        other.start()
        wait_until(lambda: bool(commit._queue), "somebody queues up")
        raise Killed

    commit.call("PING")
    monkeypatch.setattr(commit._runtime, "yield_turn", yield_turn)
    commit._is_crowd = True
    with pytest.raises(Killed):
        commit.call("ECHO", "killed")
    other.join(10)
    assert answers == [b"other"]
    assert commit.call("PING") == b"PONG"
    assert commit.reconnects == 1


def test_an_error_belongs_to_its_own_command(commit: GroupCommit, namespace: str) -> None:
    """In one group the refused command raises in its caller; its neighbours get their replies."""
    commit.call("SET", f"{namespace}:text", "abc")
    failed: list[Exception] = []
    answered: list[object] = []

    def fail() -> None:
        try:
            commit.call("INCR", f"{namespace}:text")
        except ReplyError as error:
            failed.append(error)

    def succeed() -> None:
        answered.append(commit.call("GET", f"{namespace}:text"))

    run_all(*[fail, succeed] * 50)
    assert len(failed) == 50
    assert answered == [b"abc"] * 50


def test_a_killed_leader_never_leaves_its_reply_to_another(
    commit: GroupCommit, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that is killed between sending and reading takes the connection with it: the next one reads its own."""

    class KilledError(BaseException):
        pass

    commit.call("SET", f"{namespace}:a", "of a")
    commit.call("SET", f"{namespace}:b", "of b")
    original = Wire.read
    is_armed = [True]

    def read(wire: Wire) -> object:
        if is_armed[0]:
            is_armed[0] = False
            raise KilledError
        return original(wire)

    monkeypatch.setattr(Wire, "read", read)
    with pytest.raises(KilledError):
        commit.call("GET", f"{namespace}:a")
    assert commit.call("GET", f"{namespace}:b") == b"of b"
    assert commit.reconnects == 2


def test_followers_of_a_killed_leader_are_told_or_repeat(
    commit: GroupCommit, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader is killed mid-flight: idempotent followers repeat, others get StateUnavailableError; none hangs."""

    class KilledError(BaseException):
        pass

    commit.call("PING")
    first_reads = threading.Event()
    go_on = threading.Event()
    original = Wire.read
    killed: list[int] = []
    outcomes: list[str] = []

    def read(wire: Wire) -> object:
        name = threading.current_thread().name
        if name == "slow":
            first_reads.set()
            go_on.wait(10)
        elif not killed:
            killed.append(1)
            raise KilledError
        return original(wire)

    monkeypatch.setattr(Wire, "read", read)

    def follow(idempotent: bool) -> None:
        try:
            value = commit.call("INCR", f"{namespace}:x", idempotent=idempotent)
            outcomes.append(f"value {type(value).__name__}")
        except StateUnavailableError:
            outcomes.append("told")
        except KilledError:
            outcomes.append("killed")

    slow = threading.Thread(target=lambda: commit.call("PING"), name="slow", daemon=True)
    slow.start()
    assert first_reads.wait(10)
    others = [threading.Thread(target=follow, args=(n % 2 == 0,), daemon=True) for n in range(10)]
    for thread in others:
        thread.start()
        wait_until(lambda: len(commit._queue) == others.index(thread) + 1, "queued")  # noqa: B023 - called at once
    go_on.set()
    for thread in [slow, *others]:
        thread.join(20)
        assert not thread.is_alive()
    assert outcomes.count("killed") == 1
    assert sorted(set(outcomes) - {"killed"}) == ["told", "value int"]
    assert len(outcomes) == 10
    assert commit.call("PING") == b"PONG"


def test_a_killed_waiter_is_left_out(commit: GroupCommit, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower killed while it waits leaves the queue, also when the lead was just given to it."""

    class KilledError(BaseException):
        pass

    commit.call("PING")
    original_wait = GroupCommit._wait

    def wait(group: GroupCommit, ticket: Any, parking: Any) -> None:
        if threading.current_thread().name == "victim":
            # The worst moment: promoted to leader, and killed before it could run.
            wait_until(lambda: ticket.batch is not None, "promoted")
            group._abandon(ticket)
            raise KilledError
        original_wait(group, ticket, parking)

    monkeypatch.setattr(GroupCommit, "_wait", wait)
    first_reads, go_on = threading.Event(), threading.Event()
    original_read = Wire.read

    def read(wire: Wire) -> object:
        if threading.current_thread().name == "slow":
            first_reads.set()
            go_on.wait(10)
        return original_read(wire)

    monkeypatch.setattr(Wire, "read", read)
    results: list[object] = []

    def victim() -> None:
        try:
            commit.call("SET", f"{namespace}:victim", "1")
        except KilledError:
            results.append("killed")

    threads = [threading.Thread(target=lambda: commit.call("PING"), name="slow", daemon=True)]
    threads[0].start()
    assert first_reads.wait(10)
    threads.append(threading.Thread(target=victim, name="victim", daemon=True))
    threads[1].start()
    wait_until(lambda: len(commit._queue) == 1, "the victim waits")
    threads += [threading.Thread(target=lambda: results.append(commit.call("PING")), daemon=True) for _ in range(3)]
    for thread in threads[2:]:
        thread.start()
    wait_until(lambda: len(commit._queue) == 4, "all wait")
    go_on.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(map(str, results)) == ["b'PONG'", "b'PONG'", "b'PONG'", "killed"]
    assert commit.call("GET", f"{namespace}:victim") is None


def test_a_stalled_server_costs_at_most_the_timeouts(own_redis: RedisProcess) -> None:
    """Redis accepts and never answers: every caller, waiting or leading, is told within about a second."""
    settings = StateSettings()
    commit = GroupCommit(Address(own_redis.url, settings), settings, find_runtime())
    commit.call("PING")
    own_redis.signal(signal.SIGSTOP)
    waits: list[float] = []

    def ask() -> None:
        started_at = time.monotonic()
        with pytest.raises(StateUnavailableError):
            commit.call("PING", idempotent=True)
        waits.append(time.monotonic() - started_at)

    try:
        run_all(*[ask] * 30)
    finally:
        own_redis.signal(signal.SIGCONT)
    assert len(waits) == 30
    # Its own exchange and the one before it, with room for a busy machine.
    assert max(waits) < 4
    commit.close()


def test_the_breaker_answers_at_once_and_lets_probes_through(own_redis: RedisProcess) -> None:
    """Redis is gone: after three failures callers are refused in microseconds; when it is back, one probe finds it."""
    settings = StateSettings(probe_interval=0.2)
    commit = GroupCommit(Address(own_redis.url, settings), settings, find_runtime())
    commit.call("PING")
    own_redis.kill()
    for _ in range(3):
        with pytest.raises(StateUnavailableError):
            commit.call("PING")
    attempts = commit.reconnects
    for _ in range(200):
        with pytest.raises(StateUnavailableError):
            commit.call("PING")
    assert commit.reconnects == attempts
    own_redis.start()

    def answers() -> bool:
        try:
            return bool(commit.call("PING") == b"PONG")
        except StateUnavailableError:
            return False

    wait_until(answers, "a probe closes the breaker")
    assert [commit.call("PING") for _ in range(10)] == [b"PONG"] * 10
    commit.close()


def test_a_server_that_restarted_while_we_were_idle_is_not_noticed(own_redis: RedisProcess) -> None:
    """A dead idle connection is found before anything is sent: even a command that may not be repeated succeeds."""
    settings = StateSettings()
    commit = GroupCommit(Address(own_redis.url, settings), settings, find_runtime())
    commit.call("PING")
    own_redis.kill()
    own_redis.start()
    time.sleep(0.05)  # idle
    assert commit.call("INCR", "x") == 1
    commit.close()


def test_a_command_that_may_not_be_repeated_is_not(redis_url: str, namespace: str) -> None:
    """The link breaks after the command was sent: INCR is reported as unknown, never sent a second time."""
    settings = StateSettings()
    with Link(redis_url) as proxy:
        commit = GroupCommit(Address(proxy.url, settings), settings, find_runtime())
        commit.call("PING")
        proxy.mode = "cut replies"
        with pytest.raises(StateUnavailableError):
            commit.call("INCR", f"{namespace}:n")
        proxy.mode = "forward"
        assert commit.call("GET", f"{namespace}:n") == b"1"
        commit.close()


def test_scripts_are_sent_once_and_survive_a_flush(commit: GroupCommit, namespace: str) -> None:
    """After SCRIPT FLUSH the text is sent again by itself."""
    commit.call("SCRIPT", "FLUSH")
    assert commit.script("compare_delete", [f"{namespace}:k"], ["token"]) == 0
    before = commit.commands
    commit.script("compare_delete", [f"{namespace}:k"], ["token"])
    assert commit.commands - before == 1


def test_transactions_come_as_one(commit: GroupCommit, namespace: str) -> None:
    """MULTI and EXEC travel in one group, so other callers' commands cannot get between."""
    wrong: list[object] = []

    def swap(number: int) -> None:
        for _ in range(20):
            commands: list[Command] = [("SET", f"{namespace}:v", str(number)), ("GET", f"{namespace}:v")]
            reply = commit.transaction(commands)
            if reply[1] != str(number).encode():
                wrong.append(reply)

    run_all(*(lambda n=number: swap(n) for number in range(20)))
    assert wrong == []


def test_a_refused_transaction_raises(commit: GroupCommit, namespace: str) -> None:
    """An error inside EXEC is the caller's to see."""
    commit.call("SET", f"{namespace}:text", "abc")
    with pytest.raises(ReplyError, match="not an integer"):
        commit.transaction([("INCR", f"{namespace}:text")])


def test_blocking_commands_have_their_own_way(commit: GroupCommit, namespace: str) -> None:
    """BLPOP on the shared connection would stop every other caller; on one of its own it waits alone."""
    with pytest.raises(Bug):
        commit.call("BLPOP", f"{namespace}:list", 1)
    assert commit.exclusive("BLPOP", f"{namespace}:list", "0.05", timeout=2) is None


def test_the_queue_is_bounded(redis_url: str) -> None:
    """When more wait than the limit allows, the next one is refused at once instead of waiting without end."""
    settings = StateSettings(queue_limit=0)
    commit = GroupCommit(Address(redis_url, settings), settings, find_runtime())
    commit._leading = True
    with pytest.raises(StateUnavailableError, match="too many"):
        commit.call("PING")
    commit._leading = False
    assert commit.call("PING") == b"PONG"
    commit.close()


@pytest.mark.skipif(not is_module_patched("socket"), reason="greenlets are killed, threads cannot be")
def test_greenlets_killed_at_any_moment_break_nobody_else(commit: GroupCommit, namespace: str) -> None:
    """300 greenlets ask, a third of them is killed at random moments; all others get their own values, none hangs."""
    import gevent

    wrong: list[object] = []
    finished: list[int] = []

    def ask(number: int) -> None:
        for turn in range(10):
            value = f"{number}.{turn}".encode()
            try:
                if (found := commit.call("ECHO", value, idempotent=True)) != value:
                    wrong.append((value, found))
            except StateUnavailableError:
                pass  # told that its exchange was cut short; that is allowed
        finished.append(number)

    greenlets = [gevent.spawn(ask, number) for number in range(300)]
    victims = random.sample(greenlets, 100)
    for victim in victims:
        gevent.sleep(random.uniform(0, 0.0005))
        victim.kill(block=False)
    gevent.joinall(greenlets, timeout=30)
    assert all(greenlet.dead for greenlet in greenlets)
    assert wrong == []
    assert len(finished) >= 200
    assert commit.call("PING") == b"PONG"
