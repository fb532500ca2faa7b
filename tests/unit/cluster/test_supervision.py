"""reconcile: what there is and what is desired, in; what has to be done, out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sharedcluster.cluster import supervision as s
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState
from tests.unit.cluster.fake_workers import worker

W = WorkerState
STEADY = s.Desired(2, 1, 1, graceful_timeout=30, heartbeat_timeout=30, boot_timeout=60)


def act(
    workers: list[WorkerHandle],
    desired: s.Desired = STEADY,
    crashes: dict[int, s.Crashes] | None = None,
    now: float = 1.0,
    *,
    ever: bool = True,
) -> list[s.Action]:
    """Reconcile at `now`."""
    return s.reconcile(desired, workers, crashes or {}, now, ever_listened=ever)


def test_boot_spawns_every_slot() -> None:
    """Nothing there: one worker for each slot."""
    assert act([], ever=False) == [s.Spawn(0, 1), s.Spawn(1, 1)]


@pytest.mark.parametrize("state", [W.FORKED, W.ONLINE, W.LISTENING])
def test_enough_is_enough(state: WorkerState) -> None:
    """As many as desired, in whatever state of coming up: nothing to do."""
    assert act([worker(1, 0, state=state), worker(2, 1, state=state)]) == []


def test_a_missing_slot_is_filled_after_its_delay() -> None:
    """A crashed slot is respawned when its delay has passed and not before."""
    alive, crashes = worker(2, 1), {0: s.Crashes(3, respawn_at=5.0)}
    assert act([alive], crashes=crashes, now=4.9) == []
    assert act([alive], crashes=crashes, now=5.0) == [s.Spawn(0, 1)]


def test_scaling() -> None:
    """Up: new slots at the end. Down: the highest slots drain, once the others listen."""
    a, b = worker(1, 0), worker(2, 1)
    assert act([a, b], replace(STEADY, workers=4)) == [s.Spawn(2, 1), s.Spawn(3, 1)]
    assert act([a, b], replace(STEADY, workers=1), now=2) == [s.DrainWorker(b, 32, "scale")]
    booting = worker(1, 0, state=W.FORKED)
    assert act([booting, b], replace(STEADY, workers=1)) == []


def test_a_reload_replaces_first() -> None:
    """The old generation serves until the new one is complete; then it is promoted and the old one drains."""
    reload = replace(STEADY, generation=2)
    old = [worker(1, 0), worker(2, 1)]
    assert act(old, reload) == [s.Spawn(0, 2), s.Spawn(1, 2)]
    half = [worker(3, 0, generation=2), worker(4, 1, generation=2, state=W.ONLINE)]
    assert act([*old, *half], reload) == []
    full = [half[0], worker(5, 1, generation=2)]
    assert act([*old, *full], reload) == [
        s.Promote(),
        s.DrainWorker(old[0], 31, "reload"),
        s.DrainWorker(old[1], 31, "reload"),
    ]


def test_a_new_generation_that_does_not_load_is_abandoned() -> None:
    """One newcomer that failed is enough; nobody of the old generation is touched."""
    broken = worker(3, 0, generation=2, state=W.ONLINE)
    broken.load_failure = ("it raised", "Traceback")
    actions = act([worker(1, 0), worker(2, 1), broken], replace(STEADY, generation=2))
    assert actions == [s.AbandonReload(broken)]


def test_a_retiring_worker_leaves_after_its_replacement() -> None:
    """Recycling is a reload of one."""
    tired, other = worker(1, 0), worker(2, 1)
    tired.retiring = "max-requests"
    assert act([tired, other]) == [s.Spawn(0, 1)]
    assert act([tired, other, worker(3, 0)]) == [s.DrainWorker(tired, 31, "max-requests")]


def test_the_ladder() -> None:
    """A moment past its drain deadline: TERM; past the grace after that: KILL; then it is waited for."""
    leaving = worker(1, 0, state=W.DRAINING)
    leaving.deadline = 10.0 - s.LEAVE_GRACE
    others = [worker(2, 0), worker(3, 1)]
    assert act([leaving, *others], now=9.9) == []
    assert [type(a) for a in act([leaving, *others], now=10.0)] == [s.Terminate]
    leaving.terminated_at = 10.0
    assert act([leaving, *others], now=11.9) == []
    assert [type(a) for a in act([leaving, *others], now=12.0)] == [s.Kill]
    leaving.killed = True
    assert act([leaving, *others], now=13.0) == []


def test_a_loop_that_stands_still_is_dumped_and_ended() -> None:
    """No heartbeat for the timeout: stacks first, then TERM. A timeout of 0 switches it off."""
    still, fine = worker(1, 0, at=0.0), worker(2, 1, at=29.0)
    assert [type(a) for a in act([still, fine], now=30.0)] == [s.Dump, s.Terminate]
    assert act([still, fine], replace(STEADY, heartbeat_timeout=0), now=30.0) == []


def test_a_boot_that_takes_too_long_is_ended() -> None:
    """A worker that is not ready within the boot timeout is dumped and ended."""
    slow = worker(1, 0, state=W.ONLINE)
    assert [type(a) for a in act([slow, worker(2, 1, at=59)], now=60.0)] == [s.Dump, s.Terminate]


def test_stop_drains_everybody_and_replaces_nobody() -> None:
    """Stopping: all drain with the deadline that is left; empty slots stay empty."""
    up, coming = worker(1, 0), worker(2, 1, state=W.FORKED)
    actions = act([up, coming], replace(STEADY, stopping=True, graceful_timeout=7), now=1)
    assert actions == [s.DrainWorker(up, 8, "stop"), s.DrainWorker(coming, 8, "stop")]
    assert act([], replace(STEADY, stopping=True)) == []


def test_stop_now_terminates_then_kills() -> None:
    """Stop now: out of rotation and TERM at once, KILL after the grace."""
    now = replace(STEADY, stopping=True, now_or_never=True)
    up = worker(1, 0)
    assert [type(a) for a in act([up], now)] == [s.DrainWorker, s.Terminate]
    up.state, up.terminated_at = W.DRAINING, 1.0
    assert act([up], now, now=2.9) == []
    assert [type(a) for a in act([up], now, now=3.0)] == [s.Kill]


@pytest.mark.parametrize(
    ("ever", "unstable", "serving", "ends"),
    [
        (False, 4, False, False),
        (False, 5, False, True),
        (True, 15, False, False),
        (True, 16, False, True),
        (True, 99, True, False),
    ],
)
def test_giving_up(ever: bool, unstable: int, serving: bool, ends: bool) -> None:
    """Workers that never came up, or keep dying: the end; but never while one of them serves."""
    workers = [worker(2, 1)] if serving else []
    actions = act(workers, crashes={0: s.Crashes(unstable, respawn_at=99)}, ever=ever)
    assert any(isinstance(a, s.GiveUp) for a in actions) is ends


def test_delays_grow_and_are_forgotten() -> None:
    """x 1.5 from 0.1 s up to 15 s; half a minute of service and the record is clean."""
    record, delays = s.Crashes(), []
    for _ in range(16):
        record = s.after_exit(record, worker(1, state=W.FORKED), now=100.0)
        delays.append(record.respawn_at - 100.0)
    assert delays[:3] == pytest.approx([0.1, 0.15, 0.225])
    assert max(delays) == 15.0
    assert s.after_exit(record, worker(1, at=0.0), now=40.0) == s.Crashes(0, 40.0)
    assert s.forgiven(record, worker(1, at=0.0), now=30.0).unstable == 0
    assert s.forgiven(record, worker(1, at=0.0), now=29.0).unstable == 16


def test_the_first_crash_of_a_stable_worker_is_replaced_at_once() -> None:
    """A worker that served for a while and is killed leaves no gap."""
    assert s.after_exit(s.Crashes(), worker(1, at=0.0), now=10.0) == s.Crashes(0, 10.0)


@pytest.mark.parametrize(
    ("end", "killed_before", "speaks"),
    [(-15, 0, False), (-9, 1, False), (-9, 2, True), (-11, 0, True), (0, 0, True), (3, 0, True)],
)
def test_what_ends_a_reload(end: int, killed_before: int, speaks: bool) -> None:
    """An exit or a crash of a newcomer does; a TERM or KILL from outside does so the third time."""
    assert s.speaks_against_new_code(end, killed_before) is speaks
