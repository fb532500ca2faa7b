"""The chunked coding: every split, and two other parsers as judges."""

from __future__ import annotations

import itertools

import h11
import httptools
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedcluster.http.chunked import ChunkedDecoder
from sharedcluster.http.policy import Refused

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
EXTENSIONS = st.sampled_from([b"", b";a", b";a=b", b';a="b;c"', b";a=b;c", b';a="\\""'])
TRAILERS = st.lists(st.sampled_from([b"X-A: b\r\n", b"Sum:\r\n", b"Q: \xff\t.\r\n"]), max_size=3)


@st.composite
def coded(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A body and one of its codings."""
    body, wire = b"", b""
    for _ in range(draw(st.integers(0, 5))):
        piece = draw(st.binary(min_size=1, max_size=40))
        size = f"{len(piece):{draw(st.sampled_from(['x', 'X', '04x']))}}".encode()
        body += piece
        wire += size + draw(EXTENSIONS) + b"\r\n" + piece + b"\r\n"
    return body, wire + b"0" + draw(EXTENSIONS) + b"\r\n" + b"".join(draw(TRAILERS)) + b"\r\n"


def decode(wire: bytes, cuts: list[int]) -> tuple[bytes, bytes, bool]:
    """Feed `wire` cut at `cuts`; returns the body, what is left over, and whether the end was reached."""
    decoder = ChunkedDecoder()
    body = b""
    places = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        body += decoder.feed(wire[start:end])
        if decoder.done:
            return body, decoder.rest + wire[end:], True
    return body, b"", decoder.done


@settings(max_examples=500)
@given(coded(), st.binary(max_size=20), st.lists(st.integers(0, 400), max_size=8))
def test_round_trip_at_any_split(pair: tuple[bytes, bytes], behind: bytes, cuts: list[int]) -> None:
    """Whatever the chunks and wherever the reads end, the body comes out and what is behind it stays."""
    body, wire = pair
    assert decode(wire + behind, cuts) == (body, behind, True)


@settings(max_examples=300)
@given(coded(), st.data())
def test_a_cut_body_is_never_done(pair: tuple[bytes, bytes], data: st.DataObject) -> None:
    """One byte short is not the end."""
    wire = pair[1]
    assert not decode(wire[: data.draw(st.integers(0, len(wire) - 1))], [])[2]


class Judge:
    """What llhttp makes of a body."""

    def __init__(self) -> None:
        self.body = b""
        self.is_done = False

    def on_body(self, data: bytes) -> None:
        """A piece."""
        self.body += data

    def on_message_complete(self) -> None:
        """The end."""
        self.is_done = True


NOISE = st.sampled_from(
    [
        b"\r\n",
        b"\n",
        b"\r",
        b";",
        b"=",
        b'"',
        b"\\",
        b" ",
        b"\t",
        b"0",
        b"5",
        b"f",
        b"g",
        b"+",
        b"-",
        b"x",
        b"_",
        b"\x00",
        b"\x7f",
        b"\xff",
        b":",
        b"A: b\r\n",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b"ffffffffffffffff",
    ]
)


@settings(max_examples=2000)
@given(coded(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), NOISE), min_size=1, max_size=4))
def test_what_we_accept_h11_and_llhttp_accept_and_read_alike(
    pair: tuple[bytes, bytes], edits: list[tuple[int, int, bytes]]
) -> None:
    """No coding is accepted that the others refuse, and none is read as another body."""
    wire = bytearray(pair[1])
    for place, size, noise in edits:
        start = place % (len(wire) + 1)
        wire[start : start + size] = noise
    try:
        body, rest, is_done = decode(bytes(wire), [])
    except Refused:
        return
    if not is_done:
        return
    message = HEAD + bytes(wire[: len(wire) - len(rest)])
    h11_judge = h11.Connection(h11.SERVER)
    h11_judge.receive_data(message)
    pieces = b""
    while not isinstance(event := h11_judge.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA
        if isinstance(event, h11.Data):
            pieces += event.data
    assert pieces == body
    judge = Judge()
    httptools.HttpRequestParser(judge).feed_data(message)
    assert (judge.body, judge.is_done) == (body, True)
