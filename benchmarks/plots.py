"""Plots as SVG, written by hand: bars need no library. Light and dark readers both see them (currentColor)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape
from typing import Final

from benchmarks.peers import OURS
from benchmarks.results import Entry

WIDTH: Final = 720
COLOURS: Final = ("#2f81f7", "#d29922", "#3fb950", "#db61a2", "#9aa7b4")
LABEL: Final = 150
ROW: Final = 24
STYLE: Final = (
    "<style>text{font:12px system-ui,sans-serif;fill:#57606a}.t{font-size:14px;font-weight:600}"
    ".b{fill:#9aa7b4}.o{fill:#2f81f7}.e{stroke:#57606a;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#adbac7}.e{stroke:#adbac7}}</style>"
)


def cpu_per_request(entry: Entry) -> str:
    """One bar per server, shortest first, with the range over the rounds as a line."""
    rows = []
    for server in entry.servers:
        measured = entry.figure(server, "cpu_us")
        if measured:
            rows.append((server, measured.median, measured.low, measured.high))
    rows.sort(key=lambda row: row[1])
    title = f"{entry.name}: CPU per request, µs (less is better)"
    return bars(title, rows)


def scaling(entries: Sequence[Entry]) -> str:
    """CPU per request with more workers, each row over its cost with one worker."""
    series = []
    for entry in entries:
        if entry.kind == "scaling":
            first = next(iter(entry.servers))
            ratios = [(float(name.split()[0]), entry.ratio(name, first)) for name in entry.servers]
            points = [(workers, found.median) for workers, found in ratios if found]
            series.append((entry.name.removeprefix("scaling: "), points))
    return lines("CPU per request, over that with one worker (flat is good)", "workers, on two cores", series)


def bars(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Horizontal bars: name, value, and the ends of its range."""
    scale = (WIDTH - LABEL - 90) / max((row[3] for row in rows), default=1.0)
    height = 40 + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' role="img" aria-label="{escape(title)}">',
        STYLE,
        f'<text class="t" x="0" y="16">{escape(title)}</text>',
    ]
    for index, (name, value, low, high) in enumerate(rows):
        top = 30 + ROW * index
        kind = "o" if name.startswith(OURS) else "b"
        end = LABEL + scale * high
        parts += [
            f'<text x="{LABEL - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LABEL}" y="{top}" width="{scale * value:.1f}" height="{ROW - 7}" rx="2"/>',
            f'<path class="e" d="M{LABEL + scale * low:.1f} {top + 8.5}H{end:.1f}"/>',
            f'<text x="{end + 6:.1f}" y="{top + 14}">{value:.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def lines(title: str, across: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines over numbered steps: each series is a name and its points."""
    width, height, left, top = WIDTH, 300, 60, 40
    points = [point for _, data in series for point in data]
    highest = max((y for _, y in points), default=1.0) * 1.08
    steps = sorted({x for x, _ in points})
    place = {x: left + (width - left - 270) * index / max(1, len(steps) - 1) for index, x in enumerate(steps)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label="{escape(title)}">',
        STYLE,
        f'<text class="t" x="0" y="16">{escape(title)}</text>',
        f'<text x="{left}" y="{height - 6}">{escape(across)}</text>',
    ]
    bottom = height - 42
    parts += [f'<text x="{place[x]:.0f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>' for x in steps]
    for value in (0, highest / 2, highest):
        y = bottom - (bottom - top) * value / highest
        parts.append(f'<path class="e" opacity=".25" d="M{left} {y:.1f}H{width - 270}"/>')
        label = f"{value:.0f}" if highest > 10 else f"{value:.1f}"
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for (name, data), colour in zip(series, itertools.cycle(COLOURS), strict=False):
        drawn = " ".join(f"{place[x]:.1f},{bottom - (bottom - top) * y / highest:.1f}" for x, y in data)
        end_x, end_y = drawn.split()[-1].split(",")
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{drawn}"/>')
        parts.append(f'<text x="{float(end_x) + 8:.0f}" y="{float(end_y) + 4:.0f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
