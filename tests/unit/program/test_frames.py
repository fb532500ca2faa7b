"""Frames on a stream: whatever the pieces, whatever the garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.errors import ConfigError
from sharedcluster.program.frames import MESSAGE, NOTE, TAKEN, Frame, Garbage, Reader, serialization, write

frames = st.builds(Frame, st.sampled_from((MESSAGE, NOTE, TAKEN)), st.integers(0, 2**32 - 1), st.binary(max_size=300))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def feed(data: bytes, cuts: list[int]) -> list[Frame | Garbage]:
    """Read bytes that come in pieces."""
    reader, found, start = Reader(), [], 0
    for cut in sorted({c % (len(data) + 1) for c in cuts} | {len(data)}):
        found += reader.feed(data[start:cut])
        start = cut
    return found


@given(st.lists(frames, max_size=10), st.lists(st.integers(0, 5000)))
def test_frames_come_out_as_they_went_in(sent: list[Frame], cuts: list[int]) -> None:
    """In order, whole, for every way to cut the stream into pieces."""
    assert feed(b"".join(map(write, sent)), cuts) == sent


@given(st.binary(min_size=1, max_size=200), st.lists(frames, min_size=1, max_size=5), st.lists(st.integers(0, 5000)))
def test_frames_behind_garbage_are_read(noise: bytes, sent: list[Frame], cuts: list[int]) -> None:
    """Bytes that are no frame are reported; the frames behind them arrive, but for what noise made of itself."""
    noise = noise.replace(b"\xc5", b"\xc4")  # noise that holds a whole head is a frame, by any reading
    found = feed(noise + b"".join(map(write, sent)), cuts)
    assert [each for each in found if isinstance(each, Frame)] == sent
    assert sum(each.count for each in found if isinstance(each, Garbage)) == len(noise)


@given(st.binary(max_size=500), st.lists(st.integers(0, 500)))
def test_nothing_raises(data: bytes, cuts: list[int]) -> None:
    """Any bytes at all."""
    feed(data, cuts)


def test_an_absurd_length_is_garbage() -> None:
    """A head that announces more than the limit does not make the reader wait for it."""
    head = b"\xc5\x9d\x01\x00\x00\x00\x01\xff\xff\xff\xff"
    good = Frame(MESSAGE, 7, b"1")
    found = feed(head + write(good), [])
    assert found[-1] == good
    assert isinstance(found[0], Garbage)


@given(json_values)
def test_json_round_trip(value: object) -> None:
    """Every JSON value is the same on the other side."""
    how = serialization("json")
    assert how.loads(how.dumps(value)) == value


@pytest.mark.parametrize("value", [b"raw", {1, 2}, object(), float("inf"), 1j])
def test_what_json_has_not_raises(value: object) -> None:
    """At the sender, instead of arriving as something else."""
    with pytest.raises((TypeError, ValueError)):
        serialization("json").dumps(value)


def test_msgpack_and_unknown_names() -> None:
    """msgpack carries bytes; garbage is a ValueError like JSON's; an unknown name says which there are."""
    how = serialization("msgpack")
    assert how.loads(how.dumps({"raw": b"\x00\xff"})) == {"raw": b"\x00\xff"}
    with pytest.raises(ValueError, match="MessagePack"):
        how.loads(b"\xc1")
    with pytest.raises(ConfigError, match="json or msgpack"):
        serialization("pickle")
