"""The application the consistency checker asks, and the switches that take one guard each out of the product.

CONSISTENCY_GUARD_OFF names a guard to be switched off: the checker must then find violations, or it proves nothing.
CONSISTENCY_CHAOS=1 makes readers slow between their read and what they do with it, which is only bad luck.
CONSISTENCY_LOSE names the share of session invalidations that go unheard: sequential clients must not notice.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, request, session

from sharedcluster import SharedCluster
from sharedcluster.state import SharedState
from sharedcluster.state import connection as connection_room
from sharedcluster.state import scripting as script_room
from sharedcluster.state.broadcast import Subscription
from sharedcluster.state.cache_store import ALL
from sharedcluster.state.cookie import CookieSigner
from sharedcluster.state.near import Near
from sharedcluster.state.primitives import LockLostError, LockTimeoutError
from sharedcluster.state.session import Session, SessionDelta
from sharedcluster.state.sessions import SessionStore
from sharedcluster.state.subscriber import Subscriber

app = Flask("consistency")
app.config.update(SECRET_KEY="consistency", SHAREDCLUSTER_NAMESPACE="cc")
shared = SharedCluster(app)

HISTORY = 100_000


@app.post("/session")
def use_session() -> dict[str, Any]:
    """Tell what is in the session, then set, or clear it."""
    job = request.get_json()
    seen = dict(session)
    if job.get("clear"):
        session.clear()
    elif job.get("set"):
        time.sleep(job.get("hold", 0))
        session.update(job["set"])
    return {"seen": seen, "pid": os.getpid()}


@app.post("/cache")
def use_cache() -> dict[str, Any]:
    """Set, delete, read."""
    job = request.get_json()
    for key, value in job.get("set", {}).items():
        shared.cache.set(key, value, timeout=600)
    return {"values": {key: shared.cache.get(key) for key in job.get("get", ())}, "pid": os.getpid()}


@app.post("/row")
def use_rows() -> dict[str, Any]:
    """Change a row (a counter stands for the database) and delete what was computed from it; or read it cached."""
    job = request.get_json()
    if (key := job.get("bump")) is not None:
        number = shared.counter(key).add(once=job["once"])
        shared.cache.delete(f"row:{key}")
        return {"number": number}
    cache = shared.state.cache

    def compute(key: str) -> Callable[[], int]:
        def read() -> int:
            value = shared.counter(key).value
            time.sleep(random.uniform(0, 0.003))
            return value

        return read

    return {"values": {key: cache.get_or_compute(f"row:{key}", compute(key), 600) for key in job["get"]}}


@app.post("/dict")
def use_dict() -> dict[str, Any]:
    """One attempt to count with compare_and_set."""
    numbers = shared.dict("numbers")
    name = request.get_json()["name"]
    seen = numbers.fresh(name)
    if seen is None:
        numbers.setdefault(name, 0)
        seen = numbers.fresh(name)
    time.sleep(random.uniform(0, 0.001))
    return {"seen": seen, "ok": numbers.compare_and_set(name, seen, seen + 1)}


@app.post("/lock")
def use_lock() -> dict[str, Any]:
    """A critical section; the times are of the one monotonic clock all processes of a machine share."""
    lock = shared.lock(request.get_json()["name"], timeout=2, wait=3)
    try:
        with lock:
            began = time.monotonic()
            time.sleep(random.uniform(0, 0.004))
            ended = time.monotonic()
        return {"fence": lock.fence, "began": began, "ended": ended, "kept": True}
    except LockTimeoutError:
        return {"fence": 0, "kept": False}
    except LockLostError:
        return {"fence": lock.fence, "kept": False}


@app.post("/publish")
def publish() -> dict[str, Any]:
    """Publish one message."""
    job = request.get_json()
    return {"position": shared.publish(job["channel"], job["data"], history=HISTORY, once=job.get("once", ""))}


@app.get("/events/<channel>")
def events(channel: str) -> Response:
    """Listen."""
    return shared.stream(channel)


@app.get("/plain")
def plain() -> str:
    """Nothing shared."""
    return "plain"


@app.get("/pid")
def pid() -> dict[str, Any]:
    """Which worker this is, and what it counts."""
    facts = shared.state.facts()
    return {"pid": os.getpid(), "gaps": facts.gaps, "counts": dict(facts.counts)}


# -- bad luck -------------------------------------------------------------------------------------------------------


def make_readers_slow() -> None:
    """Replies reach the code that asked a little later, so that messages overtake them."""
    exchange, settle = connection_room.GroupCommit.exchange, connection_room.GroupCommit.settle

    def wait() -> None:
        if random.random() < 0.2:
            time.sleep(random.uniform(0, 0.003))

    def slow_exchange(*args: Any) -> list[Any]:
        replies = exchange(*args)
        wait()
        return replies

    def slow_settle(*args: Any, **named: Any) -> Any:
        reply = settle(*args, **named)
        wait()
        return reply

    connection_room.GroupCommit.exchange = slow_exchange  # type: ignore[method-assign, assignment]
    connection_room.GroupCommit.settle = slow_settle  # type: ignore[method-assign]


def lose_invalidations(part: float) -> None:
    """Let this share of the messages about written sessions go unheard; that one has ended is always heard."""
    original = SharedState._hear_invalidations

    def thin(payload: bytes) -> bytes:
        kind, *words = payload.split(b" ")
        if kind != b"s":
            return payload
        heard = [
            word
            for pair in zip(words[::2], words[1::2], strict=True)
            if pair[0] == b"-" or random.random() >= part
            for word in pair
        ]
        return b" ".join((kind, *heard)) if heard else b""

    def hear(state: SharedState, payloads: list[bytes]) -> None:
        original(state, [payload for payload in map(thin, payloads) if payload])

    SharedState._hear_invalidations = hear  # type: ignore[method-assign, assignment]


# -- guards, to be switched off --------------------------------------------------------------------------------------


def without_cookie_version() -> None:
    """The cookie no longer says what its holder has seen."""
    original = CookieSigner.renew
    CookieSigner.renew = lambda signer, cookie, version, issued: original(signer, cookie, 0, issued)  # type: ignore[method-assign, assignment]


def without_fill_guard() -> None:
    """A reader that was overtaken by an invalidation keeps what it read."""
    Near.begin = lambda near: 10**15  # type: ignore[method-assign, assignment]


def without_trust() -> None:
    """Near copies are believed without proof of delivery."""
    Subscriber.is_trusted = lambda subscriber: True  # type: ignore[method-assign, assignment]


def without_forgetting() -> None:
    """After a gap near copies stay."""
    Near.forget = lambda near: None  # type: ignore[method-assign, assignment]


def without_delta() -> None:
    """The whole session is written, not what changed."""
    original = Session.delta

    def delta(each: Session) -> SessionDelta:
        changes = original(each)
        return SessionDelta({**each._stored, **changes.written}, changes.removed) if not changes.is_empty else changes

    Session.delta = delta  # type: ignore[method-assign, assignment]


def without_exact_view() -> None:
    """After an own write the near copy is base and own fields, whoever has written in between."""
    original = SessionStore._end

    def saved(store: Any, saving: Any, reply: Any) -> Any:
        saving.begun = 10**15
        return original(store, saving, reply[1] if type(reply) is list and reply[0] == 1 else reply)

    SessionStore._end = saved  # type: ignore[method-assign, assignment]


def replace_in_script(name: str, old: str, new: str) -> Callable[[], None]:
    """Take a condition out of a script."""

    def replace() -> None:
        sha = script_room.script_sha(name)
        text = script_room._TEXTS[sha]
        assert old in text, (name, old)
        broken = text.replace(old, new)
        import hashlib

        broken_sha = hashlib.sha1(broken.encode(), usedforsecurity=False).hexdigest()
        script_room._TEXTS[broken_sha] = broken
        plain = script_room.script_sha

        def script_sha(asked: str) -> str:
            return broken_sha if asked == name else plain(asked)

        script_room.script_sha = script_sha  # type: ignore[assignment]

    return replace


def without_catching_up() -> None:
    """What a stream has missed is not read from history."""
    Subscription._catch_up = lambda subscription: []  # type: ignore[method-assign, assignment]
    Subscription._is_missing_before = lambda subscription, message: False  # type: ignore[method-assign, assignment]


GUARDS: dict[str, Callable[[], None]] = {
    "cookie-version": without_cookie_version,
    "fill-guard": without_fill_guard,
    "trust": without_trust,
    "forget-after-gap": without_forgetting,
    "delta-writes": without_delta,
    "exact-view": without_exact_view,
    "no-resurrection": replace_in_script("session_save", "if not previous and not creates then return {0} end", ""),
    "lease-token": replace_in_script(
        "cache_set", "if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end", ""
    ),
    "catching-up": without_catching_up,
    "lock-nx": replace_in_script("lock_acquire", "ARGV[1], 'NX', 'PX'", "ARGV[1], 'PX'"),
    "compare": replace_in_script("dict_write", "(kind == 'cas' and stored ~= ARGV[at + 2])", "false"),
}

if os.environ.get("CONSISTENCY_CHAOS"):
    make_readers_slow()
if os.environ.get("CONSISTENCY_LOSE"):
    lose_invalidations(float(os.environ["CONSISTENCY_LOSE"]))
if guard := os.environ.get("CONSISTENCY_GUARD_OFF"):
    GUARDS[guard]()
assert ALL == "*"
