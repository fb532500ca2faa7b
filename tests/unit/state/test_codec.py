"""Codecs, by property and against Flask's own."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import flask
import pytest
from flask.json.tag import TaggedJSONSerializer
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from sharedcluster.errors import ConfigError
from sharedcluster.state.codec import Codec, CodecError, make_codec

CODECS = [make_codec("json"), make_codec("msgpack")]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.uuids(),
    st.decimals(allow_nan=False),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.text(st.characters(exclude_categories=["Cs"])).map(Markup),
    st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(UTC)).map(lambda d: d.replace(microsecond=0)),
)
keys = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([" t", " b", " di", " s", " d__"]))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.sets(st.integers(0, 9)),
        st.frozensets(st.integers(0, 9)),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal and of the same types, all the way down."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    return True


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(value=values)
def test_what_goes_in_comes_out(codec: Codec, value: Any) -> None:
    """decode(encode(x)) is x, types included, and encoding it again gives the same bytes: changes are found by it."""
    data = codec.encode(value)
    found = codec.decode(data)
    assert same(found, value)
    assert codec.encode(found) == data


@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text("ab<ü")
        | st.binary()
        | st.uuids()
        | st.text("ab").map(Markup),
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
        max_leaves=10,
    )
)
def test_it_reads_what_flask_wrote_and_the_other_way(value: Any) -> None:
    """For Flask's own types both directions are compatible: one tagged JSON."""
    app = flask.Flask("x")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    ours, theirs = make_codec("json"), TaggedJSONSerializer()
    with app.app_context():
        tagged_by_us_only = any(isinstance(key, str) and key.startswith((" s", " d__")) for key in _keys_of(value))
        if not tagged_by_us_only:
            assert same(theirs.loads(ours.encode(value).decode()), value)
            assert same(ours.decode(theirs.dumps(value).encode()), value)


def _keys_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys_of(item))]
    if isinstance(value, list | tuple):
        return [key for item in value for key in _keys_of(item)]
    return []


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        frozenset("ab"),
        Decimal("1.10"),
        date(2026, 1, 2),
        time(3, 4),
        timedelta(days=-1, microseconds=5),
        uuid4(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_more_types_than_flasks(codec: Codec, value: Any) -> None:
    """set, frozenset, Decimal, date, time and timedelta keep their types too."""
    assert same(codec.decode(codec.encode([value])), [value])


class Lazy:
    """Like a lazy translation: has `__html__`."""

    def __html__(self) -> str:
        return "<i>lazy</i>"


class Name(str):
    """A subclass is stored as what it extends."""


@pytest.mark.parametrize(
    ("value", "stored"),
    [(Lazy(), Markup("<i>lazy</i>")), (Name("x"), "x"), (datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=UTC))],
)
def test_what_flask_stores_as_something_else_we_do_too(value: Any, stored: Any) -> None:
    """Objects with __html__ become Markup, subclasses their base, naive datetimes UTC."""
    codec = make_codec("json")
    found = codec.decode(codec.encode(value))
    assert found == stored
    assert type(found) is type(stored)


@pytest.mark.parametrize("value", [object(), lambda: 1, [object()], {"x": {1: object()}}])
def test_what_cannot_be_stored_is_refused(value: Any) -> None:
    """No pickle and no repr: an unknown type is an error that names it."""
    for codec in CODECS:
        with pytest.raises(CodecError, match="cannot be stored"):
            codec.encode(value)


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"\xc1"])
def test_bytes_of_another_format_are_refused(data: bytes) -> None:
    """Above all pickles."""
    for codec in CODECS:
        if data == b"\x80\x04." and codec.name == "msgpack":
            continue  # 0x80 is msgpack's empty map; what follows it is what is refused
        with pytest.raises(ValueError, match=r".*"):
            codec.decode(data)


def test_an_unknown_codec_is_a_config_error() -> None:
    """The message says which there are."""
    with pytest.raises(ConfigError, match="pickle"):
        make_codec("pickle")


def test_uuid_is_flasks() -> None:
    """One example one can read."""
    assert make_codec("json").encode(UUID(int=1)) == b'{" u":"00000000000000000000000000000001"}'
