"""Results as Markdown: the bars with what was measured beside them, the rows, what each leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks import capacity, markdown, twice
from benchmarks.bars import BARS, verdict
from benchmarks.code_state import CodeState, is_stale
from benchmarks.markdown import short, with_spread
from benchmarks.micro import counting
from benchmarks.peers import OURS, PEERS
from benchmarks.results import Entry, Results

STALE: Final = "⚠ stale"
RATES: Final = ("rate", "p50_ms", "p99_ms", "redis_us", "client_us")
REMARKS: Final = {"failed": "failed", "dropped": "cut off", "closed_idle": "idle connections closed"}
A_VARIANT: Final = "sharedcluster, shared"
"""Ours in another set-up: being behind it is not being behind another server."""


def document(results: Results, now: CodeState, before: Results | None = None) -> str:
    """The whole page; with `before`, also how far two runs differ."""
    parts = ["# Results", "", *preface(results, now), "", "## The bars", "", *bars(results, now), ""]
    parts += ["## CPU per request", "", *works(results, now), "", "## Rate and wait", "", *rates(results), ""]
    parts += ["## Scaling", "", *scaling(results, now), ""]
    parts += ["## Capacity", "", *capacity.section(results), ""]
    parts += ["## Other measurements", "", *specials(results, now)]
    if before is not None and twice.pairs(results, before):
        parts += ["", "## The same table twice", "", *twice.section(results, before)]
    return "\n".join(parts).rstrip() + "\n"


def blocks(results: Results, now: CodeState, before: Results) -> Mapping[str, Sequence[str]]:
    """What other pages show of it, by the names of their places."""
    return {
        "environment": preface(results, now),
        "bars": bars(results, now),
        "behind": behind(results, now),
        "capacity": capacity.section(results),
        "instructions": specials(results, now, counting.NAME),
        "twice": twice.bars(results, before) or ["There has been one run only."],
    }


def preface(results: Results, now: CodeState) -> list[str]:
    """Where, when and what was measured; what is stale; who is left out, and which rows failed."""
    env = results.environment
    packages = ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items())
    taken = [entry.taken for entry in results.entries.values()] or ["never"]
    commits = " and ".join(dict.fromkeys(entry.code.commit for entry in results.entries.values()))
    lines = [
        f"Measured {min(taken)} to {max(taken)} UTC, commit {commits}. "
        f"{env.get('cpus')} CPUs ({env.get('cpu')}), Linux {env.get('kernel')}, Python {env.get('python')}, "
        f"Redis {env.get('redis')}, Node {env.get('node')}, wrk {env.get('wrk')}; {packages}. "
        f"Load average before the run: {env.get('load_average_before')}; highest in it, with its own load: "
        f"{env.get('load_average_highest')}.",
    ]
    stale = [entry.name for entry in results.entries.values() if is_stale(entry.code, now)]
    if stale:
        lines += [
            "",
            f"**{STALE}: {len(stale)} of {len(results.entries)} rows measured older code than is here now.**",
        ]
    for name, reason in results.left_out.items():
        lines += ["", f"Left out: {name} ({reason})."]
    for entry in results.entries.values():
        for name, why in entry.missing.items():
            lines += ["", f"Failed: {name} in *{entry.name}*: {why}"]
    return lines


def bars(results: Results, now: CodeState) -> list[str]:
    """Each bar of DESIGN.md, what was measured, and whether that is enough."""
    rows = []
    for bar in BARS:
        entry = results.entries.get(bar.work)
        found = entry.against(bar) if entry else None
        best = entry.best_ratio(OURS, bar.peer) if entry and bar.peer else None
        quiet = short(best) if best else ""
        rows.append((bar.work + _mark(entry, now), bar.text, with_spread(found), quiet, verdict(bar, found)))
    return markdown.table(("work", "bar", "measured (lowest to highest)", "of the best turns", "verdict"), rows)


def behind(results: Results, now: CodeState) -> list[str]:
    """Each row in which another server spent less CPU."""
    rows = []
    for entry in results.entries.values():
        for peer in entry.servers:
            found = entry.ratio(OURS, peer) if entry.kind == "work" and peer not in (OURS, A_VARIANT) else None
            if found and found.median > 1:
                sure = "" if found.low > 1 else "not in every round"
                rows.append((entry.name + _mark(entry, now), peer, with_spread(found), sure))
    return markdown.table(("work", "less CPU than ours", "ours ÷ theirs", ""), rows) if rows else ["In no row."]


def works(results: Results, now: CodeState) -> list[str]:
    """CPU per request of ours in microseconds, and ours over each peer's."""
    entries = [entry for entry in results.entries.values() if entry.kind == "work"]
    peers = [name for name in PEERS if name != OURS and any(name in entry.servers for entry in entries)]
    rows = []
    for entry in entries:
        ours, redis = (entry.figure(OURS, name) for name in ("cpu_us", "redis_us"))
        cells = [entry.name + _mark(entry, now), f"{ours.median:.1f}" if ours else "failed"]
        cells.append(f"{redis.median:.1f}" if redis and redis.median >= 0.5 else "")
        rows.append((*cells, *(_cell(entry, peer) for peer in peers)))
    return markdown.table(("work", "ours, µs", "Redis, µs", *(f"÷ {peer}" for peer in peers)), rows)


def _cell(entry: Entry, peer: str) -> str:
    return "failed" if peer in entry.missing else with_spread(entry.ratio(OURS, peer))


def rates(results: Results) -> list[str]:
    """Requests per second and waits, which a noisy machine disturbs far more than CPU per request; and the CPU per
    request that is not the server's: Redis's and the client's.
    """
    rows = []
    for entry in results.entries.values():
        for server in entry.servers if entry.kind == "work" else ():
            rate, p50, p99, redis, client = (entry.figure(server, name) for name in RATES)
            sums = [(sum(turn[name] for turn in entry.servers[server]), words) for name, words in REMARKS.items()]
            remarks = [f"{count:.0f} {words}" for count, words in sums if count]
            if rate and p50 and p99 and redis and client:
                cells = (f"{rate.median:,.0f}", f"{p50.median:.2f}", f"{p99.median:.2f}")
                beside = (f"{redis.median:.1f}", f"{client.median:.1f}", ", ".join(remarks))
                rows.append((entry.name, server, *cells, *beside))
    head = ("work", "server", "requests/s", "p50, ms", "p99, ms", "Redis, µs", "client, µs", "")
    return markdown.table(head, rows)


def scaling(results: Results, now: CodeState) -> list[str]:
    """Ours with more and more workers: what a request costs, all processes, the primary's part, and Redis's."""
    rows = []
    for entry in results.entries.values():
        if entry.kind != "scaling" or not entry.servers:
            continue
        first = next(iter(entry.servers))
        for workers in entry.servers:
            cells = [entry.name.removeprefix("scaling: ") + _mark(entry, now), workers]
            figures = (entry.figure(workers, name) for name in ("cpu_us", "root_us", "redis_us", "rate"))
            cells += [f"{each.median:,.1f}" if each else "–" for each in figures]
            rows.append((*cells, with_spread(entry.ratio(workers, first))))
    head = ("work", "workers", "µs per request", "of it primary", "Redis, µs", "requests/s", "÷ one worker")
    return markdown.table(head, rows)


def specials(results: Results, now: CodeState, only: str = "") -> list[str]:
    """One small table for each measurement that has its own figures, or for one of them."""
    lines: list[str] = []
    for entry in results.entries.values():
        if entry.kind != "special" or (only and entry.name != only):
            continue
        names = list(next(iter(entry.servers.values()))[0]) if entry.servers else ["failed"]
        rows = [(server, *(with_spread(entry.figure(server, name)) for name in names)) for server in entry.servers]
        rows += [(server, *(["–"] * (len(names) - 1)), reason) for server, reason in entry.missing.items()]
        lines += [f"### {entry.name[0].upper()}{entry.name[1:]}{_mark(entry, now)}", ""]
        lines += [*markdown.table(("", *names), rows), ""]
    return lines


def _mark(entry: Entry | None, now: CodeState) -> str:
    return f" ({STALE})" if entry is not None and is_stale(entry.code, now) else ""
