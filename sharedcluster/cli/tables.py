"""Facts as text: durations, sizes, tables. Colour only on a terminal, a state always as a word, ASCII everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

GOOD: Final = frozenset(("online", "listening", "ok"))
BAD: Final = frozenset(("errored", "dead", "down", "no answer"))


def wants_colour() -> bool:
    """Whether colour may be used on standard output (no-color.org; FORCE_COLOR overrides the terminal's absence)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def coloured(text: str, colour: str) -> str:
    """The text in a colour, if that is wanted."""
    return click.style(text, fg=colour) if wants_colour() else text


def say(text: str) -> None:
    """Print it with its colours, which `echo` would take out where FORCE_COLOR asks for them."""
    click.echo(text, color=wants_colour())


def state_colour(state: str) -> str:
    """Green, red or yellow."""
    return "green" if state in GOOD else "red" if state in BAD else "yellow"


def duration(seconds: float) -> str:
    """`12s`, `3m05s`, `2h14m`, `5d03h`."""
    whole = int(max(0.0, seconds))
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{small}"
    return f"{whole}s"


def megabytes(size: float) -> str:
    """`58 MB`."""
    return f"{size / 1048576:.0f} MB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (), state: int = -1) -> str:
    """Columns aligned: numbers to the right, the columns in `left` to the left; `state` is coloured."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str], *, is_header: bool = False) -> str:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padded = cell.ljust(width) if i in left else cell.rjust(width)
            cells.append(coloured(padded, state_colour(cell)) if i == state and not is_header else padded)
        return "  ".join(cells).rstrip()

    return "\n".join([line(header, is_header=True), *(line(row) for row in rows)])


def facts_block(facts: Mapping[str, Any]) -> str:
    """One fact a line, labels aligned; what is empty is left out."""
    shown = {label: str(value) for label, value in facts.items() if value not in ("", None)}
    width = max((len(label) for label in shown), default=0)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in shown.items())
