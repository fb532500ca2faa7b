"""Two whole runs side by side: how far each ratio moved is how far a figure of this page can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

from benchmarks.bars import BARS, verdict
from benchmarks.code_state import is_stale
from benchmarks.markdown import table
from benchmarks.peers import OURS
from benchmarks.ratios import percentile
from benchmarks.results import Results

Pair = tuple[str, str, float, float]
"""Row, the server it is a ratio over, the ratio in the first run and in the second."""
HEAD: Final = ("work", "÷", "first run", "second run", "apart")


def section(results: Results, before: Results) -> list[str]:
    """Every ratio in two runs."""
    rows = [
        (row, over, f"{one:.2f}", f"{two:.2f}", f"{two / one - 1:+.0%}")
        for row, over, one, two in pairs(results, before)
    ]
    return [*summary(results, before), "", *table(HEAD, rows)] if rows else []


def bars(results: Results, before: Results) -> list[str]:
    """Every bar in two runs, and how far all ratios were apart."""
    rows = []
    for bar in BARS:
        entries = [each.entries.get(bar.work) for each in (before, results)]
        summaries = [entry.against(bar) if entry else None for entry in entries]
        figures = [f"{each.median:.2f}" if each else "–" for each in summaries]
        one, two = summaries
        apart = f"{two.median / one.median - 1:+.0%}" if one and two and one.median else ""
        verdicts = [verdict(bar, each).split(",")[0] for each in summaries]
        rows.append((bar.work, bar.text, *figures, apart, " / ".join(dict.fromkeys(verdicts))))
    head = ("work", "bar", "first run", "second run", "apart", "verdict")
    return [*summary(results, before), "", *table(head, rows)] if pairs(results, before) else []


def summary(results: Results, before: Results) -> list[str]:
    """In a sentence or two: when, of which code, and how far apart."""
    found = pairs(results, before)
    if not found:
        return []
    apart = sorted(abs(two / one - 1) for _, _, one, two in found)
    row, over, one, two = max(found, key=lambda each: abs(each[3] / each[2] - 1))
    when = [f"{min(taken)} to {max(taken)}" for taken in (_taken(before), _taken(results))]
    lines = [
        f"First run {when[0]} UTC, second run {when[1]} UTC. Of {len(found)} ratios the middle one moved by "
        f"{statistics.median(apart):.0%}, nine in ten by no more than {percentile(apart, 0.9):.0%}, and one by "
        f"{abs(two / one - 1):.0%} ({row} ÷ {over})."
    ]
    changed = [
        name for name, entry in results.entries.items()
        if name in before.entries and is_stale(before.entries[name].code, entry.code)
    ]  # fmt: skip
    if changed:
        lines += ["", f"**The code changed between the two runs of {len(changed)} rows**: these are not repeats."]
    return lines


def pairs(results: Results, before: Results) -> list[Pair]:
    """All ratios that both runs have."""
    return list(_pairs(results, before))


def _pairs(results: Results, before: Results) -> Iterator[Pair]:
    for name, entry in results.entries.items():
        older = before.entries.get(name)
        if older is None or entry.kind == "special":
            continue
        base = OURS if entry.kind == "work" else next(iter(entry.servers), "")
        for server in entry.servers:
            ends = (OURS, server) if entry.kind == "work" else (server, base)
            first, second = older.ratio(*ends), entry.ratio(*ends)
            if server != base and first and second:
                yield name, server if entry.kind == "work" else f"{base}: {server}", first.median, second.median


def _taken(results: Results) -> list[str]:
    return [entry.taken for entry in results.entries.values()] or [""]
