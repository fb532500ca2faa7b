"""How the cost of a request changes with the number of workers, and where one primary saturates.

On a machine with few cores more workers give no more throughput; what can be seen there, and decides how far it goes
on a larger one, is whether a request, a connection or a write costs more when there are more workers.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks.peers import OURS, PEERS, Place
from benchmarks.rounds import Row, Scale, turn
from benchmarks.servers import Redis, Server, free_port, terminate_all
from benchmarks.specials import Measured
from benchmarks.work import WORKS, Work

WORKERS: Final = (1, 2, 4, 8)
SCALED: Final = (
    "Flask hello",
    "Flask hello, a new connection per request",
    "Flask, session read",
    "Flask, session write",
)
CAPS: Final = (0.05, 0.1, 0.2)
SATURATION: Final = "saturation of the primary"
CGROUP: Final = Path("/sys/fs/cgroup")
PERIOD: Final = 20_000
"""Microseconds of one accounting period of a cap."""


def name_of(work: str) -> str:
    """The name of a row's scaling entry."""
    return f"scaling: {work}"


def measure(work: Work, scale: Scale, redis: Redis) -> Row:
    """Ours with 1, 2, 4 and 8 workers, in turns, on one row's work."""
    row = Row(name_of(work.name), "scaling")
    with ExitStack() as undo:
        servers = {}
        for workers in WORKERS:
            place = Place(work.family, free_port(), workers, redis.url, site=f"bench{workers}")
            server = Server(PEERS[OURS], place)
            undo.callback(server.stop)
            servers[f"{workers} worker{'s' if workers > 1 else ''}"] = server.launch()
        undo.callback(terminate_all, servers.values())
        for server in servers.values():
            server.ready()
        for server in servers.values():
            turn(server, work, 1.0, redis)
        for _ in range(scale.others):
            for name, server in servers.items():
                row.slices.setdefault(name, []).append(turn(server, work, scale.seconds, redis))
                sys.stderr.write(".")
                sys.stderr.flush()
    sys.stderr.write("\n")
    return row


def saturation(scale: Scale, redis: Redis) -> Measured:
    """Predict from the primary's cost per connection how many it can pass on, then take its CPU away and see.

    The primary alone is put into a cgroup that gives it a part of one core, so that it saturates long before the
    workers do: the only way to see its limit on a machine with fewer cores than it can feed.
    """
    measured = Measured(SATURATION)
    # The plain callable: the cheaper the workers, the sooner the primary is what is short.
    work = dataclasses.replace(WORKS["Flask hello, a new connection per request"], family="plain")
    server = Server(PEERS[OURS], Place("plain", free_port(), 2, redis.url))
    try:
        server.start()
        turn(server, work, 1.0, redis)
        for _ in range(scale.others):
            free = turn(server, work, scale.seconds, redis)
            cost = free.cpu_us * free.root_share
            worker_cost = free.cpu_us - cost
            measured.repeats.setdefault("not capped", []).append(
                {
                    "primary µs per connection": cost, "workers µs per connection": worker_cost,
                    "predicted per second": 1e6 / cost, "seen per second": free.outcome.rate,
                }
            )  # fmt: skip
            for cap in CAPS:
                with capped(server.pid, cap):
                    time.sleep(0.1)
                    seen = turn(server, work, scale.seconds, redis)
                measured.repeats.setdefault(f"capped at {cap:.0%} of a core", []).append(
                    {
                        "primary µs per connection": seen.cpu_us * seen.root_share,
                        "workers µs per connection": seen.cpu_us * (1 - seen.root_share),
                        "predicted per second": cap * 1e6 / cost, "seen per second": seen.outcome.rate,
                    }
                )  # fmt: skip
                sys.stderr.write(".")
                sys.stderr.flush()
    except OSError as error:
        measured.missing["capped"] = f"no cgroup can be made here: {error.strerror}"
    finally:
        server.stop()
    sys.stderr.write("\n")
    return measured


@contextmanager
def capped(pid: int, part: float) -> Iterator[None]:
    """Give one process no more than a part of one core, by a cgroup of its own (version 1 or 2; needs root).

    Raises:
        OSError: There is no cgroup that may be made.
    """
    second = (CGROUP / "cgroup.controllers").exists()
    home = CGROUP if second else CGROUP / "cpu"
    group = home / f"sc-bench-{os.getpid()}"
    group.mkdir()
    quota = int(PERIOD * part)
    try:
        if second:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (home / "cgroup.procs").write_text(str(pid))
        group.rmdir()
