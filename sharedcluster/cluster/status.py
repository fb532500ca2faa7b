"""What `sharedcluster status --json` says, from what the primary knows. The shape is a contract (schema 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharedcluster.cluster.board import COUNTED
from sharedcluster.cluster.listener import Listener
from sharedcluster.cluster.worker_handle import WorkerHandle, WorkerState


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The primary's own facts: who it is and what it counted. `started_at` is wall-clock time, for people."""

    name: str
    pid: int
    version: str
    state: str
    generation: int
    policy: str
    started_at: float
    redis_url: str
    counters: Mapping[str, int]


def describe(
    facts: ClusterFacts, listeners: Iterable[Listener], workers: Sequence[WorkerHandle], now: float
) -> dict[str, Any]:
    """The whole status. `now` is the monotonic clock."""
    counters = dict(facts.counters)
    for worker in workers:
        for name, count in worker.stats.counters.items():
            counters[name] = counters.get(name, 0) + count
    return {
        "schema": 1,
        "name": facts.name,
        "pid": facts.pid,
        "version": facts.version,
        "state": facts.state,
        "generation": facts.generation,
        "policy": facts.policy,
        "started_at": round(facts.started_at, 3),
        "listeners": [listener_facts(each, workers) for each in listeners],
        "redis": redis_facts(facts.redis_url, workers),
        "workers": [worker_facts(each, now) for each in sorted(workers, key=lambda w: (w.slot, w.id))],
        "counters": counters,
    }


def listener_facts(listener: Listener, workers: Sequence[WorkerHandle]) -> dict[str, Any]:
    """What has come in by a socket, and how much of it is nobody's turn yet or has not been passed on."""
    turns = sum(worker.turns.count(listener.index) for worker in workers)
    taken = sum(worker.row.taken(listener.index) for worker in workers) if listener.index < COUNTED else 0
    return {
        "address": str(listener.address),
        "pending": len(listener.pending) + max(0, listener.waiting - turns),
        "accepted": listener.accepted + taken + listener.waiting,
    }


def worker_facts(worker: WorkerHandle, now: float) -> dict[str, Any]:
    """One row of the table."""
    stats = worker.stats
    return {
        "id": worker.id,
        "slot": worker.slot,
        "pid": worker.pid,
        "generation": worker.generation,
        "state": str(worker.state),
        "connections": worker.row.connections,
        "in_flight": worker.row.in_flight,
        "handed_off": worker.handed_off,
        "given_back": worker.given_back,
        "requests": worker.row.requests,
        "rss": stats.rss,
        "cpu": round(worker.cpu_percent, 1),
        "uptime": round(now - worker.forked_at, 1),
        "restarts": worker.restarts,
    }


def redis_facts(url: str, workers: Sequence[WorkerHandle]) -> dict[str, Any]:
    """Redis as the workers see it, since the primary does not speak to it: "down" if any of them says so."""
    seen = [w.stats for w in workers if w.state is WorkerState.LISTENING and w.stats.redis_state != "none"]
    if not seen:
        return {"url": url, "state": "none", "latency_ms": None}
    latencies = [stats.redis_latency_ms for stats in seen]
    return {
        "url": url or seen[0].redis_url,
        "state": "down" if any(stats.redis_state == "down" for stats in seen) else "ok",
        "latency_ms": round(sum(latencies) / len(latencies), 3),
    }
