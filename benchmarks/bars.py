"""Where sharedcluster must stand (the last table of DESIGN.md), and whether it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.ratios import Summary


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit on a row.

    Attributes:
        peer: The limit is on the ratio of CPU per request, ours over this peer's; "" for a figure of our own.
        figure: The name of that figure, in the row of a special.
    """

    work: str
    limit: float
    peer: str = ""
    figure: str = ""

    @property
    def text(self) -> str:
        """As the table has it."""
        return f"≤ {self.limit:g} × {self.peer}" if self.peer else f"{self.figure} ≤ {self.limit:g}"


BARS: Final = (
    Bar("plain WSGI", 0.65, "granian"),
    Bar("plain WSGI", 2.0, "bjoern"),
    Bar("Flask hello", 1.2, "bjoern"),
    Bar("Flask hello", 0.45, "gunicorn gevent"),
    Bar("Flask, session read", 0.22, "gunicorn gevent"),
    Bar("Flask, session read", 0.65, "node cluster"),
    Bar("Flask, session write", 0.28, "gunicorn gevent"),
    Bar("Flask, session write", 0.8, "node cluster"),
    Bar("Flask hello, a new connection per request", 0.55, "node cluster"),
    Bar("Flask hello, a new connection per request", 1.0, "granian"),
    Bar("a cached page, hot", 0.25, "gunicorn gevent"),
    Bar("reload under strict keep-alive clients", 0, figure="errors"),
    Bar("reload under strict keep-alive clients", 0, figure="closed by the server"),
    Bar("memory per further worker with --preload", 8, figure="private MB per worker"),
)


def peers_with_a_bar(work: str) -> set[str]:
    """The servers that a bar on this row is set against."""
    return {bar.peer for bar in BARS if bar.work == work and bar.peer}


def verdict(bar: Bar, measured: Summary | None) -> str:
    """`met` or `MISSED` by the median, and whether the rounds lie on both sides of the bar; or `not measured`."""
    if measured is None:
        return "not measured"
    crosses = measured.low <= bar.limit < measured.high
    word = "met" if measured.median <= bar.limit else "**MISSED**"
    return f"{word}, the spread crosses it" if crosses else word
