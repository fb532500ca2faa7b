"""Who is picked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.cluster.messages import Connection
from sharedcluster.cluster.scheduling import RoundRobin
from sharedcluster.cluster.worker_handle import CREDIT, WorkerState
from tests.unit.cluster.fake_workers import worker


def test_each_in_turn() -> None:
    """Idle workers are picked in the order in which they joined, for ever."""
    policy = RoundRobin()
    for id in (1, 2, 3):
        policy.add(worker(id))
    assert [policy.pick(None).id for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]  # type: ignore[union-attr]


def test_a_worker_that_does_not_acknowledge_is_passed_over() -> None:
    """It gets up to its credit, and that only when nobody is free of debts; then nothing."""
    policy = RoundRobin()
    stuck, free = worker(1), worker(2)
    policy.add(stuck)
    policy.add(free)
    stuck.unacknowledged[1] = Connection(-1, 0, None)
    assert [policy.pick(None) for _ in range(3)] == [free, free, free]
    free.unacknowledged[1] = Connection(-1, 0, None)
    assert {policy.pick(None), policy.pick(None)} == {stuck, free}
    for each in (stuck, free):
        for seq in range(CREDIT):
            each.unacknowledged[seq] = Connection(-1, 0, None)
    assert policy.pick(None) is None


def test_nobody_is_there() -> None:
    """Without workers, and after the last has left, nobody is picked."""
    policy = RoundRobin()
    assert policy.pick(None) is None
    only = worker(1)
    policy.add(only)
    policy.remove(only)
    assert policy.pick(("127.0.0.1", 1)) is None


@given(st.lists(st.sampled_from(["add", "remove", "pick", "ack"]), max_size=60), st.randoms(use_true_random=False))
def test_never_one_without_credit(steps: list[str], random: object) -> None:
    """Whatever joins, leaves and acknowledges: a pick has credit, and None means that nobody has."""
    policy, members, next_id = RoundRobin(), [], 1
    for step in steps:
        if step == "add":
            members.append(worker(next_id))
            policy.add(members[-1])
            next_id += 1
        elif step == "remove" and members:
            policy.remove(members.pop(0))
        elif step == "ack" and members:
            members[-1].unacknowledged.clear()
        else:
            picked = policy.pick(None)
            if picked is None:
                assert not any(each.has_credit for each in members)
            else:
                assert picked in members
                assert picked.has_credit
                assert picked.state is WorkerState.LISTENING
                picked.unacknowledged[len(picked.unacknowledged)] = Connection(-1, 0, None)
