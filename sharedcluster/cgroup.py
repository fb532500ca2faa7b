"""What the control group of this process allows and has done: CPU quota and out-of-memory kills, v1 and v2."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def available_cpus(root: str = "/") -> tuple[int, str]:
    """How many CPUs this process may use, and how that is known.

    The affinity mask counts, and the quota of the cgroup (v2 `cpu.max`, v1 `cpu.cfs_quota_us`), rounded up; a
    container with 3.5 CPUs on a machine of 64 gets 4 workers.
    """
    affinity = len(os.sched_getaffinity(0))
    quota = min(_quotas(Path(root)), default=math.inf)
    if quota < affinity and math.ceil(quota) < affinity:
        return max(1, math.ceil(quota)), f"cgroup quota {quota:g} CPUs"
    return affinity, f"{affinity} CPUs"


def oom_kills(root: str = "/") -> int:
    """How many processes of this cgroup the kernel has killed for want of memory; 0 where that is not counted."""
    counts = [*_read_all(Path(root), "", _oom_kills_v2), *_read_all(Path(root), "memory", _oom_kills_v1)]
    return max(counts, default=0)


def _quotas(root: Path) -> list[float]:
    """The quotas on the way from this process's cgroup up to the root: the tightest one holds."""
    return [*_read_all(root, "", _quota_v2), *_read_all(root, "cpu", _quota_v1)]


def _read_all(root: Path, controller: str, read: Callable[[Path], T | None]) -> list[T]:
    """What `read` finds in this process's cgroup folder of a controller ("" for v2) and in those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
            # Inside a container the path may name folders that are not mounted there; ".." is one above the mount.
            parts = [part for part in path.split("/") if part and part != ".."]
            folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
            return [found for folder in folders if (found := read(folder)) is not None]
    return []


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _oom_kills_v2(folder: Path) -> int | None:
    return _counter(folder / "memory.events")


def _oom_kills_v1(folder: Path) -> int | None:
    return _counter(folder / "memory.oom_control")


def _counter(file: Path) -> int | None:
    try:
        facts = dict(line.split() for line in file.read_text().splitlines())
        return int(facts["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None
