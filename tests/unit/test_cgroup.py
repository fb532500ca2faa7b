"""Control groups, read from a made-up root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sharedcluster import cgroup

V1 = "sys/fs/cgroup/cpu/d/cpu.cfs_"
CPUS = len(os.sched_getaffinity(0))


def root(tmp_path: Path, membership: str, files: dict[str, str]) -> str:
    """A root folder with these files below it."""
    for name, text in {"proc/self/cgroup": membership, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, CPUS),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "100000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 1),
        ("0::/../../x\n", {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, CPUS),
        ("4:cpu,cpuacct:/d\n", {V1 + "quota_us": "90000", V1 + "period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/d\n", {V1 + "quota_us": "-1", V1 + "period_us": "100000"}, CPUS),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, CPUS),
    ],
)  # fmt: skip
def test_cpus(tmp_path: Path, membership: str, files: dict[str, str], cpus: int) -> None:
    """The tightest quota on the way up, rounded up, and never more than the affinity allows."""
    assert cgroup.available_cpus(root(tmp_path, membership, files))[0] == cpus


def test_the_quota_is_named(tmp_path: Path) -> None:
    """The start-up lines say why there are so few workers."""
    where = root(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert cgroup.available_cpus(where)[1] == "cgroup quota 0.5 CPUs"


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    """Where nothing is mounted, affinity decides and no kill is counted."""
    assert cgroup.available_cpus(str(tmp_path))[0] == CPUS
    assert cgroup.oom_kills(str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("membership", "file", "text", "kills"),
    [
        ("0::/s\n", "sys/fs/cgroup/s/memory.events", "low 0\noom 3\noom_kill 2\n", 2),
        ("5:memory:/s\n", "sys/fs/cgroup/memory/s/memory.oom_control", "oom_kill_disable 0\noom_kill 4\n", 4),
        ("0::/s\n", "sys/fs/cgroup/s/memory.events", "low 0\n", 0),
    ],
)
def test_kills_are_counted(tmp_path: Path, membership: str, file: str, text: str, kills: int) -> None:
    """v1 and v2 count them in different files."""
    assert cgroup.oom_kills(root(tmp_path, membership, {file: text})) == kills
