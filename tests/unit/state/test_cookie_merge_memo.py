"""Cookies, merging and cache keys: pure functions, by table and by property."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.state.cookie import Cookie, CookieSigner
from sharedcluster.state.memo import UncacheableArgumentError, call_key
from sharedcluster.state.merge import merge

SIGNER = CookieSigner(["secret"])


@given(st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True), st.integers(0, 2**53), st.integers(0, 2**50))
def test_a_signed_cookie_is_read_back(sid: str, version: int, issued: int) -> None:
    """Sign and verify are inverse."""
    cookie = Cookie(sid, version, issued)
    assert SIGNER.verify(SIGNER.sign(cookie)) == cookie


@given(st.text(max_size=200))
def test_garbage_is_no_cookie(text: str) -> None:
    """Anything a client can send that we did not sign is None, never an exception."""
    assert SIGNER.verify(text) is None


@given(st.integers(0, 500), st.characters(codec="ascii"))
def test_every_changed_character_is_noticed(index: int, character: str) -> None:
    """Neither id, version nor time can be changed."""
    text = SIGNER.sign(Cookie("s" * 43, 1_700_000_000_000_000, 1_700_000_000_000))
    index %= len(text)
    forged = text[:index] + character + text[index + 1 :]
    assert (SIGNER.verify(forged) is None) == (forged != text)


def test_a_replaced_cookie_is_forgotten_and_still_good() -> None:
    """What a client holds is remembered once, not each that it has held; one that comes late is read as any other."""
    signer = CookieSigner(["secret"])
    first = text = signer.sign(Cookie("s" * 43, 1, 1))
    for version in range(2, 100):
        cookie = signer.verify(text)
        assert cookie is not None
        text = signer.renew(cookie, version, version)
    assert len(signer._known) == 1
    assert signer.verify(first) == Cookie("s" * 43, 1, 1)
    latest = signer.verify(text)
    assert latest == Cookie("s" * 43, 99, 99)
    assert latest is not None
    assert latest.name == Cookie("s" * 43, 0, 0).name


def test_redis_gets_a_hash() -> None:
    """What the session is called in Redis does not lead back to the cookie."""
    assert Cookie("abc", 0, 0).name == "ba7816bf8f01cfea414140de5dae2223"


@pytest.mark.parametrize(
    ("base", "theirs", "mine", "merged"),
    [
        (1, 1, 2, 2),
        (1, 2, 1, 2),
        (1, 2, 3, 3),
        ([1], [1, 2], [1, 3], [1, 2, 3]),
        ([1], [2], [1, 3], [1, 3]),
        ({"a": 1}, {"a": 1, "b": 2}, {"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}),
        ({"a": 1, "b": 1}, {"b": 1}, {"a": 1, "b": 2}, {"b": 2}),
        ({"a": 1}, {}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {"a": 2}, {}, {"a": 2}),
        (None, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}),
        (None, [1], [2], [1, 2]),
        ({"a": {"x": [1]}}, {"a": {"x": [1, 2]}}, {"a": {"x": [1, 3], "y": 0}}, {"a": {"x": [1, 2, 3], "y": 0}}),
        ("a", [1], {"b": 1}, {"b": 1}),
    ],
)
def test_merge(base: Any, theirs: Any, mine: Any, merged: Any) -> None:
    """Dicts per key, lists by their tails, all else the last writer."""
    assert merge(base, theirs, mine) == merged


@given(
    st.dictionaries(st.text("ab", max_size=2), st.integers()),
    st.dictionaries(st.text("ab", max_size=2), st.integers()),
)
def test_merging_with_no_change_is_the_change(base: dict[str, int], other: dict[str, int]) -> None:
    """If one side did nothing, the other's work is the result."""
    assert merge(base, other, base) == other
    assert merge(base, base, other) == other


def function(a: Any, b: Any = None, *args: Any, c: Any = 0, **kwargs: Any) -> None:
    """Something to call."""


def key(*args: Any, **kwargs: Any) -> str:
    """The cache key of a call of `function`."""
    return call_key(function, args, kwargs)


@pytest.mark.parametrize(
    "calls",
    [
        [lambda: key(1), lambda: key(1, None), lambda: key(a=1), lambda: key(b=None, a=1), lambda: key(1, c=0)],
        [lambda: key({"x": 1, "y": 2}), lambda: key({"y": 2, "x": 1})],
        [lambda: key({1, 2, 3}), lambda: key({3, 2, 1})],
        [lambda: key(1, x=1, y=2), lambda: key(1, y=2, x=1)],
    ],
)
def test_the_same_call_has_one_key(calls: list[Callable[[], str]]) -> None:
    """However its arguments are written."""
    assert len({call() for call in calls}) == 1


class Colour(Enum):
    """Two values with a name."""

    RED = 1
    BLUE = 2


class Row:
    """An object that says what tells it apart."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __cache_key__(self) -> int:
        return self.number


def test_different_calls_have_different_keys() -> None:
    """Types count, nesting counts, falsy values are values."""
    arguments = [
        1, True, 1.0, "1", b"1", None, 0, "", [], (), {}, set(), frozenset(), [1], (1,), [[1]], {"a": 1}, {1: "a"},
        ["a", "b"], ["a,b"], ["ab", ""], Colour.RED, Colour.BLUE, Row(1), Row(2), int, len,
    ]  # fmt: skip
    assert len({key(argument) for argument in arguments}) == len(arguments)
    assert key(1, 2) != key(2, 1)
    assert key(1, x=2) != key(1, y=2)


def test_an_object_without_a_key_is_refused() -> None:
    """Its repr holds an address: such a key never hits, or hits the next object that lives there."""
    with pytest.raises(UncacheableArgumentError, match=r"function\(b\) is a object.*__cache_key__"):
        key(1, object())
    assert call_key(function, (1, object()), {}, ignore=["b"]) == call_key(function, (1, object()), {}, ignore=["b"])


def test_changed_code_has_another_key() -> None:
    """After a deploy the old version's values are not served by the new one."""

    def one() -> int:
        return 1

    def two() -> int:
        return 2

    two.__qualname__ = one.__qualname__
    assert call_key(one, (), {}) != call_key(two, (), {})


def test_what_is_not_given_by_place_counts_too() -> None:
    """A call without arguments is the same as one that gives the defaults, for names and for any number of places."""

    def by_name(*, size: int = 1) -> None: ...

    def any_number(*values: int, **named: int) -> None: ...

    def both(first: int, *, size: int = 1) -> None: ...

    assert call_key(by_name, (), {}) == call_key(by_name, (), {"size": 1})
    assert call_key(by_name, (), {}) != call_key(by_name, (), {"size": 2})
    assert call_key(any_number, (), {}) != call_key(any_number, (1,), {})
    assert call_key(both, (1,), {}) == call_key(both, (1,), {"size": 1})
    assert call_key(both, (1,), {}) == call_key(both, (), {"first": 1})
