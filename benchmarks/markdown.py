"""Markdown: tables, figures short enough for them, and pages with a place for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.ratios import Summary


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def insert(page: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """Put tables into a page, in the places that are marked for them; a page without marks stays as it is."""
    for name, lines in blocks.items():
        place = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end of results -->)", re.DOTALL)
        page = place.sub(lambda found: found[1] + "\n".join(["", *lines]).rstrip() + "\n\n" + found[2], page)  # noqa: B023
    return page


def with_spread(measured: Summary | None) -> str:
    """The median, and the lowest and highest where they differ."""
    if measured is None:
        return "–"
    if measured.low == measured.high:
        return f"{short(measured.median)}"
    return f"{short(measured.median)} ({short(measured.low)}–{short(measured.high)})"


def short(value: float) -> str:
    """Three digits are enough."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.{1 if abs(value) >= 10 else 2}f}"
