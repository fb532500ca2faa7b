"""The near cache's rules, without Redis: every interleaving of a small world is tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from sharedcluster.state.near import Near


def make_near(*, entries: int = 100, size: int = 10_000, max_age: float = 60.0, ordered: bool = False) -> Near[str]:
    """A near cache whose delivery is always proven."""
    return Near(lambda: True, entries=entries, size=size, max_age=max_age, ordered=ordered)


@pytest.mark.parametrize(
    ("told", "mark", "is_dropped"), [(9, 10, False), (10, 9, True), (10, 10, False), (99, 100, False)]
)
def test_versions_are_compared_as_numbers(told: int, mark: int, is_dropped: bool) -> None:
    """A message of an older version says nothing against a newer entry, however many digits they have."""
    near = make_near(ordered=True)
    near.fill("k", "value", near.begin(), mark=b"%d" % mark)
    near.invalidate("k", b"%d" % told)
    assert (near.get("k") is None) == is_dropped


class World:
    """One value in Redis, one worker with a near copy, two readers, two writers; messages arrive in order."""

    def __init__(self, *, guarded: bool, ordered: bool) -> None:
        self.stored = 0
        self.near: Near[str] = make_near(ordered=ordered)
        self.messages: list[int] = []
        self.guarded = guarded
        self.read: dict[str, tuple[int, int]] = {}

    def step(self, name: str) -> None:
        """One thing that can happen."""
        kind, who = name[0], name[1:]
        if kind == "w":  # a write elsewhere: Redis changes and publishes at once
            self.stored += 1
            self.messages.append(self.stored)
        elif kind == "d":  # the next message is delivered
            version = self.messages.pop(0)
            self.near.invalidate("k", b"%d" % version)
        elif kind == "r":  # a reader asks Redis
            self.read[who] = (self.near.begin(), self.stored)
        else:  # and fills the near cache with what it got
            begun, version = self.read[who]
            begun = begun if self.guarded else 10**9
            self.near.fill("k", str(version), begun, mark=b"%d" % version)


def interleavings() -> Iterator[list[str]]:
    """All orders of: two reads with their fills, two writes with their deliveries, in which causes precede effects."""
    steps = ["r1", "f1", "r2", "f2", "w", "w", "d", "d"]
    seen: set[tuple[str, ...]] = set()
    for order in set(itertools.permutations(steps)):
        if order in seen or order.index("r1") > order.index("f1") or order.index("r2") > order.index("f2"):
            continue
        balance = list(itertools.accumulate({"w": 1, "d": -1}.get(step, 0) for step in order))
        if min(balance) >= 0:
            seen.add(order)
            yield list(order)


def stale_worlds(*, guarded: bool, ordered: bool = False) -> int:
    """In how many interleavings an old value is left near although every message has been delivered."""
    count = 0
    for order in interleavings():
        world = World(guarded=guarded, ordered=ordered)
        for step in order:
            world.step(step)
        entry = world.near.get("k")
        count += entry is not None and entry.value != str(world.stored)
    return count


@pytest.mark.parametrize("ordered", [False, True])
def test_no_interleaving_leaves_a_stale_entry(ordered: bool) -> None:
    """The fill guard closes the race between a slow reader and an invalidation that overtakes it."""
    assert stale_worlds(guarded=True, ordered=ordered) == 0


@pytest.mark.parametrize("ordered", [False, True])
def test_without_the_guard_some_do(ordered: bool) -> None:
    """The model can fail: without the guard the race is there."""
    assert stale_worlds(guarded=False, ordered=ordered) > 0


def test_the_echo_of_an_older_write_drops_nothing() -> None:
    """With versions as marks: a late message about version 5 neither drops nor refuses version 6; one about 7 does."""
    near = make_near(ordered=True)
    begun = near.begin()
    near.invalidate("k", b"5")
    assert near.fill("k", "six", begun, mark=b"6") is not None
    near.invalidate("k", b"5")
    near.invalidate("k", b"6")
    assert near.get("k") is not None
    begun = near.begin()
    near.invalidate("k", b"10")  # more digits, not less
    assert near.get("k") is None
    assert near.fill("k", "six again", begun, mark=b"6") is None
    near.invalidate("k")
    assert near.fill("k", "ended", begun, mark=b"99") is None


def test_untrusted_delivery_means_no_entry_and_no_fill() -> None:
    """Law 1: while delivery is not proven nothing near is used, and nothing is kept."""
    trusted = [True]
    near: Near[str] = Near(lambda: trusted[0], entries=10, size=1000, max_age=60)
    near.fill("k", "v", near.begin())
    assert near.get("k") is not None
    trusted[0] = False
    assert near.get("k") is None
    assert near.begin() == 0
    assert near.fill("k", "w", near.begin()) is None


def test_a_fill_from_before_a_gap_is_refused() -> None:
    """Law 4: what was read before the gap may have been changed during it."""
    near = make_near()
    begun = near.begin()
    near.forget()
    assert near.fill("k", "old", begun) is None
    assert near.fill("k", "new", near.begin()) is not None


def test_an_own_write_stays_and_a_later_one_of_others_removes_it() -> None:
    """Law 3: the message of the very write an entry was made from does not drop it; the next one does."""
    near = make_near()
    begun = near.begin()
    near.invalidate("k", b"mine")  # the message may come before the reply is handled
    assert near.fill("k", "v", begun, mark=b"mine") is not None
    near.invalidate("k", b"mine")  # or after
    assert near.get("k") is not None
    near.invalidate("k", b"theirs")
    assert near.get("k") is None


def test_an_own_write_that_was_overtaken_is_refused() -> None:
    """Two writes, messages in order of the writes: only the last one may be kept."""
    near = make_near()
    begun = near.begin()
    near.invalidate("k", b"mine")
    near.invalidate("k", b"theirs")
    assert near.fill("k", "v", begun, mark=b"mine") is None


def test_a_refused_own_write_still_removes_what_was_there() -> None:
    """Who has written never reads the older value afterwards, even if the new one may not be kept."""
    near = make_near()
    near.fill("k", "old", near.begin())
    assert near.fill("k", "new", 0, mark=b"mine") is None
    assert near.get("k") is None


def test_tags_drop_what_carries_them_and_guard_fills() -> None:
    """A tag's invalidation removes its entries and refuses fills that began before it."""
    near = make_near()
    near.fill("a", "1", near.begin(), tags=("red", "big"))
    near.fill("b", "2", near.begin(), tags=("big",))
    begun = near.begin()
    near.invalidate_tag("red")
    assert near.get("a") is None
    assert near.get("b") is not None
    assert near.fill("c", "3", begun, tags=("red",)) is None
    assert near.fill("c", "3", begun, tags=("blue",)) is not None


@pytest.mark.parametrize(("entries", "size", "left"), [(3, 10_000, 3), (100, 50, 5)])
def test_it_is_bounded(entries: int, size: int, left: int) -> None:
    """The least recently used go first when entries or bytes are too many."""
    near = make_near(entries=entries, size=size)
    for number in range(20):
        near.fill(f"k{number}", "v", near.begin(), size=10)
        near.note_use("k0")
    assert len(near) == left
    assert near.get("k19") is not None
    assert near.get("k0") is not None


def test_the_table_of_recent_invalidations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it overflows, fills that began before are refused, and later ones are fine."""
    monkeypatch.setattr("sharedcluster.state.near.RECENT_LIMIT", 5)
    near = make_near()
    begun = near.begin()
    for number in range(6):
        near.invalidate(f"k{number}")
    assert near.fill("other", "v", begun) is None
    assert near.fill("other", "v", near.begin()) is not None


@pytest.mark.parametrize("ordered", [False, True])
def test_told_together_is_told_one_by_one(ordered: bool) -> None:
    """Whatever is told of which names: the same entries are left, and the same fills are accepted afterwards."""
    marks = [b"", b"8", b"9", b"10"]
    for pairs in itertools.product(itertools.product(["a", "b"], marks), repeat=2):
        left = []
        for together in (False, True):
            near = make_near(ordered=ordered)
            for name in ("a", "b"):
                near.fill(name, name, near.begin(), mark=b"9")
            begun = near.begin()
            if together:
                near.invalidate_many(pairs)
            else:
                for name, mark in pairs:
                    near.invalidate(name, mark)
            kept = [name for name in ("a", "b") if near.get(name) is not None]
            filled = [near.fill(name, name, begun, mark=mark) is not None for name in ("a", "b") for mark in marks]
            left.append((kept, filled))
        assert left[0] == left[1]


def test_a_deletion_is_never_overlooked() -> None:
    """A message without a mark drops an entry without one, and refuses a fill that was under way."""
    near = make_near()
    begun = near.begin()
    near.fill("k", "value", begun)
    near.invalidate("k")
    assert near.get("k") is None
    assert near.fill("k", "value", begun) is None


def test_what_is_asked_for_after_a_message_is_kept() -> None:
    """Only a read that was under way is refused: the next one is remembered, whatever was heard before."""
    near = make_near()
    for number in range(5):
        near.invalidate_many([("k", b"%d" % number), ("other", b""), ("k", b"")])
        assert near.fill("k", "value", near.begin(), mark=b"mine") is not None
