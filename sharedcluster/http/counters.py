"""What a server counts about itself: monotonic numbers that merge across workers by addition."""

from __future__ import annotations

from dataclasses import dataclass

BUCKETS = 28
"""Latency bucket i counts requests that took less than 2**i microseconds (the last one: all that took longer)."""


@dataclass(frozen=True, slots=True)
class HttpStats:
    """A picture of the counters, ready for a heartbeat. Two pictures add field by field."""

    connections: int
    """Open now."""
    in_flight: int
    """Requests being served now."""
    accepted: int
    requests: int
    bytes_in: int
    bytes_out: int
    by_class: tuple[int, int, int, int, int]
    """Responses 1xx to 5xx, refusals included."""
    refused: int
    """Messages the policy refused."""
    latency: tuple[int, ...]
    """Requests by duration: bucket i is below 2**i microseconds."""


class Counters:
    """The live numbers; only the loop's thread writes them."""

    __slots__ = ("accepted", "by_class", "bytes_in", "bytes_out", "latency", "refused", "requests")

    def __init__(self) -> None:
        self.accepted = 0
        self.requests = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.refused = 0
        self.by_class = [0] * 10
        self.latency = [0] * 64

    def picture(self, connections: int, in_flight: int) -> HttpStats:
        """Copy the numbers."""
        return HttpStats(
            connections=connections,
            in_flight=in_flight,
            accepted=self.accepted,
            requests=self.requests,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            by_class=(self.by_class[1], self.by_class[2], self.by_class[3], self.by_class[4], self.by_class[5]),
            refused=self.refused,
            latency=(*self.latency[: BUCKETS - 1], sum(self.latency[BUCKETS - 1 :])),
        )
