"""Measure one row: all servers run at once, idle, and take turns under load: A B C, A B C, ...

What disturbs the machine for longer than a turn disturbs all servers of a round, and cancels in the round's ratio.
Many short rounds are better than few long ones: the median bears more of them being disturbed. A turn begins when the
server before has come to rest: what that one still does is not its successor's load.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Final

from benchmarks import processes
from benchmarks.bars import peers_with_a_bar
from benchmarks.checking import check
from benchmarks.install import left_out
from benchmarks.load import own, wrk
from benchmarks.load.outcome import Outcome
from benchmarks.load.plan import Plan
from benchmarks.peers import OURS, PEERS, Place
from benchmarks.servers import CannotServeError, Redis, Server, free_port, terminate_all
from benchmarks.work import Work

FAILURES: Final = (CannotServeError, RuntimeError, ValueError, OSError, HTTPException, subprocess.SubprocessError)
"""How a server, or the client that loads it, fails: named in the table, never the end of the run."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One turn of one server.

    Attributes:
        cpu_us: Microseconds of CPU per request, of all its processes.
        root_share: The part of that spent in its first process (for us and Node: the primary).
        redis_us: What Redis spent per request; not part of `cpu_us`.
    """

    cpu_us: float
    root_share: float
    redis_us: float
    client_us: float
    outcome: Outcome


@dataclass(slots=True)
class Row:
    """All turns of one row, by server; and who is missing, and why."""

    work: str
    kind: str = "work"
    slices: dict[str, list[Slice]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scale:
    """How long and how often.

    Attributes:
        seconds: Of one turn.
        rounds: Turns of ours and of each server that a bar is set against.
        others: Turns of each other server, in the first of these rounds; with 0 they are not started.
        workers: Of each server.
    """

    seconds: float
    rounds: int
    others: int = 3
    workers: int = 2


def measure(work: Work, scale: Scale, redis: Redis, only: Sequence[str] = ()) -> Row:
    """Start every server of a row, warm each up, and let them take turns."""
    row = Row(work.name)
    often = {OURS, *peers_with_a_bar(work.name)}
    has_a_bar = len(often) > 1
    wanted = [name for name in (OURS, *work.peers) if (not only or name in only) and (scale.others or name in often)]
    with ExitStack() as undo:
        servers = _start(work, scale, redis, row, undo, wanted)
        for server in list(servers):
            # Warm: compilers, caches, lazy imports.
            alone = dataclasses.replace(work, idle=0)
            _take_turn(server, servers, row, lambda each: turn(each, alone, each.peer.warm_up, redis))  # noqa: B023
        row.slices.clear()
        for number in range(scale.rounds if has_a_bar else scale.others):
            # Each round begins with another server, so that none is always first after a pause.
            first = number % max(1, len(servers))
            for server in servers[first:] + servers[:first]:
                if number < scale.others or server.peer.name in often:
                    _take_turn(server, servers, row, lambda each: turn(each, work, scale.seconds, redis))
    sys.stderr.write("\n")
    return row


def _take_turn(server: Server, servers: list[Server], row: Row, run: Callable[[Server], Slice]) -> None:
    """One turn; a server that fails in it is out of the row, and the row says why."""
    name = server.peer.name
    try:
        row.slices.setdefault(name, []).append(run(server))
        processes.wait_quiet(server.pid)
    except FAILURES as error:
        row.missing[name] = first_line(error)
        row.slices.pop(name, None)
        servers.remove(server)
    sys.stderr.write(".")
    sys.stderr.flush()


def _start(work: Work, scale: Scale, redis: Redis, row: Row, undo: ExitStack, wanted: Sequence[str]) -> list[Server]:
    launched = []
    absent = left_out()
    for name in wanted:
        peer = PEERS[name]
        if peer.needs in absent:
            row.missing[name] = absent[peer.needs]
            continue
        if work.family == "state" and not redis.url:
            row.missing[name] = "no redis-server on PATH"
            continue
        server = Server(peer, Place(work.family, free_port(), scale.workers, redis.url))
        undo.callback(server.stop)
        try:
            launched.append(server.launch())
        except OSError as error:
            row.missing[name] = first_line(error)
    undo.callback(terminate_all, launched)
    servers = []
    for server in launched:
        try:
            check(server.ready(), work)
            servers.append(server)
        except FAILURES as error:
            row.missing[server.peer.name] = first_line(error)
    return servers


def turn(server: Server, work: Work, seconds: float, redis: Redis) -> Slice:
    """Load one server for some seconds, and account for it."""
    holder = own.Started("holder", str(server.port), str(work.idle), work.path) if work.idle else None
    client = None
    try:
        plan = Plan(server.port, work.path, work.connections, seconds, method=work.method, login=work.login)
        client = own.start(plan) if work.login else None
        before, redis_before = processes.cpu_by_process(server.pid), _redis_cpu(redis)
        if client:
            client.go()
            outcome = own.finish(client, plan)
        else:
            outcome = wrk.run(
                f"http://127.0.0.1:{server.port}{work.path}", seconds=seconds, connections=work.connections,
                method=work.method, body_bytes=work.body_bytes, new_connection=work.new_connection,
            )  # fmt: skip
        after, redis_after = processes.cpu_by_process(server.pid), _redis_cpu(redis)
    finally:
        if client:
            client.end()
        still_open = _let_go(holder)
    if work.idle and still_open < work.idle:
        outcome = dataclasses.replace(outcome, closed_idle=work.idle - still_open)
    if not outcome.requests:
        raise CannotServeError(f"{server.peer.name} answered nothing well ({outcome.failed} failed)")
    spent = sum(after.values()) - sum(before.values())
    root = after.get(server.pid, 0.0) - before.get(server.pid, 0.0)
    per_request = 1e6 / outcome.requests
    return Slice(
        cpu_us=spent * per_request, root_share=root / spent if spent else 0.0,
        redis_us=(redis_after - redis_before) * per_request, client_us=outcome.client_cpu * per_request,
        outcome=outcome,
    )  # fmt: skip


def _redis_cpu(redis: Redis) -> float:
    return processes.cpu(redis.pid) if redis.url else 0.0


def _let_go(holder: own.Started | None) -> int:
    if holder is None:
        return 0
    try:
        holder.go()
        return int(holder.result(30)["open"])
    finally:
        holder.end()


def first_line(error: Exception) -> str:
    """What a table has room for."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
