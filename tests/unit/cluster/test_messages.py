"""The wire's messages and their codec."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharedcluster.cluster import messages as m

texts = st.text(max_size=60)
seqs = st.integers(0, 2**32 - 1)
peers = st.none() | st.tuples(st.text(min_size=1, max_size=40), st.integers(0, 65535))
stats = st.builds(
    m.WorkerStats,
    connections=st.integers(0, 10**6),
    cpu_seconds=st.floats(0, 1e6),
    redis_url=texts,
    counters=st.dictionaries(texts, st.integers(0, 2**53)),
)
all_messages = st.one_of(
    st.builds(m.NewConnection, seqs, st.integers(0, 65535), peers, texts),
    st.builds(m.Accepted, seqs),
    st.builds(m.Returned, seqs),
    st.builds(m.GivenBack, st.integers(0, 65535), peers, texts),
    st.builds(m.Drain, st.floats(0, 1e6), st.booleans()),
    st.builds(m.Online, st.integers(1, 2**22)),
    st.builds(m.Listening, texts),
    st.builds(m.LoadFailed, texts, texts),
    st.builds(m.Heartbeat, stats),
    st.just(m.Stop()),
)


@given(all_messages)
def test_what_is_encoded_is_decoded(message: m.Message) -> None:
    """Every message comes out as it went in, its types included."""
    assert m.decode(m.encode(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_a_value_error_or_a_message(data: bytes) -> None:
    """No bytes make the codec raise anything but ValueError."""
    try:
        message = m.decode(data)
    except ValueError:
        return
    assert isinstance(message, m.Message)


@pytest.mark.parametrize("data", [b"", b"\x04", b"\x04[]", b'\x04["Popen",{}]', b'\x04["Drain",{"x":1}]', b"\x01\x00"])
def test_near_misses_are_refused(data: bytes) -> None:
    """An empty datagram, cut ones, an unknown name, a wrong field."""
    with pytest.raises(ValueError, match="not a message"):
        m.decode(data)


def test_a_long_traceback_keeps_its_end() -> None:
    """What happened stands at the end of a traceback."""
    cut = m.cut_to_fit("x" * 100_000 + "ValueError: here")
    assert cut.endswith("ValueError: here")
    assert len(m.encode(m.LoadFailed("", cut))) < m.MAX_MESSAGE
