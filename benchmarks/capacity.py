"""What the measured costs say about larger sites, as Markdown: cores per primary, requests per second per Redis."""

from __future__ import annotations

from typing import Final

from benchmarks import model, scaling
from benchmarks.model import Costs, redis_limit, workers_limit
from benchmarks.peers import OURS
from benchmarks.results import Results

SITES: Final = (2, 8, 32, 128)
WRITES: Final = (0.01, 0.1, 0.5)
REQUESTS_PER_CONNECTION: Final = (1, 5, 25, 100)
HELLO: Final = "Flask hello"
NEW_CONNECTION: Final = "Flask hello, a new connection per request"


def section(results: Results) -> list[str]:
    """Both tables, or nothing where their rows have not been measured."""
    return [*_primary(results), *_redis(results)]


def saturating_workers(primary: float, connection: float, request: float, per_connection: float) -> float:
    """How many workers, each with a core of its own, one primary can keep busy.

    Args:
        primary: Its CPU per connection, µs.
        connection: A worker's CPU for a connection with one request, µs.
        request: A worker's CPU for one further request on it, µs.
        per_connection: Requests on a connection.
    """
    return (connection + request * (per_connection - 1)) / primary


def _figure(results: Results, row: str, server: str, name: str) -> float | None:
    entry = results.entries.get(row)
    found = entry.figure(server, name) if entry else None
    return found.median if found else None


def _primary(results: Results) -> list[str]:
    primary = _figure(results, NEW_CONNECTION, OURS, "root_us")
    whole = _figure(results, NEW_CONNECTION, OURS, "cpu_us")
    request = _figure(results, HELLO, OURS, "cpu_us")
    if not (primary and whole and request):
        return []
    lines = [
        f"A connection costs the primary {primary:.0f} µs, so it can give out {1e6 / primary:,.0f} a second. A Flask "
        f"hello on a connection of its own costs its worker {whole - primary:.0f} µs, a further one {request:.0f} µs:",
        "",
        "| requests per connection | workers (one core each) that one primary keeps busy |",
        "| --- | --- |",
    ]
    lines += [
        f"| {count} | {saturating_workers(primary, whole - primary, request, count):.0f} |"
        for count in REQUESTS_PER_CONNECTION
    ]
    checked = results.entries.get(scaling.SATURATION)
    if checked:
        lines += ["", "Predicted and seen, the primary alone held to a part of one core (plain callable):", ""]
        lines += ["| primary | predicted connections/s | seen |", "| --- | --- | --- |"]
        for name in checked.servers:
            if name.startswith("capped"):
                expected, seen = (checked.figure(name, f"{kind} per second") for kind in ("predicted", "seen"))
                if expected and seen:
                    lines.append(f"| {name} | {expected.median:,.0f} | {seen.median:,.0f} |")
    return [*lines, ""]


def costs(results: Results) -> Costs | None:
    """The parameters of the model from what was measured; None if a part is missing."""
    read = _figure(results, "Flask, session read", OURS, "cpu_us")
    write = _figure(results, "Flask, session write", OURS, "cpu_us")
    few, many = (f"{n} worker{'s' if n > 1 else ''} elsewhere" for n in model.BYSTANDERS)
    redis_few, redis_many = (_figure(results, model.NAME, name, "Redis µs per write") for name in (few, many))
    heard = _figure(results, model.NAME, many, "µs per write in each worker elsewhere")
    if not (read and write and redis_few and redis_many and heard):
        return None
    told = max(0.0, redis_many - redis_few) / (model.BYSTANDERS[1] - model.BYSTANDERS[0])
    # The writer itself is told too: the first figure is with two that listen.
    return Costs(read, write, heard, redis_few - 2 * told, told)


def _redis(results: Results) -> list[str]:
    known = costs(results)
    if known is None:
        return []
    lines = [
        f"In µs of CPU: a session read {known.read:.0f}, a write {known.write:.0f}; a write served elsewhere "
        f"{known.heard:.1f} in each worker of the site; Redis {known.redis_write:.0f} per write and "
        f"{known.redis_told:.2f} for each worker that is told. Requests per second at which the first thing is busy "
        "all the time:",
        "",
        "| workers, all nodes | " + " | ".join(f"{part:.0%} write" for part in WRITES) + " |",
        "| --- |" + " --- |" * len(WRITES),
    ]
    for workers in SITES:
        cells = []
        for part in WRITES:
            by_redis, by_workers = redis_limit(known, workers, part), workers_limit(known, workers, part)
            first = "workers" if by_workers <= by_redis else "Redis"
            cells.append(f"{min(by_redis, by_workers):,.0f} ({first})")
        lines.append(f"| {workers} | " + " | ".join(cells) + " |")
    return [*lines, ""]
