"""Count the instructions of the hot paths with valgrind, and compare with the counts of the last release.

Each path runs twice in a process of its own, FEW and MANY times; the difference over the number of further steps is
what one step takes: start-up, imports and warming up cancel. Counts hold for one Python and one set of compiled
packages, so both are kept beside them; where they differ, counts are shown and not judged.
"""

from __future__ import annotations

import compileall
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sharedcluster
from benchmarks import ROOT
from benchmarks.environment import python_packages
from benchmarks.micro.paths import PATHS
from benchmarks.specials import Measured

FEW: Final = 100
MANY: Final = 1100
TOLERANCE: Final = 0.05
"""A path may take that much more than it did at the last release before it counts as a regression."""
KEPT: Final = Path(__file__).with_name("counts.json")
COMPILED: Final = ("gevent", "httptools", "msgspec")
NAME: Final = "instructions of the hot paths"
NO_VALGRIND: Final = "valgrind is not on PATH (Debian: apt-get install valgrind)"


@dataclass(frozen=True, slots=True)
class Kept:
    """The counts of the last release, and what they were made with."""

    release: str
    platform: Mapping[str, str]
    counts: Mapping[str, int]

    @staticmethod
    def load(path: Path) -> Kept:
        """Read them; there are none before the first release."""
        return Kept(**json.loads(path.read_text())) if path.exists() else Kept("none", {}, {})


@dataclass(frozen=True, slots=True)
class Change:
    """A path's count, now and at the last release (0: it was not counted)."""

    path: str
    now: int
    kept: int

    @property
    def is_regression(self) -> bool:
        """Whether it takes clearly more than it did."""
        return self.kept > 0 and self.now > self.kept * (1 + TOLERANCE)

    @property
    def percent(self) -> float:
        """How much more it takes; 0 for a path that was not counted."""
        return 100 * (self.now / self.kept - 1) if self.kept else 0.0

    def __str__(self) -> str:
        if not self.kept:
            return f"{self.path:<40} {self.now:>10,}   new"
        word = "   REGRESSION" if self.is_regression else ""
        return f"{self.path:<40} {self.now:>10,}   {self.percent:+.1f}%{word}"


def compare(now: Mapping[str, int], kept: Mapping[str, int]) -> list[Change]:
    """Each path that was counted now, beside what was kept."""
    return [Change(path, count, kept.get(path, 0)) for path, count in now.items()]


def parse_count(text: str) -> int:
    """The number of instructions from what cachegrind writes.

    Raises:
        ValueError: It wrote none.
    """
    found = re.search(r"I\s+refs:\s+([\d,]+)", text)
    if not found:
        raise ValueError(f"valgrind counted nothing: {text[-300:]}")
    return int(found.group(1).replace(",", ""))


def run(*, keep: bool) -> int:
    """Count all paths, print them beside the kept counts; the exit code: 1 if one takes clearly more."""
    if shutil.which("valgrind") is None:
        print(f"instruction counts skipped: {NO_VALGRIND}")
        return 0
    now, here = count(), _platform()
    if keep:
        document = {"release": sharedcluster.__version__, "platform": here, "counts": now}
        KEPT.write_text(json.dumps(document, indent=2) + "\n")
        print(f"kept in {KEPT.relative_to(ROOT)}")
    kept = Kept.load(KEPT)
    changes = compare(now, kept.counts if kept.platform == here else {})
    print(f"{'instructions per step':<40} {'now':>10}   since {kept.release}")
    for change in changes:
        print(change)
    if kept.platform != here:
        print(f"not compared: the kept counts are of {kept.platform}, this is {here}")
    return int(any(change.is_regression for change in changes))


def measure() -> Measured:
    """The same as a row of the results."""
    measured = Measured(NAME)
    if shutil.which("valgrind") is None:
        measured.missing["all paths"] = NO_VALGRIND
        return measured
    kept = Kept.load(KEPT)
    comparable = kept.platform == _platform()
    for change in compare(count(), kept.counts if comparable else {}):
        figures = {"instructions": float(change.now)}
        if comparable:
            figures |= {f"at {kept.release}": float(change.kept), "change, %": change.percent}
        measured.repeats[f"{change.path}{' (REGRESSION)' if change.is_regression else ''}"] = [figures]
    if not comparable:
        measured.missing["the last release"] = "counted with another Python or other compiled packages, not comparable"
    sys.stderr.write("\n")
    return measured


def count() -> dict[str, int]:
    """The instructions of one step of each path."""
    for folder in ("benchmarks", "sharedcluster"):  # or the first run of each path compiles, and counts that
        compileall.compile_dir(ROOT / folder, quiet=2)
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1))) as pool:
        return dict(zip(PATHS, pool.map(_count, PATHS), strict=True))


def _count(path: str) -> int:
    return (_instructions(path, MANY) - _instructions(path, FEW)) // (MANY - FEW)


def _instructions(path: str, times: int) -> int:
    command = [
        "valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
        sys.executable, "-m", "benchmarks.micro.paths", path, str(times),
    ]  # fmt: skip
    # Hashes and addresses must not differ from run to run: both decide how long a dict's chain is.
    environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    if shutil.which("setarch"):
        command = ["setarch", platform.machine(), "--addr-no-randomize", *command]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{path}: {done.stderr[-600:]}")
    return parse_count(done.stderr)


def _platform() -> dict[str, str]:
    packages = python_packages()
    return {"machine": platform.machine(), "python": platform.python_version()} | {
        name: packages.get(name, "") for name in COMPILED
    }
