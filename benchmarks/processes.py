"""What a tree of processes has cost: CPU from /proc/<pid>/stat, memory from /proc/<pid>/smaps_rollup.

The CPU of a server is the sum, over every living process of it, of its own time and of the time of those of its
children that ended and were waited for (cutime, cstime; proc(5)). A worker that ends between two readings moves from
the first term to the second, so a difference of two readings loses nothing, whatever was reloaded in between.

Who belongs to a server: all descendants of the process that was started, and everything in its session, so a daemon
that changes its parent is still counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stat:
    """The part of /proc/<pid>/stat that is accounted. Times are clock ticks."""

    pid: int
    parent: int
    session: int
    own: int
    children: int

    @property
    def seconds(self) -> float:
        """CPU seconds of the process and of its children that are gone."""
        return (self.own + self.children) / TICKS


def parse_stat(text: str) -> Stat:
    """Read one line of /proc/<pid>/stat; the command name may hold blanks and brackets."""
    pid, _, rest = text.partition(" (")
    fields = rest.rpartition(")")[2].split()
    utime, stime, cutime, cstime = (int(field) for field in fields[11:15])
    return Stat(int(pid), int(fields[1]), int(fields[3]), utime + stime, cutime + cstime)


def family(stats: Iterable[Stat], root: int) -> list[Stat]:
    """Those of `stats` that belong to the server whose first process is `root`."""
    everyone = list(stats)
    members = {root}
    grown = True
    while grown:
        more = {s.pid for s in everyone if s.pid not in members and (s.parent in members or s.session == root)}
        grown = bool(more)
        members |= more
    return [s for s in everyone if s.pid in members]


def all_stats() -> list[Stat]:
    """Every process of this machine that can be read."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.append(parse_stat(Path("/proc", name, "stat").read_text()))
            except (OSError, ValueError, IndexError):  # it ended while we read
                continue
    return found


def cpu_by_process(root: int) -> dict[int, float]:
    """CPU seconds of each process of a server, by its pid."""
    return {s.pid: s.seconds for s in family(all_stats(), root)}


def cpu(root: int) -> float:
    """CPU seconds of a server so far."""
    return sum(cpu_by_process(root).values())


def wait_quiet(root: int, quiet: float = 0.4, at_most: float = 2.0) -> bool:
    """Wait until a server has used no CPU for `quiet` seconds; False if `at_most` seconds were not enough."""
    end = time.monotonic() + at_most
    before, since = cpu(root), time.monotonic()
    while (now := time.monotonic()) - since < quiet:
        if now > end:
            return False
        time.sleep(0.05)
        if (after := cpu(root)) != before:
            before, since = after, time.monotonic()
    return True


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: `uss` is what only this process has, `pss` its share of everything it maps."""

    uss: int
    pss: int


def parse_smaps(text: str) -> Memory:
    """Read /proc/<pid>/smaps_rollup."""
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.endswith(" kB")}
    return Memory(1024 * (sizes["Private_Clean"] + sizes["Private_Dirty"]), 1024 * sizes["Pss"])


def memory(root: int) -> Mapping[int, Memory]:
    """The memory of each process of a server, by its pid."""
    found = {}
    for stat in family(all_stats(), root):
        try:
            found[stat.pid] = parse_smaps(Path("/proc", str(stat.pid), "smaps_rollup").read_text())
        except OSError:  # it ended while we read
            continue
    return found


def total_memory(root: int) -> int:
    """Bytes of a whole server: shared pages once."""
    return sum(each.pss for each in memory(root).values())
