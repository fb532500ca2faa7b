"""What is not CPU per request: reloads, start-up, memory, the wait beside busy views, fan-out of events.

Each function measures one server once and returns named figures; `Special` says of whom and how often. Repeats take
turns like the rounds of rounds.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks import processes
from benchmarks.install import left_out
from benchmarks.load import own
from benchmarks.load.plan import Plan
from benchmarks.peers import OURS, PEERS, Family, Peer, Place
from benchmarks.rounds import FAILURES, Scale, first_line
from benchmarks.servers import START_DEADLINE, CannotServeError, Redis, Server, free_port, wait_for

Figures = dict[str, float]
MEGABYTE: Final = 1 << 20


@dataclass(slots=True)
class Measured:
    """All repeats of one special, by server, and who is missing, and why."""

    name: str
    repeats: dict[str, list[Figures]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Special:
    """One measurement that has its own shape."""

    name: str
    measure: Callable[[Peer, Scale, Redis], Figures]
    peers: tuple[str, ...]
    repeats: int = 2


def run(special: Special, scale: Scale, redis: Redis, only: Sequence[str] = (), at_most: int = 99) -> Measured:
    """All servers of a special, in turns."""
    measured = Measured(special.name)
    absent = left_out()
    for _ in range(min(special.repeats, at_most)):
        for name in (OURS, *special.peers):
            peer = PEERS[name]
            if name in measured.missing or (only and name not in only):
                continue
            if peer.needs in absent:
                measured.missing[name] = absent[peer.needs]
                continue
            try:
                measured.repeats.setdefault(name, []).append(special.measure(peer, scale, redis))
            except FAILURES as error:
                measured.missing[name] = first_line(error)
            sys.stderr.write(".")
            sys.stderr.flush()
    sys.stderr.write("\n")
    measured.repeats = {name: figures for name, figures in measured.repeats.items() if figures}
    return measured


class _Running:
    """A server for the time of a `with`."""

    def __init__(
        self, peer: Peer, family: Family, redis: Redis, *, workers: int = 2, preload: bool = False, ready: bool = True
    ) -> None:
        self._server = Server(peer, Place(family, free_port(), workers, redis.url, preload))
        self._ready = ready

    def __enter__(self) -> Server:
        try:
            return self._server.start() if self._ready else self._server.launch()
        except BaseException:
            self._server.stop()
            raise

    def __exit__(self, *_error: object) -> None:
        self._server.stop()


def reload_under_load(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """Three reloads under 32 strict keep-alive clients, one request each about every 70 ms."""
    gap = 2.5
    with _Running(peer, "flask", redis, workers=scale.workers) as server:
        plan = Plan(server.port, "/", 32, 4 * gap, think=0.07)
        client = own.start(plan)
        try:
            client.go()
            for _ in range(3):
                time.sleep(gap)
                server.reload()
            outcome = own.finish(client, plan)
        finally:
            client.end()
    return {
        "answered": outcome.requests, "errors": outcome.dropped + outcome.failed,
        "closed by the server": outcome.dropped + outcome.told_to_close + outcome.closed_idle,
        "p99 ms": outcome.p99 * 1e3, "max ms": outcome.highest * 1e3,
    }  # fmt: skip


def start_up(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """From the command to the first answer of a Flask hello."""
    running = _Running(peer, "flask", redis, workers=scale.workers, ready=False)
    begun = time.monotonic()
    with running as server:
        if not wait_for(server.answers, START_DEADLINE, pause=0.003):
            raise CannotServeError(f"{peer.name} did not answer in {START_DEADLINE:.0f} s")
        return {"seconds": time.monotonic() - begun}


def memory(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """What a further worker takes: from two workers to four, each warmed by requests."""
    return _memory(peer, scale, redis, preload=False)


def memory_preloaded(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """The same, the application imported before the fork."""
    return _memory(peer, scale, redis, preload=True)


def _memory(peer: Peer, scale: Scale, redis: Redis, *, preload: bool) -> Figures:
    totals = {}
    private = []
    for workers in (2, 4):
        with _Running(peer, "flask", redis, workers=workers, preload=preload) as server:
            plan = Plan(server.port, "/", 32, 1.0)
            _load(plan)
            found = processes.memory(server.pid)
            totals[workers] = sum(each.pss for each in found.values())
            private = sorted(each.uss for pid, each in found.items() if pid != server.pid)[-workers:]
    return {
        "private MB per worker": private[len(private) // 2] / MEGABYTE,
        "PSS MB per further worker": (totals[4] - totals[2]) / 2 / MEGABYTE,
        "PSS MB of two workers, all processes": totals[2] / MEGABYTE,
    }


def idle_memory(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """What a kept-alive connection takes that waits for its next request: all processes, before and with 10,000.

    The server has been warmed by requests before, and each connection has had one answered. The kernel's part, which
    is the same for all servers, is not in it.
    """
    count = 10_000
    with _Running(peer, "flask", redis, workers=scale.workers) as server:
        _load(Plan(server.port, "/", 64, 1.0))
        before = processes.memory(server.pid).values()
        holder = own.Started("holder", str(server.port), str(count), "/")
        try:
            held = processes.memory(server.pid).values()
            holder.go()
            still_open = holder.result(30)["open"]
        finally:
            holder.end()
    return {
        "private KB per connection": (sum(m.uss for m in held) - sum(m.uss for m in before)) / count / 1024,
        "PSS KB per connection": (sum(m.pss for m in held) - sum(m.pss for m in before)) / count / 1024,
        "connections kept": still_open,
    }  # fmt: skip


def _load(plan: Plan) -> None:
    """Load by our own client, for what it does to the server."""
    client = own.start(plan)
    try:
        client.go()
        own.finish(client, plan)
    finally:
        client.end()


def beside_computing(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """A hello, 100 a second over 16 connections, while one client asks for views that compute for 100 ms."""
    return _beside(peer, scale, redis, "/spin/100", 1)


def beside_waiting(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """The same hello while 64 clients ask for views that wait 200 ms, as for a database."""
    return _beside(peer, scale, redis, "/wait/200", 64)


def _beside(peer: Peer, scale: Scale, redis: Redis, path: str, clients: int) -> Figures:
    seconds = 3.0
    with _Running(peer, "flask", redis, workers=scale.workers) as server:
        busy = Plan(server.port, path, clients, seconds, think=0.1 if clients == 1 else 0.0)
        hello = Plan(server.port, "/", 16, seconds, rate=100)
        first = own.start(busy)
        try:
            second = own.start(hello)
            try:
                first.go()
                second.go()
                outcome = own.finish(second, hello)
            finally:
                second.end()
            own.finish(first, busy)
        finally:
            first.end()
    return {
        "p50 ms": outcome.p50 * 1e3, "p99 ms": outcome.p99 * 1e3, "max ms": outcome.highest * 1e3,
        "answered": outcome.requests, "errors": outcome.failed + outcome.dropped,
    }  # fmt: skip


def fan_out(peer: Peer, scale: Scale, redis: Redis) -> Figures:
    """100 subscribers, 150 events at 50 a second."""
    subscribers, events, rate = 100, 150, 50
    if not redis.url:
        raise CannotServeError("no redis-server on PATH")
    with _Running(peer, "state", redis, workers=scale.workers) as server:
        client = own.Started("subscribers", str(server.port), str(subscribers), str(events), str(rate))
        try:
            before, redis_before = processes.cpu(server.pid), processes.cpu(redis.pid)
            client.go()
            seen = client.result(60)
            spent, redis_spent = processes.cpu(server.pid) - before, processes.cpu(redis.pid) - redis_before
        finally:
            client.end()
    delivered = max(1, seen["delivered"])
    return {
        "µs per delivered event": spent * 1e6 / delivered,
        "Redis µs per delivered event": redis_spent * 1e6 / delivered,
        "lost": seen["expected"] - seen["delivered"], "p50 ms": seen["p50"] * 1e3, "p99 ms": seen["p99"] * 1e3,
    }  # fmt: skip


_BESIDE: Final = ("gunicorn gevent", "gunicorn gthread", "granian", "uwsgi", "node cluster")
# What waits needs a thread for each where there are threads: both what they usually get and what this work needs.
_BESIDE_WAITING: Final = (
    "gunicorn gevent", "gunicorn gthread", "gunicorn gthread, 64 threads", "granian, 64 threads", "node cluster",
)  # fmt: skip

SPECIALS: Final[Mapping[str, Special]] = {
    special.name: special
    for special in (
        Special(
            "reload under strict keep-alive clients", reload_under_load,
            ("gunicorn gevent", "gunicorn gthread", "granian", "uwsgi", "pm2"),
        ),
        Special("start-up", start_up, ("gunicorn gevent", "granian", "uwsgi", "bjoern", "node cluster", "pm2"), 3),
        Special("memory per further worker", memory, ("gunicorn gevent", "granian", "node cluster", "pm2"), 1),
        Special("memory per further worker with --preload", memory_preloaded, ("gunicorn gevent", "uwsgi")),
        Special(
            "memory per idle connection", idle_memory,
            ("gunicorn gevent", "granian", "uwsgi", "bjoern", "node cluster"), 1,
        ),
        Special("hello beside computing views", beside_computing, _BESIDE),
        Special("hello beside waiting views", beside_waiting, _BESIDE_WAITING),
        Special("broadcast fan-out", fan_out, ("gunicorn gevent", "node cluster")),
    )
}  # fmt: skip
