"""Plots as SVG, written by hand: bars need no library. Light and dark readers both see them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from benchmarks.bars import BARS
from benchmarks.peers import OURS
from benchmarks.ratios import Summary
from benchmarks.results import Entry, Results

WIDTH: Final = 720
COLOURS: Final = ("#2f81f7", "#d29922", "#3fb950", "#db61a2", "#9aa7b4")
ROW: Final = 24
TOP: Final = 48
STYLE: Final = (
    "<style>text{font:12px system-ui,sans-serif;fill:#57606a}.t{font-size:14px;font-weight:600}.s{font-size:11px}"
    ".b{fill:#b6c0ca}.o{fill:#6cabff}.m{fill:#f0a35e}.e{stroke:#24292f;stroke-width:1}.l{stroke:#cf222e;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#adbac7}.b{fill:#545d68}.o{fill:#316dca}.m{fill:#ae5622}"
    ".e{stroke:#e6edf3}.l{stroke:#ff7b72}}</style>"
)


def write_all(results: Results, folder: Path) -> None:
    """The plots of all rows, each under the row's name; those of rows that are no more are removed."""
    drawn = {"where-it-stands": standing(results), "scaling": scaling(results)}
    for entry in results.entries.values():
        if entry.kind == "work" and entry.servers:
            drawn[slug(entry.name)] = cpu_per_request(entry)
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, svg in drawn.items():
        (folder / f"{name}.svg").write_text(svg)


def slug(name: str) -> str:
    """A file's name from a row's: letters, digits and hyphens."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)


def cpu_per_request(entry: Entry) -> str:
    """One bar per server, shortest first, with the range over the rounds as a line."""
    rows = []
    for server in entry.servers:
        measured = entry.figure(server, "cpu_us")
        if measured:
            rows.append((server, "o" if server.startswith(OURS) else "b", measured, None))
    rows.sort(key=lambda row: row[2].median)
    under = "all processes of a server with two workers, Redis not counted"
    return bars(f"{entry.name}: CPU per request, µs (less is better)", f"{under}; {_about([entry])}", rows, 150, 0)


def standing(results: Results) -> str:
    """Each bar that is a ratio, beside what was measured."""
    rows, entries = [], []
    for bar in BARS:
        entry = results.entries.get(bar.work)
        measured = entry.against(bar) if entry and bar.peer else None
        if entry and measured:
            entries.append(entry)
            kind = "o" if measured.median <= bar.limit else "m"
            rows.append((f"{bar.work} ÷ {bar.peer}", kind, measured, bar.limit))
    title = "CPU per request, ours ÷ theirs (less is better)"
    return bars(title, f"red: the bar we set; orange: missed; {_about(entries)}", rows, 370, 2)


def bars(
    title: str, under: str, rows: Sequence[tuple[str, str, Summary, float | None]], left: int, digits: int
) -> str:
    """Horizontal bars from zero: name, class, the median with its range as a line, and a limit as a mark."""
    furthest = max((max(measured.high, limit or 0.0) for _, _, measured, limit in rows), default=1.0)
    scale = (WIDTH - left - 60) / furthest
    parts = _head(title, under, TOP + ROW * len(rows))
    for index, (name, kind, measured, limit) in enumerate(rows):
        top = TOP + ROW * index
        low, middle, high = (left + scale * value for value in (measured.low, measured.median, measured.high))
        mark = left + scale * limit if limit else 0.0
        parts += [
            f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{left}" y="{top}" width="{middle - left:.1f}" height="{ROW - 7}" rx="2"/>',
            f'<path class="e" d="M{low:.1f} {top + 8.5}H{high:.1f}M{low:.1f} {top + 5}v7M{high:.1f} {top + 5}v7"/>',
            f'<text x="{max(high, mark) + 8:.1f}" y="{top + 13}">{measured.median:.{digits}f}</text>',
        ]
        parts += [f'<path class="l" d="M{mark:.1f} {top - 2}v{ROW - 3}"/>'] if limit else []
    return "\n".join([*parts, "</svg>"]) + "\n"


def scaling(results: Results) -> str:
    """CPU per request with more workers, each row over its cost with one worker."""
    series, entries = [], []
    for entry in results.entries.values():
        if entry.kind == "scaling" and entry.servers:
            entries.append(entry)
            first = next(iter(entry.servers))
            ratios = [(float(name.split()[0]), entry.ratio(name, first)) for name in entry.servers]
            points = [(workers, found.median) for workers, found in ratios if found]
            assert points, "each turn costs something"
            series.append((entry.name.removeprefix("scaling: "), points))
    cores = results.environment.get("cpus")
    title = "CPU per request with more workers, over that with one (flat is good)"
    return lines(
        title, f"{cores} cores for all of it, and for the client; {_about(entries, 'median')}", "workers", series
    )


def lines(title: str, under: str, across: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines over numbered steps, from zero: each series is a name and its points."""
    height, left, right = 320, 40, WIDTH - 290
    bottom = height - 44
    points = [point for _, data in series for point in data]
    highest = math.ceil(max((y for _, y in points), default=1.0))
    steps = sorted({x for x, _ in points})
    place = {x: left + (right - left) * index / max(1, len(steps) - 1) for index, x in enumerate(steps)}

    def level(value: float) -> float:
        return bottom - (bottom - TOP) * value / highest

    parts = _head(title, under, height)
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>')
    parts += [f'<text x="{place[x]:.0f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>' for x in steps]
    for value in range(0, highest + 1, max(1, highest // 4)):
        parts.append(f'<path class="e" opacity=".25" d="M{left} {level(value):.1f}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{level(value) + 4:.1f}" text-anchor="end">{value}</text>')
    labels = _apart([level(data[-1][1]) for _, data in series])
    for (name, data), label, colour in zip(series, labels, itertools.cycle(COLOURS), strict=False):
        drawn = " ".join(f"{place[x]:.1f},{level(y):.1f}" for x, y in data)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{drawn}"/>')
        parts.append(f'<circle cx="{right + 12}" cy="{label:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 22}" y="{label + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(title: str, under: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' role="img" aria-label="{escape(title)}">',
        STYLE,
        f'<text class="t" x="0" y="16">{escape(title)}</text>',
        f'<text class="s" x="0" y="34">{escape(under)}</text>',
    ]


def _about(entries: Iterable[Entry], figure: str = "median and range") -> str:
    """When, how often, of which commit."""
    measured = list(entries)
    turns = {len(turns) for entry in measured for turns in entry.servers.values()} or {0}
    rounds = f"{min(turns)} to {max(turns)}" if len(turns) > 1 else f"{max(turns)}"
    when = max((entry.taken[:10] for entry in measured), default="never")
    commits = " and ".join(dict.fromkeys(entry.code.commit[:7] for entry in measured))
    return f"{figure} of {rounds} rounds, {when}, {commits}"


def _apart(places: Sequence[float], distance: float = 15.0) -> list[float]:
    """The same places, moved down where one would cover another."""
    moved = list(places)
    taken = -math.inf
    for index in sorted(range(len(places)), key=places.__getitem__):
        taken = moved[index] = max(places[index], taken + distance)
    return moved
