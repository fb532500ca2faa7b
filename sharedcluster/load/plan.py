"""What is to be sent, and what came of it: the two things that travel between the generator's processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from sharedcluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: what the socket connects to, and what the request says."""

    host: str
    port: int
    path: str
    is_tls: bool
    authority: str

    @classmethod
    def from_url(cls, url: str) -> Target:
        """Read a URL; `127.0.0.1:8000/x` without a scheme is http.

        Raises:
            ConfigError: It is none.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"{url!r} is not a URL to load.", advice="As in http://127.0.0.1:8000/counter")
        is_tls = parts.scheme == "https"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not path.isascii() or any(c <= " " for c in path):
            raise ConfigError(f"{url!r} has characters that must be written as %XX.")
        return cls(parts.hostname, port or (443 if is_tls else 80), path, is_tls, parts.netloc.rpartition("@")[2])


@dataclass(frozen=True, slots=True)
class Plan:
    """A load test. Durations are seconds; 0 requests means until the time is over, 0 seconds until they are sent."""

    target: Target
    requests: int
    seconds: float
    clients: int
    rate: float = 0.0
    """Requests a second of all processes together; 0 sends the next one when the last one was answered."""
    per_client: int = 0
    """Requests of each client; then `requests` is their product."""
    keep_alive: bool = True
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    cookies: tuple[str, ...] = ()
    body: bytes = b""
    timeout: float = 10.0
    processes: int = 1
    sessions: bool = False
    """Each client keeps its cookies, and counts what its session forgot."""

    def head(self, cookies: Mapping[str, str]) -> bytes:
        """The request, all but its body."""
        given = {name.lower() for name, _ in self.headers}
        lines = [f"{self.method} {self.target.path} HTTP/1.1"]
        if "host" not in given:
            lines.append(f"Host: {self.target.authority}")
        if "user-agent" not in given:
            lines.append("User-Agent: sharedcluster-load-test")
        lines += [f"{name}: {value}" for name, value in self.headers]
        pairs = [*self.cookies, *(f"{name}={value}" for name, value in cookies.items())]
        if pairs:
            lines.append("Cookie: " + "; ".join(pairs))
        if self.body or self.method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(self.body)}")
            if self.body and "content-type" not in given:
                lines.append("Content-Type: application/x-www-form-urlencoded")
        if not self.keep_alive:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


STEP: Final = math.log(1.01)
"""A bucket of the histogram is 1 % wide, so a percentile is off by half a percent at the most."""


class Histogram:
    """Latencies in microseconds, by buckets that grow; two of them merge by addition."""

    __slots__ = ("buckets", "count", "highest", "total")

    def __init__(self) -> None:
        self.buckets: Counter[int] = Counter()
        self.count = 0
        self.total = 0.0
        self.highest = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        micros = seconds * 1e6
        self.buckets[int(math.log(micros) / STEP) if micros > 1.0 else 0] += 1
        self.count += 1
        self.total += micros
        if micros > self.highest:
            self.highest = micros

    def merge(self, other: Histogram) -> None:
        """Add another one's counts."""
        self.buckets.update(other.buckets)
        self.count += other.count
        self.total += other.total
        self.highest = max(self.highest, other.highest)

    def percentile(self, share: float) -> float:
        """Milliseconds below which this share of the latencies lies (0.99: the p99)."""
        wanted = share * self.count
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return min(math.exp((bucket + 0.5) * STEP), self.highest) / 1000
        return self.highest / 1000

    @property
    def mean(self) -> float:
        """Milliseconds."""
        return self.total / self.count / 1000 if self.count else 0.0


@dataclass(slots=True)
class Tally:
    """What one process saw, or, merged, all of them."""

    sent: int = 0
    answered: int = 0
    offered: int = 0
    """Requests that were due, with a rate."""
    bytes_in: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by what happened."""
    workers: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    closed_idle: int = 0
    """Connections that the server closed between two requests."""
    increments: int = 0
    lost: int = 0
    """What sessions forgot: a count that was lower than it had to be."""
    uncounted: int = 0
    """Answers without a count, with --sessions."""
    latency: Histogram = field(default_factory=Histogram)
    seconds: float = 0.0
    cpu: list[float] = field(default_factory=list)
    """Share of one CPU that each process used."""

    def merge(self, other: Tally) -> None:
        """Add what another process saw; the time is the longest."""
        for name in ("sent", "answered", "offered", "bytes_in", "connections", "closed_idle", "increments", "lost",
                     "uncounted"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("statuses", "errors", "workers"):
            getattr(self, name).update(getattr(other, name))
        self.latency.merge(other.latency)
        self.seconds = max(self.seconds, other.seconds)
        self.cpu += other.cpu

    def to_json(self) -> dict[str, Any]:
        """For the pipe to the parent."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "latency"}
        facts["statuses"] = list(self.statuses.items())
        latency = self.latency
        return {**facts, "latency": [list(latency.buckets.items()), latency.count, latency.total, latency.highest]}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Tally:
        """The reverse."""
        tally = cls(**{name: value for name, value in facts.items() if name != "latency"})
        tally.statuses = Counter(dict(facts["statuses"]))
        tally.errors, tally.workers = Counter(facts["errors"]), Counter(facts["workers"])
        buckets, tally.latency.count, tally.latency.total, tally.latency.highest = facts["latency"]
        tally.latency.buckets = Counter(dict(buckets))
        return tally


def share(plan: Plan, index: int) -> tuple[int, int]:
    """How many clients and how many requests the process `index` has of the plan."""

    def part(whole: int) -> int:
        return whole // plan.processes + (index < whole % plan.processes)

    clients = part(plan.clients)
    if plan.per_client:
        return clients, clients * plan.per_client
    return clients, part(plan.requests)
