"""The capacity model of docs/performance.md: its parameters, measured, and what follows from them.

A session write costs the worker that serves it, Redis, and a little every worker of the site that hears the
invalidation. The last term decides how far one Redis goes, so it is measured directly: a second cluster on the same
Redis that serves nothing, while the first one writes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

from benchmarks import processes
from benchmarks.load import own
from benchmarks.load.plan import Plan
from benchmarks.peers import OURS, PEERS, Place
from benchmarks.rounds import Scale
from benchmarks.servers import Redis, Server, free_port
from benchmarks.specials import Figures, Measured

NAME: Final = "cost of a session write to the rest of the site"
BYSTANDERS: Final = (1, 8)


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds of CPU: of a worker for a read and a write it serves, and for a write served elsewhere; of Redis
    for a write, and for each worker that is told of it.
    """

    read: float
    write: float
    heard: float
    redis_write: float
    redis_told: float


def redis_limit(costs: Costs, workers: int, writes: float) -> float:
    """Requests per second at which one Redis (one core) is busy all the time.

    Args:
        costs: What things cost.
        workers: Of the whole site, all nodes.
        writes: The part of the requests that write their session, 0 to 1.
    """
    per_request = writes * (costs.redis_write + costs.redis_told * workers)
    return 1e6 / per_request if per_request else float("inf")


def workers_limit(costs: Costs, workers: int, writes: float) -> float:
    """Requests per second at which all workers, each with a core of its own, are busy all the time."""
    served = writes * costs.write + (1 - writes) * costs.read
    return workers * 1e6 / (served + workers * writes * costs.heard)


def measure(scale: Scale, redis: Redis) -> Measured:
    """Write in one cluster; see what Redis and the workers of another one spend on it."""
    measured = Measured(NAME)
    for _ in range(scale.others):
        for count in BYSTANDERS:
            name = f"{count} worker{'s' if count > 1 else ''} elsewhere"
            measured.repeats.setdefault(name, []).append(_once(count, scale, redis))
            sys.stderr.write(".")
            sys.stderr.flush()
    sys.stderr.write("\n")
    return measured


def _once(bystanders: int, scale: Scale, redis: Redis) -> Figures:
    writer = Server(PEERS[OURS], Place("state", free_port(), 1, redis.url))
    listener = Server(PEERS[OURS], Place("state", free_port(), bystanders, redis.url))
    try:
        writer.start()
        listener.start()
        # A worker asks Redis to tell it of changes only once it has something to keep: let each read a session.
        for server in (writer, listener):
            _load(Plan(server.port, "/read", 64, 1.0, login="/login"))
        idle = processes.cpu(listener.pid), processes.cpu(redis.pid)
        written = _load(Plan(writer.port, "/write", 64, 2 * scale.seconds, method="POST", login="/login"))
        heard = processes.cpu(listener.pid) - idle[0]
        spent = processes.cpu(redis.pid) - idle[1]
    finally:
        writer.stop()
        listener.stop()
    return {
        "Redis µs per write": spent / written * 1e6,
        "µs per write in each worker elsewhere": heard / written / bystanders * 1e6,
    }


def _load(plan: Plan) -> int:
    client = own.start(plan)
    try:
        client.go()
        return own.finish(client, plan).requests + plan.connections  # each login is a write too
    finally:
        client.end()
