"""Results as they are kept: one JSON file, one entry per row, each with the code it measured and when.

Rows can be measured again one by one; an entry replaces the older one of its name.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar
from benchmarks.code_state import CodeState
from benchmarks.peers import OURS
from benchmarks.ratios import Summary, ratio, summary
from benchmarks.rounds import Row, Scale
from benchmarks.specials import Measured

SCHEMA = 1
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row, measured. `servers` holds for each server its turns; each turn is named figures.

    `kind` is "work", "scaling" (its servers are ours, with more and more workers) or "special". A turn of the first
    two has `cpu_us`, `root_us`, `redis_us`, `client_us`, `rate`, `p50_ms` ...; a special names its own figures.
    """

    name: str
    kind: str
    taken: str
    code: CodeState
    scale: Scale
    servers: Mapping[str, Sequence[Figures]]
    missing: Mapping[str, str]

    def figure(self, server: str, name: str) -> Summary | None:
        """A figure of one server over its turns."""
        turns = self.servers.get(server)
        return summary([turn[name] for turn in turns]) if turns else None

    def against(self, bar: Bar) -> Summary | None:
        """What a bar is a limit on, as it was measured."""
        return self.ratio(OURS, bar.peer) if bar.peer else self.figure(OURS, bar.figure)

    def ratio(self, ours: str, theirs: str, name: str = "cpu_us") -> Summary | None:
        """A figure of one server over that of another, round by round."""
        mine, other = self._in_the_same_rounds(ours, theirs, name)
        return ratio(mine, other) if mine and other else None

    def best_ratio(self, ours: str, theirs: str, name: str = "cpu_us") -> float | None:
        """Our best turn over their best turn: a busy machine only ever adds CPU, so this is the quietest view."""
        mine, other = self._in_the_same_rounds(ours, theirs, name)
        return min(mine) / min(other) if mine and other else None

    def _in_the_same_rounds(self, ours: str, theirs: str, name: str) -> tuple[list[float], list[float]]:
        """The turns of two servers that both had: one without a bar took part in the first rounds only."""
        mine, other = (self.servers.get(server, ()) for server in (ours, theirs))
        count = min(len(mine), len(other))
        return [turn[name] for turn in mine[:count]], [turn[name] for turn in other[:count]]


@dataclass(slots=True)
class Results:
    """A file of results."""

    environment: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Results:
        """Read a file; an absent one is empty.

        Raises:
            ValueError: It was written by another version of this program.
        """
        if not path.exists():
            return Results()
        read = json.loads(path.read_text())
        if read.get("schema") != SCHEMA:
            raise ValueError(f"{path.name} has schema {read.get('schema')}, not {SCHEMA}; run make bench again")
        entries = {
            each["name"]: Entry(**{**each, "code": CodeState(**each["code"]), "scale": Scale(**each["scale"])})
            for each in read["entries"]
        }
        return Results(read["environment"], read["left_out"], entries)

    def save(self, path: Path) -> None:
        """Write the file."""
        document = {
            "schema": SCHEMA,
            "environment": self.environment,
            "left_out": self.left_out,
            "entries": [dataclasses.asdict(entry) for entry in self.entries.values()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    def add(self, measured: Row | Measured, scale: Scale, code: CodeState) -> None:
        """Keep what was just measured, in the place of an older entry of that name."""
        taken = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        if isinstance(measured, Row):
            servers: dict[str, Sequence[Figures]] = {
                name: [_turn(each) for each in slices] for name, slices in measured.slices.items()
            }
            entry = Entry(measured.work, measured.kind, taken, code, scale, servers, measured.missing)
        else:
            repeats: dict[str, Sequence[Figures]] = {
                name: [_rounded(each) for each in figures] for name, figures in measured.repeats.items()
            }
            entry = Entry(measured.name, "special", taken, code, scale, repeats, measured.missing)
        self.entries[entry.name] = entry


def _turn(each: Any) -> dict[str, float]:
    seen = each.outcome
    return _rounded(
        {
            "cpu_us": each.cpu_us, "root_us": each.cpu_us * each.root_share, "redis_us": each.redis_us,
            "client_us": each.client_us, "rate": seen.rate, "p50_ms": seen.p50 * 1e3, "p99_ms": seen.p99 * 1e3,
            "max_ms": seen.highest * 1e3, "failed": seen.failed, "dropped": seen.dropped,
            "closed_idle": seen.closed_idle,
        }
    )  # fmt: skip


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in figures.items()}
