"""Who is picked."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.cluster.board import STANDS_STILL
from sharedcluster.cluster.messages import Connection
from sharedcluster.cluster.scheduling import LeastConnections, RoundRobin, Sticky
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
            for each in members:
                each.row.waits(0, 0, 0)
            picked = policy.pick(None)
            if picked is None:
                assert not any(each.has_credit for each in members)
            else:
                assert picked in members
                assert picked.has_credit
                assert picked.state is WorkerState.LISTENING
                picked.unacknowledged[len(picked.unacknowledged)] = Connection(-1, 0, None)


def test_one_that_stands_still_is_passed_over() -> None:
    """A loop that has worked for long without a pause gets nothing, unless all are like that."""
    policy = RoundRobin()
    still, fine = worker(1), worker(2)
    policy.add(still)
    policy.add(fine)
    still.row.works()
    deadline = time.monotonic_ns() + 2 * STANDS_STILL
    while time.monotonic_ns() < deadline:
        pass
    fine.row.waits(0, 0, 0)
    assert [policy.pick(None) for _ in range(3)] == [fine, fine, fine]
    fine.unacknowledged = dict.fromkeys(range(CREDIT), Connection(-1, 0, None))
    assert policy.pick(None) is None
    policy.remove(fine)
    assert policy.pick(None) is still


def test_least_connections_looks_at_work_then_at_connections() -> None:
    """The least in flight; then the fewest connections; then in turn. What was handed over counts."""
    policy = LeastConnections()
    a, b, c = worker(1), worker(2), worker(3)
    for each in (a, b, c):
        policy.add(each)
    a.row.waits(in_flight=2, connections=2, requests=0)
    b.row.waits(in_flight=1, connections=9, requests=0)
    c.row.waits(in_flight=1, connections=5, requests=0)
    assert policy.pick(None) is c
    c.unacknowledged[1] = Connection(-1, 0, None)
    assert policy.pick(None) is b
    for each in (a, b, c):
        each.unacknowledged.clear()
        each.row.waits(0, 0, 0)
    assert {policy.pick(None) for _ in range(3)} == {a, b, c}


@given(st.integers(2, 12), st.lists(st.ip_addresses(v=4).map(str), min_size=20, max_size=60, unique=True))
def test_sticky_clients_move_only_with_their_own_slot(slots: int, clients: list[str]) -> None:
    """The same address, the same slot; when a slot goes, the clients of the other slots stay where they are."""
    policy = Sticky()
    handles = [worker(id, id) for id in range(slots)]
    for each in handles:
        policy.add(each)
    before = {client: policy.pick((client, 1)).slot for client in clients}  # type: ignore[union-attr]
    assert before == {client: policy.pick((client, 2)).slot for client in clients}  # type: ignore[union-attr]
    policy.remove(handles[0])
    for client, slot in before.items():
        now = policy.pick((client, 3))
        assert now is not None
        assert slot == 0 or now.slot == slot
    replacement = worker(99, 0)
    policy.add(replacement)
    assert {client: policy.pick((client, 1)).slot for client in clients} == before  # type: ignore[union-attr]


def test_sticky_waits_for_its_worker() -> None:
    """A client whose worker has no credit gets nobody else; one without an address is taken in turn."""
    policy = Sticky()
    a, b = worker(1, 0), worker(2, 1)
    policy.add(a)
    policy.add(b)
    mine = policy.pick(("192.0.2.7", 1))
    assert mine is not None
    mine.unacknowledged = dict.fromkeys(range(CREDIT), Connection(-1, 0, None))
    assert policy.pick(("192.0.2.7", 1)) is None
    assert policy.pick(None) is not mine


def test_sticky_prefers_the_newcomer_of_a_reload() -> None:
    """During a reload two workers fill a slot: the newer one has its clients, also after the old one has left."""
    policy = Sticky()
    old, new = worker(1, 0), worker(2, 0, generation=2)
    policy.add(old)
    policy.add(new)
    assert policy.pick(("192.0.2.7", 1)) is new
    policy.remove(old)
    assert policy.pick(("192.0.2.7", 1)) is new


def test_sticky_a_slot_goes_back_to_who_had_it() -> None:
    """Of two workers with one slot the newer has it; when that one fails, the older has it again."""
    policy = Sticky()
    old, other, new = worker(1, 0), worker(2, 1), worker(3, 0, generation=2)
    for each in (old, other):
        policy.add(each)
    peers = [(f"10.0.0.{n}", 1) for n in range(50)]
    before = [policy.pick(peer) for peer in peers]
    policy.add(new)
    assert [policy.pick(peer) for peer in peers] == [new if w is old else w for w in before]
    policy.remove(new)
    assert [policy.pick(peer) for peer in peers] == before
