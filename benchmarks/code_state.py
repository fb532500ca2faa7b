"""Which code a result measured, and whether that is still the code that is here."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import ROOT

MEASURED: Final = "sharedcluster"
SUFFIXES: Final = (".py", ".lua")


@dataclass(frozen=True, slots=True)
class CodeState:
    """The measured code: the commit it stands on, and a fingerprint of the files as they are on disk.

    The fingerprint, not the commit, decides whether a result is stale: it changes with an edit that is not committed,
    and does not change with a commit that touches only docs.
    """

    commit: str
    fingerprint: str


def current() -> CodeState:
    """The code as it is now."""
    return CodeState(_commit(), fingerprint(ROOT / MEASURED))


def fingerprint(folder: Path) -> str:
    """A hash of the names and contents of all code below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def is_stale(measured: CodeState, now: CodeState) -> bool:
    """Whether the code has changed since it was measured."""
    return measured.fingerprint != now.fingerprint


def changed_since(commit: str) -> list[str]:
    """The files of the measured code that differ from that commit; empty if git does not know it."""
    done = _git("diff", "--name-only", commit, "--", MEASURED)
    return done.split() if done else []


def _commit() -> str:
    return _git("rev-parse", "--short=12", "HEAD") or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
