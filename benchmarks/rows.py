"""All rows by their names: which are wanted, and how each is measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from benchmarks import model, rounds, scaling, specials
from benchmarks.bars import BARS
from benchmarks.micro import counting
from benchmarks.peers import OURS
from benchmarks.rounds import Row, Scale, first_line
from benchmarks.servers import Redis
from benchmarks.specials import SPECIALS, Measured
from benchmarks.work import WORKS

SCALED: Final = {scaling.name_of(name): name for name in scaling.SCALED}
QUICK_SPECIAL_PEERS: Final = ("sharedcluster", "gunicorn gevent")


def wanted(*, quick: bool = False, work: bool = False, texts: Sequence[str] = ()) -> list[str]:
    """The names of the rows to measure, in the order of the page.

    Args:
        quick: Only those that have a bar.
        work: Only CPU per request.
        texts: Only those with one of these in the name; a text that is a whole name chooses that row alone.
    """
    names = [*WORKS] if work else [*WORKS, *SPECIALS, *SCALED, scaling.SATURATION, model.NAME, counting.NAME]
    if quick:
        names = [name for name in names if any(bar.work == name for bar in BARS)]
    return [name for name in names if not texts or any(_chooses(text, name, names) for text in texts)]


def _chooses(text: str, name: str, names: Sequence[str]) -> bool:
    return text == name if text in names else text in name


def measure(name: str, scale: Scale, redis: Redis, only: Sequence[str], *, quick: bool = False) -> Row | Measured:
    """Measure a row; `only` names the servers to compare, all if it is empty.

    A row that cannot be measured comes back with the reason and without figures: whatever one of thirty does, the
    others are measured.
    """
    try:
        return _measure(name, scale, redis, only, quick=quick)
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}\n")
        reason = {OURS: f"{type(error).__name__}: {first_line(error)}"}
        if name in WORKS or name in SCALED:
            return Row(name, "work" if name in WORKS else "scaling", missing=reason)
        return Measured(name, missing=reason)


def _measure(name: str, scale: Scale, redis: Redis, only: Sequence[str], *, quick: bool) -> Row | Measured:
    if name in WORKS:
        return rounds.measure(WORKS[name], scale, redis, only)
    if name in SCALED:
        return scaling.measure(WORKS[SCALED[name]], scale, redis)
    if name == scaling.SATURATION:
        return scaling.saturation(scale, redis)
    if name == model.NAME:
        return model.measure(scale, redis)
    if name == counting.NAME:
        return counting.measure()
    if quick:
        return specials.run(SPECIALS[name], scale, redis, QUICK_SPECIAL_PEERS, at_most=1)
    return specials.run(SPECIALS[name], scale, redis, only)
