"""Group commit: one connection for all callers, and nobody gets another one's reply."""

from __future__ import annotations

import functools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from gevent.monkey import is_module_patched

from sharedcluster.errors import Bug, StateUnavailableError
from sharedcluster.flask import find_runtime
from sharedcluster.state.connection import GroupCommit
from sharedcluster.state.scripting import JointScript, Part
from sharedcluster.state.settings import StateSettings
from sharedcluster.state.tickets import RUN_LIMIT, Run, Submitted, Ticket
from sharedcluster.state.wire import Address, Command, Form, ReplyError, Wire, pack, pack_argument
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
        if other.ident is not None:  # the next one in the queue
            return
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


def test_an_heir_that_is_killed_while_others_queue_up_loses_nobody(
    commit: GroupCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given the lead over all who wait and has sent nothing: they are answered, over the same connection."""

    class Killed(BaseException):
        """As a greenlet's or a thread's end."""

    deaths = [Killed()]

    class Deadly(type(commit._runtime)):  # type: ignore[misc]
        def yield_turn(self) -> None:
            if deaths:
                raise deaths.pop()

    answers: list[object] = []

    def ask(number: int) -> None:
        try:
            answers.append(commit.call("ECHO", f"{number}"))
        except Killed:
            answers.append("killed")

    commit.call("PING")
    monkeypatch.setattr(commit, "_runtime", Deadly())
    commit._is_crowd = commit._leading = True  # as while a trip with several is under way
    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda: len(commit._queue) == number + 1, "it queues up")  # noqa: B023
    commit._pass_on()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(answers, key=str) == [b"1", b"2", b"3", "killed"]
    assert commit.call("PING") == b"PONG"
    assert (commit._leading, commit.reconnects) == (False, 1)


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


# -- parts that run together ---------------------------------------------------------------------------------------


class Saver:
    """Saves sessions by parts, without anything around them."""

    def __init__(self, commit: GroupCommit, namespace: str) -> None:
        self.commit = commit
        self.prefix = f"{namespace}:s:"
        self.channel = f"{namespace}:inv"
        common = [b"0", self.channel.encode(), f"{namespace}:u:".encode(), b"%d" % len(self.prefix)]
        self.script = JointScript("session_save", common)
        self.form = Form([b"c", b"60000", b"", b"0", b"1", b"0", b"field", None])

    def part(self, name: str, value: str = "x") -> Part:
        """A session that is written without having been read."""
        key = pack_argument(f"{self.prefix}{name}".encode())
        return Part(self.script, key, 1, self.form.fill([value.encode()]), self.form.count)

    def stored(self, name: str) -> bytes | None:
        """The field, as Redis has it."""
        value: bytes | None = self.commit.call("HGET", f"{self.prefix}{name}", "field")
        return value


@pytest.fixture
def saver(commit: GroupCommit, namespace: str) -> Saver:
    """Over the test's own connection."""
    commit.load_scripts()
    return Saver(commit, namespace)


def submit_together(saver: Saver, names: list[str]) -> list[Submitted]:
    """Parts that go out in one exchange: the leader is held up until all are in the queue."""
    saver.commit.call("PING")
    saver.commit._home = saver.commit._home or saver.commit._runtime.make_home()
    with saver.commit._lock:
        saver.commit._leading = True
    submitted = [saver.commit.submit(saver.part(name)) for name in names]
    saver.commit._home.spawn(saver.commit._lead_alone)
    return submitted


def test_parts_that_are_sent_together_run_as_one(saver: Saver, redis_url: str) -> None:
    """One round trip, one command, one message for all; each caller is given what became of its own."""
    listener = Wire(Address(redis_url, StateSettings()))
    listener.send(pack(("SUBSCRIBE", saver.channel)))
    listener.read()
    saver.commit.call("PING")
    before = (saver.commit.exchanges + 1, saver.commit.commands + 1)  # a PING comes first
    names = [f"n{number}" for number in range(20)]
    submitted = submit_together(saver, names)
    versions = [saver.commit.settle(each) for each in submitted]
    assert (saver.commit.exchanges - before[0], saver.commit.commands - before[1]) == (1, 1)
    assert [saver.stored(name) for name in names] == [b"x"] * 20
    # Nobody said which version it expects but 0, so each is told its version by itself.
    kind, *told = listener.read()[2].decode().split(" ")
    assert kind == "s"
    assert dict(zip(told[1::2], told[::2], strict=True)) == {
        name: version.decode() for name, version in zip(names, versions, strict=True)
    }
    listener.close()


def test_what_fails_in_one_part_is_nobody_else_s(saver: Saver, redis_url: str) -> None:
    """A key of another type costs its own caller an error; what it may have written is told as gone."""
    listener = Wire(Address(redis_url, StateSettings()))
    listener.send(pack(("SUBSCRIBE", saver.channel)))
    listener.read()
    saver.commit.call("SET", f"{saver.prefix}b", "no hash")
    submitted = submit_together(saver, ["a", "b", "c"])
    assert type(saver.commit.settle(submitted[0])) is bytes
    with pytest.raises(ReplyError, match="WRONGTYPE"):
        saver.commit.settle(submitted[1])
    assert type(saver.commit.settle(submitted[2])) is bytes
    assert [saver.stored("a"), saver.stored("c")] == [b"x", b"x"]
    told = listener.read()[2].decode().split(" ")[1:]
    listener.close()
    assert [told[1::2], told[2]] == [["a", "b", "c"], "-"]
    with pytest.raises(ReplyError, match="WRONGTYPE"):
        saver.commit.part(saver.part("b"))
    assert type(saver.commit.part(saver.part("a"), idempotent=True)) is list  # somebody has written since 0


def test_many_parts_are_several_runs_and_other_commands_go_along(saver: Saver) -> None:
    """No run keeps Redis busy for long; who waits for a command of its own gets its reply from the same trip."""
    names = [f"n{number}" for number in range(RUN_LIMIT + 5)]
    saver.commit.call("PING")
    before = saver.commit.commands + 1
    answered: list[object] = []
    submitted = submit_together(saver, names)
    run_all(lambda: answered.append(saver.commit.call("ECHO", "other")))
    assert {type(saver.commit.settle(each)) for each in submitted} == {bytes}
    assert answered == [b"other"]
    assert saver.commit.commands - before == 3  # two runs and the other one


def test_redis_has_forgotten_the_script(saver: Saver) -> None:
    """Each sends its own part again, with the text; none is lost."""
    saver.commit.part(saver.part("known"))
    saver.commit.call("SCRIPT", "FLUSH")
    names = ["a", "b", "c"]
    for each in submit_together(saver, names):
        assert type(saver.commit.settle(each, idempotent=True)) is bytes
    assert [saver.stored(name) for name in names] == [b"x"] * 3


def test_who_submitted_is_called_once_and_need_not_wait(saver: Saver) -> None:
    """Before it is done, then; afterwards, at once. `settle` waits where nobody is called."""
    calls: list[str] = []
    (first,) = submit_together(saver, ["a"])
    first.when_done(lambda: calls.append("first"))
    wait_until(lambda: bool(calls), "called")
    assert first.is_done
    first.when_done(lambda: calls.append("late"))
    assert calls == ["first", "late"]
    waited = saver.commit.submit(saver.part("b"))
    assert type(saver.commit.settle(waited)) is bytes
    assert saver.stored("b") == b"x"


def test_a_submitted_part_is_told_of_silence(own_redis: RedisProcess, namespace: str) -> None:
    """Redis stands still: everybody who submitted hears it within the timeout, and again at once while it is down."""
    settings = StateSettings(socket_timeout=0.2, connect_timeout=0.2, breaker_limit=1, probe_interval=60)
    commit = GroupCommit(Address(own_redis.url, settings), settings, find_runtime())
    saver = Saver(commit, namespace)
    commit.call("PING")
    own_redis.signal(signal.SIGSTOP)
    submitted = [commit.submit(saver.part(f"n{number}")) for number in range(5)]
    for each in submitted:
        with pytest.raises(StateUnavailableError):
            commit.settle(each, idempotent=True)
    with pytest.raises(StateUnavailableError, match="down"):
        commit.submit(saver.part("late"))
    own_redis.signal(signal.SIGCONT)
    commit.close()


def test_a_cut_link_is_tried_again_where_that_is_harmless(own_redis: RedisProcess, namespace: str) -> None:
    """Who may send twice gets its answer over the next connection; who may not is told that nobody knows."""
    with Link(own_redis.url) as link:
        settings = StateSettings()
        commit = GroupCommit(Address(link.url, settings), settings, find_runtime())
        saver = Saver(commit, namespace)
        commit.call("PING")
        link.mode = "cut replies"
        careful = commit.submit(saver.part("careful"))
        with pytest.raises(StateUnavailableError):
            commit.settle(careful)
        link.mode = "forward"
        link.cut()
        commit.call("PING", idempotent=True)
        link.mode = "cut replies"
        harmless = commit.submit(saver.part("harmless"))
        wait_until(lambda: harmless.is_done, "the link is cut")
        link.mode = "forward"
        assert type(commit.settle(harmless, idempotent=True)) in (bytes, list)
        assert saver.stored("harmless") == b"x"
        commit.close()


def test_a_full_queue_refuses_a_submission(commit: GroupCommit, namespace: str) -> None:
    """As it refuses a caller: told at once, and nothing stays behind."""
    commit._settings = replace(commit._settings, queue_limit=0)
    saver = Saver(commit, namespace)
    submitted = commit.submit(saver.part("a"))
    assert submitted.is_done
    with pytest.raises(StateUnavailableError, match="too many"):
        commit.settle(submitted)
    commit._settings = StateSettings()
    assert commit.call("PING") == b"PONG"


def test_who_submitted_is_not_lost_with_its_leader(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something breaks while others queue up, before anything is sent: it is reported, and led by another."""
    commit = saver.commit
    deaths = [RuntimeError("a bug")]

    class Deadly(type(commit._runtime)):  # type: ignore[misc]
        def yield_turn(self) -> None:
            if deaths:
                raise deaths.pop()

    commit.call("PING")
    monkeypatch.setattr(commit, "_runtime", Deadly())
    commit._is_crowd = True
    submitted = [commit.submit(saver.part(f"n{number}")) for number in range(3)]
    assert [type(commit.settle(each)) for each in submitted] == [bytes] * 3
    assert deaths == []
    wait_until(lambda: "[BUG] an exchange with Redis was cut short" in caplog.text, "the report")
    wait_until(lambda: not commit._leading, "nobody leads")


def test_callers_and_submissions_of_a_crowd_all_get_their_own(saver: Saver) -> None:
    """Both kinds at once, led by either: no reply goes astray, and nobody is left behind."""
    wrong: list[object] = []

    def call(number: int) -> None:
        for turn in range(20):
            text = f"{number} {turn}"
            if saver.commit.call("ECHO", text) != text.encode():
                wrong.append(text)

    def save(number: int) -> None:
        for turn in range(20):
            name = f"{number}.{turn}"
            submitted = saver.commit.submit(saver.part(name, name))
            saver.commit.settle(submitted)
            if saver.stored(name) != name.encode():
                wrong.append(name)

    run_all(*[functools.partial(work, number) for number in range(10) for work in (call, save)])
    assert wrong == []
    assert not saver.commit._leading


@pytest.mark.skipif(not is_module_patched("socket"), reason="threads have no loop to be told in")
def test_another_thread_may_lead_and_may_submit(saver: Saver) -> None:
    """A native thread carries what the loop's thread submitted, and tells it there; for its own it waits."""
    import gevent
    from gevent.monkey import get_original

    thread_id = get_original("_thread", "get_ident")
    here = thread_id()
    told_in: list[int] = []
    saver.commit.call("PING")
    saver.commit._home = saver.commit._runtime.make_home()
    with saver.commit._lock:
        saver.commit._leading = True
    submitted = [saver.commit.submit(saver.part(f"n{number}")) for number in range(3)]
    for each in submitted:
        each.when_done(lambda: told_in.append(thread_id()))
    elsewhere: list[object] = []

    def lead() -> None:
        saver.commit._lead_alone()
        elsewhere.append(saver.commit.settle(saver.commit.submit(saver.part("elsewhere"))))

    gevent.get_hub().threadpool.apply(lead)
    with gevent.Timeout(10):
        while len(told_in) < 3:
            gevent.sleep(0.001)
    assert told_in == [here] * 3
    assert [type(saver.commit.settle(each)) for each in submitted] == [bytes] * 3
    assert [type(each) for each in elsewhere] == [bytes]


def test_a_leader_s_bug_is_told_and_leaves_nobody_waiting(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As many answers as parts, or nobody believes any of them."""
    monkeypatch.setattr("sharedcluster.state.tickets.Run.hand_out", lambda run: 1 / 0)
    submitted = submit_together(saver, ["a", "b"])
    for each in submitted:
        with pytest.raises(StateUnavailableError, match="cut short"):
            saver.commit.settle(each)
    wait_until(lambda: "[BUG]" in caplog.text, "it is told")
    monkeypatch.undo()
    assert type(saver.commit.part(saver.part("c"))) is bytes


def test_answers_are_counted() -> None:
    """A run that is answered for another number of parts is a bug, and nobody gets another one's answer."""
    script = JointScript("session_save", [])
    tickets = [Ticket(b"", 1, Part(script, b"", 0, b"", 0)) for _ in range(2)]
    run = Run(script, tickets)
    run.replies = [[b"1"]]
    with pytest.raises(Bug):
        run.hand_out()
    assert [ticket.replies for ticket in tickets] == [None, None]


def test_a_replica_is_left_for_its_primary(own_redis: RedisProcess, namespace: str) -> None:
    """A part that is refused for being written on a replica makes the next command connect anew."""
    settings = StateSettings()
    commit = GroupCommit(Address(own_redis.url, settings), settings, find_runtime())
    saver = Saver(commit, namespace)
    commit.load_scripts()
    commit.call("REPLICAOF", "127.0.0.1", "1")
    for each in submit_together(saver, ["a", "b"]):
        with pytest.raises(StateUnavailableError, match="READONLY"):
            commit.settle(each)
    assert commit.reconnects == 1
    commit.call("PING")
    assert commit.reconnects == 2
    commit.close()
