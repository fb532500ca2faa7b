"""Results as Markdown: the bars with what was measured beside them, the rows, what each leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from benchmarks import capacity
from benchmarks.bars import BARS, Bar, verdict
from benchmarks.code_state import CodeState, is_stale
from benchmarks.peers import OURS, PEERS
from benchmarks.ratios import Summary
from benchmarks.results import Entry, Results

STALE = "⚠ stale"


def document(results: Results, now: CodeState, before: Results | None = None) -> str:
    """The whole page; with `before`, also how far two runs differ."""
    parts = ["# Results", "", *_preface(results, now), "", "## The bars", "", *bars(results, now), ""]
    parts += ["## CPU per request", "", *works(results, now), "", "## Rate and wait", "", *rates(results), ""]
    parts += ["## Scaling", "", *scaling(results, now), ""]
    parts += ["## Capacity", "", *capacity.section(results), ""]
    parts += ["## Other measurements", "", *specials(results, now)]
    if before is not None and before.entries:
        parts += ["", "## The same table twice", "", *twice(results, before)]
    return "\n".join(parts).rstrip() + "\n"


def _preface(results: Results, now: CodeState) -> list[str]:
    env = results.environment
    packages = ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items())
    stale = [entry.name for entry in results.entries.values() if is_stale(entry.code, now)]
    lines = [
        f"{env.get('cpus')} CPUs ({env.get('cpu')}), Linux {env.get('kernel')}, Python {env.get('python')}, "
        f"Redis {env.get('redis')}, Node {env.get('node')}, wrk {env.get('wrk')}; {packages}. "
        f"Load average before the run: {env.get('load_average_before')}.",
    ]
    if stale:
        lines += [
            "",
            f"**{STALE}: {len(stale)} of {len(results.entries)} rows measured older code than is here now.**",
        ]
    for name, reason in results.left_out.items():
        lines += ["", f"Left out: {name} ({reason})."]
    return lines


def bars(results: Results, now: CodeState) -> list[str]:
    """Each bar of DESIGN.md, what was measured, and whether that is enough."""
    rows = []
    for bar in BARS:
        entry = results.entries.get(bar.work)
        measured = _against(bar, entry)
        best = entry.best_ratio(OURS, bar.peer) if entry and bar.peer else None
        quiet = _short(best) if best else ""
        rows.append((bar.work + _mark(entry, now), bar.text, _with_spread(measured), quiet, verdict(bar, measured)))
    return markdown(("work", "bar", "measured (lowest to highest)", "of the best turns", "verdict"), rows)


def _against(bar: Bar, entry: Entry | None) -> Summary | None:
    if entry is None:
        return None
    if bar.peer:
        return entry.ratio(OURS, bar.peer)
    return entry.figure(OURS, bar.figure)


def works(results: Results, now: CodeState) -> list[str]:
    """CPU per request of ours in microseconds, and ours over each peer's."""
    entries = [entry for entry in results.entries.values() if entry.kind == "work"]
    peers = [name for name in PEERS if name != OURS and any(name in entry.servers for entry in entries)]
    rows = []
    for entry in entries:
        ours = entry.figure(OURS, "cpu_us")
        redis = entry.figure(OURS, "redis_us")
        cells = [entry.name + _mark(entry, now), f"{ours.median:.1f}" if ours else "–"]
        cells.append(f"{redis.median:.1f}" if redis and redis.median >= 0.5 else "")
        rows.append((*cells, *(_cell(entry, peer) for peer in peers)))
    lines = markdown(("work", "ours, µs", "Redis, µs", *(f"÷ {peer}" for peer in peers)), rows)
    for entry in entries:
        lines += [line for name, why in entry.missing.items() for line in ("", f"{entry.name}: {name} failed: {why}")]
    return lines


def _cell(entry: Entry, peer: str) -> str:
    if peer in entry.missing:
        return "failed"
    return _with_spread(entry.ratio(OURS, peer))


def rates(results: Results) -> list[str]:
    """Requests per second and p99, which a noisy machine disturbs far more than CPU per request."""
    entries = [entry for entry in results.entries.values() if entry.kind == "work"]
    rows = []
    for entry in entries:
        for server in entry.servers:
            rate, p50, p99 = (entry.figure(server, name) for name in ("rate", "p50_ms", "p99_ms"))
            failed = sum(turn["failed"] for turn in entry.servers[server])
            closed = sum(turn["closed_idle"] for turn in entry.servers[server])
            remarks = [f"{failed:.0f} failed"] if failed else []
            remarks += [f"{closed:.0f} idle connections closed"] if closed else []
            grown = max(turn.get("idle_kb", 0.0) for turn in entry.servers[server])
            remarks += [f"{grown:.1f} KB per idle connection"] if grown >= 0.1 else []
            if rate and p50 and p99:
                cells = (f"{rate.median:,.0f}", f"{p50.median:.2f}", f"{p99.median:.2f}", ", ".join(remarks))
                rows.append((entry.name, server, *cells))
    return markdown(("work", "server", "requests/s", "p50, ms", "p99, ms", ""), rows)


def scaling(results: Results, now: CodeState) -> list[str]:
    """Ours with more and more workers: what a request costs, all processes, the primary's part, and Redis's."""
    rows = []
    for entry in results.entries.values():
        if entry.kind != "scaling":
            continue
        first = next(iter(entry.servers))
        for workers in entry.servers:
            cells = [entry.name.removeprefix("scaling: ") + _mark(entry, now), workers]
            figures = (entry.figure(workers, name) for name in ("cpu_us", "root_us", "redis_us", "rate"))
            cells += [f"{each.median:,.1f}" if each else "–" for each in figures]
            rows.append((*cells, _with_spread(entry.ratio(workers, first))))
    head = ("work", "workers", "µs per request", "of it primary", "Redis, µs", "requests/s", "÷ one worker")
    return markdown(head, rows)


def specials(results: Results, now: CodeState) -> list[str]:
    """One small table for each measurement that has its own figures."""
    lines: list[str] = []
    for entry in results.entries.values():
        if entry.kind != "special" or not entry.servers:
            continue
        names = list(next(iter(entry.servers.values()))[0])
        rows = []
        for server in entry.servers:
            summaries = [entry.figure(server, name) for name in names]
            rows.append((server, *(_with_spread(each) for each in summaries)))
        rows += [(server, *(["–"] * (len(names) - 1)), reason) for server, reason in entry.missing.items()]
        lines += [f"### {entry.name[0].upper()}{entry.name[1:]}{_mark(entry, now)}", ""]
        lines += [*markdown(("server", *names), rows), ""]
    return lines


def twice(results: Results, before: Results) -> list[str]:
    """Every ratio in two runs, and how far they are apart."""
    rows = []
    for entry in results.entries.values():
        older = before.entries.get(entry.name)
        if entry.kind != "work" or older is None:
            continue
        for peer in entry.servers:
            first, second = older.ratio(OURS, peer), entry.ratio(OURS, peer)
            if peer != OURS and first and second:
                apart = second.median / first.median - 1
                name = entry.name + (" (the code changed between)" if is_stale(older.code, entry.code) else "")
                rows.append((name, peer, f"{first.median:.2f}", f"{second.median:.2f}", f"{apart:+.0%}"))
    return markdown(("work", "÷", "first run", "second run", "apart"), rows)


def insert(page: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """Put tables into a page, in the places that are marked for them; a page without marks stays as it is."""
    for name, lines in blocks.items():
        place = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)", re.DOTALL)
        page = place.sub(lambda found: found[1] + "\n".join(["", *lines]).rstrip() + "\n\n" + found[2], page)  # noqa: B023
    return page


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _with_spread(measured: Summary | None) -> str:
    if measured is None:
        return "–"
    if measured.low == measured.high:
        return f"{_short(measured.median)}"
    return f"{_short(measured.median)} ({_short(measured.low)}–{_short(measured.high)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.{1 if abs(value) >= 10 else 2}f}"


def _mark(entry: Entry | None, now: CodeState) -> str:
    return f" ({STALE})" if entry is not None and is_stale(entry.code, now) else ""
