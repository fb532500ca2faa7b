"""What a client saw during one slice of load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """The sum of one slice.

    Attributes:
        requests: Answered as expected.
        failed: Answered with a status of 400 or more, or not in time, or not connected.
        dropped: Written, and the connection ended before the answer was whole.
        told_to_close: Answers that said `Connection: close` though the client wanted to stay.
        closed_idle: Connections the server closed between two requests.
        p50, p99, highest: Seconds a client waited; from when the request was due, where a rate was given.
        client_cpu: Seconds of CPU that the client itself used.
        received: Bytes.
    """

    requests: int
    seconds: float
    failed: int = 0
    dropped: int = 0
    told_to_close: int = 0
    closed_idle: int = 0
    p50: float = 0.0
    p99: float = 0.0
    highest: float = 0.0
    client_cpu: float = 0.0
    received: int = 0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0
