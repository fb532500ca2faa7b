"""Who is in rotation: entering, leaving, resting, in every order."""

from __future__ import annotations

import selectors

from sharedcluster.cluster.hand_off import REST, HandOff
from sharedcluster.cluster.scheduling import RoundRobin
from tests.unit.cluster.fake_workers import worker


class Counted(RoundRobin):
    """A policy that is asked how often somebody is in it."""

    def count(self) -> int:
        """Places in the round."""
        return len(self._ring)


def test_a_worker_is_in_the_round_once_at_the_most() -> None:
    """It rests and comes back; it rests, enters anew, and its rest ends; it rests, leaves, and its rest ends."""
    policy = Counted()
    hand_off = HandOff([], policy, selectors.DefaultSelector())
    one = worker(1)
    hand_off.enter(one)
    hand_off.rest(one, 0.0)
    assert policy.count() == 0
    hand_off.watch(REST)
    assert policy.count() == 1
    hand_off.rest(one, 1.0)
    hand_off.enter(one)
    hand_off.watch(1.0 + REST)
    assert policy.count() == 1
    hand_off.rest(one, 2.0)
    hand_off.leave(one)
    hand_off.watch(2.0 + REST)
    assert policy.count() == 0
    assert not hand_off.is_waiting
