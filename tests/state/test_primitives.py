"""Lock, counter, rate limit, dict, leader, jobs: what holds however many ask at once and whoever dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state import SharedState
from sharedcluster.state.primitives import LockLostError, LockTimeoutError, RateLimitedError
from tests.redis_process import RedisProcess
from tests.state.conftest import MakeState
from tests.state.link import Link
from tests.state.test_cache import run_all
from tests.waiting import wait_until

# -- lock -----------------------------------------------------------------------------------------------------------


def test_at_most_one_holder_and_growing_fences(make_state: MakeState) -> None:
    """Three workers, twelve threads, one lock: never two inside, and every holder's fence is higher than the last."""
    workers = [make_state() for _ in range(3)]
    inside, most = [0], [0]
    fences: list[int] = []

    def work(worker: SharedState) -> None:
        for _ in range(10):
            with worker.lock("l", wait=60) as lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                fences.append(lock.fence)
                time.sleep(0.001)
                inside[0] -= 1

    run_all(*(lambda w=workers[n % 3]: work(w) for n in range(12)))
    assert most[0] == 1
    assert fences == sorted(set(fences))
    assert len(fences) == 120


def test_waiters_are_woken_by_the_release(make_state: MakeState) -> None:
    """The next holder has it right after the release, not after a poll interval; nobody waits: nobody is told."""
    first, second = make_state(), make_state()
    heard = second.subscriber.messages
    with first.lock("l"):
        pass
    lock = first.lock("l")
    assert lock.acquire()
    got_it_at: list[float] = []

    def wait() -> None:
        if second.lock("l", wait=20).acquire():
            got_it_at.append(time.monotonic())

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: first.commit.call("EXISTS", f"{first.namespace}:l:l:waiters"), "somebody waits")
    time.sleep(0.05)
    released_at = time.monotonic()
    lock.release()
    waiter.join(5)
    assert got_it_at[0] - released_at < 0.5
    assert second.subscriber.messages - heard < 20


def test_a_lock_that_is_not_free_in_time_says_so(state: SharedState) -> None:
    """`with` raises LockTimeoutError, acquire returns False."""
    with state.lock("l"):
        with pytest.raises(LockTimeoutError, match='"l" was not free'), state.lock("l", wait=0.05):
            pass
        assert not state.lock("l", wait=0).acquire()


def test_a_held_lock_is_renewed(make_state: MakeState) -> None:
    """A holder that works longer than the timeout keeps the lock as long as it lives."""
    first, second = make_state(), make_state()
    with first.lock("l", timeout=0.3) as lock:
        time.sleep(1.0)
        assert not second.lock("l", wait=0).acquire()
        assert lock.is_held


def test_a_dead_holders_lock_becomes_free(make_state: MakeState) -> None:
    """A holder that dies loses it after the timeout."""
    first, second = make_state(), make_state()
    lock = first.lock("l", timeout=0.4)
    assert lock.acquire()
    assert lock._lease is not None
    first._keeper.let_go(lock._lease)  # dead: nobody renews
    assert second.lock("l", wait=5).acquire()
    assert lock.lost


def test_a_lost_lock_is_told_to_its_holder(own_redis: RedisProcess, make_state: MakeState) -> None:
    """The link is cut while the lock is held: its holder is told before anybody else can have it; `with` raises."""
    told: list[float] = []
    with Link(own_redis.url) as link:
        first, second = make_state(link.url), make_state(own_redis.url)
        lock = first.lock("l", timeout=1.5, on_lost=lambda: told.append(time.monotonic()))
        assert lock.acquire()
        link.mode = "black hole"
        assert second.lock("l", wait=20).acquire()
        taken_at = time.monotonic()
        assert lock.lost
        with pytest.raises(LockLostError):
            lock.check()
        wait_until(lambda: told, "the holder is told")
        with pytest.raises(LockLostError):
            lock.release()
        assert told[0] <= taken_at + 1


def test_releasing_what_is_not_ours_is_refused(state: SharedState) -> None:
    """Nobody can release another one's lock, and nobody twice."""
    lock = state.lock("l")
    with pytest.raises(LockLostError):
        lock.release()
    assert lock.acquire()
    state.commit.call("SET", f"{state.namespace}:l:l", "somebody else")
    with pytest.raises(LockLostError):
        lock.release()
    assert state.commit.call("GET", f"{state.namespace}:l:l") == b"somebody else"


def test_fences_grow_even_if_redis_lost_everything(state: SharedState) -> None:
    """Redis restarts empty: the next fence is still higher than all before."""
    with state.lock("l") as lock:
        fence = lock.fence
    state.commit.call("DEL", f"{state.namespace}:l:l:fence")
    with state.lock("l") as lock:
        assert lock.fence > fence


# -- counter, rate limit --------------------------------------------------------------------------------------------


def test_a_counter_counts_everything_once(make_state: MakeState) -> None:
    """1000 increments from three workers are 1000; a repeated `once` token adds nothing."""
    workers = [make_state() for _ in range(3)]
    run_all(*(lambda w=workers[n % 3]: [w.counter("c").add() for _ in range(100)] for n in range(10)))
    assert workers[0].counter("c").value == 1000
    assert [workers[n % 3].counter("c").add(5, once="order 7") for n in range(4)] == [1005] * 4
    workers[1].counter("c").reset(7)
    assert workers[2].counter("c").add(-2) == 5


def test_a_rate_limit_holds_for_the_whole_cluster(make_state: MakeState) -> None:
    """Ten per minute are ten, whoever asks; the answer says when there is room again."""
    workers = [make_state() for _ in range(3)]
    allowed: list[bool] = []

    def ask(worker: SharedState) -> None:
        allowed.extend(bool(worker.rate_limit("r", 10, 60).hit()) for _ in range(5))

    run_all(*(lambda w=workers[n % 3]: ask(w) for n in range(6)))
    assert sum(allowed) == 10
    result = workers[0].rate_limit("r", 10, 60).hit()
    assert (result.allowed, result.remaining) == (False, 0)
    assert 0 < result.retry_after <= 6.1
    assert workers[0].rate_limit("r", 10, 60).test(11).retry_after == float("inf")
    with pytest.raises(RateLimitedError):
        workers[0].rate_limit("r", 10, 60).require()
    workers[1].rate_limit("r", 10, 60).reset()
    assert workers[0].rate_limit("r", 10, 60).hit().remaining == 9


def test_a_rate_limit_refills_evenly(state: SharedState) -> None:
    """5 per 0.5 s: after the burst one more each 0.1 s."""
    limit = state.rate_limit("r", 5, 0.5)
    while limit.hit():
        pass
    retry = limit.hit().retry_after
    assert retry <= 0.1
    time.sleep(retry + 0.005)
    assert limit.hit()


# -- dict -----------------------------------------------------------------------------------------------------------


def test_a_dict_is_the_same_everywhere(make_state: MakeState) -> None:
    """Written in one worker, read in another after a message's time; read again for nothing."""
    first, second = make_state(), make_state()
    one, two = first.dict("d"), second.dict("d")
    one["a"] = (1, 2)
    one.update({"b": [1], "@v": "a name like ours"})
    wait_until(lambda: two.copy() == {"a": (1, 2), "b": [1], "@v": "a name like ours"}, "the other worker")
    before = second.commit.commands - second.subscriber.beats
    assert two["a"] == (1, 2)
    assert "b" in two
    assert len(two) == 3
    assert sorted(two) == ["@v", "a", "b"]
    assert second.commit.commands - second.subscriber.beats == before
    del two["b"]
    assert two.get("b") is None  # its own write at once
    wait_until(lambda: "b" not in one, "the deletion")
    assert one.setdefault("a", 5) == (1, 2)
    assert one.setdefault("new", 5) == 5
    with pytest.raises(KeyError):
        one["b"]
    two.clear()
    assert one.fresh("a") is None


def test_compare_and_set_loses_no_update(make_state: MakeState) -> None:
    """Six threads on two workers count with compare_and_set: every success counts."""
    workers = [make_state(), make_state()]
    workers[0].dict("d")["n"] = 0

    def add(worker: SharedState) -> None:
        shared, done = worker.dict("d"), 0
        while done < 20:
            seen = shared.fresh("n")
            done += shared.compare_and_set("n", seen, seen + 1)

    run_all(*(lambda w=workers[n % 2]: add(w) for n in range(6)))
    assert workers[1].dict("d").fresh("n") == 120


def test_watchers_are_called_in_other_workers(make_state: MakeState) -> None:
    """Watch tells of changes, whoever made them."""
    first, second = make_state(), make_state()
    seen: list[object] = []
    second.dict("d").watch(lambda shared: seen.append(shared.get("a")))
    first.dict("d")["a"] = 1
    wait_until(lambda: 1 in seen, "the first change")
    first.dict("d")["a"] = 2
    wait_until(lambda: 2 in seen, "the second change")


# -- once per cluster -----------------------------------------------------------------------------------------------


def test_one_leader_and_another_when_it_goes(make_state: MakeState) -> None:
    """Exactly one worker leads; when it resigns, another does."""
    workers = [make_state() for _ in range(3)]

    def leaders() -> list[int]:
        return [n for n, worker in enumerate(workers) if worker.leader.is_leader]

    first = wait_until(leaders, "a leader")
    for _ in range(20):
        assert len(leaders()) <= 1
    workers[first[0]].leader.resign()
    second = wait_until(leaders, "another leader")
    assert len(second) == 1
    assert second != first


def test_a_job_runs_once_per_tick(make_state: MakeState) -> None:
    """Four workers, a job each 0.25 s: once per tick, not once per worker; none is started while draining."""
    workers = [make_state() for _ in range(4)]
    runs: list[tuple[float, int]] = []
    for number, worker in enumerate(workers):
        worker.schedule.every(0.25, "job", lambda n=number: runs.append((time.monotonic(), n)))  # type: ignore[misc]
    began = time.monotonic()
    wait_until(lambda: len(runs) >= 6, "six ticks")
    elapsed = time.monotonic() - began
    assert len(runs) <= elapsed / 0.25 + 1.5
    for worker in workers:
        worker.drain()
    time.sleep(0.3)
    count = len(runs)
    time.sleep(0.5)
    assert len(runs) == count


# -- Redis away -----------------------------------------------------------------------------------------------------


def test_they_fail_closed(own_redis: RedisProcess, make_state: MakeState) -> None:
    """Without Redis nothing is granted: every primitive raises, in bounded time."""
    state = make_state(own_redis.url)
    own_redis.kill()
    attempts: list[Callable[[], object]] = [
        lambda: state.lock("l").acquire(),
        lambda: state.rate_limit("r", 1, 1).hit(),
        lambda: state.counter("c").add(),
        lambda: state.dict("d").fresh("k"),
        lambda: state.broadcast.publish("c", 1),
    ]
    for attempt in attempts:
        began = time.monotonic()
        with pytest.raises(StateUnavailableError):
            attempt()
        assert time.monotonic() - began < 5
    assert not state.leader.is_leader
