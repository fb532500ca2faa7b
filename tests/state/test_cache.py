"""The cache: one computation, no stale set, invalidation that every worker hears."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state import SharedState
from sharedcluster.state.near import Near
from tests.redis_process import RedisProcess
from tests.state.conftest import MakeState
from tests.state.test_sessions import commands_of
from tests.waiting import wait_until


def run_all(*functions: Any) -> None:
    """Run functions at the same time and wait for all."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


# -- plain use ------------------------------------------------------------------------------------------------------


def test_the_verbs_of_flask_caching(state: SharedState) -> None:
    """get, set, add, has, delete and the many-forms mean what they mean there."""
    cache = state.cache
    assert cache.get("a") is None
    assert not cache.has("a")
    assert cache.set("a", {"x": (1, 2)})
    assert cache.get("a") == {"x": (1, 2)}
    assert cache.has("a")
    assert not cache.add("a", 2)
    assert cache.add("b", None)
    assert cache.has("b")
    assert cache.get("b") is None
    assert cache.set_many({"c": 1, "d": [2]}) == ["c", "d"]
    assert cache.get_many("c", "d", "e") == [1, [2], None]
    assert cache.get_dict("c", "e") == {"c": 1, "e": None}
    assert cache.delete("c")
    assert not cache.delete("c")
    assert cache.delete_many("a", "c", "d") == ["a", "d"]
    assert cache.clear()
    assert not cache.has("b")


def test_a_hit_near_costs_nothing_and_a_far_one_one_command(make_state: MakeState) -> None:
    """0 round trips near, 1 from Redis, 1 for any number of keys."""
    first, second = make_state(), make_state()
    first.cache.set_many({"a": 1, "b": 2, "c": 3})
    assert commands_of(first, lambda: first.cache.get("a")) == 0
    assert commands_of(second, lambda: second.cache.get("a")) == 1
    assert commands_of(second, lambda: second.cache.get("a")) == 0
    before = second.commit.exchanges - second.subscriber.beats
    assert second.cache.get_many("a", "b", "c") == [1, 2, 3]
    assert second.commit.exchanges - second.subscriber.beats - before == 1


def test_values_end(state: SharedState) -> None:
    """A timeout ends a value near and far; 0 means for ever."""
    state.cache.set("short", 1, timeout=0.3)
    state.cache.set("long", 1, timeout=0)
    assert state.cache.get("short") == 1
    wait_until(lambda: state.cache.get("short") is None, "the timeout")
    assert state.commit.call("PTTL", f"{state.namespace}:c:long") == -1


def test_nobody_can_change_what_is_cached(state: SharedState) -> None:
    """Each caller gets a value of its own."""
    state.cache.set("k", {"list": [1]})
    state.cache.get("k")["list"].append(2)
    assert state.cache.get("k") == {"list": [1]}


# -- invalidation ---------------------------------------------------------------------------------------------------


def test_after_delete_every_worker_forgets(make_state: MakeState) -> None:
    """After delete or set returned, workers in touch with Redis serve the old value no longer than a message takes."""
    workers = [make_state() for _ in range(3)]
    for turn in range(100):
        workers[turn % 3].cache.set("k", turn)
        for worker in workers:
            wait_until(lambda w=worker, t=turn: w.cache.get("k") == t, "the new value", interval=0.001)  # type: ignore[misc]
        if turn % 10 == 0:
            workers[0].cache.delete("k")
            for worker in workers:
                wait_until(lambda w=worker: w.cache.get("k") is None, "the deletion", interval=0.001)  # type: ignore[misc]


def test_a_message_is_never_older_than_what_a_reader_finds(make_state: MakeState) -> None:
    """Each of 300 invalidations, followed by an immediate read, finds the value it announced or a newer one."""
    writer, reader = make_state(), make_state()
    older: list[tuple[int, int]] = []
    heard = threading.Event()
    seen = [0]
    original = reader.cache.hear

    def hear(name: str, etag: bytes) -> None:
        original(name, etag)
        heard.set()

    reader.cache.hear = hear  # type: ignore[method-assign]
    for turn in range(1, 300):
        heard.clear()
        writer.cache.set("k", turn)
        assert heard.wait(5)
        seen[0] = reader.cache.get("k")
        if seen[0] < turn:
            older.append((seen[0], turn))
    assert older == []


@pytest.mark.parametrize("guard", ["on", "off"])
def test_a_slow_reader_leaves_no_stale_entry(
    make_state: MakeState, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    """A reader overtaken by an invalidation between its read and its fill keeps nothing; the guard does it."""
    writer, reader = make_state(), make_state()
    writer.cache.set("k", "old")
    if guard == "off":
        monkeypatch.setattr(Near, "begin", lambda near: 10**12)
    original = reader.commit.many

    def many(*args: Any, **kwargs: Any) -> Any:
        replies = original(*args, **kwargs)
        if replies and replies[0][0] == 1 and b"old" in replies[0][1]:
            heard = reader.subscriber.messages
            writer.cache.set("k", "new")
            wait_until(lambda: reader.subscriber.messages > heard, "the invalidation overtakes")
            time.sleep(0.02)
        return replies

    monkeypatch.setattr(reader.commit, "many", many)
    assert reader.cache.get("k") == "old"
    assert reader.cache.get("k") == ("new" if guard == "on" else "old")


def test_tags_invalidate_everything_that_carries_them(make_state: MakeState) -> None:
    """One round trip, however many values; values without the tag stay."""
    first, second = make_state(), make_state()
    first.cache.set_many({f"red{n}": n for n in range(20)}, tags=["red", "all colours"])
    first.cache.set("blue", 1, tags=["blue", "all colours"])
    second.cache.get_many(*(f"red{n}" for n in range(20)))
    assert second.cache.get("blue") == 1
    assert commands_of(first, lambda: first.cache.invalidate_tag("red")) == 4  # MULTI, SET, PUBLISH, EXEC: one trip
    for worker in (first, second):
        wait_until(lambda w=worker: w.cache.get("red1") is None, "the tag is heard")  # type: ignore[misc]
        assert worker.cache.get_many(*(f"red{n}" for n in range(20))) == [None] * 20
        assert worker.cache.get("blue") == 1
    first.cache.invalidate_tag("all colours")
    wait_until(lambda: second.cache.get("blue") is None, "the other tag")


def test_an_evicted_tag_makes_misses_and_never_resurrects(state: SharedState) -> None:
    """Versions are random: losing a tag's key can only lose values."""
    state.cache.set("k", "old", tags=["t"])
    state.cache.invalidate_tag("t")
    state.commit.call("DEL", f"{state.namespace}:t:t")
    state.cache.near.forget()
    assert state.cache.get("k") is None
    state.cache.set("other", 1, tags=["t"])
    assert state.cache.get("k") is None


# -- one computation ------------------------------------------------------------------------------------------------


def test_one_computation_per_key_in_the_cluster(make_state: MakeState) -> None:
    """Four workers, forty callers, one missing key: computed once, everybody gets the value."""
    workers = [make_state() for _ in range(4)]
    calls: list[int] = []
    results: list[Any] = []

    def compute() -> dict[str, int]:
        calls.append(1)
        time.sleep(0.3)
        return {"value": len(calls)}

    def ask(worker: SharedState) -> None:
        results.append(worker.cache.get_or_compute("k", compute, 60))

    run_all(*(lambda w=workers[n % 4]: ask(w) for n in range(40)))
    assert len(calls) == 1
    assert results == [{"value": 1}] * 40
    assert sum(worker.counts["cache_joined"] for worker in workers) >= 30


def test_a_computation_that_fails_is_told_and_does_not_block_the_next(make_state: MakeState) -> None:
    """The error reaches those who waited for it in this worker; others compute themselves, at once."""
    first, second = make_state(), make_state()
    started, go_on = threading.Event(), threading.Event()
    outcomes: list[str] = []

    def fail() -> None:
        started.set()
        go_on.wait(5)
        raise ZeroDivisionError

    def ask(worker: SharedState, compute: Any, name: str) -> None:
        try:
            outcomes.append(f"{name} {worker.cache.get_or_compute('k', compute, 60)}")
        except ZeroDivisionError:
            outcomes.append(f"{name} failed")

    def other() -> None:
        started.wait(5)
        threading.Timer(0.1, go_on.set).start()
        begun = time.monotonic()
        ask(second, lambda: "fine", "second")
        assert time.monotonic() - begun < 3  # woken, not timed out by the lease

    run_all(lambda: ask(first, fail, "first"), other)
    assert sorted(outcomes) == ["first failed", "second fine"]


def test_a_dead_computer_costs_one_lease(make_state: MakeState) -> None:
    """If the holder of a lease dies, another caller computes when the lease has run out."""
    state = make_state(cache_lease_timeout=0.4)
    state.commit.call("SET", f"{state.namespace}:cl:k", "a dead one", "PX", 400)
    assert state.cache.get_or_compute("k", lambda: "computed", 60) == "computed"


def test_a_long_computation_keeps_its_lease(make_state: MakeState) -> None:
    """The lease is renewed while the computation runs, so its value is not refused and nobody else computes."""
    first, second = make_state(cache_lease_timeout=0.4), make_state(cache_lease_timeout=0.4)
    calls: list[int] = []

    def compute() -> str:
        calls.append(1)
        time.sleep(1.5)
        return "slow"

    run_all(
        lambda: first.cache.get_or_compute("k", compute, 60), lambda: second.cache.get_or_compute("k", compute, 60)
    )
    assert len(calls) == 1
    assert second.cache.get("k") == "slow"


@pytest.mark.parametrize("how", ["delete", "tag"])
def test_a_value_computed_from_before_a_deletion_is_refused(make_state: MakeState, how: str) -> None:
    """Stale set: the row is read, changed and the key deleted by somebody else; what was read is not stored."""
    first, second = make_state(), make_state()
    row = ["old"]

    def compute() -> str:
        value = row[0]
        if value == "old":
            row[0] = "new"
            second.cache.delete("k") if how == "delete" else second.cache.invalidate_tag("rows")
        return value

    assert first.cache.get_or_compute("k", compute, 60, tags=["rows"]) == "old"
    assert second.cache.get("k") is None
    wait_until(lambda: first.cache.get("k") is None, "and near neither")
    assert first.cache.get_or_compute("k", compute, 60, tags=["rows"]) == "new"


def test_stale_values_are_served_while_one_computes(make_state: MakeState) -> None:
    """Stale-while-revalidate: past its time a value is served on at once, and replaced in the background, once."""
    first, second = make_state(cache_early=0.0), make_state(cache_early=0.0)
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        time.sleep(0.1)
        return len(calls)

    def ask(worker: SharedState) -> Any:
        return worker.cache.get_or_compute("k", compute, 0.5, stale=30)

    assert ask(first) == ask(second) == 1
    time.sleep(0.6)
    begun = time.monotonic()
    assert [ask(first), ask(second), ask(first), ask(second)] == [1, 1, 1, 1]
    assert time.monotonic() - begun < 0.1
    wait_until(lambda: ask(second) == 2, "the new value")
    assert len(calls) == 2


def test_a_failing_computation_leaves_the_stale_value(make_state: MakeState) -> None:
    """Fail-safe: between timeout and stale an error costs nothing but freshness."""
    state = make_state(cache_early=0.0)
    results: list[Any] = ["good"]
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError
        return results[0]

    assert state.cache.get_or_compute("k", compute, 0.2, stale=30) == "good"
    time.sleep(0.3)
    for _ in range(20):
        assert state.cache.get_or_compute("k", compute, 0.2, stale=30) == "good"
        time.sleep(0.01)
    assert 2 <= len(calls) <= 4  # throttled


def test_early_refresh_happens_before_the_end(make_state: MakeState) -> None:
    """XFetch: a dear value is computed anew shortly before it ends, so nobody waits."""
    state = make_state(cache_early=100.0)
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        time.sleep(0.05)
        return len(calls)

    state.cache.get_or_compute("k", compute, 5)
    wait_until(lambda: state.cache.get_or_compute("k", compute, 5) > 1, "refreshed early", deadline=4)


# -- Redis away -----------------------------------------------------------------------------------------------------


def test_without_redis_reads_compute_and_deletions_raise(own_redis: RedisProcess, make_state: MakeState) -> None:
    """A cache may be empty, but a deletion that did not happen must not look as if it had."""
    state = make_state(own_redis.url)
    state.cache.set("k", 1)
    own_redis.kill()
    wait_until(lambda: not state.subscriber.is_trusted(), "the loss is noticed")
    assert state.cache.get("k") is None
    assert state.cache.get_or_compute("k", lambda: "computed", 60) == "computed"
    with pytest.raises(StateUnavailableError):
        state.cache.delete("k")
    with pytest.raises(StateUnavailableError):
        state.cache.set("k", 2)
