"""Sessions: the first three rows of the guarantee table, and what keeps them cheap."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from markupsafe import Markup

from sharedcluster.errors import StateUnavailableError
from sharedcluster.state import SharedState
from sharedcluster.state.codec import CodecError
from sharedcluster.state.cookie import Cookie, CookieSigner
from sharedcluster.state.save_parts import SessionTooLargeError
from sharedcluster.state.session import Session
from sharedcluster.state.sessions import CookieAction
from tests.redis_process import RedisProcess
from tests.state.browser import SIGNER, Browser
from tests.state.conftest import MakeState
from tests.waiting import wait_until


def commands_of(state: SharedState, function: Any) -> int:
    """How many commands of ours a function sends, heartbeats aside."""
    before = state.commit.commands, state.subscriber.beats
    function()
    return (state.commit.commands - before[0]) - (state.subscriber.beats - before[1])


# -- cost -------------------------------------------------------------------------------------------------------------


def test_an_untouched_session_costs_no_command(state: SharedState) -> None:
    """A request that never looks at its session asks Redis nothing, cookie or not."""
    browser = Browser()
    browser.set(state, a=1)
    assert commands_of(state, lambda: browser.save(state, browser.open(state))) == 0


def test_a_warm_read_costs_no_command_and_a_write_one(state: SharedState) -> None:
    """Reading what this worker has near is free; any number of changed fields is one script, one round trip."""
    browser = Browser()
    browser.set(state, a=1)
    browser.get(state, "a")
    assert commands_of(state, lambda: browser.get(state, "a")) == 0
    before = state.commit.exchanges - state.subscriber.beats
    assert commands_of(state, lambda: browser.set(state, a=2, b=3, c=[1, 2])) == 1
    assert state.commit.exchanges - state.subscriber.beats - before == 1


def test_setting_what_was_there_is_no_write(state: SharedState) -> None:
    """A view that sets the value that is stored already writes nothing and sets no cookie."""
    browser = Browser()
    browser.set(state, a={"x": 1})
    session = browser.open(state)
    session["a"] = {"x": 1}
    assert commands_of(state, lambda: browser.save(state, session)) == 0


# -- sequential client ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0.0, 0.3, 1.0])
def test_a_sequential_client_reads_its_writes_on_any_worker(
    make_state: MakeState, monkeypatch: pytest.MonkeyPatch, lost: float
) -> None:
    """Read-your-writes and monotonic reads over three workers, even if invalidations are lost, as often as you like.

    The near copy is never older than the version in the signed cookie; without that check this fails (see below).
    """
    workers = [make_state() for _ in range(3)]
    for worker in workers:
        lose_invalidations(worker, monkeypatch, lost)
    assert stale_reads(workers, turns=300) == 0


def test_without_the_version_in_the_cookie_it_would_fail(
    make_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard is what does it: a cookie that always says version 0 lets stale reads through."""
    workers = [make_state() for _ in range(3)]
    for worker in workers:
        lose_invalidations(worker, monkeypatch, 1.0)
    renew = CookieSigner.renew
    monkeypatch.setattr(
        CookieSigner, "renew", lambda signer, cookie, version, issued: renew(signer, cookie, 0, issued)
    )
    assert stale_reads(workers, turns=100) > 0


def lose_invalidations(worker: SharedState, monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    """Let this share of the session invalidations go unheard."""
    near = worker._session_near
    original = near.invalidate_many
    own = threading.get_ident()

    def invalidate_many(told: Iterable[tuple[str, bytes]]) -> None:
        is_own = threading.get_ident() == own
        original([each for each in told if is_own or random.random() >= part])

    monkeypatch.setattr(near, "invalidate_many", invalidate_many)


def stale_reads(workers: list[SharedState], turns: int) -> int:
    """How often one client, going from worker to worker, sees less than it has seen or written."""
    browser, last, stale = Browser(), 0, 0
    browser.set(workers[0], n=0)
    for turn in range(1, turns):
        worker = random.choice(workers)
        if random.random() < 0.4:
            browser.set(worker, n=turn)
            last = turn
        elif (found := browser.get(worker, "n")) != last:
            stale += 1
            last = found
    return stale


def test_reads_are_monotonic_when_somebody_else_writes(make_state: MakeState) -> None:
    """A response that served something newer than its cookie hands out a newer cookie: no going back afterwards."""
    first, second = make_state(), make_state()
    browser = Browser()
    browser.set(first, n=1)
    other = Browser()
    other.cookie = browser.cookie  # a second tab
    browser.get(second, "n")  # second has version 1 near
    other.set(first, n=2)
    old = browser.cookie
    wait_until(lambda: browser.get(second, "n") == 2, "the other tab's write")
    assert browser.cookie != old
    wanted = SIGNER.verify(browser.cookie)
    assert wanted is not None
    assert wanted.version == SIGNER.verify(other.cookie).version  # type: ignore[union-attr]


# -- parallel requests ------------------------------------------------------------------------------------------------


def test_parallel_requests_on_different_keys_lose_nothing(make_state: MakeState) -> None:
    """Two workers, eight threads, one session: every acknowledged write to each key is there at the end (800 of 800).

    A store that writes the whole session keeps about half of these.
    """
    workers = [make_state(), make_state()]
    browser = Browser()
    browser.set(workers[0], start=True)

    def write(number: int) -> None:
        own = Browser()
        own.cookie = browser.cookie
        for _ in range(100):
            own.visit(workers[number % 2], lambda s: s.__setitem__(f"k{number}", [*s.get(f"k{number}", []), 1]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)

    def lengths(worker: SharedState) -> dict[str, int]:
        return {key: len(value) for key, value in browser.visit(worker, dict).items() if key != "start"}

    everything = {f"k{n}": 100 for n in range(8)}
    assert lengths(make_state()) == everything  # it has no copy: this is what Redis holds
    # A copy may be as old as the cookie that asks for it, until the last message has been heard; not for longer.
    for worker in workers:
        wait_until(lambda worker=worker: lengths(worker) == everything, "the last write is known")  # type: ignore[misc]


def test_a_writer_that_was_overtaken_keeps_no_half_old_view(make_state: MakeState) -> None:
    """Two workers write different keys of one session with near copies on: neither serves the other's old field.

    This is the trap of delta writes: the writer's own view is base + its delta, but the version it gets back covers
    the other's delta too.
    """
    first, second = make_state(), make_state()
    browser = Browser()
    browser.set(first, a=0, b=0)
    one, two = Browser(), Browser()
    for turn in range(1, 60):
        one.cookie = two.cookie = browser.cookie
        session_one, session_two = one.open(first), two.open(second)
        session_one.get("a")
        session_two.get("b")
        session_one["a"] = turn
        session_two["b"] = turn
        one.save(first, session_one)
        two.save(second, session_two)  # overtaken by one's write
        browser.cookie = two.cookie
        assert (browser.get(second, "a"), browser.get(second, "b")) == (turn, turn)
        assert (browser.get(first, "a"), browser.get(first, "b")) == (turn, turn)


def test_merge_keeps_both_writers_of_one_key(make_state: MakeState) -> None:
    """With SHAREDCLUSTER_SESSION_MERGE, parallel changes inside one dict or list are both kept."""
    first, second = make_state(session_merge=True), make_state(session_merge=True)
    browser = Browser()
    browser.set(first, cart={"old": 1, "gone": 1}, log=["start"])
    one, two = Browser(), Browser()
    one.cookie = two.cookie = browser.cookie
    session_one, session_two = one.open(first), two.open(second)
    session_one["cart"]["a"] = 1
    session_one["log"].append("one")
    session_two["cart"]["b"] = 2
    del session_two["cart"]["gone"]
    session_two["log"].append("two")
    one.save(first, session_one)
    two.save(second, session_two)
    browser.cookie = two.cookie
    assert browser.get(first, "cart") == {"old": 1, "a": 1, "b": 2}
    assert browser.get(second, "log") == ["start", "one", "two"]


# -- the end of a session ---------------------------------------------------------------------------------------------


def test_logout_is_final(make_state: MakeState) -> None:
    """A late write of a request that began before logout brings nothing back, and sets no cookie."""
    first, second = make_state(), make_state()
    browser = Browser()
    browser.set(first, user="ann")
    late = browser.open(second)
    assert late["user"] == "ann"
    stolen = browser.cookie
    assert browser.visit(first, lambda session: session.clear()) is None
    assert browser.cookie == ""
    late["cart"] = [1]
    outcome = second.sessions.save(late, SIGNER)
    assert outcome.action is CookieAction.KEEP
    thief = Browser()
    thief.cookie = stolen
    for worker in (first, second):
        wait_until(lambda w=worker: thief.visit(w, dict) == {}, "the session is gone everywhere")  # type: ignore[misc]
    assert second.counts["session_late_writes"] == 1


def test_an_unknown_id_is_never_adopted(state: SharedState) -> None:
    """A validly signed cookie whose session does not exist gets a new session under a new id."""
    browser = Browser()
    browser.cookie = SIGNER.sign(Cookie("planted", 1, int(time.time() * 1000)))
    browser.set(state, a=1)
    cookie = SIGNER.verify(browser.cookie)
    assert cookie is not None
    assert cookie.sid != "planted"


@pytest.mark.parametrize("how", ["rotate", "clear"])
def test_login_leaves_no_way_in_through_the_old_id(make_state: MakeState, how: str) -> None:
    """After rotation the old id leads nowhere on any worker, and the data is under the new one."""
    first, second = make_state(), make_state()
    browser, fixed = Browser(), Browser()
    browser.set(first, cart=[1])
    fixed.cookie = browser.cookie
    fixed.get(second, "cart")

    def log_in(session: Session) -> None:
        session.rotate() if how == "rotate" else session.clear()
        session["user"] = "ann"

    browser.visit(first, log_in)
    assert SIGNER.verify(browser.cookie).sid != SIGNER.verify(fixed.cookie).sid  # type: ignore[union-attr]
    assert browser.get(second, "user") == "ann"
    assert browser.get(second, "cart") == ([1] if how == "rotate" else None)
    wait_until(lambda: fixed.get(second, "cart") is None, "the old id is dead")
    fixed.set(second, user="evil")
    assert browser.get(first, "user") == "ann"


@pytest.mark.parametrize("how", ["rotate", "clear"])
def test_a_request_that_raced_with_login_does_not_replace_its_cookie(make_state: MakeState, how: str) -> None:
    """It arrives with the old id right after the login: it sees nothing, stores nothing and sets no cookie."""
    first, second = make_state(), make_state()
    browser, racing = Browser(), Browser()
    browser.set(first, a=1)
    racing.cookie = browser.cookie

    def log_in(session: Session) -> None:
        session.rotate() if how == "rotate" else session.clear()
        session["user"] = "ann"

    browser.visit(first, log_in)
    wait_until(lambda: racing.get(second, "a") is None, "the old id is dead")
    session = racing.open(second)
    session["csrf"] = "x"
    assert racing.save(second, session).action is CookieAction.KEEP
    # Who means to begin anew with it can: another login.
    racing.visit(second, lambda session: session.rotate())
    session = racing.open(second)
    session.rotate()
    session["user"] = "bob"
    assert racing.save(second, session).action is CookieAction.SET
    assert browser.get(second, "user") == "ann"
    assert racing.get(first, "user") == "bob"


def test_a_user_can_be_logged_out_everywhere(make_state: MakeState) -> None:
    """bind_user lists a user's sessions; revoke ends one, revoke_user all but the present one."""
    first, second = make_state(), make_state()
    browsers = [Browser() for _ in range(4)]
    for browser in browsers:
        browser.visit(first, lambda session: session.bind_user("ann"))
        browser.visit(first, lambda session: session.rotate())  # the index follows
    sessions = second.sessions.list_user("ann")
    assert len(sessions) == 4
    assert second.sessions.revoke(sessions[0].id)
    assert not second.sessions.revoke(sessions[0].id)
    assert len(second.sessions.list_user("ann")) == 3
    sid = browsers[3].open(first).sid or ""
    assert second.sessions.revoke_user("ann", keep=sid) == 2
    wait_until(lambda: [b.open(first).new for b in browsers] == [True, True, True, False], "only one is left")


# -- expiry -----------------------------------------------------------------------------------------------------------


def test_idle_sessions_end_and_used_ones_are_touched(state: SharedState) -> None:
    """Reading keeps a session alive, at a throttled cost; not using it ends it."""
    browser = Browser(idle=3.0)
    browser.set(state, a=1)
    issued = browser.cookie
    end, reads = time.monotonic() + 4.5, 0
    while time.monotonic() < end:
        assert browser.get(state, "a") == 1
        reads += 1
        time.sleep(0.05)
    assert browser.cookie != issued
    assert 1 <= state.counts["session_touches"] <= reads / 2
    wait_until(lambda: browser.open(state).get("a") is None, "idle sessions end", deadline=8)


def test_an_absolute_deadline_cannot_be_touched_away(make_state: MakeState) -> None:
    """With an absolute timeout a session ends although it is used all the time."""
    state = make_state(session_absolute_timeout=1.5)
    browser = Browser(idle=60)
    browser.set(state, a=1)

    def write_on() -> bool:
        browser.visit(state, lambda session: session.__setitem__("b", random.random()))
        return browser.get(state, "a") is None

    wait_until(write_on, "the absolute deadline", deadline=5, interval=0.1)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_values_keep_their_types(make_state: MakeState, codec: str) -> None:
    """What Flask's own session keeps faithfully is kept, over another worker, with either codec."""
    first, second = make_state(codec=codec), make_state(codec=codec)
    values: dict[str, Any] = {
        "tuple": (1, ("a", [2, (3,)])),
        "bytes": b"\x00\xff",
        "markup": Markup("<b>x</b>"),
        "uuid": uuid4(),
        "datetime": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "tagged": {" t": [1]},
        "nested": {"a": {"b": [Markup("y"), None, 1.5, True]}},
        "@odd": "a name like ours",
        "_flashes": [("message", "hello")],
        "text": "ünïcode \N{GRINNING FACE} \x00",
    }
    browser = Browser()
    browser.set(first, **values)
    found = browser.visit(second, lambda session: session.copy())
    assert found == values
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in values.items()}


def test_changes_inside_values_are_noticed(state: SharedState) -> None:
    """session["cart"].append(...) needs no session.modified, however deep."""
    browser = Browser()
    browser.set(state, cart=[{"n": 1}], other={"x": [1]})
    browser.visit(state, lambda session: session["cart"][0].update(n=2))
    browser.visit(state, lambda session: session["other"]["x"].append(2))
    assert browser.get(state, "cart") == [{"n": 2}]
    assert browser.get(state, "other") == {"x": [1, 2]}


def test_one_request_never_sees_anothers_unsaved_change(state: SharedState) -> None:
    """Near copies are bytes: changing a value in one request does not leak into the next."""
    browser = Browser()
    browser.set(state, cart=[1])
    browser.open(state)["cart"].append("leak")
    assert browser.get(state, "cart") == [1]


def test_what_cannot_be_stored_names_its_key(state: SharedState) -> None:
    """Nobody has to guess which value it was."""
    browser = Browser()
    with pytest.raises(CodecError, match=r"session\['handle'\].*object cannot be stored"):
        browser.set(state, fine=1, handle=object())
    with pytest.raises(SessionTooLargeError, match=r"session\['big'\] is 20002 bytes"):
        browser.set(state, big="x" * 20_000)
    with pytest.raises(TypeError, match="keys are strings"):
        browser.visit(state, lambda session: session.__setitem__(1, 2))  # type: ignore[index]


def test_limits_hold_for_each_write(state: SharedState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is there as of a new one: one large value, many together; what was stored before counts."""
    limits = dataclasses.replace(state.settings, session_field_limit=1000, session_limit=3000)
    monkeypatch.setattr(state.sessions._parts, "_settings", limits)
    browser = Browser()
    browser.set(state, a=1)
    with pytest.raises(SessionTooLargeError, match=r"session\['b'\] is 1002 bytes"):
        browser.set(state, b="x" * 1000)
    browser.set(state, b="x" * 900, c="x" * 900)
    with pytest.raises(SessionTooLargeError, match="the session is"):
        browser.set(state, d="x" * 600, e="x" * 600)
    browser.set(state, d="x" * 900)
    with pytest.raises(SessionTooLargeError, match="the session is"):
        browser.set(state, e="x" * 900)  # small enough by itself
    assert browser.visit(state, lambda session: sorted(session)) == ["a", "b", "c", "d"]


def test_a_write_may_remove_bind_and_rotate_as_well(make_state: MakeState) -> None:
    """Whatever else a request wants of a session that it writes to: all of it has happened for every worker."""
    first, second = make_state(), make_state()
    browser = Browser()
    browser.set(first, a=1, b=2)

    def change(session: Session) -> None:
        session["a"] = 3
        session.bind_user("ann")

    browser.visit(first, change)
    assert browser.visit(second, lambda session: (session["a"], session.user)) == (3, "ann")
    browser.visit(first, lambda session: session.pop("b"))
    assert browser.visit(second, lambda session: (session.copy(), session.user)) == ({"a": 3}, "ann")
    assert len(second.sessions.list_user("ann")) == 1

    def renew(session: Session) -> None:
        session.update(a=4, c=5)
        session.rotate()

    browser.visit(second, renew)
    assert browser.visit(first, lambda session: (session.copy(), session.user)) == ({"a": 4, "c": 5}, "ann")
    browser.visit(first, lambda session: session.pop("c"))
    assert browser.visit(second, lambda session: session.copy()) == {"a": 4}


def test_it_is_a_mapping(state: SharedState) -> None:
    """The dict operations applications use."""
    browser = Browser()
    browser.set(state, a=1, b=2, c=3)

    def use(session: Session) -> None:
        assert sorted(session) == ["a", "b", "c"]
        assert len(session) == 3
        assert session.pop("a") == 1
        assert "a" not in session
        assert session.pop("a", None) is None
        assert session.setdefault("d", [1]) == [1]
        session["d"].append(2)
        del session["b"]
        with pytest.raises(KeyError):
            session["b"]
        with pytest.raises(KeyError):
            del session["b"]
        session["b"] = 9
        assert dict(session) == {"c": 3, "d": [1, 2], "b": 9}

    browser.visit(state, use)
    assert browser.visit(state, lambda session: session.copy()) == {"c": 3, "d": [1, 2], "b": 9}


# -- keys and secrets -------------------------------------------------------------------------------------------------


def test_redis_never_sees_the_id(state: SharedState) -> None:
    """Who reads keys, dumps or the slow log cannot use what is there as a cookie."""
    browser = Browser()
    browser.set(state, a=1)
    sid = SIGNER.verify(browser.cookie).sid  # type: ignore[union-attr]
    keys = state.commit.call("KEYS", f"{state.namespace}:s:*")
    assert len(keys) == 1
    assert sid.encode() not in keys[0]


def test_a_fallback_key_is_accepted_and_replaced(state: SharedState) -> None:
    """SECRET_KEY_FALLBACKS: old cookies are still good, and signed anew with the current key."""
    browser = Browser()
    browser.set(state, a=1)
    rotated = CookieSigner(["new key", "test key"])
    session = state.sessions.open(rotated, lambda: [browser.cookie], 60)
    assert session["a"] == 1
    outcome = state.sessions.save(session, rotated)
    assert CookieSigner(["new key"]).verify(outcome.value) is not None
    assert CookieSigner(["other"]).verify(browser.cookie) is None


# -- Redis away -------------------------------------------------------------------------------------------------------


def test_redis_away_is_never_a_silent_logout(own_redis: RedisProcess, make_state: MakeState) -> None:
    """A touched session raises (503) instead of looking empty; an untouched one is not even noticed."""
    state = make_state(own_redis.url)
    browser = Browser()
    browser.set(state, user="ann")
    own_redis.kill()
    wait_until(lambda: not state.subscriber.is_trusted(), "the loss is noticed")
    with pytest.raises(StateUnavailableError):
        browser.get(state, "user")
    browser.save(state, browser.open(state))


def test_a_session_that_redis_lost_is_counted_and_not_resurrected(
    own_redis: RedisProcess, make_state: MakeState
) -> None:
    """Redis restarts empty: the old id is not adopted, near copies are dropped, a new session begins."""
    state = make_state(own_redis.url)
    browser = Browser()
    browser.set(state, user="ann")
    browser.get(state, "user")
    own_redis.kill()
    own_redis.start()

    def is_new() -> bool:
        try:
            return browser.open(state).new
        except StateUnavailableError:
            return False

    wait_until(is_new, "the loss is seen")
    wait_until(lambda: state.subscriber.gaps >= 1, "the gap is counted")
    before = browser.cookie
    browser.set(state, user="bob")
    assert SIGNER.verify(browser.cookie).sid != SIGNER.verify(before).sid  # type: ignore[union-attr]


def test_a_regressed_version_is_seen(state: SharedState) -> None:
    """A failover that lost writes gives back an older version than the cookie's: served, counted, cookie renewed."""
    browser = Browser()
    browser.set(state, n=1)
    cookie = SIGNER.verify(browser.cookie)
    assert cookie is not None
    browser.cookie = SIGNER.sign(Cookie(cookie.sid, cookie.version + 1000, cookie.issued))
    assert browser.get(state, "n") == 1
    assert state.counts["session_regressed"] == 1
    assert SIGNER.verify(browser.cookie).version == cookie.version  # type: ignore[union-attr]


def test_a_session_of_very_many_fields(state: SharedState, make_state: MakeState) -> None:
    """More than fit into one command of the script: all are written, by whoever, and any of them removed."""
    other = make_state()
    browser = Browser()
    browser.set(state, **{f"k{number}": number for number in range(1203)})
    assert browser.visit(other, len) == 1203

    def change(session: Session) -> None:
        for number in range(0, 1203, 2):
            del session[f"k{number}"]
        session.update({f"k{number}": -number for number in range(1, 1203, 2)}, new=1)

    browser.visit(other, change)
    assert browser.visit(state, dict) == {**{f"k{number}": -number for number in range(1, 1203, 2)}, "new": 1}


def test_a_merging_save_removes_too(make_state: MakeState) -> None:
    """What is removed stands behind what was written and what it was compared with."""
    state = make_state(session_merge=True)
    browser = Browser()
    browser.set(state, a=1, b=2, c=3)

    def change(session: Session) -> None:
        session["a"] = 10
        del session["b"]

    browser.visit(state, change)
    assert browser.visit(make_state(session_merge=True), dict) == {"a": 10, "c": 3}
