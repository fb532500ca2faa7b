"""The small pure parts: the wheel of deadlines, whom to believe, counters, and parked greenlets."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gevent
import pytest
from greenlet import getcurrent, greenlet
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedcluster.errors import ConfigError
from sharedcluster.http.connection import Connection
from sharedcluster.http.counters import Counters
from sharedcluster.http.deadlines import GONE, SLOTS, TICK, Wheel
from sharedcluster.http.forwarded import AllowList, Forwarding
from sharedcluster.http.greenlets import PARKED, WARY, GreenletPool
from sharedcluster.http.policy import Refused
from sharedcluster.http.request import HeadReader
from sharedcluster.http.settings import HttpSettings
from sharedcluster.http.tls import TlsConnection


class Item:
    """Something that expires, and leaves the wheel then."""

    def __init__(self, wheel: Wheel, expiry: float) -> None:
        self.expiry = expiry
        self.slot = GONE
        self.expired_at: float | None = None
        self.wheel = wheel
        wheel.add(self)

    def expire(self, now: float) -> None:
        """Note it."""
        assert self.expired_at is None
        self.expired_at = now
        self.wheel.remove(self)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 400), st.one_of(st.none(), st.floats(0, 400))), max_size=30), st.floats(0.05, 40)
)
def test_everything_expires_once_and_on_time(plans: list[tuple[float, float | None]], step: float) -> None:
    """However the expiries are moved and however rarely the wheel is turned: never early, at most a turn late."""
    wheel = Wheel()
    start = wheel.now
    items = [Item(wheel, start + first) for first, _ in plans]
    for item, (first, second) in zip(items, plans, strict=True):
        if second is not None:
            item.expiry = start + second
            if second < first:
                wheel.sooner(item)
    now = start
    while now < start + 420:
        now += step
        wheel.turn(now)
    for item in items:
        assert item.expired_at is not None
        assert item.expiry <= item.expired_at <= item.expiry + step + 2 * TICK


def test_removed_items_never_expire() -> None:
    """Also if one that expires removes another that is due in the same turn."""
    wheel = Wheel()
    first, second = Item(wheel, wheel.now), Item(wheel, wheel.now)
    for item, other in ((first, second), (second, first)):
        item.expire = lambda now, other=other: wheel.remove(other)  # type: ignore[method-assign,misc]
    wheel.turn(wheel.now + 1)
    assert (first.slot == GONE) != (second.slot == GONE)
    wheel.turn(wheel.now + TICK * SLOTS * 3)


@pytest.mark.parametrize(
    ("entries", "inside", "outside"),
    [
        (["127.0.0.1"], ["127.0.0.1", "::ffff:127.0.0.1"], ["127.0.0.2", "", "nonsense", "::1"]),
        (["10.0.0.0/8", "2001:db8::/32"], ["10.9.8.7", "2001:db8::1"], ["11.0.0.1", "2001:db9::1"]),
        (["*"], ["1.2.3.4", "::1"], []),
        ([""], [], ["127.0.0.1"]),
    ],
)
def test_allow_list(entries: list[str], inside: list[str], outside: list[str]) -> None:
    """Addresses, networks, everyone, nobody."""
    allowed = AllowList(entries)
    assert all(address in allowed for address in inside)
    assert not any(address in allowed for address in outside)


def test_allow_list_refuses_nonsense() -> None:
    """A typing error is told, not ignored."""
    with pytest.raises(ConfigError, match=r"10\.0\.0\.256"):
        AllowList(["10.0.0.256"])
    with pytest.raises(ConfigError, match="fro"):
        Forwarding(AllowList([]), ["fro"], bool)


def forwarded(fields: dict[str, str], *kinds: str) -> dict[str, object]:
    """What an allowed peer's fields make of an environ."""
    site: dict[str, object] = {"SERVER_NAME": "s", "wsgi.url_scheme": "http"}
    settings = HttpSettings(forwarded_headers=kinds or ("for", "proto", "host", "port", "prefix"))
    reader = HeadReader(settings, site, AllowList(["127.0.0.1", "10.0.0.0/8"]))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return reader.read(f"GET / HTTP/1.1\r\nHost: a:1\r\n{lines}\r\n".encode()).environ_for("127.0.0.1", "4711")


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ("192.0.2.1", "192.0.2.1"), ("6.6.6.6, 192.0.2.1", "192.0.2.1"), ("192.0.2.1, 10.0.0.1", "192.0.2.1"),
        ("10.0.0.2, 10.0.0.1", "10.0.0.2"), ("192.0.2.1:4711", "192.0.2.1"), ("[2001:db8::1]:80", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"), ("unknown", "127.0.0.1"), ("6.6.6.6, unknown, 10.0.0.1", "10.0.0.1"),
        ("", "127.0.0.1"), ("1.2.3.4, <script>", "127.0.0.1"),
    ],
)  # fmt: skip
def test_chain_is_walked_from_the_right(chain: str, client: str) -> None:
    """The first address that is not allowed itself is the client; what is left of it is the client's word."""
    assert forwarded({"X-Forwarded-For": chain})["REMOTE_ADDR"] == client


def test_host_port_and_prefix() -> None:
    """They are taken when they are named in the settings, and judged."""
    environ = forwarded({"X-Forwarded-Host": "evil, b", "X-Forwarded-Port": "8443", "X-Forwarded-Prefix": "/app/"})
    assert (environ["HTTP_HOST"], environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("b:8443", "b", "8443")
    assert environ["SCRIPT_NAME"] == "/app"
    for bad in ({"X-Forwarded-Host": "a b"}, {"X-Forwarded-Port": "x"}, {"X-Forwarded-Prefix": "app"}):
        with pytest.raises(Refused):
            forwarded(bad)
    assert forwarded({"X-Forwarded-Host": "evil"}, "for", "proto")["HTTP_HOST"] == "a:1"


def test_rfc_7239() -> None:
    """`Forwarded` counts when it is named, and then alone."""
    fields = {"Forwarded": 'for=6.6.6.6, for="[2001:db8::1]:4711";proto=HTTPS;host=b', "X-Forwarded-For": "6.6.6.6"}
    environ = forwarded(fields, "forwarded")
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"], environ["HTTP_HOST"]) == ("2001:db8::1", "https", "b")
    assert forwarded(fields, "proto")["REMOTE_ADDR"] == "127.0.0.1"
    with pytest.raises(Refused):
        forwarded({"Forwarded": 'for="open'}, "forwarded")


def test_pictures_have_every_counter() -> None:
    """A picture is plain numbers, and adds up across workers."""
    counters = Counters()
    counters.by_class[2] += 1
    counters.latency[40] += 1
    picture = counters.picture(3, 1)
    assert picture.by_class == (0, 1, 0, 0, 0)
    assert sum(picture.latency) == 1
    assert all(isinstance(getattr(picture, field.name), int | tuple) for field in fields(picture))


class Work:
    """A job that notes its greenlet, and perhaps waits."""

    def __init__(self, *, waits: bool = False, is_clean: bool = True) -> None:
        self.waits = waits
        self.is_clean = is_clean
        self.ran_in: Any = None
        self.is_done = False
        self.has_left = False

    def leave(self) -> None:
        """Note it."""
        self.has_left = True

    def run(self, worker: greenlet) -> bool:
        """Run."""
        assert worker is getcurrent()
        self.ran_in = worker
        if self.waits:
            gevent.sleep(0)
        self.is_done = True
        return self.is_clean


class FaultyWork(Work):
    """A job with a bug in it."""

    def run(self, worker: greenlet) -> bool:
        """Fail."""
        self.is_done = True
        raise ZeroDivisionError("a bug of ours")


def run_in_hub(pool: GreenletPool, *jobs: Work) -> None:
    """Start jobs from the loop, as connections do."""

    def start(job: Work) -> None:
        worker = pool.parked.pop() if pool.parked else pool.make()
        worker.switch(job)

    for job in jobs:
        gevent.get_hub().loop.run_callback(start, job)
    with gevent.Timeout(10):
        while not all(job.is_done for job in jobs):
            gevent.sleep(0)
    gevent.sleep(0)


def test_greenlets_are_used_again() -> None:
    """One after the other they share one greenlet; at once they need more; what was thrown into is not used again."""
    pool = GreenletPool(gevent.get_hub(), Work)
    jobs = [Work() for _ in range(5)]
    run_in_hub(pool, *jobs)
    assert len({id(job.ran_in) for job in jobs}) == 1
    run_in_hub(pool, *[Work(waits=True) for _ in range(PARKED + 20)])
    assert len(pool.parked) == PARKED
    dirty = Work(is_clean=False)
    run_in_hub(pool, dirty)
    assert dirty.ran_in not in pool.parked


def run_together(pool: GreenletPool, *jobs: Work) -> None:
    """Make jobs ready in one pass of the loop."""
    pool.ready.extend(jobs)
    gevent.get_hub().loop.run_callback(pool.run_ready)
    with gevent.Timeout(10):
        while not all(job.is_done for job in jobs):
            gevent.sleep(0)
    gevent.sleep(0)


def test_what_is_ready_together_shares_a_greenlet() -> None:
    """Jobs that do not wait run one behind the other in one greenlet; behind one that waits they go on in another."""
    pool = GreenletPool(gevent.get_hub(), Work)
    jobs = [Work() for _ in range(5)]
    run_together(pool, *jobs)
    assert len({id(job.ran_in) for job in jobs}) == 1
    waiting, *others = Work(waits=True), Work(), Work()
    run_together(pool, waiting, *others)
    assert waiting.ran_in is not others[0].ran_in
    assert others[0].ran_in is others[1].ran_in
    dirty, after = Work(is_clean=False), Work()
    run_together(pool, dirty, after)
    assert dirty.ran_in is not after.ran_in
    assert dirty.ran_in not in pool.parked


def test_a_bug_in_one_job_does_not_keep_the_others() -> None:
    """What comes out of a job goes to the hub, which reports it; the jobs behind it run all the same."""
    pool = GreenletPool(gevent.get_hub(), Work)
    jobs = [Work(), FaultyWork(), Work(), FaultyWork(), Work()]
    run_together(pool, *jobs)
    assert not pool.ready


def test_stray_wakeups_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """A forgotten switch is ignored; a forgotten Timeout ends the parked greenlet only, and is reported."""
    pool = GreenletPool(gevent.get_hub(), Work)
    run_in_hub(pool, Work())
    parked: Any = pool.parked[0]
    gevent.get_hub().loop.run_callback(parked.switch, "stray")
    gevent.sleep(0.01)
    again = Work()
    run_in_hub(pool, again)
    assert again.ran_in is parked
    gevent.get_hub().loop.run_callback(parked.throw, gevent.Timeout(1))
    gevent.sleep(0.01)
    assert pool.parked == []
    assert "Timeout" in caplog.text
    last = Work()
    run_in_hub(pool, last)
    assert last.ran_in is not None


class Answers:
    """A pool whose jobs take as long as they say, and the order in which they leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool = GreenletPool(gevent.get_hub(), Answer)
        self.left: list[Answer] = []
        self.now = 0
        monkeypatch.setattr("sharedcluster.http.greenlets.monotonic_ns", lambda: self.now)

    def make(self, count: int, microseconds: int = 10, **how: bool) -> list[Answer]:
        """Jobs that take so long."""
        return [Answer(self, microseconds, **how) for _ in range(count)]


class Answer(Work):
    """A job whose answer may leave with those of others."""

    def __init__(self, answers: Answers, microseconds: int, **how: bool) -> None:
        super().__init__(**how)
        self.answers = answers
        self.microseconds = microseconds
        self.was_held = False
        self.done_when_left = 0

    def run(self, worker: greenlet) -> bool:
        """Compute, and leave or be held."""
        self.answers.now += self.microseconds * 1000
        is_clean = super().run(worker)
        self.was_held = self.answers.pool.holds_back()
        if self.was_held:
            self.answers.pool.hold(self)
        else:
            self.leave()
        return is_clean

    def leave(self) -> None:
        """Note when."""
        super().leave()
        self.answers.left.append(self)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Of one pool."""
    return Answers(monkeypatch)


def test_answers_of_one_pass_leave_together(answers: Answers) -> None:
    """Behind the last of them, in their order; one that is alone is not held."""
    jobs = answers.make(5)
    seen: list[list[bool]] = []
    jobs[0].leave = lambda: seen.append([job.is_done for job in jobs])  # type: ignore[method-assign]
    run_together(answers.pool, *jobs)
    assert seen == [[True] * 5]
    assert answers.left == jobs[1:]
    (alone,) = answers.make(1)
    run_in_hub(answers.pool, alone)
    assert not alone.was_held
    assert alone.has_left


def test_nobody_waits_for_a_job_that_waits(answers: Answers) -> None:
    """What is held leaves when the job behind it gives the turn away."""
    (quick,), (waiting,) = answers.make(1), answers.make(1, waits=True)
    run_together(answers.pool, quick, waiting)
    assert quick.was_held
    assert answers.left == [quick, waiting]


@pytest.mark.parametrize("quick", [1, 20])
@pytest.mark.parametrize("behind", [0, 1])
def test_slow_jobs_are_waited_for_once(answers: Answers, quick: int, behind: int) -> None:
    """The first slow one delays who was held before it; then, for a thousand answers, nobody is held."""
    jobs = answers.make(quick) + answers.make(1, 5000) + answers.make(behind)
    run_together(answers.pool, *jobs)
    assert all(job.was_held for job in jobs[:quick])
    assert answers.left == jobs
    many = answers.make(WARY + 1)  # the last one has nobody to wait for
    run_together(answers.pool, *many)
    assert not any(job.was_held for job in many)
    after = answers.make(2)
    run_together(answers.pool, *after)
    assert all(job.was_held for job in after)


def test_many_quick_jobs_leave_in_time_and_go_on_being_held(answers: Answers) -> None:
    """After a millisecond they leave, though more is to be done; that many were made shows that none was slow."""
    jobs = answers.make(60, 100)
    done: list[int] = []
    jobs[0].leave = lambda: done.append(sum(job.is_done for job in jobs))  # type: ignore[method-assign]
    run_together(answers.pool, *jobs)
    assert done == [12]  # the clock starts when the first one is done, and is looked at behind each
    assert all(job.was_held for job in jobs)
    assert answers.left == jobs[1:]


def test_a_bug_in_leaving_keeps_nobody(answers: Answers) -> None:
    """The others leave all the same."""
    jobs = answers.make(4)

    def fail() -> None:
        raise ZeroDivisionError("a bug of ours")

    jobs[1].leave = fail  # type: ignore[method-assign]
    run_together(answers.pool, *jobs)
    with gevent.Timeout(10):
        while len(answers.left) < 3:
            gevent.sleep(0)
    assert answers.left == [jobs[0], *jobs[2:]]


def test_a_greenlet_that_ends_lets_go_of_what_is_held(answers: Answers) -> None:
    """One into which something was thrown is not used again; what others have given it leaves all the same."""
    jobs = answers.make(1) + answers.make(1, is_clean=False)
    run_together(answers.pool, *jobs)
    assert jobs[0].was_held
    assert answers.left == jobs


def test_what_is_encrypted_is_never_sent_by_itself() -> None:
    """An answer over TLS is not held: `send_now` would put its text on the wire."""
    assert not TlsConnection.sends_now
    assert Connection.sends_now
